"""Several ranks train what one process does, agree on every end, and lose nothing by one that is killed."""

import dataclasses
import io
import os
import random
import re
import signal
import sys
from pathlib import Path

import pytest
import torch
from app_common import final_weights, metrics, run_quietly, tiny, wait_for, write_config
from ranks_case import together

from mofasgd.app import checkpoint, trainer
from mofasgd.app.baselines import METHODS
from mofasgd.app.compare import compare
from mofasgd.app.config import CompareConfig, OptimizerConfig
from mofasgd.app.display import Display
from mofasgd.app.errors import Diverged, Lost, Stopped
from mofasgd.app.pretrain import _train_here, pretrain
from mofasgd.app.run import train
from mofasgd.app.signals import catch_signals
from mofasgd.app.trainer import Trainer


def equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def run_ranks(ranks, config):
    return train(config, Display(quiet=True), ranks)


def trained(ranks, configs):
    """Return the windows of the first step, and weights and validation loss after three steps, by name."""
    results = {}
    for name, config in configs.items():
        one = Trainer(config, ranks)
        one.connect()
        windows = one._batch().tolist()
        for _ in range(3):
            one.train_step()
        weights = {key: value.float().numpy().copy() for key, value in one.model.state_dict().items()}
        results[name] = windows, weights, one.evaluate()
    return results


def test_two_ranks_train_as_one_process(tmp_path):
    configs = {}
    for name in METHODS:
        optimizer = {"name": name} | ({"rank": 4} if "rank" in METHODS[name].defaults else {})
        configs[name] = tiny(tmp_path, optimizer=optimizer, micro_batch_size=1)
    mofasgd = {"name": "mofasgd", "rank": 4}
    configs["complement"] = tiny(tmp_path, optimizer=mofasgd | {"complement": 1.0})
    configs["dense"] = tiny(tmp_path, optimizer=mofasgd | {"attach": "none", "max_grad_norm": 0.5}, micro_batch_size=1)
    configs["clipped"] = tiny(tmp_path, optimizer=mofasgd | {"max_grad_norm": 0.5}, micro_batch_size=1)
    configs["bfloat16"] = tiny(tmp_path, optimizer=mofasgd, precision="bf16-true", batch_size=8)
    first, second = together(trained, configs)
    (alone,) = together(trained, configs, world=1)
    for name in configs:
        # No sequence twice, none left out.
        assert first[name][0] + second[name][0] == alone[name][0]
        # Muon's Newton-Schulz steps are in bfloat16, and bfloat16 weights are rounded at random.
        bound = 2e-3 if "muon" in name else 0.02 if name == "bfloat16" else 1e-5
        for key, weight in first[name][1].items():
            assert (weight == second[name][1][key]).all(), (name, key)
            assert abs(weight - alone[name][1][key]).max() < bound, (name, key)
        assert first[name][2] == second[name][2] == pytest.approx(alone[name][2], abs=max(1e-5, bound / 10))


def test_one_rank_keeps_the_folder(tmp_path):
    run_quietly(tiny(tmp_path, out=tmp_path / "alone", seed=3))
    results = together(run_ranks, tiny(tmp_path, out=tmp_path / "both", seed=3))
    assert results[0] == results[1]
    alone, both = metrics(tmp_path / "alone"), metrics(tmp_path / "both")
    assert len(alone) == len(both)
    for one, two in zip(alone, both, strict=True):
        assert one == pytest.approx(two, rel=1e-5)
    names = [{path.name for path in (tmp_path / part).rglob("*")} for part in ("alone", "both")]
    assert names[0] == names[1]
    content = checkpoint.load(tmp_path / "both" / "checkpoints")
    assert content["ranks"] == len(content["rng"]) == 2


def interrupted(ranks, config):
    step = Trainer.train_step

    def train_step(self):
        if self.step == 2 and ranks.rank == 1:
            # As Ctrl-C arrives: from the terminal and from the launcher.
            signal.raise_signal(signal.SIGTERM)
            signal.raise_signal(signal.SIGTERM)
        return step(self)

    Trainer.train_step = train_step
    return run_ranks(ranks, config)


