"Run the torture: one line per part, and each failure with its details."
import argparse
import json
import os
import sys
import time
from collections import Counter
from collections.abc import Iterator

from tests.torture import SKIP, Budget, Part, Result, load
from tests.torture.forks import warm


def alone(run: Part, budget: Budget) -> Iterator[Result]:
    "The results of a part that runs in a fork: what it changes in its process ends with it."
    read, write = os.pipe()
    sys.stdout.flush()
    if not (pid := os.fork()):
        code = 1
        try:
            os.close(read)
            with open(write, "w", buffering=1) as out:
                for o in run(budget): print(json.dumps([o.name, o.wrong, o.kind]), file=out)
            code = 0
        except BaseException:
            import traceback
            traceback.print_exc()
        finally: os._exit(code)
    os.close(write)
    with open(read) as results:
        for line in results: yield Result(*json.loads(line))
    if status := os.waitpid(pid, 0)[1]:
        yield Result("the part itself", f"it broke off: status {status}")


def report(name: str, run: Part, budget: Budget) -> int:  # failures
    "Run a part, print its failures and its counts."
    began, kinds, found = time.monotonic(), Counter(), Counter()
    for o in alone(run, budget):
        found["skipped" if o.wrong.startswith(SKIP) else "failures" if o.wrong else "passed"] += 1
        if o.kind: kinds[o.kind] += 1
        if o.wrong:
            print(f"{name}: {o.name}:\n  " + o.wrong.strip().replace("\n", "\n  "), flush=True)
    said = f" ({', '.join(f'{n} {k}' for k, n in sorted(kinds.items()))})" if kinds else ""
    print(
        f"{name}: {found.total()} tries, {found['failures']} failures, {found['skipped']} skipped, "
        f"{time.monotonic() - began:.0f} s{said}",
        flush=True,
    )
    return found["failures"] + (not found.total())  # a part without a try has found nothing out


def main() -> int:
    parts = load()
    parser = argparse.ArgumentParser(prog="python -m tests.torture", description=__doc__)
    parser.add_argument("--short", action="store_true", help="a sample of each part")
    parser.add_argument("--only", nargs="+", choices=[*parts], help="only these parts")
    parser.add_argument("--seed", type=int, default=0, help="of the moments and samples")
    parser.add_argument(
        "--match", default="", help="only inputs and commands with this in their name"
    )
    asked = parser.parse_args()
    budget = Budget(asked.short, asked.seed, asked.match)
    warm()
    return int(any([report(k, parts[k], budget) for k in asked.only or parts]))


if __name__ == "__main__": sys.exit(main())
