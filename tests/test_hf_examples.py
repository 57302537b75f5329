"""What examples/hf shows: each file compiles, the accelerate loop trains."""

import runpy
from pathlib import Path

import pytest

pytest.importorskip("transformers")

EXAMPLES = Path(__file__).parents[1] / "examples" / "hf"


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.py")), ids=lambda path: path.stem)
def test_examples_compile(path):
    compile(path.read_text(), path, "exec")


def test_the_accelerate_loop_learns_to_count(capsys):
    losses = runpy.run_path(str(EXAMPLES / "accelerate_loop.py"))["main"](steps=40)
    assert len(losses) == 40  # of 160 micro-batches
    assert losses[0] > 4.0 > 2.0 > losses[-1]
    assert "gradient norm" in capsys.readouterr().out
