"""One of two processes of the tests with ranks: runs the cases of a module and writes what came out.

python dist_ranks.py MODULE RANK FOLDER
"""

import importlib
import sys
import traceback
import warnings
from datetime import timedelta
from pathlib import Path

import torch
from torch import distributed

module, rank, folder = sys.argv[1], int(sys.argv[2]), Path(sys.argv[3])
torch.set_num_threads(1)
store = distributed.FileStore(str(folder / "store"), 2)
distributed.init_process_group("gloo", store=store, rank=rank, world_size=2, timeout=timedelta(seconds=60))
results = {}
for name, case in importlib.import_module(module).CASES.items():
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        try:
            results[name] = case(rank)
        except Exception as error:
            # Both ranks must go on to the next case together: one that fails alone ends the run by a timeout.
            results[name] = error if isinstance(error, ValueError) else RuntimeError(traceback.format_exc())
    results[f"{name}: warnings"] = [str(w.message) for w in told]
torch.save(results, folder / f"rank{rank}.pt")
distributed.barrier()
distributed.destroy_process_group()
