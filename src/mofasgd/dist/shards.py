"""Sharded weights (FSDP2): which rows of a parameter this rank holds, and what cannot be trained."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor, distributed

from mofasgd.layout import MatrixShape


class Part(NamedTuple):
    """Rows `start` to `stop` of a parameter's dimension 0, which `replicas` ranks hold alike (1 but under HSDP)."""

    start: int
    stop: int
    replicas: int

    def offset(self, shape: torch.Size) -> int:
        """Return the index of the first element, in a parameter of the global `shape`."""
        return self.start * math.prod(shape[1:])

    def slices(self, shape: MatrixShape) -> tuple[slice, slice]:
        """Return the matrices and the rows of each that the part is: of a stack whole matrices, else rows of the one."""
        if not shape.lead:
            return slice(0, 1), slice(self.start, self.stop)
        each = math.prod(shape.lead[1:])
        return slice(self.start * each, self.stop * each), slice(0, shape.m)


def is_sharded(tensor: Tensor) -> bool:
    """Whether `tensor` is a DTensor."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def local(tensor: Tensor) -> Tensor:
    """Return what this rank holds of `tensor`, in its memory."""
    if not is_sharded(tensor):
        return tensor
    part: Any = tensor.detach()
    held: Tensor = part.to_local()
    return held


def whole(tensor: Tensor) -> Tensor:
    """Return all of `tensor` on this rank, and on all others, which call this as well."""
    return tensor.full_tensor() if is_sharded(tensor) else tensor  # type: ignore[attr-defined]


def placed_like(value: Tensor, param: Tensor) -> Tensor:
    """Return `value`, of the global shape of `param`, whole or as a DTensor like `param` is; every rank calls this."""
    if is_sharded(value) and not is_sharded(param):
        return whole(value)
    part = part_of(param)
    if part is None or is_sharded(value):
        return value
    from torch.distributed.tensor import DTensor

    like: Any = param
    rows = value[part.start : part.stop].to(param.device)
    place = (like.device_mesh, like.placements)
    return DTensor.from_local(rows, *place, run_check=False, shape=param.shape, stride=param.stride())


def part_of(param: Tensor) -> Part | None:
    """Return the rows that this rank holds of a DTensor; None of any other tensor, which is held whole."""
    if not is_sharded(param):
        return None
    mesh = param.device_mesh  # type: ignore[attr-defined]
    size, rank, rows = mesh.size(mesh.ndim - 1), mesh.get_local_rank(mesh.ndim - 1), param.shape[0]
    # As torch.chunk cuts: the last parts may be short or empty.
    each = -(-rows // size)
    return Part(min(rank * each, rows), min((rank + 1) * each, rows), mesh.size() // size)


def group_of(params: Iterable[Tensor]) -> distributed.ProcessGroup | None:
    """Return the ranks that share the DTensors among `params`; None if there are none, or there is one process.

    Raises:
        ValueError: if they lie on different sets of ranks.
    """
    meshes = list(dict.fromkeys(p.device_mesh for p in params if is_sharded(p)))  # type: ignore[attr-defined]
    if not meshes or distributed.get_world_size() == 1:
        return None
    if any(not torch.equal(mesh.mesh.flatten(), meshes[0].mesh.flatten()) for mesh in meshes[1:]):
        raise ValueError(f"parameters lie on different meshes ({meshes[0]}, {meshes[1]}): shard the model on one mesh")
    if meshes[0].ndim == 1:
        group: distributed.ProcessGroup = meshes[0].get_group()
        return group
    if meshes[0].size() != distributed.get_world_size():
        raise ValueError(
            f"a 2-dimensional mesh of {meshes[0].size()} ranks in a world of {distributed.get_world_size()}: use all "
            "ranks, or a 1-dimensional mesh"
        )
    return distributed.group.WORLD


def check_kind(param: Tensor, name: str) -> None:
    """Raise ValueError for a parameter whose tensor is not whole rows of a plain weight."""
    if getattr(param, "_is_flat_param", False) or getattr(param, "_fsdp_flattened", False):
        raise ValueError(f"{name} is flattened by FSDP1: shard with torch.distributed.fsdp.fully_shard (FSDP2) instead")
    if hasattr(param, "ds_id"):
        raise ValueError(f"{name} is partitioned by DeepSpeed ZeRO: use FSDP2 (fully_shard) or DDP instead")
    if not is_sharded(param):
        return
    from torch.distributed.tensor import Shard

    if param.device.type == "cpu" and param.device_mesh.device_type != "cpu":  # type: ignore[attr-defined]
        raise ValueError(f"{name} is offloaded to the CPU (CPUOffloadPolicy): shard the model without an offload policy")
    mesh, placements = param.device_mesh, param.placements  # type: ignore[attr-defined]
    rows = type(placements[-1]) is Shard and placements[-1].dim == 0
    fits = rows and (mesh.ndim == 1 or (mesh.ndim == 2 and placements[0].is_replicate()))
    if not fits or "tp" in (mesh.mesh_dim_names or ()):
        raise ValueError(
            f"{name} is a DTensor with placements {tuple(placements)} on a mesh of shape {tuple(mesh.shape)}, as of "
            "tensor parallelism: MoFaSGD trains what fully_shard shards by rows, on a 1-dimensional mesh (Shard(0)) or "
            "a 2-dimensional one (HSDP: Replicate, Shard(0))"
        )