def test_a_signal_to_one_rank_stops_all_and_the_run_goes_on_bit_for_bit(tmp_path):
    together(run_ranks, tiny(tmp_path, out=tmp_path / "whole"))

    for outcome in together(interrupted, tiny(tmp_path)):
        assert isinstance(outcome, Stopped)
        assert "SIGTERM at step 3: saved. Go on with: torchrun ... -m mofasgd.cli pretrain --config" in str(outcome)
    together(run_ranks, tiny(tmp_path, resume=True))
    assert equal(final_weights(tmp_path / "whole"), final_weights(tmp_path / "run"))
    assert metrics(tmp_path / "whole")[-2:] == metrics(tmp_path / "run")[-2:]


def stopped(ranks, config):
    Trainer.evaluate = lambda self: 1.0 if self.step < 8 else float("nan")
    return run_ranks(ranks, config)


def resumed(ranks, config):
    return train(config, Display(quiet=not ranks.lead), ranks)


@pytest.mark.parametrize(("before", "after"), [(2, 1), (1, 2)])
def test_another_number_of_ranks_goes_on_with_the_same_data(tmp_path, capsys, before, after):
    options = {"checkpoint_every": 4, "optimizer": {"name": "sgd", "lr": 0.1}}
    outcomes = together(stopped, tiny(tmp_path, **options), world=before)
    assert all(isinstance(outcome, Diverged) for outcome in outcomes)
    together(resumed, tiny(tmp_path, resume=True, **options), world=after)
    run_quietly(tiny(tmp_path, out=tmp_path / "whole", **options))
    whole, mixed = final_weights(tmp_path / "whole"), final_weights(tmp_path / "run")
    for name, weight in whole.items():
        torch.testing.assert_close(weight, mixed[name], rtol=0, atol=1e-6)


def fail(*arguments):
    raise OSError("no such disk")


def broken(ranks, config, where, rank):
    """Run with an error in one of the ranks."""
    if ranks.rank == rank and where == "data":
        batch = Trainer._batch
        Trainer._batch = lambda self: batch(self) if self.step < 3 else fail()
    elif ranks.rank == rank and where == "settings":
        config.log_every = 5
    elif ranks.rank == rank and where == "device":
        trainer.choose_device = fail
    elif ranks.rank == rank and where == "load":
        trainer.load = fail
    elif ranks.rank == rank and where == "other data":
        corpus, validation = trainer.load(config.data)
        trainer.load = lambda data: (dataclasses.replace(corpus, fingerprint="other"), validation)
    elif ranks.rank == rank and where == "save":
        checkpoint.save = fail
    elif ranks.rank == rank and where == "evaluation":
        part = Trainer._evaluate_part
        Trainer._evaluate_part = lambda self: part(self) if self.step < 3 else fail()
    return run_ranks(ranks, config)


@pytest.mark.parametrize(
    ("where", "rank", "message"),
    [
        ("data", 1, r"rank 1: no such disk. Step 3 is saved; when that is mended: torchrun"),
        ("settings", 1, r"rank 1 was started with log_every=5, rank 0 with 2: give all the same"),
        ("device", 1, r"rank 1: no such disk"),
        ("load", 0, r"no such disk"),
        ("load", 1, r"rank 1: no such disk"),
        ("other data", 1, r"rank 1 has other data than rank 0 \(the checksums differ\)"),
        ("save", 0, r"step 8 could not be saved \(no such disk\); there is no checkpoint yet"),
        ("evaluation", 1, r"rank 1: no such disk. Step 4 is saved"),
    ],
)
def test_an_error_of_one_rank_ends_all_with_it(tmp_path, where, rank, message):
    outcomes = together(broken, tiny(tmp_path), where, rank)
    for outcome in outcomes:
        assert type(outcome) in (Stopped, ValueError, OSError)
        assert re.match(message, str(outcome))


def steps_in_backward(ranks, config):
    handle = Trainer(config, ranks).handle
    return handle is not None and handle.stepping


def test_a_rank_whose_micro_batch_is_its_part_of_the_batch_steps_in_backward(tmp_path):
    config = tiny(tmp_path, optimizer={"name": "mofasgd", "rank": 4, "complement": 1.0}, micro_batch_size=2)
    assert together(steps_in_backward, config) == [True, True]
    assert together(steps_in_backward, config, world=1) == [False]


def test_ranks_that_do_not_fit(tmp_path):
    cases = [
        (tiny(tmp_path, batch_size=5), "batch_size=5 cannot be shared by 2 ranks"),
        (tiny(tmp_path, batch_size=12, micro_batch_size=4), "is 6 sequences for each of 2 ranks, no multiple of"),
        (tiny(tmp_path, device="cuda:1"), "device='cuda:1' would be every rank's"),
    ]
    for config, message in cases:
        for outcome in together(run_ranks, config):
            assert isinstance(outcome, ValueError)
            assert message in str(outcome)
    assert not (tmp_path / "run").exists()


