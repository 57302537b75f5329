"""From rows to tokens, of which the answers' are learned."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from jinja2 import TemplateError

from mofasgd.app.tune.config import RowsConfig
from mofasgd.app.tune.rows import Message, Row, Skipped, read

IGNORED = -100
"""Label of a token that is not learned, as in torch's cross entropy."""


@dataclass(frozen=True)
class Example:
    """One row in tokens.

    Attributes:
        input_ids: of the whole row.
        labels: the same where the assistant speaks, else IGNORED.
        prompt: tokens before the last answer, from which the model is asked to write.
        answer: the text of the last answer.
    """

    input_ids: list[int]
    labels: list[int]
    prompt: list[int]
    answer: str


def _template(tokenizer: Any, messages: Sequence[Message], *, ask: bool) -> list[int]:
    """Return the tokens of a chat; `ask`: with the head of an answer at the end."""
    ids: list[int] = tokenizer.apply_chat_template(messages, add_generation_prompt=ask, return_dict=True)["input_ids"]
    return ids


def _common(a: Sequence[int], b: Sequence[int]) -> int:
    """Return how many first elements agree."""
    for i, (x, y) in enumerate(zip(a, b, strict=False)):
        if x != y:
            return i
    return min(len(a), len(b))


def _encode_chat(tokenizer: Any, messages: list[Message]) -> Example:
    @functools.cache
    def rendered(count: int, ask: bool) -> list[int]:
        return _template(tokenizer, messages[:count], ask=ask)

    ids = rendered(len(messages), False)
    labels = [IGNORED] * len(ids)
    for i, message in enumerate(messages):
        if message["role"] == "assistant":
            # Templates that render earlier turns otherwise than the last (without its reasoning) agree up to a point.
            start = _common(rendered(i, True), ids)
            end = _common(rendered(i + 1, False), ids)
            labels[start:end] = ids[start:end]
    return Example(ids, labels, rendered(len(messages) - 1, True), messages[-1]["content"])


def _encode_plain(tokenizer: Any, prompt: str, completion: str) -> Example:
    asked = tokenizer(prompt)["input_ids"]
    # Tokenizers such as BERT's end every text with a token; the answer goes on where the prompt ends.
    if asked and asked[-1] == tokenizer.eos_token_id:
        asked = asked[:-1]
    answer = tokenizer(completion, add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id]
    return Example(asked + answer, [IGNORED] * len(asked) + answer, asked, completion)


def encode(tokenizer: Any, row: Row) -> Example:
    """Return the row in tokens, by the tokenizer's chat template or, if it has none, as plain text.

    Raises:
        ValueError: for a chat, and no chat template.
    """
    if tokenizer.chat_template is not None:
        return _encode_chat(tokenizer, row.messages)
    if row.plain is None:
        raise ValueError(
            "the tokenizer has no chat template, which rows of messages need: give one with --data.chat_template "
            "FILE.jinja, or use the instruction-tuned model's tokenizer"
        )
    return _encode_plain(tokenizer, *row.plain)


def encode_all(
    tokenizer: Any, rows: Sequence[tuple[str, Row]], context: int, skipped: Skipped, limit: int
) -> list[Example]:
    """Return the first `limit` rows (0: all) that have an answer and fit into `context` tokens; others are counted."""
    examples: list[Example] = []
    for place, row in rows:
        if limit and len(examples) == limit:
            break
        try:
            example = encode(tokenizer, row)
        except TemplateError as error:
            skipped.add(f"that the chat template refuses ({str(error).strip()[:100]})", place)
            continue
        if len(example.input_ids) > context:
            skipped.add(f"longer than data.context={context} tokens", place)
        # The first token of a sequence is never predicted.
        elif all(label == IGNORED for label in example.labels[1:]):
            skipped.add("without a token to learn: the chat template drops the answer", place)
        else:
            examples.append(example)
    return examples


def load(tokenizer: Any, config: RowsConfig, skipped: Skipped) -> tuple[list[Example], list[Example]]:
    """Return training and validation rows in tokens.

    Raises:
        ValueError: for sources that cannot be read, and when nothing is left to train on or to validate with.
    """
    if not config.train:
        raise ValueError("data.train is empty: name a .jsonl, .json or .parquet file, or a Hugging Face dataset")
    if tokenizer.chat_template is None and tokenizer.eos_token_id is None:
        raise ValueError(
            "the tokenizer has neither a chat template nor an end-of-text token: give --data.chat_template"
        )
    rows = read("data.train", config.train, "train", skipped)
    if config.validation:
        held_out = read("data.validation", config.validation, "test", skipped)
    else:
        count = max(1, round(config.holdout * len(rows)))
        rows, held_out = rows[:-count], rows[-count:]
    train = encode_all(tokenizer, rows, config.context, skipped, config.rows)
    validation = encode_all(tokenizer, held_out, config.context, skipped, config.validation_rows)
    for name, examples in (("training", train), ("validation", validation)):
        if not examples:
            raise ValueError(f"there is no {name} row: {skipped}; raise data.context, or give more rows")
    return train, validation
