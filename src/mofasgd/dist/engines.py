"""What is asked of the engine around a model: how many processes there are, FSDP2's switches, engines not served."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from torch import Tensor, distributed, nn

from mofasgd.dist.replicas import ORDER


def many() -> bool:
    """Whether `torch.distributed` is initialized with more than one process."""
    return distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1


def check_model(model: nn.Module) -> None:
    """Raise ValueError for a model that attaching cannot serve: inside a wrapper of DDP, FSDP1 or DeepSpeed."""
    names = {cls.__name__ for module in model.modules() for cls in type(module).__mro__}
    if isinstance(model, nn.parallel.DistributedDataParallel):
        raise ValueError(f"the model is a DistributedDataParallel: {ORDER}")
    if "FullyShardedDataParallel" in names:
        raise ValueError("the model is sharded by FSDP1: use FSDP2 (torch.distributed.fsdp.fully_shard) instead")
    if "DeepSpeedEngine" in names:
        raise ValueError("the model is a DeepSpeedEngine: use DDP or FSDP2 (fully_shard) instead")


def _sharded_modules(model: nn.Module) -> list[Any]:
    if not many():
        return []
    from torch.distributed.fsdp import FSDPModule

    return [module for module in model.modules() if isinstance(module, FSDPModule)]


def reshard(model: nn.Module) -> None:
    """Give the modules of an FSDP2 model their sharded parameters, which an evaluation may have left gathered."""
    for module in _sharded_modules(model):
        module.reshard()


def holders(model: nn.Module, params: Collection[Tensor]) -> list[Any]:
    """Return the FSDP2 modules that shard some of `params`."""
    wanted = set(params)
    return [module for module in _sharded_modules(model) if any(p in wanted for p in _managed(module))]


def keep_sync(modules: list[Any]) -> None:
    """Make FSDP2 `modules` reduce their gradients after every backward; without, they would be held in full."""
    for module in modules:
        module.set_requires_gradient_sync(True, recurse=False)
        module.set_requires_all_reduce(True, recurse=False)


def _managed(module: nn.Module) -> list[Tensor]:
    """Return the parameters below `module` that are not those of an FSDP2 module below it."""
    from torch.distributed.fsdp import FSDPModule

    found: list[Tensor] = list(module.parameters(recurse=False))
    for child in module.children():
        if not isinstance(child, FSDPModule):
            found += _managed(child)
    return found
