"""Rows of text from files and from the Hugging Face hub, in one form."""

from __future__ import annotations

import gzip
import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

Message = dict[str, Any]
Record = tuple[str, Any]
"""Where a row is, for errors, and the row; an exception in its place could not be read."""

_SUFFIXES = (".jsonl", ".json", ".parquet")


@dataclass(frozen=True)
class Row:
    """One example to learn from.

    Attributes:
        messages: alternating roles and contents, as chat templates take them; the last is the assistant's.
        plain: (prompt, completion) for a tokenizer without a chat template; None: it needs one.
    """

    messages: list[Message]
    plain: tuple[str, str] | None


@dataclass
class Skipped:
    """Rows that were left out, by reason, each with the first place where it was found."""

    counts: Counter[str] = field(default_factory=Counter)
    first: dict[str, str] = field(default_factory=dict)

    def add(self, reason: str, place: str) -> None:
        """Count a row."""
        self.counts[reason] += 1
        self.first.setdefault(reason, place)

    def __str__(self) -> str:
        parts = [f"{count} {reason} (the first: {self.first[reason]})" for reason, count in self.counts.items()]
        return f"{self.counts.total()} rows left out: {'; '.join(parts)}" if parts else "no rows left out"


def _text(row: dict[str, Any], key: str) -> str:
    value = row[key]
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"with {key!r} empty or no text")
    return value


def _turn(message: Any) -> Message:
    if not isinstance(message, dict) or not isinstance(message.get("role"), str):
        raise ValueError("with a message that has no role")
    if not isinstance(message.get("content"), str):
        raise ValueError("with a message whose content is no text")
    return dict(message)


def _chat(row: dict[str, Any]) -> Row:
    messages = row["messages"]
    if not isinstance(messages, list) or not messages:
        raise ValueError("with 'messages' that is no list of messages")
    messages = [_turn(message) for message in messages]
    if messages[0]["role"] == "assistant":
        raise ValueError("whose first message is the assistant's")
    if messages[-1]["role"] != "assistant" or not messages[-1]["content"].strip():
        raise ValueError("whose last message is not the assistant's, or is empty")
    return Row(messages, None)


def _pair(prompt: str, completion: str, plain: str) -> Row:
    messages = [{"role": "user", "content": prompt}, {"role": "assistant", "content": completion}]
    return Row(messages, (plain, completion))


def _completion(row: dict[str, Any]) -> Row:
    prompt, completion = row["prompt"], row["completion"]
    if isinstance(prompt, list) and isinstance(completion, list):
        return _chat({"messages": [*prompt, *completion]})
    return _pair(_text(row, "prompt"), _text(row, "completion"), prompt)


def _alpaca(row: dict[str, Any]) -> Row:
    instruction, output, more = _text(row, "instruction"), _text(row, "output"), row.get("input") or ""
    if not isinstance(more, str):
        raise ValueError("with an 'input' that is no text")
    body = f"### Instruction:\n{instruction}\n\n" + (f"### Input:\n{more}\n\n" if more else "")
    return _pair(f"{instruction}\n\n{more}" if more else instruction, output, f"{body}### Response:\n")


def _question(row: dict[str, Any]) -> Row:
    question = _text(row, "question")
    return _pair(question, _text(row, "answer"), f"Question: {question}\nAnswer: ")


FORMS: dict[tuple[str, ...], Callable[[dict[str, Any]], Row]] = {
    ("messages",): _chat,
    ("prompt", "completion"): _completion,
    ("instruction", "output"): _alpaca,
    ("question", "answer"): _question,
}
"""Columns that a row has -> how it is read; the first form that fits counts."""


def read_row(row: Any) -> Row:
    """Return `row` in one form; ValueError, as the end of "a row ...", if it has none."""
    if not isinstance(row, dict):
        raise ValueError("that is no JSON object")
    for columns, form in FORMS.items():
        if all(row.get(column) is not None for column in columns):
            return form(row)
    known = ", ".join("/".join(columns) for columns in FORMS)
    raise ValueError(f"with columns {', '.join(map(str, row)) or 'none'} where one of {known} is needed")


def _lines(path: Path) -> Iterator[Record]:
    opener: Any = gzip.open if path.suffix == ".gz" else open
    with opener(path, "rt", encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                try:
                    yield f"{path.name}:{number}", json.loads(line)
                except ValueError:
                    yield f"{path.name}:{number}", ValueError("that is no JSON")


def _array(path: Path) -> Iterator[Record]:
    raw = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    content = json.loads(raw)
    if not isinstance(content, list):
        raise ValueError("it holds no list of rows")
    for number, row in enumerate(content, 1):
        yield f"{path.name}, row {number}", row


def _parquet(path: Path) -> Iterator[Record]:
    from pyarrow.parquet import ParquetFile

    number = 0
    for batch in ParquetFile(path).iter_batches():
        for row in batch.to_pylist():
            number += 1
            yield f"{path.name}, row {number}", row


def _hub(name: str, split: str) -> Iterator[Record]:
    from datasets import load_dataset

    dataset, _, rest = name.partition(":")
    config, _, given = rest.partition(":")
    for number, row in enumerate(load_dataset(dataset, config or None, split=given or split), 1):
        yield f"{name}, row {number}", row


def records(key: str, source: str, split: str) -> Iterable[Record]:
    """Return the raw rows of a file or dataset with where each is.

    Args:
        key: of the configuration that names the source, for errors.
        source: a file, or name[:config[:split]] of the hub.
        split: of a dataset whose name does not give one.

    Raises:
        ValueError: if there is no such source or it cannot be read.
    """
    path = Path(source).expanduser()
    kind = Path(path.stem).suffix if path.suffix == ".gz" else path.suffix
    if not path.is_file() and (kind in _SUFFIXES or path.exists()):
        raise ValueError(f"{key}={source}: there is no such file" + (", it is a folder" if path.is_dir() else ""))
    if path.is_file() and (kind not in _SUFFIXES or (path.suffix, kind) == (".gz", ".parquet")):
        raise ValueError(f"{key}={source} should end in .jsonl, .json (also .gz) or .parquet")
    readers = {".jsonl": _lines, ".json": _array, ".parquet": _parquet}
    rows = readers[kind](path) if path.is_file() else _hub(source, split)
    try:
        # Whatever a damaged file, pyarrow or the hub may raise is told with the value that led to it.
        return list(rows)
    except Exception as error:
        what = "cannot be read" if path.is_file() else "is neither a file nor a dataset that could be loaded"
        raise ValueError(f"{key}={source} {what} ({type(error).__name__}: {str(error).strip()[:200]})") from error


def read(key: str, source: str, split: str, skipped: Skipped) -> list[tuple[str, Row]]:
    """Return the well-formed rows of a source with where each is; others are counted in `skipped`.

    Raises:
        ValueError: as `records`, or if no row is left.
    """
    found = []
    for place, record in records(key, source, split):
        try:
            if isinstance(record, ValueError):
                raise record
            found.append((place, read_row(record)))
        except ValueError as error:
            skipped.add(str(error), place)
    if not found:
        raise ValueError(f"{key}={source} has no usable row: {skipped if skipped.counts else 'it is empty'}")
    return found
