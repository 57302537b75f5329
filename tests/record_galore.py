"""Record a trajectory of the published galore-torch, once, into tests/data/galore_trace.json.

pip install --no-deps --target /tmp/galore galore-torch==1.0 && python tests/record_galore.py /tmp/galore

Its package imports transformers and bitsandbytes, which its AdamW does not need; both are stubbed.
"""

import importlib
import importlib.metadata
import json
import sys
import types
from pathlib import Path

import torch
from galore_case import OPTIONS, SHAPES, gradients, weights


def published_adamw(folder):
    stubs = ["bitsandbytes", "transformers", "transformers.utils", "transformers.utils.versions"]
    sys.modules |= {name: types.ModuleType(name) for name in stubs}
    sys.modules["transformers.utils.versions"].require_version = lambda *_: None
    package = types.ModuleType("galore_torch")
    package.__path__ = [f"{folder}/galore_torch"]
    sys.modules["galore_torch"] = package
    return importlib.import_module("galore_torch.adamw").AdamW


def main(folder):
    sys.path.insert(0, folder)
    AdamW = published_adamw(folder)
    traces = []
    for shape in SHAPES:
        W = torch.nn.Parameter(weights(shape))
        own = {
            "rank": OPTIONS["rank"],
            "update_proj_gap": OPTIONS["gap"],
            "scale": OPTIONS["scale"],
            "proj_type": "std",
        }
        rest = {k: OPTIONS[k] for k in ("lr", "weight_decay")}
        opt = AdamW([{"params": [W], **own}], no_deprecation_warning=True, **rest)
        steps = []
        for G in gradients(shape):
            W.grad = G
            opt.step()
            steps.append(W.detach().tolist())
        traces.append(steps)
    version = importlib.metadata.version("galore-torch")
    out = Path(__file__).parent / "data" / "galore_trace.json"
    out.parent.mkdir(exist_ok=True)
    out.write_text(json.dumps({"galore-torch": version, "torch": torch.__version__, "weights": traces}))


if __name__ == "__main__":
    main(sys.argv[1])
