"""From a model to parameter groups: every trainable parameter exactly once."""

from __future__ import annotations

import fnmatch
import re
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from mofasgd.layout import default_layout, matrix_shape
from mofasgd.options import FACTORED_KEYS, Group, check_number, check_whole, did_you_mean

# Keys that param_groups decides for each parameter, so that no single value can be asked for.
_DECIDED = ("layout", "transposed")


class _Role(NamedTuple):
    """What is known of a parameter from the modules that hold it."""

    names: list[str]
    embedding: bool = False
    head: bool = False
    transposed: bool = False
    convolution: bool = False


class ParamGroups(list[Group]):
    """Parameter groups for `MoFaSGD`; `str()` of it is a table of the assignment."""

    def __init__(self, groups: Iterable[Group] = ()) -> None:
        super().__init__(groups)
        self._notes: dict[Tensor, tuple[str, str]] = {}

    def rows(self) -> Iterator[tuple[str, Tensor, Group, str]]:
        """Yield (name, parameter, its group, why it is there) in the order of the groups."""
        for group in self:
            for param in group["params"]:
                name, why = self._notes.get(param, ("?", "added by hand"))
                yield name, param, group, why

    def __str__(self) -> str:
        table: Counter[tuple[str, ...]] = Counter()
        sizes = {"mofasgd": [0, 0], "adamw": [0, 0]}
        state = 0
        for name, param, group, why in self.rows():
            algorithm, rank, layout = group.get("algorithm", "mofasgd"), "", ""
            sizes[algorithm][0] += 1
            sizes[algorithm][1] += param.numel()
            if algorithm == "mofasgd":
                shape = matrix_shape(group.get("layout"), tuple(param.shape))
                # A group added by hand may leave the rank to the optimizer, whose default is 32.
                r = min(group.get("rank", 32), shape.m, shape.n)
                state += shape.batch * r * (shape.m + shape.n + 1)
                rank, layout = str(r), str(group.get("layout") or "")
            else:
                state += 2 * param.numel()
            # Layers that differ by their number only share a line.
            key = (re.sub(r"(?<=\.)\d+(?=\.)", "*", name), "x".join(map(str, param.shape)), algorithm)
            line = (*key, rank, layout, why)
            table[line] += 1
        head = ("parameter", "count", "shape", "algorithm", "rank", "layout", "why")
        lines = [(k[0], str(count), *k[1:]) for k, count in table.items()]
        widths = [max(len(line[i]) for line in [head, *lines]) for i in range(len(head))]
        text = ["  ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)).rstrip() for line in [head, *lines]]
        (nf, f), (na, a) = sizes["mofasgd"], sizes["adamw"]
        text.append(
            f"{nf} factored parameters ({f:,} numbers), {na} with AdamW ({a:,}); "
            f"state {state:,} numbers, {state / max(1, 2 * (f + a)):.1%} of AdamW's"
        )
        return "\n".join(text)


def param_groups(
    model: nn.Module,
    rank: int = 32,
    lr: float = 0.02,
    adamw_lr: float = 3e-4,
    weight_decay: float = 0.0,
    *,
    factor: Sequence[str] = (),
    adamw: Sequence[str] = (),
    head: nn.Module | str | None = None,
    **mofasgd_keys: Any,
) -> ParamGroups:
    """Assign every trainable parameter of `model` to MoFaSGD or to AdamW, exactly once.

    AdamW takes embeddings, the output head, parameters of fewer than two dimensions and matrices whose smaller side
    is at most `rank`; the rest is factored. Frozen parameters are left out, tied weights appear once.

    Args:
        model: any module.
        rank, lr: of the factored parameters.
        adamw_lr: learning rate of the others.
        weight_decay: decoupled decay for both; 0 for parameters of fewer than two dimensions. A step shrinks a
            weight by lr * weight_decay: 0.02 * 0.1 forgets a pretrained matrix within 500 steps.
        factor, adamw: name patterns (fnmatch, as in "layers.*.bias") that force an algorithm.
        head: the output head, a module or its name; default `model.get_output_embeddings()` where it exists.
        **mofasgd_keys: more group keys of the factored parameters, such as `beta`, `complement` or `lr_scale`.

    Returns:
        Groups for `MoFaSGD`, complete but for the optimizer's defaults; `print` shows them as a table.

    Raises:
        ValueError: for a pattern that matches nothing, contradicting patterns, an unknown key, a forced parameter
            that cannot be factored, a value out of range, or a lazy module that has seen no input yet.
    """
    for name, patterns in (("factor", factor), ("adamw", adamw)):
        if isinstance(patterns, str) or not isinstance(patterns, Sequence):
            raise ValueError(f"{name}={patterns!r} should be a list of name patterns: write {name}=['...']")
    check_whole("rank", rank, 1)
    for name, value in (("lr", lr), ("adamw_lr", adamw_lr), ("weight_decay", weight_decay)):
        check_number(name, value, 0.0)
    for key in mofasgd_keys:
        if key in _DECIDED or key not in FACTORED_KEYS:
            known = tuple(k for k in FACTORED_KEYS if k not in _DECIDED)
            raise ValueError(f"param_groups has no key {key!r}{did_you_mean(key, known)}")
    roles = _roles(model, head)
    forced = {"factor": _match(factor, roles, "factor"), "adamw": _match(adamw, roles, "adamw")}
    both = [roles[p].names[0] for p in forced["factor"] if p in forced["adamw"]]
    if both:
        raise ValueError(f"parameter {both[0]!r} matches a pattern of factor and one of adamw: narrow one of them")

    buckets: dict[tuple[Any, ...], Group] = {}
    notes: dict[Tensor, tuple[str, str]] = {}
    for param, role in roles.items():
        layout = "flatten" if role.convolution else default_layout(param.ndim)
        why = _why_adamw(param, role, layout, rank)
        if param in forced["factor"]:
            try:
                matrix_shape(layout, tuple(param.shape))
            except ValueError as error:
                raise ValueError(f"factor={forced['factor'][param]!r} matches {role.names[0]!r}: {error}") from None
            factored, why = True, f"factor={forced['factor'][param]!r}"
        elif param in forced["adamw"]:
            factored, why = False, f"adamw={forced['adamw'][param]!r}"
        else:
            factored, why = why is None, why or ""
        decay = weight_decay if param.ndim >= 2 else 0.0
        common: Group = {"params": [], "weight_decay": decay}
        if factored:
            group = {**common, "algorithm": "mofasgd", "lr": lr, "rank": rank, **mofasgd_keys}
            group |= {"layout": layout, "transposed": role.transposed}
        else:
            group = {**common, "algorithm": "adamw", "lr": adamw_lr}
        bucket = (not factored, decay, group.get("layout"), group.get("transposed"))
        buckets.setdefault(bucket, group)["params"].append(param)
        notes[param] = (role.names[0], why)
    groups = ParamGroups(buckets[key] for key in sorted(buckets, key=lambda k: k[0]))
    groups._notes = notes
    if not any(group["algorithm"] == "mofasgd" for group in groups):
        warnings.warn(
            f"nothing of this model is factored at rank={rank}, AdamW trains it all: lower the rank, or force "
            "matrices with factor=[...]",
            stacklevel=2,
        )
    return groups


def split(model: nn.Module, rank: int) -> tuple[list[Tensor], list[Tensor]]:
    """Return the matrices that MoFaSGD of this rank would factor, as far as they are 2-D, and the rest.

    Raises:
        ValueError: if there is no such matrix.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that nothing is factored is an error here
        groups = param_groups(model, rank=rank)
    matrices = [p for g in groups if g["algorithm"] == "mofasgd" for p in g["params"] if p.ndim == 2]
    if not matrices:
        raise ValueError(f"rank={rank} leaves no matrix of {type(model).__name__} to factor: lower it")
    chosen = set(matrices)
    return matrices, [p for g in groups for p in g["params"] if p not in chosen]


def freeze(model: nn.Module, patterns: Sequence[str]) -> None:
    """Freeze the parameters whose names match; ValueError for a pattern that matches none, or if all match."""
    names = dict(model.named_parameters())
    for pattern in patterns:
        found = fnmatch.filter(names, pattern)
        if not found:
            raise ValueError(f"freeze={pattern!r} matches no parameter; names are as {next(iter(names))!r}")
        for name in found:
            names[name].requires_grad_(False)
    if not any(param.requires_grad for param in names.values()):
        raise ValueError(f"freeze={list(patterns)} leaves nothing to train: drop a pattern")


def _roles(model: nn.Module, head: nn.Module | str | None) -> dict[Tensor, _Role]:
    """Return the trainable parameters in order, each with all its names and what its modules say of it."""
    names: dict[Tensor, list[str]] = {}
    for name, param in model.named_parameters(remove_duplicate=False):
        if param.requires_grad:
            if is_lazy(param):
                raise ValueError(f"parameter {name!r} has no shape yet: run one batch through the model first")
            names.setdefault(param, []).append(name)
    roles = {param: _Role(all_names) for param, all_names in names.items()}
    heads = set(_head(model, head).parameters())
    for module in model.modules():
        for param in module.parameters(recurse=False):
            if param not in roles:
                continue
            role = roles[param]
            embedding = isinstance(module, (nn.Embedding, nn.EmbeddingBag))
            convolution = isinstance(module, nn.modules.conv._ConvNd)
            # transformers' Conv1D, embeddings and transposed convolutions keep inputs in rows.
            conv1d = type(module).__name__ == "Conv1D" and type(module).__module__.startswith("transformers")
            rows_are_inputs = embedding or conv1d or (convolution and module.transposed)
            roles[param] = role._replace(
                embedding=role.embedding or embedding,
                head=role.head or param in heads,
                transposed=role.transposed or bool(rows_are_inputs),
                convolution=role.convolution or convolution,
            )
    return roles


def _head(model: nn.Module, head: nn.Module | str | None) -> nn.Module:
    nothing = nn.Module()
    if isinstance(head, nn.Module) and any(module is head for module in model.modules()):
        return head
    if head is not None and (head == "" or not isinstance(head, str)):
        raise ValueError(f"head={head!r} is no module of this model: give one of its modules, or the name of one")
    if head is not None:
        try:
            return model.get_submodule(head)
        except AttributeError:
            known = tuple(name for name, _ in model.named_modules() if name)
            raise ValueError(f"head={head!r} is no module of this model{did_you_mean(head, known)}") from None
    find = getattr(model, "get_output_embeddings", None)
    if callable(find):
        found = find()
        return found if isinstance(found, nn.Module) else nothing
    return nothing


def _match(patterns: Sequence[str], roles: dict[Tensor, _Role], argument: str) -> dict[Tensor, str]:
    """Return the parameters that `patterns` match, each with its pattern."""
    matched: dict[Tensor, str] = {}
    for pattern in patterns:
        hits = [p for p, role in roles.items() if any(fnmatch.fnmatchcase(n, pattern) for n in role.names)]
        if not hits:
            known = tuple(name for role in roles.values() for name in role.names)
            near = did_you_mean(pattern, known) if len(known) > 20 else f"; names: {', '.join(known)}"
            raise ValueError(f"{argument}={pattern!r} matches no trainable parameter{near[:400]}")
        matched |= dict.fromkeys(hits, pattern)
    return matched


def _why_adamw(param: Tensor, role: _Role, layout: str, rank: int) -> str | None:
    """Return why a parameter goes to AdamW, or None if it is factored."""
    if role.embedding:
        return "embedding"
    if role.head:
        return "head"
    if param.ndim < 2:
        return f"{param.ndim}-D"
    shape = matrix_shape(layout, tuple(param.shape))
    return f"smaller side <= rank {rank}" if min(shape.m, shape.n) <= rank else None
