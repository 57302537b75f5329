"""Ranks that start in no time: copies of the test's own process, joined over gloo."""

import os
import socket
from multiprocessing import get_context

import torch._dynamo  # what every copy would import by itself
import torch.distributed as dist
import torch.distributed.checkpoint.state_dict  # noqa: F401

from mofasgd.app.ranks import joined


def _rank(rank, world, port, pipe, work, args):
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world)}
    os.environ |= {"LOCAL_WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    try:
        with joined("cpu") as ranks:
            pipe.send(work(ranks, *args))
    except Exception as error:
        pipe.send(error)
        # Rank 0 has the store, which the others may still ask.
        os._exit(1)


def together(work, *args, world=2):
    """Return what `work(ranks, *args)` returns or raises in each of `world` ranks, or a negative signal's number."""
    assert not dist.is_initialized()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context, processes, pipes = get_context("fork"), [], []
    for rank in range(world):
        pipe, end = context.Pipe(duplex=False)
        processes.append(context.Process(target=_rank, args=(rank, world, port, end, work, args)))
        processes[-1].start()
        end.close()
        pipes.append(pipe)
    outcomes = []
    for process, pipe in zip(processes, pipes, strict=True):
        try:
            outcomes.append(pipe.recv())
            process.join(60)
        except EOFError:
            process.join(60)
            outcomes.append(process.exitcode)
        if process.exitcode is None:
            process.kill()
            outcomes[-1] = f"hung after {outcomes[-1]!r}"
    return outcomes
