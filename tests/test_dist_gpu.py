"""Two GPUs (NCCL) train alike, and as one does with both batches: what hooks do beside FSDP2's streams, and kernels."""

import functools

import pytest
import torch
from dist_case import Outcome, alone, distance, net
from dist_fsdp_cases import DTYPES, STEPS
from dist_pair import run_pair

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.slow,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="fewer than two CUDA devices"),
]

# As on the CPU (test_dist_ddp.py), and ten times that for float32: products are summed in other orders still.
FAR = {torch.float32: 3e-4, torch.bfloat16: 0.1}
NORMS = {torch.float32: 1e-5, torch.bfloat16: 1e-2}


@functools.cache
def single(dtype, **options):
    with torch.device("cuda:0"):
        return alone(dtype, STEPS, **options)


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    return functools.cache(lambda module: run_pair(module, tmp_path_factory.mktemp(module), "nccl"))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("module", "case"),
    [("dist_ddp_cases", f"{engine} {mode}") for engine in ("ddp", "plain") for mode in ("auto", "release")]
    + [("dist_fsdp_cases", mode) for mode in ("dense", "auto", "release")],
)
def test_two_gpus_are_one_with_both_batches(pair, module, case, dtype):
    found = [results[f"{case} {dtype}"] for results in pair(module)]
    for one in found:
        if isinstance(one, Exception):
            raise one
    first, second = found
    assert isinstance(first, Outcome)
    assert first.same(second)
    kind = DTYPES[dtype]
    expected = single(kind)
    assert first.norms == pytest.approx(expected.norms, rel=NORMS[kind])
    far, name = distance(first.weights, expected.weights, net(kind).state_dict())
    assert far < FAR[kind], name
