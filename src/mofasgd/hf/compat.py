"""The transformers that is installed, refused at import if it is too old, and what is used of it."""

from __future__ import annotations

import re
import warnings

try:
    import transformers
except ModuleNotFoundError as error:
    if error.name != "transformers":
        raise
    raise ImportError("mofasgd.hf needs transformers: pip install 'mofasgd[hf]'") from error

OLDEST, NEWEST = (5, 6), (5, 23)
"""Minor versions whose Trainer was read and tested; the order of its callbacks within a step is what matters."""


def check_version(found: str) -> None:
    """Raise ImportError if `found`, as in "5.23.0", is older than what was tested of transformers; warn if newer."""
    parts = re.match(r"(\d+)\.(\d+)", found)
    version = (int(parts[1]), int(parts[2])) if parts else (0, 0)
    low, high = (".".join(map(str, tested)) for tested in (OLDEST, NEWEST))
    if version < OLDEST:
        raise ImportError(
            f"mofasgd.hf needs transformers {low} or newer but found {found}: pip install 'transformers>={low}'"
        )
    if version > NEWEST:
        warnings.warn(
            f"mofasgd.hf was tested with transformers {low} to {high} but found {found}: if something is odd, "
            f"pip install 'transformers<{NEWEST[0]}.{NEWEST[1] + 1}'",
            stacklevel=2,
        )


check_version(transformers.__version__)

from accelerate.state import AcceleratorState, is_initialized  # noqa: E402
from transformers import Trainer, TrainerCallback, TrainingArguments  # noqa: E402

__all__ = ["AcceleratorState", "Trainer", "TrainerCallback", "TrainingArguments", "check_version", "is_initialized"]
