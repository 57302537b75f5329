"""What a language model says: its loss on answers, and the answers that it writes."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mofasgd.app.tune.encode import IGNORED, Example
from mofasgd.app.tune.models import room

Row = TypeVar("Row")

_NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?|-?\.\d+")

_TOKENS = 1 << 13
"""Most tokens, padding included, of one forward of an evaluation."""


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Set the model to evaluation, without gradients, and back."""
    was = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(was)


def batches(examples: Sequence[Row], length: Callable[[Row], int], tokens: int) -> Iterator[list[int]]:
    """Yield the numbers of examples of similar length, the longest first, `tokens` with padding at a time."""
    order = sorted(range(len(examples)), key=lambda i: (-length(examples[i]), i))
    while order:
        count = max(1, tokens // max(1, length(examples[order[0]])))
        yield order[:count]
        order = order[count:]


def _pad(rows: Sequence[Sequence[int]], value: int, device: torch.device, *, left: bool = False) -> Tensor:
    width = max(map(len, rows))
    full = [[value] * (width - len(r)) + list(r) if left else list(r) + [value] * (width - len(r)) for r in rows]
    return torch.tensor(full, device=device)


def _device(model: nn.Module) -> torch.device:
    return next(model.parameters()).device


def answer_loss(model: Any, examples: Sequence[Example], autocast: Callable[[], Any]) -> tuple[float, int]:
    """Return the mean loss per answer token in nats, and the number of these tokens.

    Every token counts the same, however examples are batched.
    """
    device, total, count = _device(model), 0.0, 0
    with evaluating(model):
        for numbers in batches(examples, lambda e: len(e.input_ids), _TOKENS):
            rows = [examples[i] for i in numbers]
            ids = _pad([row.input_ids for row in rows], 0, device)
            mask = _pad([[1] * len(row.input_ids) for row in rows], 0, device)
            targets = _pad([row.labels for row in rows], IGNORED, device)[:, 1:].flatten()
            with autocast():
                logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits[:, :-1].flatten(0, 1)
            # Only the logits that count, in float32: all of them would be the largest tensor of the run.
            learned = targets != IGNORED
            total += float(F.cross_entropy(logits[learned].float(), targets[learned], reduction="sum"))
            count += int(learned.sum())
    return total / count, count


def _ends(model: Any, tokenizer: Any) -> list[int]:
    """Return the tokens that end an answer: a chat's end of turn may be the model's or the tokenizer's."""
    own = model.generation_config.eos_token_id
    found = {*(own if isinstance(own, list) else [own]), tokenizer.eos_token_id}
    return sorted(token for token in found if token is not None)


def write(
    model: Any, tokenizer: Any, examples: Sequence[Example], max_new_tokens: int, autocast: Callable[[], Any]
) -> list[str]:
    """Return the answers that the model writes, greedily, in the order of `examples`; within its learned positions."""
    limit, answers = room(model), [""] * len(examples)
    most = [max_new_tokens if limit is None else min(max_new_tokens, limit - len(e.prompt)) for e in examples]
    with evaluating(model):
        # Together only what may be equally long: no answer depends on the batch.
        for count in sorted({count for count in most if count > 0}):
            own = [i for i, value in enumerate(most) if value == count]
            texts = _write(model, tokenizer, [examples[i].prompt for i in own], count, autocast)
            for i, text in zip(own, texts, strict=True):
                answers[i] = text
    return answers


def _write(
    model: Any, tokenizer: Any, asked: Sequence[list[int]], max_new_tokens: int, autocast: Callable[[], Any]
) -> list[str]:
    """Return what the model writes to the prompts `asked`."""
    device, answers = _device(model), [""] * len(asked)
    for numbers in batches(asked, lambda prompt: len(prompt) + max_new_tokens, 4 * _TOKENS):
        prompts = [asked[i] for i in numbers]
        ids = _pad(prompts, tokenizer.pad_token_id, device, left=True)
        mask = _pad([[1] * len(prompt) for prompt in prompts], 0, device, left=True)
        with autocast():
            out = model.generate(
                input_ids=ids,
                attention_mask=mask,
                max_new_tokens=max_new_tokens,
                do_sample=False,
                pad_token_id=tokenizer.pad_token_id,
                eos_token_id=_ends(model, tokenizer),
            )
        texts = tokenizer.batch_decode(out[:, ids.shape[1] :], skip_special_tokens=True)
        for i, text in zip(numbers, texts, strict=True):
            answers[i] = text.strip()
    return answers


def final_number(text: str) -> float | None:
    """Return the number after the last ####, else the last number of the text; None if there is none."""
    found = _NUMBER.findall(text.rsplit("####", 1)[-1] if "####" in text else text)
    if not found:
        return None
    return float((found[0] if "####" in text else found[-1]).replace(",", ""))


def exact_match(answers: Sequence[str], examples: Sequence[Example]) -> float:
    """Return the share of answers whose final number is that of the example's answer, after its ####.

    Raises:
        ValueError: for an example whose answer has no such number.
    """
    wanted = [final_number(example.answer) if "####" in example.answer else None for example in examples]
    if None in wanted:
        example = examples[wanted.index(None)]
        raise ValueError(
            f"exact_match compares the numbers after ####, which the answer {example.answer[-60:]!r} lacks: set "
            "exact_match to 0"
        )
    return sum(final_number(a) == w for a, w in zip(answers, wanted, strict=True)) / len(examples)
