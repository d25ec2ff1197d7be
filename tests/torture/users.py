"""Torture by several users of one machine, and by a user without rights.

As root, forks become other users in a view of the disk where they can read the interpreter and the
package, whatever home folder those lie
in. `python -m tests.torture.users [--short]`.
"""
import os
import pickle
import random
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

from tests.torture import alone, disk
from tests.torture.alone import SKIP, Results, in_fork
from tests.torture.disk import attempted, usual, variable

# 65534 has a name on most machines, the others have none
NOBODY, OTHER, THIRD = 65534, 12345, 23456


# --- what users do, in a folder of their own

def generated(work: Path, inputs: Path) -> list[str]:
    "A task whose answers run in the sandbox."
    return alone.say(
        "evaluate", "--model", inputs / "model", "--tasks", "mbpp_generate", "--limit", 1, "--json"
    )


def study(work: Path, inputs: Path) -> list[str]:
    "A study of one tiny model."
    disk.checkout(work, work)
    preset = work / "checkout/tiny.yaml"
    preset.write_text(preset.read_text().replace(str(work / "model"), str(
        inputs / "model")).replace(str(work / "text.txt"), str(inputs / "text.txt")))
    return disk.run_study(work, work)


COMMANDS: dict[str, Callable[[Path, Path], list[str]]] = {
    "prune": lambda w, i: usual(w, i, "prune", "--output", w / "out", "--checkpoint", w / "cp"),
    "generate": lambda w, i: usual(w, i, "generate", "--output", w / "own.jsonl"),
    "evaluate": lambda w, i: usual(w, i, "evaluate"),
    "evaluate in the sandbox": generated,
    "measure": lambda w, i: usual(w, i, "measure"),
    "init": lambda w, i: alone.say("init", w / "study", "--json"),
    "new-study": lambda w, i: alone.say(
        "new-study", w / "study", "--model", i / "model", "--calibration", i / "text.txt", "--json"
    ),
    "fetch": lambda w, i: disk.fetch_wheels(w / "new", w),
    "kernel": lambda w, i: disk.compile_kernel(w, w),
    "reproduce": study,
}
NEEDS_DATA = ("evaluate", "measure", "reproduce")
SLOW = ("reproduce",)


def as_user(
    uid: int, world: Path, home: str, cache: str, mask: int, act: Callable[[Path, Path], list[str]]
) -> list[str]:
    "In a fork: become a user in a folder of its own, and do something there."
    work = world / f"work-{uid}"
    work.mkdir(exist_ok=True)
    alone.private_mounts()
    alone.let_others_read()
    shared = alone.PLACE / "cache"
    if cache == "shared, read-only": alone.read_only(shared)
    homes = {"own": work, "none": None, "missing": Path("/nonexistent/home"), "another's": world}
    os.chown(work, uid, uid)
    os.environ.pop("CALIB_PRUNE_CACHE", None)
    if cache == "own":
        (own := work / "cache").mkdir(exist_ok=True)
        os.chown(own, uid, uid)
        for o in shared.iterdir():
            if (
                o.name in ("benchmarks", "models", "sources", "manifest.json")
                and not (own / o.name).exists()
            ):
                (own / o.name).symlink_to(o)
        os.environ["CALIB_PRUNE_CACHE"] = str(own)
    elif cache != "not named":
        os.environ["CALIB_PRUNE_CACHE"] = str(shared)
    tempfile.tempdir = None
    os.umask(mask)
    alone.become(uid, homes[home])
    os.chdir(work)
    return act(work, world / "inputs")


WAYS = {  # name → user, home, cache, umask
    "an ordinary user": (NOBODY, "own", "own", 0o022),
    "a user without a name or home": (OTHER, "none", "own", 0o022),
    "a read-only cache": (OTHER, "own", "shared, read-only", 0o022),
    "root's cache": (NOBODY, "missing", "shared", 0o022),
    "umask 077": (NOBODY, "own", "own", 0o077),
    "umask 000": (OTHER, "own", "own", 0o000),
    "no home and no cache": (OTHER, "none", "not named", 0o022),
    "another's home": (THIRD, "another's", "not named", 0o022),
}
# here a command may say that there is no cache
MAY_LACK = ("no home and no cache", "another's home")


def how(found: list[str], may_lack: bool) -> str:
    "What is wrong; empty if nothing."
    kind, said = found
    if kind == "done": return ""
    plain = any(o in said for o in ("CALIB_PRUNE_CACHE", "home directory", "calib-prune fetch",
                                    "TMPDIR", "Permission denied"))
    if may_lack and kind == "refused" and plain: return ""
    return f"{kind}: {said[-500:]}"


