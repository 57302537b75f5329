"""The shape of the code: imports point down, `import mofasgd` is light, what the documents show runs."""

import ast
import doctest
import importlib
import re
import subprocess
import sys
from pathlib import Path

import pytest

import mofasgd

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "src" / "mofasgd"

# From the bottom up; a module may import from lower layers only.
LAYERS = [
    {"precision", "layout", "kernels", "snapshot"},
    {"rng", "dist"},
    {"columns", "momentum", "options", "apply"},
    {"algebra", "clipping", "complement", "adamw", "state", "groups"},
    {"solver", "gradient", "residual"},
    {"attach", "buckets"},
    {"factored", "exchange"},
    {"start"},
    {"base"},
    {"optimizer"},
    {"authors"},
    {"hf", "memory"},
    {"app"},
    {"cli"},
    {"paper"},
]


def modules():
    return [p for p in SOURCE.rglob("*.py") if p != SOURCE / "__init__.py"]


def layer_of(name):
    found = [i for i, layer in enumerate(LAYERS) if name in layer]
    assert found, f"{name} has no layer: add it to LAYERS"
    return found[0]


@pytest.mark.parametrize("path", modules(), ids=lambda p: str(p.relative_to(SOURCE)))
def test_imports_point_down(path):
    own = path.relative_to(SOURCE).with_suffix("").parts[0]
    for node in ast.walk(ast.parse(path.read_text())):
        if not isinstance(node, (ast.Import, ast.ImportFrom)):
            continue
        names = [node.module] if isinstance(node, ast.ImportFrom) else [a.name for a in node.names]
        for name in names:
            if name == "mofasgd":
                pytest.fail(f"{path.name} imports the package itself")
            if name.startswith("mofasgd.") and name.split(".")[1] != own:
                assert layer_of(name.split(".")[1]) < layer_of(own), f"{path.name} imports {name}"


def test_import_needs_torch_only_and_loads_nothing_heavier():
    script = "import torch, sys; had = set(sys.modules); import mofasgd; print(*set(sys.modules) - had)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    loaded = {name.split(".")[0] for name in done.stdout.split()} - set(sys.stdlib_module_names)
    assert loaded == {"mofasgd"}


def test_a_step_needs_no_numpy():
    script = (
        "import sys; sys.modules['numpy'] = None; import torch, mofasgd, mofasgd.paper, mofasgd.app.galore;"
        "W = torch.nn.Parameter(torch.ones(9, 8, dtype=torch.bfloat16)); W.grad = torch.randn(9, 8).bfloat16();"
        "mofasgd.MoFaSGD([W], rank=2, complement=1.0, max_grad_norm=1.0).step(); print(W.isfinite().all().item())"
    )
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", script], capture_output=True, text=True)
    assert done.stdout.strip() == "True", done.stderr


def test_no_file_is_longer_than_400_lines():
    assert {p.name: n for p in modules() if (n := len(p.read_text().splitlines())) > 400} == {}


def test_public_names_exist():
    assert all(hasattr(mofasgd, name) for name in mofasgd.__all__)
    assert (SOURCE / "py.typed").exists()


@pytest.mark.parametrize("name", ["mofasgd.optimizer"])
def test_docstring_examples_run(name):
    result = doctest.testmod(importlib.import_module(name))
    assert result.attempted > 0
    assert result.failed == 0


def test_the_readme_example_runs(monkeypatch):
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "path", list(sys.path))
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), flags=re.DOTALL)
    assert blocks
    for block in blocks:
        exec(compile(block, "README.md", "exec"), {})


def test_documents_name_existing_files():
    for page in [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")]:
        text = page.read_text()
        for name in re.findall(r"\]\(([\w./-]+)\)", text):
            assert (page.parent / name).exists(), f"{page.name} links to {name}"
        for name in re.findall(r"`((?:docs|benchmarks|examples|tests|src)/[\w./-]+)`", text):
            assert (ROOT / name).exists(), f"{page.name} names {name}"
