"""Gradients that are sketched during backward and never kept: `MoFaSGD.attach`."""

from mofasgd.attach.handle import MODES, Handle, detach

__all__ = ["MODES", "Handle", "detach"]
