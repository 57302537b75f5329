"""The authors' command line: their flags unchanged, mapped on the application, and mistakes that are told of."""

import copy
import dataclasses
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import yaml
from authors_case import Theirs
from torch import nn

from mofasgd.app.config import PretrainConfig
from mofasgd.app.trainer import Trainer
from mofasgd.cli import configured
from mofasgd.paper import keys
from mofasgd.paper.__main__ import VALIDATION, _flags, _misspelled, main, mapped

MFSGD = (
    '{"lr": 0.0009, "rank": 16, "beta": 0.95, "eta1": 0.25, "eta2": 0, "use_current_projection": true, '
    '"use_ones_for_nonzero_s": false, "nesterov": false, "eps": 1e-6, "max_value": 1000, "warmup_steps": 300, '
    '"beta_start": 0.75, "beta_end": 0.95, "cooldown_frac": 0.4}'
)
GALORE = '{"lr": 0.008, "group_params": {"rank": 16, "update_proj_gap": 150, "scale": 0.25, "proj_type": "std"}}'
SMALL = [
    "--device",
    "cpu",
    "--steps",
    "30",
    "--batch_size",
    "4",
    "--data.context",
    "16",
    "--model.layers",
    "1",
    "--model.width",
    "32",
    "--model.heads",
    "2",
    "--model.vocab_size",
    "256",
    "--eval_every",
    "30",
    "--eval_tokens",
    "64",
]


def dry(capsys, *arguments):
    assert main([*arguments, "--dry-run"]) == 0
    return json.loads(capsys.readouterr().out)


def config_of(*arguments):
    flags, rest = _flags().parse_known_args(arguments)
    return mapped(flags, rest)[1]


def shards(folder):
    """Two training shards and one for validation, of bytes, as FineWeb's are of GPT-2 tokens."""
    text = np.frombuffer(b"".join(b"%d squared is %d.\n" % (i, i * i) for i in range(300)), dtype=np.uint8)
    for name, part in zip(("train_0", "train_1", "val_0"), np.array_split(text, 3), strict=True):
        header = np.zeros(256, dtype="<i4")
        header[:3] = 20240520, 1, len(part)
        (folder / f"fineweb_{name}.bin").write_bytes(header.tobytes() + part.astype("<u2").tobytes())
    return ["--data.train", str(folder / "fineweb_train_*.bin"), "--data.validation", str(folder / "fineweb_val_*.bin")]


def test_the_readmes_command_is_mapped_key_by_key(capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: pytest.fail("a dry run looks for no GPU"))
    told = dry(capsys, "--optimizer", "mfsgd", "--num-gpus", "4", "--config", MFSGD)
    pretrain = told["pretrain"]
    assert pretrain["optimizer"] == {
        "name": "authors_mfsgd",
        "lr": 0.0009,
        "rank": 16,
        "beta": 0.95,
        "beta_start": 0.75,
        "beta_warmup_steps": 300,
        "eta1": 0.25,
        "eta2": 0,
        "clip_eps": 1e-6,
        "max_value": 1000,
        "use_current_projection": True,
        "use_ones_for_nonzero_s": False,
        "nesterov": False,
        "gradient_scale": 2.0,
    }
    assert pretrain["model"] == {"layers": 12, "width": 768, "heads": 6, "vocab_size": 50304}
    assert pretrain["data"]["train"] == ["data/fineweb10B/fineweb_train_*.bin"]
    # 4 GPUs x 2 micro-batches x 64k tokens, 1390 steps, the last 40 % of them cooling down
    assert pretrain["batch_size"] * pretrain["data"]["context"] == 4 * 2 * 64 * 1024
    assert pretrain["micro_batch_size"] * pretrain["data"]["context"] == 64 * 1024
    assert (pretrain["steps"], pretrain["warmup"], pretrain["cooldown"]) == (1390, 0.0, 0.4)
    assert any("use_current_projection is idle" in note for note in told["notes"])
    assert any("num_gpus=4" in note and "8 times 64 sequences" in note for note in told["notes"])


def test_the_galore_command_is_mapped(capsys):
    pretrain = dry(capsys, "--optimizer", "galore", "--num-gpus", "4", "--config", GALORE)["pretrain"]
    assert pretrain["optimizer"] == {
        "name": "authors_galore",
        "lr": 0.008,
        "rank": 16,
        "gap": 150,
        "scale": 0.25,
        "betas": [0.9, 0.95],
        "eps": 1e-8,
        "weight_decay": 0.0,
        "gradient_scale": 2.0,
    }


