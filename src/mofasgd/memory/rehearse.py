"""A forward and a backward on tensors without memory (`FakeTensorMode`), recorded: activations of any architecture.

The tensors call themselves CPU tensors, since those of CUDA need CUDA; what a GPU would do otherwise and is of the
model's size is done as there (`_as_on_gpu`, `_attention`).
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator
from itertools import chain
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    UnsupportedOperatorException,
)
from torch.optim import Optimizer
from torch.utils._pytree import tree_leaves, tree_map

from mofasgd.memory.record import Recorder

Loss = Callable[[Any], Tensor]

_UNKNOWABLE = (DataDependentOutputException, DynamicOutputShapeException, UnsupportedOperatorException)
_ATTENTION = "mofasgd_plan"


class Rehearsal(NamedTuple):
    """What one forward and backward hold.

    Attributes:
        peak: bytes by category when most was alive.
        most: the most bytes of each category.
        after: bytes by category after the last backward.
    """

    peak: dict[str, int]
    most: dict[str, int]
    after: dict[str, int]


@contextlib.contextmanager
def _as_on_gpu() -> Iterator[None]:
    """Dropout as on a GPU: attention's kernels keep nothing of it, by itself it keeps a byte an element.

    The functions are replaced: a `TorchFunctionMode` is not there when backward computes a layer again.
    """
    attention, dropout = F.scaled_dot_product_attention, F.dropout

    def without(*args: Any, **kwargs: Any) -> Any:
        kwargs.pop("dropout_p", None)
        return attention(*args[:4], *((0.0, *args[5:]) if len(args) > 4 else ()), **kwargs)

    F.scaled_dot_product_attention, F.dropout = without, _dropout
    try:
        yield
    finally:
        F.scaled_dot_product_attention, F.dropout = attention, dropout


def _dropout(input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
    kept: Tensor = torch.native_dropout(input, p, True)[0] if training and p > 0 else input
    return kept


def blank(model: nn.Module, device: str, dtype: torch.dtype | None = None) -> nn.Module:
    """Return a copy of `model` with new tensors on `device`, floating parameters in `dtype` (None: in their own)."""
    memo: dict[int, Any] = {}
    parameters = dict.fromkeys(model.parameters())
    others = [value for module in model.modules() for value in vars(module).values() if isinstance(value, Tensor)]
    for tensor in chain(parameters, model.buffers(), others):
        own = dtype if dtype is not None and tensor in parameters and tensor.is_floating_point() else tensor.dtype
        made = torch.empty_strided(tensor.shape, tensor.stride(), dtype=own, device=device)
        memo[id(tensor)] = nn.Parameter(made, requires_grad=tensor.requires_grad) if tensor in parameters else made
    return copy.deepcopy(model, memo)


def build(config: Any, dtype: torch.dtype) -> nn.Module:
    """Return the model of a transformers config, on the meta device.

    The class is the one that the config names in `architectures`, else its causal language model.

    Raises:
        ValueError: if transformers has no such model.
    """
    import transformers

    config = copy.deepcopy(config)
    if str(getattr(config, "_attn_implementation", "")).startswith("flash"):
        config._attn_implementation = "sdpa"
    named = getattr(transformers, (getattr(config, "architectures", None) or [""])[0], None)
    auto = transformers.AutoModelForCausalLM
    try:
        with torch.device("meta"):
            if named is None or (type(config) in auto._model_mapping and "For" not in named.__name__):
                found = auto.from_config(config, dtype=dtype)
            else:
                found = named._from_config(config, dtype=dtype)
    except Exception as error:  # of code for one architecture each
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        raise ValueError(f"no model can be built of a {type(config).__name__} ({reason})") from error
    result: nn.Module = found
    return result


def _attention(model: nn.Module) -> None:
    """Let a model of transformers leave out masks that hide nothing, as it does when it can read them."""
    config: Any = getattr(model, "config", None)
    if getattr(config, "_attn_implementation", None) != "sdpa" or not hasattr(model, "set_attn_implementation"):
        return
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.integrations.sdpa_attention import sdpa_attention_forward
    from transformers.masking_utils import sdpa_mask

    def mask(*args: Any, **kwargs: Any) -> Any:
        # Rows are not packed, which it looks for in the positions.
        return sdpa_mask(*args, **kwargs | {"allow_is_causal_skip": True})

    AttentionInterface.register(_ATTENTION, sdpa_attention_forward)
    AttentionMaskInterface.register(_ATTENTION, mask)
    model.set_attn_implementation(_ATTENTION)  # type: ignore[operator]


def ready(model: nn.Module, checkpointing: bool) -> None:
    """Prepare a model without memory for training, as a Trainer does.

    Raises:
        ValueError: if it cannot checkpoint its activations.
    """
    _attention(model)
    if hasattr(getattr(model, "config", None), "use_cache"):
        model.config.use_cache = False  # type: ignore[union-attr]
    if checkpointing:
        # The second name is the older one.
        names = ("activation_checkpointing_enable", "gradient_checkpointing_enable")
        enable: Any = next((found for name in names if (found := getattr(model, name, None)) is not None), None)
        if enable is None:
            raise ValueError(
                f"checkpointing: {type(model).__name__} has no gradient_checkpointing_enable(); leave it out for a "
                "model that checkpoints by itself"
            )
        enable({"use_reentrant": False})
    model.train()


def tokens(model: nn.Module, batch: int, seq: int) -> Any:
    """Return what a model is called with: token ids, and labels if it takes them; numbers if it begins with a Linear.

    Raises:
        ValueError: if it begins with another layer.
    """
    layers = [m for m in model.modules() if next(m.parameters(recurse=False), None) is not None]
    kinds = [m for m in layers if isinstance(m, (nn.Embedding, nn.Linear, nn.modules.conv._ConvNd))]
    config = getattr(model, "config", None)
    if config is None and kinds and isinstance(kinds[0], nn.Linear):
        return torch.empty(batch, seq, kinds[0].in_features, dtype=kinds[0].weight.dtype)
    if config is None and not (kinds and isinstance(kinds[0], nn.Embedding)):
        raise ValueError(f"{type(model).__name__} begins with no embedding or linear layer: give inputs=")
    ids = torch.zeros(batch, seq, dtype=torch.int64)
    if config is None:
        return ids
    whole = "SequenceClassification" in type(getattr(model, "base_model", model)).__name__ + type(model).__name__
    return {"input_ids": ids, "labels": torch.zeros(batch, dtype=torch.int64) if whole else ids}


def default_loss(output: Any, called_with: Any) -> Tensor:
    """Return `output.loss`, or the cross-entropy of logits for token ids, or a mean square in float32."""
    found = output.get("loss") if isinstance(output, dict) else getattr(output, "loss", None)
    if isinstance(found, Tensor):
        return found
    first: Tensor = next(t for t in tree_leaves(output) if isinstance(t, Tensor) and t.is_floating_point())
    ids = called_with if isinstance(called_with, Tensor) else None
    if ids is not None and not ids.is_floating_point() and first.shape[:-1] == ids.shape:
        return F.cross_entropy(first.flatten(0, -2).float(), ids.flatten())
    return first.float().square().mean()


def _call(model: nn.Module, inputs: Any) -> Any:
    if isinstance(inputs, dict):
        return model(**inputs)
    return model(*inputs) if isinstance(inputs, (tuple, list)) else model(inputs)


def faked(inputs: Any) -> Any:
    """Return tensors like those in `inputs`, without memory; to be called within the mode."""

    def like(value: Any) -> Any:
        return torch.empty(value.shape, dtype=value.dtype) if isinstance(value, Tensor) else value

    return tree_map(like, inputs)


@contextlib.contextmanager
def knowable(model: nn.Module) -> Iterator[None]:
    """Raise ValueError for a forward that fails, or depends on numbers, which tensors without memory do not have."""
    try:
        yield
    except _UNKNOWABLE as error:
        raise ValueError(
            f"the forward or backward of {type(model).__name__} reads numbers of its tensors ({error}), which an "
            "estimate does not have: measure it with `mofasgd profile`"
        ) from error
    except (RuntimeError, TypeError, AttributeError, LookupError) as error:  # of the model's code
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        raise ValueError(f"a forward and backward of {type(model).__name__} failed ({reason})") from error


def rehearse(
    model: nn.Module, optimizer: Optimizer, inputs: Any, loss: Loss | None, *, backwards: int, autocast: bool
) -> Rehearsal:
    """Return what forward and backward of a model without memory hold; to be called within its mode.

    Args:
        model, optimizer: whose weights and state are there from the beginning.
        inputs: of the model.
        loss: of its output; None: `default_loss`.
        backwards: how many follow one another before the step; from the second on gradients are there.
        autocast: make products in bfloat16.
    """
    with knowable(model), _as_on_gpu(), Recorder(model, optimizer) as recorder:
        for _ in range(backwards):
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
                output = _call(model, inputs)
                value = default_loss(output, inputs) if loss is None else loss(output)
            del output
            value.backward()  # type: ignore[no-untyped-call]
            del value
        done = len(recorder.events) - 1
        optimizer.step()
    timeline = recorder.timeline()
    total = timeline.total()
    peak = max(range(done + 1), key=total.__getitem__)
    return Rehearsal(
        {category: sizes[peak] for category, sizes in timeline.sizes.items()},
        {category: max(sizes[: done + 1]) for category, sizes in timeline.sizes.items()},
        {category: sizes[done] for category, sizes in timeline.sizes.items()},
    )