def test_starts_that_do_not_fit(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(ValueError, match="gpus=2, but this machine has 1: lower it, or add --device cpu"):
        pretrain(tiny(tmp_path, gpus=2, device="auto"))
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="WORLD_SIZE=2 says that there are several processes, but RANK, LOCAL_RANK"):
        pretrain(tiny(tmp_path))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="gpus=3, but torchrun has started 2 processes here: leave gpus out"):
        pretrain(tiny(tmp_path, gpus=3))
    with pytest.raises(ValueError, match="compare is one process: start it without torchrun"):
        compare(CompareConfig(methods={"a": OptimizerConfig()}))


def killed(ranks, config, plan):
    """Run, and die by SIGKILL if the plan has this rank: in a step, or with a share of a checkpoint on the disk."""
    ranks_to_die, where, after, share = plan
    if ranks.rank in ranks_to_die:
        left = [after]

        def due():
            left[0] -= 1
            return left[0] == 0

        step, save = Trainer.train_step, torch.save

        def train_step(self):
            if where == "step" and due():
                os.kill(os.getpid(), signal.SIGKILL)
            return step(self)

        def save_some(content, out, **options):
            if where == "save" and isinstance(content, dict) and "optimizers" in content and due():
                whole = io.BytesIO()
                save(content, whole)
                out.write(whole.getvalue()[: int(len(whole.getvalue()) * share)])
                out.flush()
                os.kill(os.getpid(), signal.SIGKILL)
            return save(content, out, **options)

        Trainer.train_step, torch.save = train_step, save_some
    return run_ranks(ranks, config)


def kill_and_resume(folder, plans, **options):
    """Run with each plan in turn and then to the end; assert that nothing is lost against a run without them."""
    together(run_ranks, tiny(folder, out=folder / "whole", **options))
    for attempt, plan in enumerate(plans):
        outcomes = together(killed, tiny(folder, resume=attempt > 0, **options), plan)
        for rank, outcome in enumerate(outcomes):
            if rank in plan[0]:
                assert outcome == -signal.SIGKILL
            else:
                assert isinstance(outcome, Lost)
                assert re.search(
                    rf"rank {rank} has lost another rank.*(is whole|no checkpoint).*--resume", str(outcome)
                )
    results = together(run_ranks, tiny(folder, resume=True, **options))
    assert results[0] == results[1]
    assert equal(final_weights(folder / "whole"), final_weights(folder / "run"))
    whole, run = metrics(folder / "whole"), metrics(folder / "run")
    assert [line for line in run if "validation_loss" in line] == [line for line in whole if "validation_loss" in line]


def test_killed_ranks_lose_nothing(tmp_path):
    plans = [({1}, "step", 5, 0.0), ({0}, "save", 2, 0.5), ({0, 1}, "step", 2, 0.0)]
    kill_and_resume(tmp_path, plans, steps=8, checkpoint_every=2)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(10))
def test_ranks_killed_at_random_lose_nothing(tmp_path, seed):
    chance = random.Random(seed)
    plans = []
    for attempt in range(5):
        where = ("step", "save")[attempt % 2]
        # The lead alone writes; of the others some die in a step.
        dying = {0} if where == "save" else chance.choice([{0}, {1}, {0, 1}])
        plans.append(
            (dying, where, chance.randint(1, 4) if where == "save" else chance.randint(1, 10), chance.random())
        )
    kill_and_resume(tmp_path, plans, steps=40, checkpoint_every=2, log_every=5, eval_every=20)


@pytest.fixture
def launch(start_process):
    """Return a function that starts `python -m *command pretrain` on a configuration."""

    def launch(config, folder, *command):
        path = write_config(config, folder / "config.yaml")
        return start_process([sys.executable, "-m", *command, "pretrain", "--config", str(path)])

    return launch