@pytest.mark.parametrize("optimizer", ["mfsgd", "muon", "adam", "adamw", "sgd", "galore"])
def test_what_a_dry_run_prints_is_a_configuration_of_pretrain(capsys, tmp_path, optimizer):
    pretrain = dry(capsys, "--optimizer", optimizer)["pretrain"]
    (tmp_path / "a.yaml").write_text(yaml.safe_dump(pretrain))
    assert configured("pretrain", ["--config", str(tmp_path / "a.yaml")])[1] == config_of("--optimizer", optimizer)


@pytest.mark.parametrize("gpus", [1, 2, 4, 8, 16])
def test_the_gradient_is_what_that_many_gpus_would_have_made(gpus):
    """Each sums the means over its micro-batches of 64k tokens, DDP averages over GPUs: so the authors' loop does."""
    means = np.random.default_rng(0).standard_normal(8)
    per_gpu = means.reshape(gpus, -1).sum(axis=1) if gpus <= 8 else means
    assert config_of("--num-gpus", str(gpus)).optimizer.gradient_scale * means.mean() == pytest.approx(per_gpu.mean())


@pytest.mark.parametrize(
    ("optimizer", "override"), [("mfsgd", MFSGD), ("galore", GALORE), ("muon", None), ("sgd", None), ("adamw", None)]
)
def test_flags_scale_the_run_down_and_it_learns(capsys, tmp_path, optimizer, override):
    given = [] if override is None else ["--config", override]
    scaled = [*SMALL, *shards(tmp_path), "--out", str(tmp_path / "run")]
    assert main(["--optimizer", optimizer, "--num-gpus", "4", *given, *scaled]) == 0
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    assert record["result"]["validation_loss"] < 0.6 * math.log(256)
    assert record["config"]["optimizer"]["name"] == f"authors_{optimizer}"
    assert "num_gpus=4" in capsys.readouterr().err


def on_four_gpus(model, windows):
    """Gradients of 8 sequences, one a micro-batch, two a GPU: summed on a GPU, averaged over the four."""
    total = {}
    for gpu in windows.view(4, 2, -1):
        for sequence in gpu:
            copied = copy.deepcopy(model)
            F.cross_entropy(copied(sequence[None, :-1])[0], sequence[1:]).backward()
            for name, param in copied.named_parameters():
                total[name] = total.get(name, 0.0) + param.grad.double().numpy() / 4
    return total


