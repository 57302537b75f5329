"""The authors' published code: their step, `AuthorsMFSGD`, and their command line, `python -m mofasgd.paper`."""

from mofasgd.authors import AuthorsMFSGD

__all__ = ["AuthorsMFSGD"]
