"""Ranks that start in no time: copies of a process that has imported everything, joined over gloo."""

import os
from multiprocessing import get_context

import torch
from dist_pair import meeting_point, torchrun_environment

from mofasgd.app.ranks import joined

# Not copies of the test's own process: autograd does not survive that where a GPU has been used.
_CONTEXT = get_context("forkserver")
_CONTEXT.set_forkserver_preload(
    ["torch._dynamo", "torch.distributed.checkpoint.state_dict", "torch.distributed.fsdp", "mofasgd.app.pretrain"]
)


def _rank(environment, pipe, work, args):
    torch.set_num_threads(1)
    os.environ |= environment
    try:
        with joined("cpu") as ranks:
            pipe.send(work(ranks, *args))
    except Exception as error:
        pipe.send(error)
        # Without waiting for the others.
        os._exit(1)


def together(work, *args, world=2):
    """Return what `work(ranks, *args)` returns or raises in each of `world` ranks, or a negative signal's number.

    Work and arguments are pickled: functions of a module.
    """
    store, processes, pipes, outcomes = meeting_point(), [], [], []
    for rank in range(world):
        pipe, end = _CONTEXT.Pipe(duplex=False)
        given = (torchrun_environment(store, rank, world), end, work, args)
        processes.append(_CONTEXT.Process(target=_rank, args=given, daemon=True))
        processes[-1].start()
        end.close()
        pipes.append(pipe)
    # All pipes before any process: ranks leave together, and none can while its outcome waits to be read.
    for pipe in pipes:
        try:
            outcomes.append(pipe.recv() if pipe.poll(240) else "hung")
        except EOFError:
            outcomes.append(EOFError)
    for i, process in enumerate(processes):
        process.join(60)
        if process.exitcode is None:
            process.kill()
            outcomes[i] = f"hung after {outcomes[i]!r}"
        elif outcomes[i] is EOFError:
            outcomes[i] = process.exitcode
    return outcomes