def test_the_mapped_run_is_the_authors_loop(tmp_path):
    """Their sum over micro-batches, schedules of rate and momentum, start and step, recomputed on dense matrices."""
    override = '{"lr": 0.02, "rank": 4, "eta1": 0.25, "eps": 1e-6, "max_value": 50, "warmup_steps": 4, '
    override += '"beta_start": 0.5, "beta_end": 0.9}'
    arguments = ["--optimizer", "mfsgd", "--num-gpus", "4", "--config", override, *SMALL, *shards(tmp_path)]
    trainer = Trainer(config_of(*arguments, "--steps", "6", "--batch_size", "8"))
    model = trainer.model
    nn.init.normal_(model.head.weight, std=0.1)  # at its start of zero no gradient reaches the blocks
    for name in ("blocks.0.attention.out", "blocks.0.down"):
        nn.init.normal_(model.get_submodule(name).weight, std=0.1)  # has no singular vectors at its start of zero
    weights = {name: param for name, param in model.named_parameters() if name.startswith("blocks")}
    theirs = {name: Theirs(W.detach().double().numpy(), 4) for name, W in weights.items()}
    adam = [torch.nn.Parameter(p.detach().clone()) for p in (model.embedding.weight, model.head.weight)]
    rest = torch.optim.Adam(
        [{"params": [p], "lr": lr} for p, lr in zip(adam, (0.6, 0.008), strict=True)], betas=(0.8, 0.95)
    )
    for step in range(6):
        grads = on_four_gpus(model, trainer.windows.batch(8 * step, 8))
        before = {name: W.detach().double().numpy() for name, W in weights.items()}
        # The rate falls over the last 0.4 * 6 steps.
        fall, beta = min(1.0, (6 - step) / 2.4), 0.5 + 0.4 * min(step / 4, 1)
        for p, name, lr, group in zip(adam, ("embedding", "head"), (0.6, 0.008), rest.param_groups, strict=True):
            p.grad, group["lr"] = torch.from_numpy(grads[f"{name}.weight"]).float(), lr * fall
        rest.step()
        trainer.train_step()
        for name, W in weights.items():
            expected = theirs[name].step(before[name], grads[name], 0.02 * fall, beta, 0.25, 1e-6, 50)
            assert np.abs(W.detach().numpy() - expected).max() <= 1e-4
        for p, name in zip(adam, ("embedding", "head"), strict=True):
            assert (p - model.get_submodule(name).weight).abs().max() <= 2e-3 * p.abs().max()
            p.data.copy_(model.get_submodule(name).weight)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--config", '{"rnk": 16}'], "'rnk' is no key of --optimizer mfsgd; did you mean 'rank'?"),
        (["--optimizer", "galore", "--config", '{"group_params": {"rnk": 16}}'], "group_params; did you mean 'rank'?"),
        (["--optimizer", "adam", "--config", '{"rank": 16}'], "'rank' is no key of --optimizer adam"),
        (["--optimizer", "mfsg"], "did you mean 'mfsgd'?"),
        (["--optimizer", "lomuon"], "did you mean 'mfsgd'?"),
        (["--config", '{"rank": 16'], "--config is no JSON"),
        (["--config", "16"], "should be a JSON object"),
        (["--config", '{"lr": "1e-4"}'], "lr='1e-4' is text"),
        (["--config", '{"nesterov": 1}'], "nesterov=1 should be True or False"),
        (["--config", '{"lr": [1]}'], "lr=[1] should be a number"),
        (["--config", '{"cooldown_frac": true}'], "cooldown_frac=True should be a number"),
        (["--config", '{"scheduler_name": "original_warmup", "lr_warmup_steps": null}'], "lr_warmup_steps=null is no"),
        (["--config", '{"scheduler_name": "original_warmup", "lr_warmup_steps": [1]}'], "lr_warmup_steps=[1] should"),
        (["--config", '{"scheduler_name": "original_warmup", "lr_warmup_steps": true}'], "lr_warmup_steps=True should"),
        (["--config", '{"scheduler_name": "original_warmup", "lr_warmup_steps": 1.5}'], "should be a whole number"),
        (["--optimizer", "galore", "--config", '{"group_params": {"rank": null}}'], "rank=null is no value"),
        (["--config", '{"lr": -1}'], "optimizer.lr=-1 should be a number"),
        (["--config", '{"beta": 0.9}'], "beta=0.9 would be without effect"),
        (["--config", '{"scheduler_name": "cosine"}'], "scheduler_name='cosine' is not supported"),
        (["--config", '{"lr_warmup_steps": 10}'], "scheduler_name='original_warmup' only"),
        (["--optimizer", "muon", "--config", '{"momentum": 0.9}'], "momentum=0.9 would be without effect"),
        (["--optimizer", "galore", "--config", '{"group_params": {"proj_type": "left"}}'], "proj_type='left'"),
        (["--optimizer", "adamw", "--config", '{"fused": false}'], "fused=False would be without effect"),
        (["--config-path", "nowhere.yaml"], "--config-path=nowhere.yaml cannot be read"),
        (["--num-gpus", "3"], "--num-gpus=3 does not divide"),
        (["--mem-start-step", "3"], "--mem-start-step=3 takes effect with --mem-prof only"),
        (["--mem-prof", "--mem-end-step", "3"], "--mem-end-step=3 takes effect with --mem-start-step only"),
        (["--mem-prof", "--mem-snap-step", "-3"], "--mem-snap-step=-3 should be a whole number of at least 0"),
        (
            ["--mem-prof", "--mem-snap-step", "30", "--steps", "30"],
            "--mem-snap-step or --mem-end-step is too late",
        ),
        (["--mem-prof", "--mem-start-step", "5000"], "--mem-start-step is too late, the last step is 1389"),
        (["--mem-prof", "--mem-start-step", "5", "--mem-end-step", "5"], "--mem-end-step=5 is not after --mem-start"),
        (["--mem-prof", "--device", "cpu"], "--mem-prof records allocations of a CUDA device"),
        ([], "there are no FineWeb shards data/fineweb10B/fineweb_train_*.bin"),
    ],
)
def test_a_mistake_ends_in_one_line(capsys, monkeypatch, tmp_path, arguments, message):
    monkeypatch.chdir(tmp_path)
    given = arguments if "--optimizer" in arguments else ["--optimizer", "mfsgd", *arguments]
    assert main(given) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("python -m mofasgd.paper: error: ")
    assert message in error


@pytest.mark.parametrize(("optimizer", "key"), [(o, key) for o, table in keys._FALLBACKS.items() for key in table])
def test_null_is_no_value(capsys, optimizer, key):
    """Here null would be another default than the one that the key's absence means."""
    assert main(["--optimizer", optimizer, "--config", json.dumps({key: None}), "--dry-run"]) == 1
    assert f"{key}=null is no value: give one, or drop the key" in capsys.readouterr().err


def test_idle_values_of_a_file_are_refused_or_told_of(capsys, tmp_path):
    path = tmp_path / "a.yaml"
    arguments = ["--config-path", str(path), "--dry-run"]
    path.write_text("momentum: 0.8\n")
    assert main(["--optimizer", "muon", *arguments]) == 1
    assert "momentum=0.8 would be without effect" in capsys.readouterr().err
    path.write_text("lr_warmup_steps: 50\nuse_ones_for_nonzero_s: true\nmax_value: 7\nbeta: 0.5\n")
    notes = dry(capsys, "--optimizer", "mfsgd", *arguments)["notes"]
    idle = [note.split()[0] for note in notes if " is idle" in note]
    assert idle == ["beta=0.5", "max_value", "lr_warmup_steps"]


