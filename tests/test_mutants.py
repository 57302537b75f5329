"""Faults put in by hand, each caught by a named test. A test that no fault can break proves nothing."""

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from mutants import app, attach, core, dist, fast, hf, paper, tune

ROOT = Path(__file__).parents[1]

PARTS = (core, fast, attach, dist, app, hf, paper, tune)

pytestmark = pytest.mark.slow


def case(part, value, name):
    needed = {hf: "transformers", tune: "trl"}.get(part)
    absent = needed is not None and importlib.util.find_spec(needed) is None
    return pytest.param(value, id=name, marks=pytest.mark.skipif(absent, reason=f"needs {needed}"))


def run(source, *tests):
    environment = {**os.environ, "PYTHONPATH": str(source), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider"]
    command += [str(ROOT / "tests" / test) for test in tests]
    return subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True)


@pytest.fixture
def copied(tmp_path):
    shutil.copytree(ROOT / "src" / "mofasgd", tmp_path / "mofasgd")
    return tmp_path


def test_the_unharmed_copy_is_what_the_tests_import(copied):
    path = subprocess.run(
        [sys.executable, "-c", "import mofasgd; print(mofasgd.__file__)"],
        env={**os.environ, "PYTHONPATH": str(copied)},
        capture_output=True,
        text=True,
    ).stdout
    assert path.startswith(str(copied))


@pytest.mark.parametrize("mutants", [case(part, part.MUTANTS, part.__name__) for part in PARTS])
def test_the_unharmed_copy_passes(copied, mutants):
    done = run(copied, *sorted({mutant.test for mutant in mutants}))
    assert done.returncode == 0, done.stdout[-2000:]


@pytest.mark.parametrize("mutant", [case(part, mutant, mutant.what) for part in PARTS for mutant in part.MUTANTS])
def test_a_fault_is_caught(copied, mutant):
    path = copied / "mofasgd" / mutant.file
    text = path.read_text()
    count = text.count(mutant.code)
    assert count == 1, f"{mutant.code!r} stands {count} times in {mutant.file}: update the mutant"
    path.write_text(text.replace(mutant.code, mutant.fault))
    done = run(copied, mutant.test)
    # 1: a test failed. Anything else (2: no collection, 4: no such test) is not a catch.
    assert done.returncode == 1, done.stdout[-2000:]
