"""Two processes (gloo, DDP): replicas agree with each other and with one process."""

import runpy
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers")

from dist_pair import meeting_point, save_apart, torchrun_environment
from hf_case import arguments, logged, make, trainer_of

EXAMPLE = Path(__file__).parents[1] / "examples" / "hf" / "accelerate_loop.py"


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """Return what each of two processes has found."""
    folder, store = tmp_path_factory.mktemp("ranks"), meeting_point()
    script = Path(__file__).parent / "hf_ranks.py"
    return save_apart(folder, lambda rank: [script, folder], lambda rank: torchrun_environment(store, rank, 2))


@pytest.mark.parametrize("attach", ["auto", "none"])
def test_two_processes_train_alike_and_as_one_does(pair, attach, tmp_path):
    (weights, norms, again, later, sent), (others, *same_norms, others_later, _) = (found[attach] for found in pair)
    assert [norms, again] == same_norms
    for mine, theirs in ((weights, others), (later, others_later)):
        assert all(torch.equal(value, theirs[key]) for key, value in mine.items())
    assert (sent > 0) == (attach == "auto")
    alone = trainer_of(make("bert"), arguments(tmp_path, max_steps=6), attach=attach)
    for found in (norms, again):
        alone.train()
        # Eight rows a step, and in the sixth the four that are left of an epoch, summed in another order.
        assert len(found) == 6
        assert found == pytest.approx(logged(alone), rel=1e-5)


def test_the_accelerate_loop_exchanges_sketches_and_trains_as_one_process_does(pair):
    # The last batch of each step is the second process's: 10 steps of 2 x 4 micro-batches.
    (_, sent), (losses, same) = (found["example"] for found in pair)
    alone = runpy.run_path(str(EXAMPLE))["main"](steps=10, micro_batches=8)
    assert losses == pytest.approx(alone, rel=1e-3)
    assert losses[-1] < 0.8 * losses[0]
    assert sent == same > 0
