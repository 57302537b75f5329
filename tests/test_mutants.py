"""Faults put in by hand, each caught by a named test. A test that no fault can break proves nothing."""

import ast
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


def case(part, value, name):
    needed = {hf: "transformers", tune: "trl"}.get(part)
    absent = needed is not None and importlib.util.find_spec(needed) is None
    return pytest.param(value, id=name, marks=pytest.mark.skipif(absent, reason=f"needs {needed}"))


def run(source, *tests):
    environment = {**os.environ, "PYTHONPATH": str(source), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider"]
    command += [str(ROOT / "tests" / test) for test in tests]
    return subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True)


def functions(path):
    return {node.name for node in ast.parse(path.read_text()).body if isinstance(node, ast.FunctionDef)}


def test_every_fault_can_be_put_in_and_names_a_test():
    assert {path.stem for path in (ROOT / "tests" / "mutants").glob("[!_]*.py")} == {
        part.__name__.removeprefix("mutants.") for part in PARTS
    }
    mutants = [mutant for part in PARTS for mutant in part.MUTANTS]
    tests = {name: functions(ROOT / "tests" / name) for name in {mutant.test.split("::")[0] for mutant in mutants}}
    for what, file, code, fault, test in mutants:
        text = (ROOT / "src" / "mofasgd" / file).read_text()
        assert text.count(code) == 1, f"{what}: {code!r} stands {text.count(code)} times in {file}"
        assert fault != code, what
        # A file that Python cannot read would fail every test.
        ast.parse(text.replace(code, fault), file)
        name, _, function = test.partition("::")
        assert function.split("[")[0] in tests[name], f"{what}: no such test as {test}"


@pytest.fixture
def copied(tmp_path):
    shutil.copytree(ROOT / "src" / "mofasgd", tmp_path / "mofasgd")
    return tmp_path


@pytest.mark.slow
def test_the_unharmed_copy_is_what_the_tests_import(copied):
    path = subprocess.run(
        [sys.executable, "-c", "import mofasgd; print(mofasgd.__file__)"],
        env={**os.environ, "PYTHONPATH": str(copied)},
        capture_output=True,
        text=True,
    ).stdout
    assert path.startswith(str(copied))


@pytest.mark.slow
@pytest.mark.parametrize("mutants", [case(part, part.MUTANTS, part.__name__) for part in PARTS])
def test_the_unharmed_copy_passes(copied, mutants):
    done = run(copied, *sorted({mutant.test for mutant in mutants}))
    assert done.returncode == 0, done.stdout[-2000:]


@pytest.mark.slow
@pytest.mark.parametrize("mutant", [case(part, mutant, mutant.what) for part in PARTS for mutant in part.MUTANTS])
def test_a_fault_is_caught(copied, mutant):
    path = copied / "mofasgd" / mutant.file
    path.write_text(path.read_text().replace(mutant.code, mutant.fault))
    done = run(copied, mutant.test)
    # 1: a test failed. Anything else (2: no collection, 4: no such test) is not a catch.
    assert done.returncode == 1, done.stdout[-2000:]