@pytest.mark.parametrize("optimizer", list(keys.BASES))
def test_the_authors_files_can_be_named(capsys, tmp_path, optimizer):
    """As --config-path of one's own copy they are what the base configurations are."""
    path = tmp_path / "a.yaml"
    path.write_text(yaml.safe_dump(keys.BASES[optimizer]))
    named = dry(capsys, "--optimizer", optimizer, "--config-path", str(path))
    assert named == dry(capsys, "--optimizer", optimizer)


def test_no_momentum_warm_up(capsys):
    told = dry(capsys, "--optimizer", "mfsgd", "--config", '{"warmup_steps": 0}')
    optimizer = told["pretrain"]["optimizer"]
    assert (optimizer["beta"], optimizer["beta_warmup_steps"], "beta_start" in optimizer) == (0.85, 0, False)
    assert not any("beta_start" in note and "idle: warmup" in note for note in told["notes"])
    told = dry(capsys, "--optimizer", "mfsgd", "--config", '{"warmup_steps": 0, "beta_start": 0.5}')
    assert any("beta_start=0.5 is idle: warmup_steps=0" in note for note in told["notes"])


def test_the_guide_names_every_flag_and_key():
    guide = (Path(__file__).parents[1] / "docs" / "coming-from-the-authors-code.md").read_text()
    flags = [flag for action in _flags()._actions for flag in action.option_strings if flag not in ("-h", "--help")]
    known = {**keys._SCHEDULE, **keys._GROUP_FALLBACKS, **{k: 0 for table in keys._FALLBACKS.values() for k in table}}
    assert [name for name in [*flags, *known] if f"`{name}`" not in guide] == []


def test_a_flag_that_nobody_has_names_the_nearest(capsys):
    with pytest.raises(SystemExit) as end:
        main(["--stepz", "3"])
    assert end.value.code == 2
    assert "did you mean 'steps'?" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("word", "flag"),
    [
        ("--num_gpus", "--num-gpus"),
        ("--dryrun", "--dry-run"),
        ("--num_gpus=4", "--num-gpus"),
        ("--optimzer", "--optimizer"),
    ],
)
def test_a_misspelled_flag_of_the_authors_names_it(capsys, word, flag):
    assert main([word, "4"]) == 2
    assert f"{word.split('=')[0]}; did you mean '{flag}'?" in capsys.readouterr().err


def test_no_flag_of_pretrain_is_taken_for_a_misspelled_one():
    fields = [f"--{field.name}" for field in dataclasses.fields(PretrainConfig) if field.name != "optimizer"]
    assert _misspelled([*fields, "--optimizer.lr", "--data.train", "mine"]) is None


def test_a_configuration_file_takes_the_place_of_the_base(capsys, tmp_path):
    path = tmp_path / "a.yaml"
    path.write_text("lr: 0.3\nscheduler_name: original_warmup\nlr_warmup_steps: 139\n")
    told = dry(capsys, "--optimizer", "mfsgd", "--config-path", str(path), "--config", '{"lr": 0.2}')
    optimizer = told["pretrain"]["optimizer"]
    # What the file lacks is their code's fallback, not the base file's 32 and 0.25.
    assert (optimizer["lr"], optimizer["rank"], optimizer["eta1"]) == (0.2, 2, 1.0)
    assert told["pretrain"]["warmup"] == pytest.approx(0.1)
    assert main(["--list-configs"]) == 0
    assert json.loads(capsys.readouterr().out)["mfsgd"]["rank"] == 32


def test_what_follows_from_a_flag_follows():
    """Data of one's own is held out from for validation; the batch stays theirs in tokens, in fitting micro-batches."""
    config = config_of("--data.train", "mine.bin", "--data.context", "256")
    assert (config.data.train, config.data.validation) == (["mine.bin"], [])
    assert (config.batch_size, config.micro_batch_size) == (2048, 256)
    odd = config_of("--batch_size", "97")
    assert (odd.batch_size, odd.micro_batch_size, odd.data.validation) == (97, 1, [VALIDATION])


@pytest.mark.parametrize(
    ("flags", "window"),
    [
        ("--mem-prof", (0, 50)),
        ("--mem-prof --mem-snap-step 3", (0, 4)),
        ("--mem-prof --mem-start-step 5 --mem-end-step 9", (6, 10)),
        ("--mem-prof --mem-start-step 5", (6, 50)),
    ],
)
def test_memory_is_recorded_over_the_steps_that_were_named(flags, window):
    assert config_of("--steps", "50", *flags.split()).memory_history == window
