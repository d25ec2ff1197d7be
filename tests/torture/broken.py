"""Commands that are broken on purpose: each checker of the torture must count them as failures, and
good ones not.

`python -m tests.torture.broken` prints for each how many tries there were, how many failed, and how
the first one did.
"""
import json
import os
import random
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from tests import attack
from tests.attack import Case
from tests.torture import Result
from tests.torture.forks import adopt
from tests.torture.inputs import verdict
from tests.torture.kills import Work, killed, stepped
from tests.torture.writers import paired

WORK = .05  # seconds that a work computes


def work() -> None:
    "Take time; sleeping would leave the clock of work done where it is."
    until = time.thread_time() + WORK
    while time.thread_time() < until: pass


def whole(folder: Path, name: str = "a.json", text: str = '{"a": 1}') -> None:
    "Write as one should."
    part = folder / f".{name}.{os.getpid()}"
    part.write_text(text)
    work()
    part.replace(folder / name)
    for left in folder.glob(f".{name}.*"): left.unlink(missing_ok=True)


def half(folder: Path) -> None:
    with open(folder / "a.json", "w") as f:
        f.write('{"a": ')
        f.flush()
        work()
        f.write("1}")


def never_again(folder: Path) -> None:
    "As a lock that a killed run leaves."
    if (folder / "began").exists(): sys.exit("Error: it has begun already.")
    (folder / "began").touch()
    whole(folder)


def grows(folder: Path) -> None:
    with open(folder / "a.jsonl", "a") as f: f.write("1\n")
    work()


def litters(folder: Path) -> None:
    (folder / f".{os.getpid()}").touch()
    work()
    whole(folder)
    (folder / f".{os.getpid()}").unlink()


def crashes_again(folder: Path) -> None:
    (folder / "new").mkdir()  # FileExistsError the second time
    work()
    whole(folder)


def refuses_badly(folder: Path) -> None:
    "Refused, but not in words that say why."
    try: (folder / "new").mkdir()
    except FileExistsError: sys.exit("Error: 17")
    work()


def half_in_between(folder: Path) -> None:
    "Another change is made while half of a file is there."
    with open(folder / "a.json", "w") as f:
        f.write('{"a": ')
        f.flush()
        (folder / "b.json").replace(folder / "c.json")
        f.write("1}")


def mine(folder: Path) -> None: whole(folder, text=json.dumps(os.getpid()))


def moves_late(folder: Path) -> None:
    "Takes the old file away before the new one is there, and needs it when it is run again."
    (folder / "b.json").unlink()
    whole(folder, "b.json")


def refuses_second(folder: Path) -> None:
    "One of two is refused in plain words."
    from calib_prune.core import only_run
    with only_run(folder / ".lock", folder): whole(folder)


def swallows(folder: Path) -> None:
    try: time.sleep(30)
    except BaseException: return attack.Outcome("refused", "all is well")


def nan(folder: Path) -> attack.Outcome: return attack.Outcome("done", '{"a": NaN}', json_ok=False)


def works(
    kind: str, good: dict[str, Callable], bad: dict[str, Callable], how: Callable
) -> Iterator[tuple[str, list[Result]]]:
    prepare = lambda folder: (folder / "b.json").write_text("{}")
    for sign, runs in (("good", good), ("bad", bad)):
        for name, run in runs.items():
            yield f"{sign} {kind}: {name}", [
                *how(
                    Work(name, run, stays=r"^\.lock$" if sign == "good" else "$^", prepare=prepare)
                )
            ]


def found() -> Iterator[tuple[str, list[Result]]]:
    yield from works(
        "kills", dict(whole=whole),
        dict(half=half,
             never_again=never_again,
             grows=grows,
             litters=litters,
             crashes_again=crashes_again), lambda w: killed(w, 6, random.Random(1)))
    yield from works("steps", dict(whole=whole),
                     dict(half_in_between=half_in_between, moves_late=moves_late),
                     lambda w: stepped(w, None, random.Random(0)))
    yield from works("writers", dict(refuses_second=refuses_second),
                     dict(mine=mine, grows=grows, crashes=crashes_again, badly=refuses_badly),
                     lambda w: paired(w, 3, random.Random(0)))
    attack.limits()
    attack.WAIT = 1
    def case(name: str, run: Callable) -> tuple[str, list[Result]]:
        case = Case("broken", name, run)
        return name, [verdict(case, attack.try_case(case))]
    yield case("good inputs: refused", lambda folder: attack.Outcome("refused", "a reason"))
    yield case("bad inputs: an error", lambda folder: {}["x"])
    yield case("bad inputs: no JSON", nan)
    yield case("bad inputs: hangs", lambda folder: time.sleep(30))
    yield case("bad inputs: hangs, and says that all is well", swallows)


if __name__ == "__main__":
    adopt()
    for name, results in found():
        wrong = [o.wrong for o in results if o.wrong]
        print(json.dumps([name, len(results), len(wrong), (wrong or [""])[0][:3000]]), flush=True)