# --- what one user leaves for another

def two_users(
    world: Path,
    first: Callable[[Path], list[str]],
    second: Callable[[Path], list[str]],
    masks=(0o022, 0o022),
    sticky: bool = True,
) -> list[list[str]]:
    "In a fork: two users, one after the other, in a folder that both can write, as /tmp is."
    place = world / "shared"
    place.mkdir()
    place.chmod(0o1777 if sticky else 0o777)
    alone.private_mounts()
    alone.let_others_read()
    os.environ["CALIB_PRUNE_CACHE"] = str(alone.PLACE / "cache")
    found = []
    for uid, mask, act in zip((OTHER, NOBODY), masks, (first, second), strict=True):
        def become_and_act(uid=uid, mask=mask, act=act):
            os.umask(mask)
            alone.become(uid)
            os.chdir(place)
            return act(place)
        ended = in_fork(become_and_act, 60)
        found.append(ended.value or ["traceback", ended.fault])
    return [*found, [str(o.relative_to(world)) for o in world.rglob("evil*")]]


def lock(path: Path) -> list[str]:
    "Hold a lock that is never given back."
    from calib_prune.core import _hold
    return attempted(lambda: _hold(path))


def links(place: Path, *names: str) -> list[str]:
    "Traps: links to a file that is not there, in the other's reach."
    (place / "theirs").mkdir(mode=0o777)
    (place / "theirs").chmod(0o777)
    for name in names: (place / name).symlink_to(place / "theirs/evil")
    return ["done", ""]


def gpu(place: Path) -> list[str]:
    from calib_prune.study.gpus import claim
    return attempted(lambda: claim(["GPU-0"], place))


def plant_kernel(place: Path) -> list[str]:
    "A cache that anyone can write: put code where the other's machine code is read from."
    class Evil:
        def __reduce__(self): return open, (str(place / "theirs/evil"), "w")
    links(place)
    found = run_kernel(place, place / "theirs/a")
    for o in (place / "cache").rglob("*"):
        if o.is_dir(): o.chmod(0o777)
        if o.suffix == ".nbi": o.write_bytes(pickle.dumps(Evil()))
    return found


def run_kernel(place: Path, work: Path) -> list[str]:
    "A kernel whose source is the same for both users."
    work.mkdir(exist_ok=True)
    source = place / "kernels_of_mine.py"
    if not source.exists():
        source.write_text(
            "from calib_prune.kernels.compiled import compiled\n\n@compiled()\ndef twice(x):\n   "
            " return 2 * x\n"
        )
    def act():
        import importlib.util
        import warnings
        spec = importlib.util.spec_from_file_location("kernels_of_mine", source)
        module = importlib.util.module_from_spec(spec)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            spec.loader.exec_module(module)
            assert module.twice(21) == 42
    with variable("CALIB_PRUNE_CACHE", place / "cache"): return attempted(act)


def meetings(world: Path) -> dict[str, tuple]:
    "name → (what the first user does, what the second does, umasks, must the second be done?)"
    inputs = world / "inputs"
    def prune(p): return usual(p, inputs, "prune", "--output", p / "out", "--checkpoint", p / "cp")
    def generate(p): return usual(p, inputs, "generate", "--output", p / "own.jsonl")
    def evaluate(p):
        with variable("CALIB_PRUNE_CACHE", p / "cache"):
            if not (p / "cache").exists():
                (p / "cache").mkdir()
                for name in ("benchmarks", "models", "sources", "manifest.json"):
                    (p / "cache" / name).symlink_to(alone.PLACE / "cache" / name)
            return usual(p, inputs, "evaluate")
    nothing = lambda p: ["done", ""]
    same = (0o022, 0o022)
    return {
        "the same output": (prune, prune, same, False),
        "the same output, umask 077": (prune, prune, (0o077, 0o022), False),
        "the same output, umask 000": (prune, prune, (0, 0), False),
        "the same text": (generate, generate, same, False),
        "one cache, umask 022": (evaluate, evaluate, same, False),
        "one cache, umask 077": (evaluate, evaluate, (0o077, 0o022), False),
        "one cache, umask 000": (evaluate, evaluate, (0, 0), False),
        "a lock that was left": (lambda p: lock(p / ".out.lock"), prune, same, False),
        "a lock that was left, umask 000": (lambda p: lock(p / ".out.lock"), prune, (0, 0o022),
                                            True),
        "a lock on a text": (lambda p: lock(p / ".own.jsonl.lock"), generate, same, False),
        "a link for a lock": (lambda p: links(p, ".out.lock"), prune, same, False),
        "a link for a part": (lambda p: links(p, ".out.part"), prune, same, False),
        "a link for an output": (lambda p: links(p, "out"), prune, same, False),
        "a link for a checkpoint": (lambda p: links(p, "cp"), prune, same, False),
        "a link for a text's lock": (lambda p: links(p, ".own.jsonl.lock"), generate, same, False),
        "a link for a journal": (lambda p: links(p, "own.jsonl.partial"), generate, same, False),
        "a link for a report": (lambda p: links(p, "own.report.json"), generate, same, False),
        "a GPU that another claimed": (gpu, gpu, same, True),
        "a link for a GPU's lock": (lambda p: links(p, f"calib-prune-gpu-{NOBODY}-GPU-0.lock"), gpu,
                                    same, False),
        "a lock for a GPU's lock": (lambda p: lock(p / f"calib-prune-gpu-{NOBODY}-GPU-0.lock"), gpu,
                                    same, False),
        "planted machine code": (plant_kernel, lambda p: run_kernel(p, p / "theirs/b"), (0, 0o022),
                                 True),
        "machine code of another": (lambda p: run_kernel(p, p / "a"),
                                    lambda p: run_kernel(p, p / "b"), same, True),
        "nothing before": (nothing, prune, same, True), }


