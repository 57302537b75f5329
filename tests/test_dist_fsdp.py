"""Weights sharded over two processes (gloo, FSDP2): training is that of one process with both batches."""

import functools

import dist_fsdp_cases as cases
import pytest
import torch
from dist_case import Outcome, alone, distance, documented, net
from dist_pair import run_pair

# Against the distance moved in STEPS steps. float32: the same sums in another order, 4e-6 seen. bfloat16 weights: each
# rank's gradients are rounded to 8 bits, and FSDP's sums of them once more, 0.06 seen, with full gradients too.
# The policy's weights are float32 and its gradients bfloat16: 0.02 seen.
FAR = {torch.float32: 3e-5, torch.bfloat16: 0.1}
NORMS = {torch.float32: 1e-6, torch.bfloat16: 1e-2}

alone = functools.cache(alone)


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    return run_pair("dist_fsdp_cases", tmp_path_factory.mktemp("fsdp"))


def both(pair, name):
    """Return what the two ranks made of a case."""
    for results in pair:
        if isinstance(results[name], Exception):
            raise results[name]
    return [results[name] for results in pair]


def agreed(pair, name):
    """Return what rank 0 made of a case, after comparing both ranks bit by bit."""
    first, second = both(pair, name)
    assert isinstance(first, Outcome)
    assert first.same(second)
    return first


def check(found, expected, dtype=torch.float32, start=torch.float32):
    assert found.norms == pytest.approx(expected.norms, rel=NORMS[dtype])
    far, name = distance(found.weights, expected.weights, net(start).state_dict())
    assert far < FAR[dtype], name


@pytest.mark.parametrize("dtype", cases.DTYPES)
@pytest.mark.parametrize("mode", cases.MODES)
def test_sharded_training_is_one_process_with_both_batches(pair, mode, dtype):
    kind = cases.DTYPES[dtype]
    check(agreed(pair, f"{mode} {dtype}"), alone(kind, cases.STEPS), kind, kind)


def test_the_lines_of_the_document_train_shards(pair):
    found = agreed(pair, "documented")
    assert found.bytes > 0
    check(found, documented(None, 1, 2, fully_shard=lambda module: module))


@pytest.mark.parametrize("mode", ["dense", "auto"])
def test_all_ranks_clip_by_the_norm_of_all_shards(pair, mode):
    check(agreed(pair, f"{mode} clipped"), alone(torch.float32, cases.STEPS, max_grad_norm=0.1, weight_decay=0.1))


def test_the_complement_is_of_the_gathered_gradient(pair):
    check(agreed(pair, "complement"), alone(torch.float32, cases.STEPS, complement=1.0, weight_decay=0.1))


def test_the_authors_step_is_that_of_one_process(pair):
    check(agreed(pair, "authors"), cases.authors(None, net()))


@pytest.mark.parametrize("mode", ["dense", "auto"])
def test_a_mixed_precision_policy_is_followed(pair, mode):
    found = agreed(pair, f"{mode} policy")
    assert {value.dtype for value in found.weights.values()} == {torch.float32}
    check(found, alone(torch.float32, cases.STEPS), torch.bfloat16)


@pytest.mark.parametrize("mode", cases.MODES)
def test_windows_without_gradient_sync_are_whole(pair, mode):
    check(agreed(pair, f"{mode} no_sync"), alone(torch.float32, cases.STEPS))


def test_checkpointed_layers_sketch_what_they_gather_again(pair):
    check(agreed(pair, "checkpointed"), alone(torch.float32, cases.STEPS))


@pytest.mark.parametrize("name", ["replicas of shards", "shards of replicas", "dense shards of replicas"])
def test_hybrid_sharding_is_sharding(pair, name):
    check(agreed(pair, name), alone(torch.float32, cases.STEPS))


def test_stochastic_rounding_does_not_depend_on_the_sharding(pair):
    shards, whole = agreed(pair, "rounded in shards").weights, agreed(pair, "rounded whole").weights
    start = net(torch.bfloat16).state_dict()
    # Sums of float32 in another order turn few roundings. With other random numbers half of the rows would differ.
    for name, value in whole.items():
        moved = value != start[name]
        assert (shards[name] != value).sum() <= 0.02 * moved.sum(), name


def test_sketched_layers_make_no_gradient_for_fsdp_to_reduce(pair):
    # Used by hand, or not the weight of a layer.
    assert both(pair, "sketches only") == [{"embedding.weight", "raw", "stack"}] * 2


def test_parameters_swapped_after_attach_are_followed(pair):
    (found, dense, states), (other, *_) = both(pair, "swapped")
    assert found.same(other)
    check(found, alone(torch.float32, cases.STEPS))
    # Its layer, which FSDP has given another class since, still sketches.
    assert dense is False
    assert states == len(list(net().parameters()))


def test_a_loaded_state_goes_on_bit_by_bit(pair):
    (unbroken, found), _ = both(pair, "resumed")
    assert found.same(unbroken)


def test_attaching_after_an_evaluation_finds_the_shards(pair):
    check(agreed(pair, "evaluated"), alone(torch.float32, cases.STEPS))


def test_hooks_registered_within_a_window_are_called_as_far_as_fsdp_calls_them(pair):
    (found, seen), (other, others) = both(pair, "hooked later")
    assert found.same(other)
    check(found, alone(torch.float32, cases.STEPS))
    # The second half of the second step, and both halves of the other two.
    assert seen == others == [True] * 5


@pytest.mark.parametrize(
    ("case", "text"),
    [
        ("columns", r"placements (Shard(dim=1),) on a mesh of shape (2,)"),
        ("replicas", "as of tensor parallelism"),
        ("tp", "what fully_shard shards by rows"),
        ("complement", "complement=1.0 needs the full gradient, which sketching never keeps"),
        ("step_in_backward", "use mode='release' without it"),
    ],
)
def test_what_shards_cannot_do_is_refused(pair, case, text):
    assert text in both(pair, "refusals")[0][case]
