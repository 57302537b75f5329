"""The transformers that is installed, refused at import if it is not one that was tested, and what is used of it."""

from __future__ import annotations

import re

try:
    import transformers
except ModuleNotFoundError as error:
    if error.name != "transformers":
        raise
    raise ImportError("mofasgd.hf needs transformers: pip install 'mofasgd[hf]'") from error

OLDEST, NEWEST = (5, 17), (5, 23)
"""Minor versions whose Trainer was read and tested; the order of its callbacks within a step is what matters."""


def check_version(found: str) -> None:
    """Raise ImportError unless `found`, as in "5.23.0", is a tested version of transformers."""
    parts = re.match(r"(\d+)\.(\d+)", found)
    if parts is None or not OLDEST <= (int(parts[1]), int(parts[2])) <= NEWEST:
        low, high = (".".join(map(str, version)) for version in (OLDEST, NEWEST))
        raise ImportError(
            f"mofasgd.hf works with transformers {low} to {high} but found {found}: "
            f"pip install 'transformers>={low},<{NEWEST[0]}.{NEWEST[1] + 1}'"
        )


check_version(transformers.__version__)

from accelerate.state import AcceleratorState, is_initialized  # noqa: E402
from transformers import Trainer, TrainerCallback  # noqa: E402

__all__ = ["AcceleratorState", "Trainer", "TrainerCallback", "check_version", "is_initialized"]
