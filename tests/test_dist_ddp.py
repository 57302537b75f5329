"""Two replicas (gloo, with and without DDP) train alike, and as one process does on both batches."""

import functools

import dist_ddp_cases as cases
import pytest
import torch
from dist_case import Outcome, alone, distance, documented, net
from dist_pair import run_pair

# Against the distance moved in STEPS steps. float32: the same sums in another order, 4e-6 seen. bfloat16: every rank
# rounds the gradients of its own batch to 8 bits, and stochastic rounding turns what is left into last places of
# single weights: 0.04 seen here, and 0.04 with full gradients under DDP.
FAR = {torch.float32: 3e-5, torch.bfloat16: 0.1}
NORMS = {torch.float32: 1e-6, torch.bfloat16: 1e-2}

alone = functools.cache(alone)


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    return run_pair("dist_ddp_cases", tmp_path_factory.mktemp("ddp"))


def agreed(pair, name):
    """Return what rank 0 made of a case, after comparing both ranks bit by bit."""
    first, second = (results[name] for results in pair)
    for found in (first, second):
        if isinstance(found, Exception):
            raise found
    assert isinstance(first, Outcome)
    assert first.same(second)
    return first


def check(found, expected, dtype=torch.float32):
    assert found.norms == pytest.approx(expected.norms, rel=NORMS[dtype])
    far, name = distance(found.weights, expected.weights, net(dtype).state_dict())
    assert far < FAR[dtype], name


@pytest.mark.parametrize("dtype", cases.DTYPES)
@pytest.mark.parametrize("engine", ["ddp dense", "ddp auto", "ddp release", "plain auto", "plain release"])
def test_two_replicas_are_one_process_with_both_batches(pair, engine, dtype):
    kind = cases.DTYPES[dtype]
    check(agreed(pair, f"{engine} {dtype}"), alone(kind, cases.STEPS), kind)


def test_the_lines_of_the_document_train_replicas(pair):
    found = agreed(pair, "documented")
    assert found.bytes > 0
    check(found, documented(None, 0, 2, DistributedDataParallel=lambda model: model))


@pytest.mark.parametrize("name", ["clipped", "clipped under ddp"])
def test_all_ranks_clip_by_the_norm_of_the_mean_gradient(pair, name):
    check(agreed(pair, name), alone(torch.float32, cases.STEPS, max_grad_norm=0.1, weight_decay=0.1))


@pytest.mark.parametrize("name", ["stepped in backward", "stepped in backward under ddp"])
def test_a_step_in_backward_sums_its_sketches_there(pair, name):
    check(agreed(pair, name), alone(torch.float32, cases.STEPS, micro=1))


def test_a_step_in_backward_that_reads_the_gradient_has_it_averaged(pair):
    check(agreed(pair, "complement"), alone(torch.float32, cases.STEPS, micro=1, complement=1.0))


def test_a_rank_that_does_not_use_a_layer_counts_with_zeros(pair):
    check(agreed(pair, "unequal"), alone(torch.float32, cases.STEPS, loss=cases.unequal_loss))


def test_what_no_rank_uses_does_not_move_or_decay(pair):
    found = agreed(pair, "unused")
    expected = alone(torch.float32, cases.STEPS, loss=cases.unused_loss, weight_decay=0.1)
    check(found, expected)
    clocks, others = ([value for value in made.state if value.ndim == 0] for made in (found, expected))
    assert clocks == others
    start = net().state_dict()
    for name in ("up.weight", "up.bias", "down.weight"):
        assert torch.equal(found.weights[name], start[name]), name


def test_a_gradient_that_is_not_finite_on_one_rank_is_skipped_by_all(pair):
    found = agreed(pair, "not finite")
    check(found, alone(torch.float32, 2, loss=cases.bad_loss))
    assert torch.equal(found.weights["raw"], net().raw)


def test_fifty_steps_leave_all_bits_alike(pair):
    found = agreed(pair, "long")
    assert len(found.norms) == 50
    assert not torch.equal(found.weights["up.weight"], net(torch.bfloat16).up.weight)


def test_bytes_of_a_step_are_those_of_the_sketches_and_adamw_s_gradients(pair):
    sent, formula, adamw = pair[0]["bytes"]
    assert 0.9 * formula < sent - adamw <= 1.05 * formula


@pytest.mark.parametrize("name", ["drifted", "drifted under ddp"])
def test_drifted_replicas_are_told_of_once_and_get_rank_0_s_state(pair, name):
    (found, later), (other, other_later) = (results[name] for results in pair)
    assert found.same(other)
    assert later.same(other_later)
    told, silent = (results[f"{name}: warnings"] for results in pair)
    assert [text for text in told if "ranks held different" in text] == [
        "ranks held different weights or optimizer state: all have rank 0's now"
    ]
    assert silent == []


def test_parameters_that_join_later_begin_with_rank_0_s_weights(pair):
    assert len(agreed(pair, "added later").norms) == 4


def test_a_rank_without_a_batch_knows_of_what_was_unfrozen(pair):
    found = agreed(pair, "unfrozen without a batch")
    assert not torch.equal(found.weights["up.weight"], net().up.weight)


def test_ranks_that_resume_from_different_states_begin_with_rank_0_s(pair):
    assert len(agreed(pair, "resumed otherwise").norms) == 1
    assert any("ranks held different" in text for text in pair[0]["resumed otherwise: warnings"])


@pytest.mark.parametrize("order", ["attach(ddp)", "attach(ddp.module)", "attach(part of ddp.module)"])
def test_attaching_what_ddp_has_wrapped_is_refused_with_the_order(pair, order):
    assert "opt.attach(root), then DistributedDataParallel(root)" in pair[0]["orders"][order]
    assert "inside DistributedDataParallel already" in pair[0]["orders"][order] or order == "attach(ddp)"


def test_ddp_around_more_than_the_attached_module_is_refused_with_the_order(pair):
    message = pair[0]["orders"]["DDP(around attached)"]
    assert "opt.attach(root), then DistributedDataParallel(root)" in message


@pytest.mark.parametrize("when", ["detach", "detach later"])
def test_detaching_inside_ddp_is_refused_with_the_fix_and_leaves_no_trace_after_it(pair, when):
    assert "Drop the wrapper first (model = ddp.module; del ddp)" in pair[0]["orders"][when]
    assert pair[0]["orders"]["left"] is False
    assert pair[0]["orders"]["copy"] is False


def test_parameters_leave_ddp_s_buckets_and_the_user_s_list_stays(pair):
    (found, own, kept), (other, others_own, _) = (results["a root's own parameter"] for results in pair)
    assert found.same(other)
    assert kept == ["own"]
    assert (own[0], others_own[0]) == (0, 1)


def test_a_model_whose_parameters_are_all_attached_needs_no_ddp(pair):
    agreed(pair, "all attached")


def test_one_rank_may_watch_a_gradient_from_within_a_window_on(pair):
    (found, seen), (other, others) = (results["watched later"] for results in pair)
    assert found.same(other)
    check(found, alone(torch.float32, cases.STEPS))
    assert (seen, others) == ([(73, cases.WIDTH)] * 5, [])
