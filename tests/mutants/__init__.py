"""Faults put in by hand: plain data, one list a file; tests/test_mutants.py puts each in and runs the test it names."""

from typing import NamedTuple


class Mutant(NamedTuple):
    """One fault.

    Attributes:
        what: what is wrong under the fault.
        file: below src/mofasgd.
        code: stands exactly once in the file.
        fault: takes its place.
        test: fails under the fault, below tests.
    """

    what: str
    file: str
    code: str
    fault: str
    test: str
