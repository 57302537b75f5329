"""GLUE's tasks: their columns, classes and metrics, and their rows in tokens."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mofasgd.app.tune.rows import Skipped, records
from mofasgd.options import check_choice


@dataclass(frozen=True)
class Task:
    """One task.

    Attributes:
        columns: of the texts in the Hugging Face dataset.
        classes: 1 for a number to be predicted.
        metrics: names in `metrics.METRICS`.
        split: of the Hugging Face dataset that it is validated on.
    """

    columns: tuple[str, ...]
    classes: int
    metrics: tuple[str, ...]
    split: str = "validation"


TASKS = {
    "sst2": Task(("sentence",), 2, ("accuracy",)),
    "cola": Task(("sentence",), 2, ("matthews",)),
    "rte": Task(("sentence1", "sentence2"), 2, ("accuracy",)),
    "stsb": Task(("sentence1", "sentence2"), 1, ("pearson", "spearman")),
    "mnli": Task(("premise", "hypothesis"), 3, ("accuracy",), "validation_matched"),
    "qnli": Task(("question", "sentence"), 2, ("accuracy",)),
    "mrpc": Task(("sentence1", "sentence2"), 2, ("accuracy", "f1")),
    "qqp": Task(("question1", "question2"), 2, ("accuracy", "f1")),
}


@dataclass(frozen=True)
class Labelled:
    """One row: one or two texts, and a class or a number."""

    texts: tuple[str, ...]
    label: int | float


def names(task: str) -> list[str]:
    """Return the tasks that `task` names: one, several with commas, or all."""
    found = list(TASKS) if task == "all" else [name.strip() for name in task.split(",")]
    for name in found:
        check_choice("task", name, tuple(TASKS))
    if len(set(found)) < len(found):
        raise ValueError(f"task={task} names a task twice")
    return found


def _read(row: Any, columns: tuple[str, ...], classes: int) -> Labelled:
    """Return a row; ValueError, as the end of "a row ...", if it is malformed."""
    if not isinstance(row, dict):
        raise ValueError("that is no JSON object")
    texts = tuple(row.get(column) for column in columns)
    if not all(isinstance(text, str) and text.strip() for text in texts):
        raise ValueError(f"without text in {' and '.join(columns)}")
    label = row.get("label")
    known = isinstance(label, (int, float)) and not isinstance(label, bool)
    if not known or (classes > 1 and label not in range(classes)):
        raise ValueError("whose label is no number" if classes == 1 else f"whose label is not in 0..{classes - 1}")
    return Labelled(texts, float(label) if classes == 1 else int(label))  # type: ignore[arg-type]


def _source(data: str, name: str, part: str) -> tuple[str, bool]:
    """Return where the `part` ("train" or "dev") of a task is, and whether it is a file."""
    folder = Path(data).expanduser()
    if not folder.is_dir():
        return f"{data}:{name}:{TASKS[name].split if part == 'dev' else 'train'}", False
    found = sorted(path for path in (folder / name).glob(f"{part}*") if ".json" in path.name)
    if len(found) != 1:
        listed = ", ".join(path.name for path in found) or "none"
        raise ValueError(f"data={data}: {name}/{part}*.jsonl should be one file, found {listed}")
    return str(found[0]), True


def load(data: str, name: str, skipped: Skipped) -> tuple[list[Labelled], list[Labelled]]:
    """Return training and validation rows of a task; malformed ones are counted.

    Raises:
        ValueError: for data that is missing or cannot be read, and when no row is left.
    """
    task, found = TASKS[name], []
    for part in ("train", "dev"):
        source, local = _source(data, name, part)
        columns = ("s1", "s2")[: len(task.columns)] if local else task.columns
        rows = []
        for place, record in records("data", source, "train"):
            try:
                if isinstance(record, ValueError):
                    raise record
                rows.append(_read(record, columns, task.classes))
            except ValueError as error:
                skipped.add(str(error), place)
        if not rows:
            raise ValueError(f"data={source} has no usable row: {skipped if skipped.counts else 'it is empty'}")
        found.append(rows)
    return found[0], found[1]


def encode(tokenizer: Any, rows: list[Labelled], context: int) -> tuple[list[dict[str, Any]], int]:
    """Return rows in tokens with their labels, and how many were cut to `context` tokens."""
    encoded, cut = [], 0
    for row in rows:
        whole = tokenizer(*row.texts)
        if len(whole["input_ids"]) > context:
            whole, cut = tokenizer(*row.texts, truncation=True, max_length=context), cut + 1
        encoded.append({**whole, "labels": row.label})
    return encoded, cut


def fingerprint(*parts: list[dict[str, Any]]) -> str:
    """Return a checksum of rows in tokens."""
    content = [[[row["input_ids"], row["labels"]] for row in part] for part in parts]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:16]
