"""The torture: what happens when inputs are wrong, when runs are killed, when two run at once.

`python -m tests.torture` runs all parts and prints their counts; `--short` a sample, which
test_torture.py runs. A part is a function in one of `MODULES` that is marked with `part`: it makes
tries, and yields what came of each.
"""
import importlib
import importlib.util
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from tests import ROOT

PLACE = ROOT / "build/torture"
# begins the failure of a try that cannot be made here: it is neither passed nor failed
SKIP = "skipped: "
MODULES = ("inputs", "kills", "writers", "disk", "poison", "users")


@dataclass(frozen=True)
class Budget:
    "How much to try."
    short: bool = False
    seed: int = 0
    match: str = ""  # only tries with this in their name, to look at some again

    def of(self, full: int, short: int) -> int: return short if self.short else full


@dataclass(frozen=True)
class Result:
    "What came of a try."
    name: str
    wrong: str = ""  # empty: all is as it should be
    kind: str = ""   # what is counted beside failures, such as "refused"


Part = Callable[[Budget], Iterator[Result]]
PARTS: dict[str, Part] = {}


def part(f: Part) -> Part:
    "Register a part under its function's name."
    PARTS[f.__name__] = f
    return f


def load() -> dict[str, Part]:
    "Import the modules that exist, so that their parts are registered."
    for name in MODULES:
        if importlib.util.find_spec(f"tests.torture.{name}") is None: continue
        module = importlib.import_module(f"tests.torture.{name}")
        if name not in PARTS and hasattr(module, "results"): PARTS[name] = _plain(module.results)
    return PARTS


def _plain(results: Callable) -> Part:  # (short, seed) → part, name, failure or ""
    "A part of plain tuples."
    def run(budget: Budget) -> Iterator[Result]:
        for _, name, wrong in results(budget.short, budget.seed): yield Result(name, wrong)
    return run
