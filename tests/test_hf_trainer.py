"""transformers' Trainer with MoFaSGD: the steps, the logs, the checkpoints and the ends of a run."""

import json

import pytest
import torch

transformers = pytest.importorskip("transformers")

from hf_case import STEPS, Watch, arguments, by_hand, logged, make, samples, trainer_of  # noqa: E402
from safetensors.torch import load_file  # noqa: E402


def same(model, other):
    return all(torch.equal(p, q) for p, q in zip(model.parameters(), other.parameters(), strict=True))


def flat(opt):
    return {(i, key): value for i, own in opt.state_dict()["state"].items() for key, value in own.items()}


CASES = [(name, dtype) for name in ("llama", "gpt2", "bert") for dtype in (torch.bfloat16, torch.float32)]


@pytest.mark.parametrize(("name", "dtype"), CASES)
def test_resumed_at_half_time_a_run_ends_as_the_unbroken_one_bit_for_bit(name, dtype, tmp_path):
    options = {"save_strategy": "steps", "save_steps": 15, "train_sampling_strategy": "random"}
    options |= {"eval_strategy": "steps", "eval_steps": 10}
    runs = []
    for resume in (None, str(tmp_path / "checkpoint-15")):
        watch = Watch()
        trainer = trainer_of(make(name, dtype), arguments(tmp_path, **options), [watch])
        trainer.train(resume_from_checkpoint=resume)
        assert watch.held == set()
        # Evaluation in between neither steps nor adds to a norm.
        assert logged(trainer)[-len(watch.norms) :] == watch.norms
        runs.append((trainer.model, trainer.optimizer.optimizer, watch.norms, logged(trainer, "eval_loss")))
    (model, opt, norms, losses), (resumed, other, later, again) = runs
    assert len(norms) == STEPS
    assert later == norms[15:]
    assert again == losses
    assert same(model, resumed)
    states = flat(opt), flat(other)
    assert states[0].keys() == states[1].keys()
    assert {value.dtype for (_, key), value in states[1].items() if key in "UsV"} == {torch.float32}
    assert all(value.dtype == states[1][key].dtype for key, value in states[0].items())
    assert all(torch.equal(value, states[1][key]) for key, value in states[0].items())


@pytest.mark.parametrize("attach", ["auto", "none"])
def test_a_trainer_takes_the_steps_of_a_loop_without_one(attach, tmp_path):
    args = arguments(tmp_path, max_steps=12)
    model, other, unclipped = (make("bert") for _ in range(3))
    trainer = trainer_of(model, args, attach=attach)
    trainer.train()
    norms, independent = by_hand(other, args, attach, steps=12)
    assert same(model, other)
    assert logged(trainer) == norms
    if attach == "none":
        # float32 sketches against float64 projections of G.
        assert norms == pytest.approx(independent, rel=1e-5)
    # Clipping matters: AdamW's moments and the momentum weigh windows by their size.
    assert min(norms) > args.max_grad_norm
    by_hand(unclipped, arguments(tmp_path, max_grad_norm=0.0), attach, steps=12)
    assert not same(model, unclipped)