def met(found: list, must: bool) -> str:
    "What is wrong with how two users met."
    (kind, said), (kind2, said2), evil = found
    if evil: return f"the second user was led to write {evil}"
    if kind == "traceback": return f"the first: {said[-400:]}"
    if kind2 not in ("done", "refused") or must and kind2 != "done":
        return f"the second: {kind2}: {said2[-400:]}"
    return ""


# --- all of it

def results(short: bool, seed: int) -> Results:
    rng, cannot = random.Random(seed), alone.why_not()
    if cannot:
        yield "users", "other users", cannot
        return
    no_data = not (alone.PLACE / "cache/benchmarks").exists()
    with alone.scratch() as world:
        world.chmod(0o755)
        disk.inputs_in(world / "inputs")
        yield "users", "they can read the interpreter and the package", readable(world)
        for way, (uid, home, cache, mask) in WAYS.items():
            for name, act in COMMANDS.items():
                title = f"{name}: {way}"
                if not alone.wanted(title) or short and (name in SLOW or rng.random() > 0.2):
                    continue
                if name in SLOW and way not in ("an ordinary user", "a user without a name or home",
                                                "a read-only cache"):
                    continue
                if no_data and name.startswith(NEEDS_DATA):
                    yield "users", title, f"{SKIP}the benchmarks are not fetched"
                    continue
                yield "users", title, alone_in(world,
                                               lambda: as_user(uid, world, home, cache, mask, act),
                                               lambda o: how(o, way in MAY_LACK))
        for title, (first, second, masks, must) in meetings(world).items():
            if not alone.wanted(title) or short and rng.random() > 0.4: continue
            if no_data and "one cache" in title:
                yield "users", title, f"{SKIP}the benchmarks are not fetched"
                continue
            sticky = "machine code" not in title
            yield "users", title, alone_in(world,
                                           lambda: two_users(world, first, second, masks, sticky),
                                           lambda o: met(o, must))


def alone_in(world: Path, act: Callable, judge: Callable) -> str:
    "A try, and nothing of it left in the world."
    ended = in_fork(act, 240)
    for o in world.iterdir():
        if o.name != "inputs": shutil.rmtree(o, ignore_errors=True)
    return ended.fault[-500:] if ended.fault else judge(ended.value)


def readable(world: Path) -> str:
    "Whether another user can start the interpreter and import the package from this checkout."
    def act():
        alone.private_mounts()
        alone.let_others_read()
        alone.become(OTHER)
        os.chdir("/")
        code = "import os, calib_prune; print(os.getuid(), calib_prune.__file__)"
        done = subprocess.run(
            [sys.executable, "-c", code],
            env=dict(PYTHONPATH=str(alone.ROOT)),
            capture_output=True,
            text=True,
        )
        return [done.stdout.strip(), done.stderr[-400:]]
    ended = in_fork(act, 60)
    if ended.fault: return ended.fault[-400:]
    return "" if ended.value[
        0] == f"{OTHER} {alone.ROOT}/calib_prune/__init__.py" else f"no: {ended.value}"


if __name__ == "__main__": sys.exit(alone.main(results))
