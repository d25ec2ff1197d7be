"""Two processes write to one place at once: one is refused in plain words, or both end with the
same whole result."""
import random
import re
import time
from collections.abc import Iterator

from tests.torture import Budget, Result, part
from tests.torture.forks import start, watch
from tests.torture.kills import (
    Work,
    difference,
    half_written,
    inputs,
    left_over,
    place_of,
    undisturbed,
    works,
)

REFUSED = re.compile(r"Another run is working on|exists|is not empty")


@part
def writers(budget: Budget) -> Iterator[Result]:
    inputs()
    for work in works(budget.match):
        if n := budget.of(*work.pairs):
            yield from paired(work, n, random.Random(f"{budget.seed} {work.name}"))


def paired(work: Work, n: int, rng: random.Random) -> Iterator[Result]:
    "Every second pair begins at the same instant, the others at most one duration apart."
    try: whole, ended = undisturbed(work)
    except AssertionError as e:
        yield Result(f"{work.name}, undisturbed", str(e))
        return
    for i in range(n):
        apart = rng.random() * ended.wall * (i % 2)
        wrong, kind = at_once(work, whole, apart)
        yield Result(f"{work.name}, {apart:.2f} s apart", wrong, kind)


def at_once(work: Work, whole: object, apart: float
           ) -> tuple[str, str]:  # what is wrong, what happened
    "Run a work twice at once, and look at what is there at the end."
    with place_of(work) as (folder, log):
        logs, acts, pids = [log, log.with_name("log2")], [work.run, work.other or work.run], []
        for file, act in zip(logs, acts, strict=True):
            if pids: time.sleep(apart)
            pids.append(start(lambda act=act: act(folder), file))
        ended = [watch(pid, file) for pid, file in zip(pids, logs, strict=True)]
        done = [o for o in ended if o.code == 0]
        kind = "both done" if len(done) == 2 else "one refused"
        for o in ended:
            if o.wrong: return o.wrong, kind
            if o.code and not REFUSED.search(o.said):
                return f"refused for another reason: {o.said[-600:]}", kind
        if not done: return f"neither was done: {[o.said[-300:] for o in ended]}", kind
        if wrong := half_written(folder, work.varies): return wrong, kind
        for o in done if work.prints else done[:1]:
            found = work.result(folder, o.said)
            # what the other makes has another name
            if work.other is not None and ended[0].code: continue
            if said := difference(found, whole): return f"another result: {said}", kind
        left = left_over(folder, work.stays)
        return f"left behind: {left}" if left else "", kind
