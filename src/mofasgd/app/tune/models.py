"""Models and tokenizers: from a name, a folder or a GGUF file; with adapters; and how long their sequences may be."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn

from mofasgd.app.config import Settings
from mofasgd.groups import freeze, split


def _source(name: str) -> tuple[str, dict[str, Any]]:
    """Return what from_pretrained takes for `model`.

    Raises:
        ValueError: for an empty name, or a path that does not exist.
    """
    if not name:
        raise ValueError("model is empty: name a Hugging Face model, a folder with a saved model, or a .gguf file")
    path = Path(name).expanduser()
    if path.suffix == ".gguf":
        if not path.is_file():
            raise ValueError(f"model={name}: there is no such file")
        if importlib.util.find_spec("gguf") is None:
            raise ValueError(f"model={name} needs the package gguf: pip install gguf")
        return str(path.parent), {"gguf_file": path.name}
    if path.is_dir():
        return str(path), {}
    if name.startswith((".", "/", "~")):
        raise ValueError(f"model={name}: there is no such folder")
    return name, {}


def _load(kind: Any, name: str, what: str, **options: Any) -> Any:
    source, more = _source(name)
    try:
        return kind.from_pretrained(source, **more, **options)
    except Exception as error:  # of the hub, of damaged files, of architectures that do not fit
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        raise ValueError(f"model={name}: its {what} could not be loaded ({reason})") from error


def load_tokenizer(name: str, chat_template: Path | None = None) -> Any:
    """Return the tokenizer of `model`, which can pad.

    Args:
        name: value of `model`.
        chat_template: a Jinja file in place of its own template.

    Raises:
        ValueError: if there is none, or no such file.
    """
    tokenizer = _load(transformers.AutoTokenizer, name, "tokenizer")
    if chat_template is not None:
        try:
            tokenizer.chat_template = chat_template.expanduser().read_text()
        except OSError as error:
            raise ValueError(f"data.chat_template={chat_template} cannot be read ({error.strerror})") from error
    if tokenizer.pad_token is None:
        # Whatever it is, the mask hides it. One that text has would be left out of what the model writes.
        found = [tokenizer.eos_token, tokenizer.bos_token, *_added(tokenizer), tokenizer.unk_token]
        if not any(found):
            raise ValueError(
                f"model={name}: its tokenizer has no special token at all to pad with: name one in the model folder's "
                'tokenizer_config.json, "pad_token": ...'
            )
        tokenizer.pad_token = next(token for token in found if token)
    return tokenizer


def _added(tokenizer: Any) -> list[str]:
    """Return the tokens beside the vocabulary's own that stand for no text."""
    return [str(token) for token in getattr(tokenizer, "added_tokens_decoder", {}).values() if token.special]


def load_config(name: str) -> Any:
    """Return the configuration of `model`, without its weights.

    Raises:
        ValueError: if it cannot be loaded.
    """
    return _load(transformers.AutoConfig, name, "configuration")


def load_model(name: str, kind: Any, precision: str, **options: Any) -> nn.Module:
    """Return the model in float32, or in bfloat16 for precision "bf16-true".

    Args:
        name: value of `model`.
        kind: an Auto class of transformers.
        precision: as in the configuration.
        **options: more arguments of from_pretrained.

    Raises:
        ValueError: if it cannot be loaded.
    """
    dtype = torch.bfloat16 if precision == "bf16-true" else torch.float32
    if name.endswith(".gguf") and hasattr(transformers, "GgufConfig"):  # older ones always dequantize
        options["quantization_config"] = transformers.GgufConfig(dequantize=True)
    model: nn.Module = _load(kind, name, "model", dtype=dtype, **options)
    return model


def room(model: Any) -> int | None:
    """Return how many tokens a sequence may have: the rows of a learned table of positions; None if there is none.

    Rotary and relative positions are computed: their models take what is longer than they were trained on.
    """
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    rows = []
    for name, module in model.named_modules():
        table = isinstance(module, nn.Embedding) and re.search(
            r"wpe$|pos(ition)?s?_?emb|embed_pos", name.split(".")[-1]
        )
        # Some have two rows more than they tell; a table of an image's patches has another number.
        if table and positions is not None and module.num_embeddings in (positions, positions + 2):
            # OPT and Bart begin at a row of their own, RoBERTa after that of the padding.
            begin = getattr(module, "offset", 0 if module.padding_idx is None else module.padding_idx + 1)
            rows.append(min(positions, module.num_embeddings - begin))
    return min(rows, default=None)


def check_room(model: Any, longest: int, key: str, context: int) -> None:
    """Raise ValueError if a sequence of `longest` tokens, which `key`=`context` lets in, has no position in `model`."""
    limit = room(model)
    if limit is not None and longest > limit:
        raise ValueError(
            f"a row has {longest} tokens, but the model has a learned table of {limit} positions: lower {key}="
            f"{context} to {limit}"
        )


def prepare(model: nn.Module, method: str, settings: Settings, task_type: str) -> nn.Module:
    """Return `model` with only that trainable which the method trains.

    "lora": adapters on all linear layers but the head of a frozen model; others: all that `settings` do not freeze.

    Args:
        model: of transformers.
        method: of `methods.METHODS`.
        settings: of the method.
        task_type: of PEFT; with "SEQ_CLS" adapters come with the new head, trained whole.

    Raises:
        ValueError: if PEFT is missing, a pattern matches nothing, or the rank leaves no matrix to factor.
    """
    if method != "lora":
        freeze(model, settings["freeze"])
        if "rank" in settings and not settings.get("factor"):
            split(model, settings["rank"])
        return model
    try:
        from peft import LoraConfig, get_peft_model
    except ModuleNotFoundError as error:
        raise ValueError("method=lora needs PEFT: pip install peft") from error
    own = {"r": settings["rank"], "lora_alpha": settings["alpha"], "lora_dropout": 0.0}
    found: nn.Module = get_peft_model(model, LoraConfig(target_modules="all-linear", task_type=task_type, **own))
    return found
