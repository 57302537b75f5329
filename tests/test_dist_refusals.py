"""Engines and weights that MoFaSGD does not train are told from those that it does, with what to use instead."""

import pytest
import torch
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.fsdp._common_utils import _set_fsdp_flattened
from torch.distributed.fsdp._flat_param import FlatParameter

from mofasgd import MoFaSGD


def test_flattened_parameters_of_fsdp1_are_refused():
    # FSDP1 itself wants an accelerator; these are what its modules hold.
    original = nn.Parameter(torch.randn(48))
    _set_fsdp_flattened(original)
    for param in (FlatParameter(torch.randn(48)), original):
        with pytest.raises(ValueError, match=r"is flattened by FSDP1: shard with .*fully_shard \(FSDP2\)"):
            MoFaSGD([{"params": [param], "algorithm": "adamw"}])


def test_a_model_of_fsdp1_is_refused():
    class Wrapped(FullyShardedDataParallel):
        def __init__(self, module):
            nn.Module.__init__(self)
            self.module = module

    model = nn.Linear(8, 6, bias=False)
    with pytest.raises(ValueError, match="sharded by FSDP1: use FSDP2"):
        MoFaSGD([model.weight], rank=2).attach(nn.Sequential(Wrapped(model)))


def test_parameters_of_deepspeed_are_refused():
    weight = nn.Parameter(torch.randn(8, 6))
    weight.ds_id = 3
    with pytest.raises(ValueError, match=r"partitioned by DeepSpeed ZeRO: use FSDP2 \(fully_shard\) or DDP"):
        MoFaSGD([weight], rank=2)


def test_an_engine_of_deepspeed_is_refused():
    class DeepSpeedEngine(nn.Module):
        def __init__(self, module):
            super().__init__()
            self.module = module

    model = nn.Linear(8, 6, bias=False)
    with pytest.raises(ValueError, match="DeepSpeedEngine: use DDP or FSDP2"):
        MoFaSGD([model.weight], rank=2).attach(DeepSpeedEngine(model))


def test_partitions_that_zero_puts_in_place_of_the_matrices_are_refused():
    opt = MoFaSGD([nn.Parameter(torch.randn(8, 6))], rank=2)
    # As the optimizers of ZeRO 1 and 2 do with the groups of the one that they wrap.
    opt.param_groups[0]["params"] = [nn.Parameter(torch.randn(48))]
    with pytest.raises(ValueError, match=r"shape \(48,\) was a matrix.*DeepSpeed ZeRO.*use FSDP2"):
        opt.step()


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8])
def test_quantized_weights_are_refused(dtype):
    weight = nn.Parameter(torch.zeros(8, 6, dtype=dtype), requires_grad=False)
    with pytest.raises(ValueError, match=r"quantized weights: dequantize them, or freeze them"):
        MoFaSGD([weight], rank=2)
