"""Compile the sketch kernel for an H200, which needs none, and print how often its loop buffers and reads a tile.

A program of its own: elsewhere on a CPU Triton interprets.
"""

import json
import re
import sys

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from mofasgd.kernels import project
from mofasgd.kernels.common import TYPES, operand, precision


def compiled(rank, measure, turned):
    """Return the code of the loop, and its number of stages, for bfloat16 gradients of 4096 columns."""
    dtype = torch.bfloat16
    wide = max(32, triton.next_power_of_2(rank))
    cut = project._cut(dtype, 4096, rank, wide)
    names = project._products.arg_names
    fixed = {"M": cut.M, "N": cut.N, "R": wide, "Q": wide, "DTYPE": TYPES[dtype], "DOT": operand(dtype)}
    fixed |= {"PRECISION": precision(dtype), "ALIGNED": True, "MEASURE": measure, "along" if turned else "across": 1}
    kinds = dict.fromkeys(["AB", "parts", "squares"], "*fp32") | dict.fromkeys(["left", "right"], "*bf16")
    kinds |= {"matrices": "*i64"} | dict.fromkeys(fixed, "constexpr")
    signature = {name: kinds.get(name, "i32") for name in names}
    aligned = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(names) if name not in fixed}
    source = ASTSource(fn=project._products, signature=signature, constexprs=fixed, attrs=aligned)
    options = {"num_warps": cut.warps, "num_stages": cut.stages}
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options).asm["ttgir"], cut.stages


if __name__ == "__main__":
    rank, measure, turned = int(sys.argv[1]), "measure" in sys.argv, "turned" in sys.argv
    code, stages = compiled(rank, measure, turned)
    found = {
        "stages": stages,
        "buffers": [int(count) for count in re.findall(r"local_alloc.*?-> !ttg.memdesc<(\d+)x\d+x\d+x", code)],
        "into registers": len(re.findall(r"local_load", code)),
        "products": len(re.findall(r"warp_group_dot ", code)),
    }
    json.dump(found, sys.stdout)
