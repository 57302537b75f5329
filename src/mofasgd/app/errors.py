"""Ends of a run that are nobody's mistake."""


class Stopped(Exception):
    """The run ended before its last step; the message says why and how to go on."""


class Diverged(Stopped):
    """The loss is not finite."""


class Lost(Stopped):
    """Another process of the run is gone."""