def pids_of_ranks(launcher, out):
    """Return the pids of a launcher's two ranks, by rank: the lead alone has the run folder's metrics open."""
    leads, others = [], []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            parent = int((folder / "stat").read_text().rsplit(")")[-1].split()[1])
            if parent != launcher.pid or "resource_tracker" in (folder / "cmdline").read_text():
                continue
            files = {os.readlink(file) for file in (folder / "fd").iterdir()}
        except OSError:
            continue
        (leads if str(out / "metrics.jsonl") in files else others).append(int(folder.name))
    (lead,), (other,) = leads, others
    return lead, other


def test_gpus_starts_the_ranks_and_tells_of_a_killed_one(tmp_path, launch):
    options = {"steps": 2000, "log_every": 1, "checkpoint_every": 1, "keep_checkpoints": 1}
    process = launch(tiny(tmp_path, gpus=2, **options), tmp_path, "mofasgd.cli")
    wait_for(process, tmp_path / "run", "checkpoints/*.pt")
    os.kill(pids_of_ranks(process, tmp_path / "run")[1], signal.SIGKILL)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 1
    assert error.count("\n") == 1, error
    pattern = (
        r"mofasgd pretrain: error: rank 1 was killed by SIGKILL; the checkpoint of step (\d+) is whole. Go on with: "
    )
    found = re.match(pattern + r"mofasgd pretrain --config \S*config.yaml --resume true\n", error)
    assert found, error
    assert checkpoint.load(tmp_path / "run" / "checkpoints")["step"] == int(found[1])


def test_a_rank_that_has_lost_another_leaves_the_launcher_time_to_find_it(tmp_path, monkeypatch):
    def lose(*arguments):
        raise Lost("another rank is gone")

    waited = []
    monkeypatch.setattr("mofasgd.app.pretrain.train", lose)
    monkeypatch.setattr("time.sleep", waited.append)
    with pytest.raises(SystemExit):
        _train_here(tiny(tmp_path), tells_of_loss=False)
    # torch's launcher looks ten times a second.
    assert sum(waited) > 5


def test_a_second_signal_acts_at_once():
    with catch_signals() as caught:
        signal.raise_signal(signal.SIGINT)
        assert caught == ["SIGINT"]
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


@pytest.mark.slow
def test_ctrl_c_in_a_terminal_saves(tmp_path, launch):
    options = {"steps": 400, "log_every": 1}
    process = launch(tiny(tmp_path, gpus=2, **options), tmp_path, "mofasgd.cli")
    wait_for(process, tmp_path / "run", "metrics.jsonl")
    os.killpg(process.pid, signal.SIGINT)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 1
    assert error.count("\n") == 1, error
    step = int(re.search(r"SIGINT at step (\d+): saved", error)[1])
    assert checkpoint.load(tmp_path / "run" / "checkpoints")["step"] == step
    process = launch(tiny(tmp_path, gpus=2, resume=True, **options), tmp_path, "mofasgd.cli")
    out, error = process.communicate(timeout=120)
    assert (process.returncode, error) == (0, "")
    assert out.startswith(f"resumed at step {step}\n")
    together(run_ranks, tiny(tmp_path, out=tmp_path / "whole", **options))
    assert equal(final_weights(tmp_path / "whole"), final_weights(tmp_path / "run"))


@pytest.mark.slow
def test_torchrun(tmp_path, launch):
    run = ("torch.distributed.run", "--nproc-per-node", "2", "-m", "mofasgd.cli")
    options = {"log_every": 1, "checkpoint_every": 5}
    process = launch(tiny(tmp_path, steps=400, **options), tmp_path, *run)
    wait_for(process, tmp_path / "run", "checkpoints/*.pt")
    os.kill(pids_of_ranks(process, tmp_path / "run")[0], signal.SIGKILL)
    _, error = process.communicate(timeout=60)
    assert process.returncode != 0
    assert error.count("mofasgd pretrain: error: rank 1 has lost another rank") == 1
    process = launch(tiny(tmp_path, steps=400, resume=True, **options), tmp_path, *run)
    out, error = process.communicate(timeout=120)
    assert process.returncode == 0, error
    assert out.startswith("resumed at step ")
    assert "step 400  validation loss" in out
    together(run_ranks, tiny(tmp_path, steps=400, out=tmp_path / "whole"))
    assert equal(final_weights(tmp_path / "whole"), final_weights(tmp_path / "run"))
    process = launch(tiny(tmp_path, batch_size=3, out=tmp_path / "other"), tmp_path, *run)
    _, error = process.communicate(timeout=60)
    assert error.count("mofasgd pretrain: error: batch_size=3 cannot be shared by 2 ranks") == 1
