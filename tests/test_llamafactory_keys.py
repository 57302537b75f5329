"""The keys of the authors' LLaMA-Factory fork and ours, without LLaMA-Factory."""

from pathlib import Path
from types import SimpleNamespace

import pytest

from mofasgd.hf.llamafactory import optimizers
from mofasgd.hf.llamafactory.keys import AUTHORS, MEMORY, Recording, read

UPSTREAM = {"stage", "learning_rate", "output_dir", "finetuning_type", "galore_rank", "use_muon"}
# The optimizer's part of the fork's configs/mfsgd/llama3.1_8b_sft_*.
FORK = {
    "use_mfsgd": True,
    "learning_rate_mfsgd": 1e-5,
    "learning_rate_adamw": 5e-6,
    "mfsgd_rank": 8,
    "mfsgd_beta": 0.9,
    "mfsgd_eta1": 1.0,
    "mfsgd_eta2": 0.0,
    "mfsgd_eps": 1e-8,
    "mfsgd_nesterov": False,
    "mfsgd_use_current_projection": False,
    "mfsgd_use_ones_for_nonzero_s": False,
    "mfsgd_max_value": 10000,
}


def test_the_forks_keys_are_taken_out_and_the_rest_goes_to_llamafactory():
    memory = {"profile_memory_from_start": True, "profile_memory_stop_step": 4, "profile_memory_max_entries": 10}
    plan = read({"stage": "sft", **FORK, **memory}, UPSTREAM)
    assert plan.rest == {"stage": "sft"}
    assert (plan.method, plan.attach) == ("mfsgd", None)
    assert plan.options == {
        "learning_rate_mfsgd": 1e-5,
        "learning_rate_adamw": 5e-6,
        "rank": 8,
        "beta": 0.9,
        "eta1": 1.0,
        "eps": 1e-8,
        "use_ones_for_nonzero_s": False,
        "max_value": 10000,
    }
    assert plan.recording == Recording(early=True, max_entries=10, stop_step=4, stop_accumulation_step=None)


def test_defaults_are_the_forks():
    options = read({"use_mfsgd": True}, UPSTREAM).options
    assert options["learning_rate_mfsgd"] is options["learning_rate_adamw"] is None
    assert read({"use_mfsgd": True, "learning_rate_mfsgd": None}, UPSTREAM).options == options
    assert (options["rank"], options["beta"], options["eps"], options["max_value"]) == (2, 0.9, 1e-4, 10000)
    assert read({"stage": "sft", "use_mfsgd": False}, UPSTREAM).method is None


def test_our_keys_lose_their_prefix():
    plan = read({"use_mofasgd": True, "mofasgd_lr": 0.02, "mofasgd_rank": 8, "mofasgd_attach": "none"}, UPSTREAM)
    assert (plan.method, plan.attach, plan.options) == ("mofasgd", "none", {"lr": 0.02, "rank": 8})


def test_what_another_value_makes_idle_is_noted():
    (note,) = read({**FORK, "mfsgd_use_ones_for_nonzero_s": True}, UPSTREAM).notes
    assert "mfsgd_max_value is idle" in note
    assert read(FORK, UPSTREAM).notes == ()


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"use_mfsgd": True, "mfsgd_rnak": 3}, r"'mfsgd_rnak' is no key of use_mfsgd; did you mean 'mfsgd_rank'\?"),
        ({"learning_rate_mfsdg": 3}, r"neither LLaMA-Factory nor mofasgd; did you mean 'learning_rate_mfsgd'\?"),
        ({"stagee": "sft"}, r"did you mean 'stage'\?"),
        ({"use_mfsgd": True, "mfsgd_eta2": 0.5}, "mfsgd_eta2=0.5 would be without effect: .*write 0"),
        ({"use_mfsgd": True, "mfsgd_nesterov": True}, "mfsgd_nesterov=True would be without effect"),
        ({"use_mfsgd": True, "mfsgd_use_current_projection": True}, "mfsgd_use_current_projection=True would be"),
        ({"use_mfsgd": True, "mfsgd_nesterov": "yes"}, "mfsgd_nesterov='yes' should be True or False"),
        *(
            ({"use_mfsgd": True, key: None}, f"{key}: null is no value: .*default {value}")
            for key, value in AUTHORS.items()
            if value is not None
        ),
        ({"use_mfsgd": True, "learning_rate_adamw": "abc"}, "^learning_rate_adamw='abc' should be a number"),
        ({"use_mfsgd": True, "learning_rate_mfsgd": -1.0}, r"^learning_rate_mfsgd=-1.0 should be a number in \[0"),
        ({"use_mfsgd": 1}, "use_mfsgd=1 should be True or False"),
        ({"mfsgd_rank": 8}, "mfsgd_rank=8 would be without effect: add use_mfsgd: true"),
        ({"mofasgd_rank": 8}, "mofasgd_rank=8 would be without effect: add use_mofasgd: true"),
        ({"use_mfsgd": False, "mfsgd_rank": 8}, "add use_mfsgd: true"),
        ({"use_mofasgd": True, "mfsgd_rank": 8}, "mfsgd_rank=8 would be without effect: it is a key of use_mfsgd"),
        ({"use_mfsgd": True, "mofasgd_rank": 8}, "'mofasgd_rank' is no key of use_mfsgd"),
        ({"use_mfsgd": True, "use_mofasgd": True}, "both true"),
        ({"muon_momentum": 0.9}, "muon_momentum=0.9 is not supported: the authors' fork has it"),
        ({"galore_fused": True}, "galore_fused=True is not supported: .*galore_rank"),
        ({"profile_memory_max_entries": 5}, "profile_memory_max_entries=5 takes effect with profile_memory_from_start"),
        ({"profile_memory_stop_step": 0}, "profile_memory_stop_step=0 should be a whole number of at least 1"),
        ({"profile_memory_stop": 3}, "did you mean 'profile_memory_stop_step'"),
        (
            {"profile_memory_stop_step": 3, "profile_memory_stop_accumulation_step": 3},
            "the recording stops once, drop one of them",
        ),
    ],
)
def test_keys_without_effect_are_refused(config, message):
    with pytest.raises(ValueError, match=message):
        read(config, UPSTREAM)


def test_the_guide_names_every_key():
    guide = (Path(__file__).parents[1] / "docs" / "coming-from-the-authors-code.md").read_text()
    assert [key for key in ("use_mfsgd", *AUTHORS, *MEMORY) if f"`{key}`" not in guide] == []


@pytest.mark.parametrize("resumed_at", [0, 100])
def test_memory_is_recorded_over_the_steps_asked_for_in_a_resumed_run_too(resumed_at, tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(optimizers, "start_recording", lambda count: seen.append("start"))
    monkeypatch.setattr(optimizers, "save_recording", lambda path: seen.append("saved"))
    args = SimpleNamespace(local_process_index=0, output_dir=str(tmp_path))
    callback = optimizers.MemoryCallback(
        Recording(early=False, max_entries=7, stop_step=2, stop_accumulation_step=None)
    )
    for _ in range(2):
        callback.on_train_begin(args, None, None)
        for step in range(4):
            seen.append("step")
            callback.on_step_end(args, SimpleNamespace(global_step=resumed_at + step + 1), None)
        callback.on_train_end(args, None, None)
    assert seen == ["start", "step", "step", "saved", "step", "step"] * 2
