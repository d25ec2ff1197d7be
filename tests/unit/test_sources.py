"Sources: one interface over packaged text, the standard library, hub data sets and a user's files."
import hashlib
import json
import os
import re
import tracemalloc
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import httpx
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets.exceptions import DatasetGenerationError
from hypothesis import given
from hypothesis import strategies as st

from calib_prune.calibration import readers
from calib_prune.calibration.sets import build_calibration, source_stream
from calib_prune.calibration.sources import (
    FURTHER,
    HELDOUT,
    PAPER_SOURCES,
    SOURCES,
    SUITE,
    HubSource,
    LibrarySource,
    get_source,
    hub_source,
    library_files,
    packaged,
    say_gsm8k_hub,
    say_hellaswag_hub,
    say_siqa_hub,
)
from calib_prune.core import DIMENSIONS, CalibPruneError
from calib_prune.data.wheels import say_winogrande
from calib_prune.model.tiny import tiny_tokenizer


def damage_parquet(path):
    "Overwrite the first page, and leave the footer as it is."
    data = path.read_bytes()
    path.write_bytes(data[:4] + b"\xff" * 40 + data[44:])


def test_registries():
    assert len(SUITE) == len(PAPER_SOURCES) == 15 and SUITE.items() <= SOURCES.items()
    for sources in (SOURCES, PAPER_SOURCES):
        assert {s.dimension for s in sources.values()} == set(DIMENSIONS)
        assert all(s.name == k and s.licence and s.origin for k, s in sources.items())
    assert (
        not SOURCES.keys() & (HELDOUT.keys() | FURTHER.keys() | PAPER_SOURCES.keys())
        and not FURTHER.keys() & HELDOUT.keys()
    )
    assert get_source("c4") is SOURCES["c4"] and get_source("paper:c4").path == "allenai/c4"


# The standard library

def test_library_leaves_out_tests_data_and_installed_packages(tmp_path):
    for name in ("b.py", "a/x.py", "a/test/t.py", "site-packages/p.py", "encodings/cp1.py",
                 "_sysconfigdata_x.py", "a/n.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(f"# {name}")
    assert [p.relative_to(tmp_path).as_posix() for p in library_files(tmp_path)] == [
        "a/x.py",
        "b.py",
    ]
    source = LibrarySource("lib", "Code", "-", "-", root=str(tmp_path))
    assert source.documents() == ["# a/x.py", "# b.py"]
    assert source.size == {"documents": 2, "megabytes": 0.0}
    (tmp_path / "b.py").write_bytes("# -*- coding: latin-1 -*-\n# caf\xe9".encode("latin-1"))
    changed = LibrarySource("lib", "Code", "-", "-", root=str(tmp_path))
    assert "café" in changed.documents()[1] and changed.revision != source.revision


def test_library_leaves_out_broken_links(tmp_path):
    (tmp_path / "a.py").write_text("# a")
    (tmp_path / "b.py").symlink_to(tmp_path / "gone.py")
    assert LibrarySource("lib", "Code", "-", "-", root=str(tmp_path)).documents() == ["# a"]


def test_library_without_source_files_is_an_error(tmp_path):
    with pytest.raises(CalibPruneError):
        LibrarySource("lib", "Code", "-", "-", root=str(tmp_path)).documents()


# The hub, as a local folder in its layout

@pytest.fixture
def folder(tmp_path):
    (tmp_path / "data").mkdir()
    frame = pd.DataFrame(
        {"question": ["1+1?", "2+2?", "1+1?"], "answer": ["2", "4", "2"], "n": [1, 2, 3]}
    )
    frame.to_parquet(tmp_path / "data/train-00000-of-00001.parquet")
    frame[:1].to_parquet(tmp_path / "data/test-00000-of-00001.parquet")
    pd.DataFrame({"text": ["one", " ", "two"]}).to_parquet(tmp_path / "plain.parquet")
    (tmp_path / "README.md").write_text(
        "---\nconfigs:\n- config_name: main\n  data_files:\n  - split: train\n    path:"
        " data/train-*\n  - split: test\n    path: data/test-*\n- config_name: plain\n "
        " data_files:\n  - split: train\n    path: plain.parquet\n---\n"
    )
    return tmp_path


def test_hub_parquet_with_configurations_in_the_card(folder):
    assert get_source(f"hub:{folder}[main]#{{question}} {{answer}}").documents() == [
        "1+1? 2",
        "2+2? 4",
    ]
    assert get_source(f"hub:{folder}[main]:test#question").documents() == ["1+1?"]
    assert get_source(f"hub:{folder}[plain]").documents() == ["one", "two"]


def test_hub_jsonl_without_a_card(tmp_path):
    (tmp_path / "train.jsonl").write_text('{"text": "one"}\n')
    assert get_source(f"hub:{tmp_path}").documents() == ["one"]


def test_hub_jsonl_with_a_card(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "one"}\n')
    (tmp_path / "b.jsonl").write_text('{"text": "two"}\n')
    (tmp_path / "README.md").write_text(
        "---\nconfigs:\n- config_name: b\n  data_files: b.jsonl\n---\n"
    )
    assert get_source(f"hub:{tmp_path}[b]").documents() == ["two"]


def test_hub_revision_follows_the_content_and_can_be_pinned(folder):
    source = get_source(f"hub:{folder}[plain]")
    assert re.fullmatch(r"folder#[0-9a-f]{12}", source.revision)
    pinned = get_source(f"hub:{folder}[plain]@{source.revision}")
    assert pinned.documents() == ["one", "two"]
    pd.DataFrame({"text": ["three"]}).to_parquet(folder / "plain.parquet")
    assert get_source(f"hub:{folder}[plain]").revision != source.revision
    with pytest.raises(CalibPruneError, match="not at folder#"):
        get_source(f"hub:{folder}[plain]@{source.revision}").documents()


def test_a_folder_that_changes_while_it_is_read_is_refused(folder, monkeypatch):
    source, later = get_source(f"hub:{folder}[plain]"), pd.DataFrame({"text": ["three"]})
    assert source.documents() == ["one", "two"]
    later.to_parquet(folder / "plain.parquet")
    with pytest.raises(CalibPruneError, match="changed"): source.documents()
    assert source.anew().documents() == ["three"] and source.anew().revision != source.revision


def test_the_number_of_hub_documents_is_bounded(folder, monkeypatch):
    monkeypatch.setattr("calib_prune.calibration.sources.MAX_DOCUMENTS", 1)
    assert get_source(f"hub:{folder}[plain]").documents() == ["one"]


@pytest.mark.parametrize("spec, says",
                         [("[nope]", "'nope' not found"), ("[main]:dev", "dev"),
                          ("[main]#body", "no column 'body'; its columns are question, answer, n"),
                          ("[main]#n", "holds int, not text"), ("[main]#{question", "template"),
                          ("[main]#{body}", "no column 'body'"),
                          ("[main]#{answer.x}", "template"), ("[main]#{0}", "template"),
                          ("[main]#{answer[x]}", "template")])
def test_hub_mistakes(folder, spec, says):
    with pytest.raises(CalibPruneError, match=re.escape(says)):
        get_source(f"hub:{folder}{spec}").documents()


def test_a_hub_data_set_out_of_reach_is_an_error(monkeypatch):
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    def load(*a, **k): raise ConnectionError("Couldn't reach the Hub")
    monkeypatch.setattr("datasets.load_dataset_builder", load)
    with pytest.raises(CalibPruneError, match="paper:gsm8k"):
        get_source("paper:gsm8k").documents()


@pytest.mark.parametrize("error", [
    DatasetGenerationError("a bad shard"),
    httpx.ConnectError("no route"),
    pa.ArrowInvalid("a bad page"),
    OSError("reset"),
    EOFError("cut short")])
def test_a_failure_while_streaming_is_an_error(monkeypatch, error):
    def rows():
        yield {"question": "q", "answer": "a"}
        raise error
    monkeypatch.setattr(
        "datasets.load_dataset_builder", lambda *a, **k: SimpleNamespace(hash="c0ffee")
    )
    monkeypatch.setattr("datasets.load_dataset", lambda *a, **k: rows())
    with pytest.raises(CalibPruneError, match=f"(?s)'paper:gsm8k' .openai/gsm8k.*{error}"):
        get_source("paper:gsm8k").documents()


def test_a_damaged_shard_in_a_folder_is_an_error(folder):
    damage_parquet(folder / "plain.parquet")
    with pytest.raises(CalibPruneError, match=re.escape(str(folder))):
        get_source(f"hub:{folder}[plain]").documents()


def test_a_hub_data_set_is_loaded_at_the_resolved_commit(monkeypatch):
    """The commit that a branch stood for is what gets loaded and recorded; no code of the hub is
    allowed to run."""
    asked = []
    class Builder: hash = "c0ffee"
    monkeypatch.setattr(
        "datasets.load_dataset_builder", lambda *a, **k: asked.append((a, k)) or Builder
    )
    rows = [{"question": "q", "answer": "a #### 1"}]
    monkeypatch.setattr("datasets.load_dataset", lambda *a, **k: asked.append((a, k)) or rows)
    source = get_source("paper:gsm8k@main")
    assert source.documents() == ["q\na"] and source.revision == "c0ffee"
    assert [(k["revision"]) for _, k in asked] == ["main", "c0ffee"]
    assert not any("trust_remote_code" in k for _, k in asked)


NAME = st.from_regex(r"[A-Za-z][\w.-]{0,8}/[A-Za-z][\w.-]{0,8}", fullmatch=True)
WORD = st.from_regex(r"[A-Za-z0-9][\w.-]{0,8}", fullmatch=True)

@given(
    NAME,
    st.none() | WORD,
    st.none() | WORD,
    st.none() | st.sampled_from(["text", "{a}: {b}\n{c}"]),
    st.none() | WORD,
)
def test_hub_names_are_read_back(path, config, split, text, at):
    spec = f"hub:{path}" + "".join(f for f, v in ((f"[{config}]", config), (f":{split}", split),
                                                  (f"#{text}", text), (f"@{at}", at)) if v)
    s = hub_source(spec)
    assert (s.path, s.config, s.split, s.text, s.at) == (path, config, split or "train", text
                                                         or "text", at)


def test_hub_records_become_the_right_text():
    assert say_hellaswag_hub({"ctx": "He", "endings": ["a", "b"], "label": "1"}) == "He b"
    r = {
        "context": "C.", "question": "Q?", "answerA": "a", "answerB": "b", "answerC": "c",
        "label": "3"}
    assert say_siqa_hub(r) == "C. Q? c"
    assert (
        say_winogrande({"sentence": "so _ won", "option1": "A", "option2": "B", "answer": "1"})
        == "so A won"
    )
    assert (
        say_gsm8k_hub({"question": "Q", "answer": "x=<<1+1=2>>2\nso 2\n#### 2"}) == "Q\nx=2\nso 2"
    )


# A user's own files

def test_txt_is_one_document_unless_form_feeds_divide_it(tmp_path):
    (tmp_path / "a.txt").write_bytes("\ufeffone\n\nstill one\f\n two \f".encode())
    assert get_source(str(tmp_path / "a.txt")).documents() == ["one\n\nstill one", "two"]


def test_jsonl_and_parquet_fields(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(
        b'{"text": "x", "body": "y\\u2028z"}\r\n\r\n{"text": "w", "body": "v"}\n'
    )
    assert get_source(f"{tmp_path}/a.jsonl").documents() == ["x", "w"]
    assert get_source(f"{tmp_path}/a.jsonl:body").documents() == ["y\u2028z", "v"]
    pd.DataFrame({"text": ["x", None, "y"], "n": [1, 2, 3]}).to_parquet(tmp_path / "a.parquet")
    assert get_source(f"{tmp_path}/a.parquet").documents() == ["x", "y"]
    assert get_source(f"{tmp_path}/a.parquet").dimension == "Own"


def test_file_revision_follows_the_content(tmp_path):
    (tmp_path / "a.txt").write_text("one")
    before = get_source(f"{tmp_path}/a.txt").revision
    (tmp_path / "a.txt").write_text("two")
    assert get_source(f"{tmp_path}/a.txt").revision != before


def write_texts(path, texts):
    "The same texts in any of the formats."
    if path.suffix == ".txt": path.write_text("\f".join(texts))
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps({"text": o}) + "\n" for o in texts))
    else: pq.write_table(pa.table({"text": texts}), path)


@pytest.mark.parametrize("end", ["txt", "jsonl", "parquet"])
def test_a_file_that_changes_while_it_is_read_is_refused(tmp_path, end, monkeypatch):
    monkeypatch.setattr(readers, "CHUNK", 4096)  # more is not in the memory yet
    path = tmp_path / f"a.{end}"
    write_texts(path, [f"text {i}" for i in range(20_000)])
    source = get_source(str(path))
    texts = source.stream()
    next(texts)
    with open(path, "r+b") as file:
        file.seek(-4, 2)
        file.write(b"8")
    with pytest.raises(CalibPruneError, match=f"a.{end}"): list(texts)


@pytest.mark.parametrize("end", ["txt", "jsonl", "parquet"])
def test_a_source_stands_for_one_revision(tmp_path, end):
    "Documents and revision of one object belong together; `anew` sees what the file holds now."
    path = tmp_path / f"a.{end}"
    write_texts(path, ["one", "two"])
    source = get_source(str(path))
    assert source.revision == f"sha256:{hashlib.sha256(path.read_bytes()).hexdigest()[:12]}"
    write_texts(path, ["one", "six"])
    with pytest.raises(CalibPruneError, match="changed"): source.documents()
    assert source.anew().documents() == ["one", "six"] and source.anew().revision != source.revision


@pytest.mark.parametrize("end, says", [("txt", "zero byte at offset 0"),
                                       ("jsonl", "zero byte at offset 0"),
                                       ("parquet", "not a Parquet file")])
def test_a_sparse_terabyte_is_refused_before_it_is_hashed(tmp_path, end, says):
    path = tmp_path / f"a.{end}"
    with open(path, "wb") as file: file.truncate(1 << 40)
    with pytest.raises(CalibPruneError, match=says): _ = get_source(str(path)).revision


def test_text_is_judged_while_it_is_hashed(tmp_path):
    with open(tmp_path / "a.txt", "wb") as file:
        file.write(b"a line\n" * 10 ** 6)
        file.truncate(1 << 40)
    with pytest.raises(CalibPruneError, match="zero byte at offset 7,000,000"):
        _ = get_source(f"{tmp_path}/a.txt").revision


def test_a_group_of_rows_that_is_large_only_when_unpacked_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(readers, "BATCH", 10 ** 6)
    table = pa.table({"text": ["a b c d e\n" * 200_000]})
    pq.write_table(
        table,
        tmp_path / "a.parquet",
        compression="zstd",
        use_dictionary=False,
        write_statistics=False,
    )
    with pytest.raises(CalibPruneError, match="2,000,"):
        get_source(f"{tmp_path}/a.parquet").documents()


@pytest.mark.parametrize("end", ["jsonl", "parquet"])
def test_a_record_that_is_too_long_is_named(tmp_path, end, monkeypatch):
    monkeypatch.setattr(readers, "LARGEST_RECORD", 1000)
    monkeypatch.setattr(readers.within, "__defaults__", (1000,))
    monkeypatch.setattr(readers, "CHUNK", 100)
    write_texts(tmp_path / f"a.{end}", ["short", "long " * 400])
    with pytest.raises(CalibPruneError, match=f"a.{end}.* 1,000 "):
        get_source(f"{tmp_path}/a.{end}").documents()


def test_a_text_without_lines_is_divided(tmp_path):
    (tmp_path / "a.txt").write_text("abcd " * 4_000_000)
    tracemalloc.start()
    assert all(len(o) < 10 ** 7 for o in readers.read_txt(tmp_path / "a.txt", "text"))
    assert tracemalloc.get_traced_memory()[1] < 6e7
    tracemalloc.stop()


@pytest.mark.parametrize(
    "error",
    [MemoryError("malloc of size 5 failed"), pa.ArrowMemoryError("realloc of size 5 failed")],
)
def test_too_little_memory_is_no_damage(tmp_path, monkeypatch, error):
    write_texts(tmp_path / "a.parquet", ["one"])
    def fail(*a, **k): raise error
    monkeypatch.setattr("pyarrow.parquet.ParquetFile.iter_batches", fail)
    with pytest.raises(CalibPruneError, match="memory .*a.parquet ") as e:
        get_source(f"{tmp_path}/a.parquet").documents()
    assert "damaged" not in str(e.value)


@pytest.mark.parametrize("name, data, says", [
    ("a.txt", b"", "holds no text"), ("a.txt", b" \n\f ", "holds no text"),
    ("a.txt", b"ab\0c", "zero byte at offset 2"), ("a.txt", b"caf\xe9", "byte 0xe9 at offset 3"),
    ("a.jsonl", b'{"text": "a"}\nnope', "line 2, is not JSON"),
    ("a.jsonl", b'{"body": "a", "n": 1}', "no field 'text', but the fields body, n"),
    ("a.jsonl", b"[1]", "but a list"), ("a.jsonl", b'{"text": 3}', "does not hold text but 3"),
    ("a.jsonl", b'{"text": "\\ud800"}', "does not hold text"), ("a.jsonl", b"", "holds no text"),
    ("a.parquet", b"PAR1", "not a Parquet file"), ("a.csv", b"x", "not '.csv'"),
    ("noend/a", b"x", "not ''")])
def test_bad_files_are_named(tmp_path, name, data, says):
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(data)
    with pytest.raises(CalibPruneError, match=re.escape(says)) as e:
        get_source(str(path)).documents()
    assert str(path) in str(e.value)


def test_a_damaged_page_is_an_error(tmp_path):
    pd.DataFrame({"text": ["one", "two"]}).to_parquet(tmp_path / "a.parquet")
    damage_parquet(tmp_path / "a.parquet")
    with pytest.raises(CalibPruneError, match="a.parquet .*'text'"):
        get_source(f"{tmp_path}/a.parquet").documents()


def test_a_file_that_may_not_be_read_is_an_error(tmp_path, monkeypatch):
    (tmp_path / "a.txt").write_text("one")
    source = get_source(f"{tmp_path}/a.txt")
    def refuse(*a, **k): raise PermissionError(13, "Permission denied")
    monkeypatch.setattr("builtins.open", refuse)
    with pytest.raises(CalibPruneError, match="a.txt: Permission denied"):
        source.documents()
    with pytest.raises(CalibPruneError, match="a.txt: Permission denied"):
        _ = source.revision


def test_parquet_columns_that_are_missing_or_not_text(tmp_path):
    pd.DataFrame({"body": ["x"], "n": [1]}).to_parquet(tmp_path / "a.parquet")
    for name in ("a.parquet", "a.parquet:n"):
        with pytest.raises(CalibPruneError, match="body .*, n "):
            get_source(f"{tmp_path}/{name}").documents()
    assert get_source(f"{tmp_path}/a.parquet:body").documents() == ["x"]
    pd.DataFrame({"a[b(": ["y"]}).to_parquet(tmp_path / "b.parquet")
    assert list(readers.read_parquet_column(tmp_path / "b.parquet", "a[b(")) == ["y"]


@pytest.mark.parametrize("kind", ["file", "folder", "inside"])
def test_a_name_that_is_not_utf8_is_refused_unless_it_is_in_a_folder(tmp_path, kind):
    name = os.fsdecode(b"r\xe9sum\xe9")  # Latin-1
    folder = tmp_path / (name if kind == "folder" else "notes")
    folder.mkdir()
    file = folder / ("a.txt" if kind == "folder" else f"{name}.txt")
    file.write_text("word " * 100)
    draw = partial(build_calibration, str(file if kind == "file" else folder), tiny_tokenizer(),
                   2, 8)
    if kind == "inside":
        assert draw().record()["windows"] == 2
        return
    with pytest.raises(CalibPruneError, match=r"udce9sum.* is not UTF-8: rename"): draw()


def test_a_bracket_in_the_name_of_a_file_with_a_field_is_no_pattern(tmp_path):
    (tmp_path / "data[1].jsonl").write_text('{"body": "one"}\n')
    (tmp_path / "data2.jsonl").write_text('{"body": "two"}\n')
    assert get_source(f"{tmp_path}/data[1].jsonl:body").documents() == ["one"]
    assert get_source(f"{tmp_path}/data[23].jsonl:body").documents() == ["two"]


def test_missing_files_and_folders(tmp_path):
    with pytest.raises(CalibPruneError, match="none.txt"): get_source(f"{tmp_path}/none.txt")
    with pytest.raises(CalibPruneError, match="none.jsonl"): get_source("none.jsonl:body")
    with pytest.raises(CalibPruneError, match="hub:"): get_source(str(tmp_path))
    with pytest.raises(CalibPruneError, match="hub:openai/gsm8k"): get_source("openai/gsm8k")


def test_a_folder_and_a_pattern_are_one_source(tmp_path):
    (tmp_path / "more").mkdir()
    (tmp_path / ".git").mkdir()
    texts = {"b.txt": "two", "a.txt": "one", "more/c.txt": "one", "more/empty.txt": "",
             ".d.txt": "x", ".git/f.txt": "x"}
    for name, text in texts.items():
        (tmp_path / name).write_text(text)
    (tmp_path / "more/e.jsonl").write_text('{"body": "three"}\n')
    with pytest.raises(CalibPruneError, match="no field 'text'"):
        get_source(str(tmp_path)).documents()
    (tmp_path / "more/e.jsonl").write_text('{"text": "three"}\n')
    folder = get_source(str(tmp_path))
    assert folder.documents() == ["one", "two", "three"]
    before = folder.revision
    assert folder.anew().revision == before
    (tmp_path / "b.txt").write_text("other")
    assert folder.anew().revision != before
    assert get_source(f"{tmp_path}/*.txt").documents() == ["one", "other"]
    assert get_source(f"{tmp_path}/**/*.jsonl:text").documents() == ["three"]
    with pytest.raises(CalibPruneError, match="no file with text"): get_source(f"{tmp_path}/*.md")


CHAT = (
    '{"messages": [{"role": "user", "content": "%s?"}, {"role": "assistant", "content": "Yes."}]}'
)


class WithTemplate:
    chat_template = "a template"

    def apply_chat_template(self, messages, tokenize):
        return "".join(f"<{message['role']}>{message['content']}" for message in messages)


def test_chats_go_through_the_template_of_the_model(tmp_path):
    file = tmp_path / "chats.jsonl"
    file.write_text("\n".join(CHAT % name for name in ("a", "b")))
    source = get_source(str(file))
    assert source.documents() == ["a?\n\nYes.", "b?\n\nYes."], "no model is known"
    with_template = source.for_tokenizer(WithTemplate())
    assert with_template.documents() == ["<user>a?<assistant>Yes.", "<user>b?<assistant>Yes."]
    assert with_template.entry != source.entry, "another template is another text"
    with pytest.raises(CalibPruneError, match="no chat template"): source.for_tokenizer(object())
    table = pd.DataFrame([json.loads(line) for line in file.read_text().split("\n")])
    table.to_parquet(tmp_path / "chats.parquet")
    parquet = get_source(f"{tmp_path}/chats.parquet").for_tokenizer(WithTemplate())
    assert parquet.documents() == with_template.documents()


def test_a_chat_with_a_template_is_of_the_same_revision(tmp_path):
    "The text is looked at once: another text under its name is refused."
    file = tmp_path / "chats.jsonl"
    pd.DataFrame({"messages": [json.loads(CHAT % "a")["messages"]]}).to_parquet(
        tmp_path / "a.parquet")
    for name in (str(file), f"hub:{tmp_path}#messages"):
        file.write_text(CHAT % "a")
        source = get_source(name)
        revision = source.revision
        file.write_text(CHAT % "b")
        told = source.for_tokenizer(WithTemplate())
        assert told.revision == revision
        with pytest.raises(CalibPruneError, match="changed"): told.documents()


def test_special_tokens_of_a_template_are_tokens_and_in_other_text_are_not(tmp_path):
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}<|endoftext|>{% endfor %}"
    (tmp_path / "chats.jsonl").write_text(CHAT % "a")
    (tmp_path / "text.txt").write_text("a?<|endoftext|>Yes.<|endoftext|>")
    ends = {
        name: int((source_stream(get_source(f"{tmp_path}/{name}"), tokenizer)[0] == 0).sum())
        for name in ("chats.jsonl", "text.txt")
    }
    assert ends == {"chats.jsonl": 3, "text.txt": 1}


@pytest.mark.parametrize("line", [
    '{"messages": []}', '{"messages": "hello"}', '{"messages": [{"role": "user"}]}',
    '{"messages": [{"role": 1, "content": "x"}]}'])
def test_messages_that_are_none_are_refused(tmp_path, line):
    (tmp_path / "a.jsonl").write_text(line)
    with pytest.raises(CalibPruneError, match="line 1: 'messages' must be a list"):
        get_source(f"{tmp_path}/a.jsonl").documents()


@pytest.mark.parametrize("column", [[["a", "b"]], [[{"from": "user", "value": "x"}]]])
def test_parquet_messages_without_content_are_refused(tmp_path, column):
    pd.DataFrame({"messages": column}).to_parquet(tmp_path / "a.parquet")
    with pytest.raises(CalibPruneError, match="has no text column 'messages'"):
        get_source(f"{tmp_path}/a.parquet").documents()


def test_an_empty_cell_of_chats_is_left_out(tmp_path):
    chat = json.loads(CHAT % "a")["messages"]
    pd.DataFrame({"messages": [chat, None]}).to_parquet(tmp_path / "a.parquet")
    assert get_source(f"{tmp_path}/a.parquet").documents() == ["a?\n\nYes."]


def test_chats_and_text_are_two_sources(tmp_path):
    (tmp_path / "a.jsonl").write_text(CHAT % "a")
    (tmp_path / "b.txt").write_text("text")
    with pytest.raises(CalibPruneError, match="two sources"): get_source(str(tmp_path))


@pytest.mark.parametrize("name", ["", "c5", "wikipeda", "paper:c5", "PAPER:c4", "paper:c5@abc"])
def test_unknown_names_suggest(name):
    with pytest.raises(CalibPruneError, match=f"'{name}'"): get_source(name)
    if name == "wikipeda":
        assert "Did you mean 'wikipedia'" in str(
            pytest.raises(CalibPruneError, get_source, name).value
        )


@given(st.lists(st.text(st.characters(exclude_categories=["Cs"])), min_size=1))
def test_any_text_survives_jsonl(tmp_path_factory, texts):
    path = tmp_path_factory.mktemp("j") / "a.jsonl"
    path.write_text("".join(json.dumps({"text": t}) + "\n" for t in texts))
    wanted = list(dict.fromkeys(t.strip() for t in texts if t.strip()))
    if wanted: assert get_source(str(path)).documents() == wanted
    else:
        with pytest.raises(CalibPruneError):
            get_source(str(path)).documents()


# What was really fetched

@pytest.mark.real
@pytest.mark.parametrize("name", [*SOURCES, *HELDOUT, *FURTHER])
def test_real_source_fills_64_windows_of_512(name):
    "Except for C4, of which the wheels hold 58 windows."
    from tokenizers import Tokenizer

    from calib_prune.data.fetch import cached
    tokenizer = Tokenizer.from_file(str(cached("models", "smollm2-135m") / "tokenizer.json"))
    texts, n = get_source(name).documents(), 0
    assert len(set(texts)) == len(texts)
    for i in range(0, len(texts), 100):
        n += sum(len(o) + 1 for o in tokenizer.encode_batch(texts[i:i + 100]))
        if n >= 64 * 512: break
    assert n >= 64 * 512 or (name == "c4" and n >= 58 * 512)


@pytest.mark.real
def test_an_edited_text_in_the_cache_is_refused(tmp_path, monkeypatch):
    "With as many bytes as before: only its hash shows it."
    from calib_prune.core import cache_dir
    from calib_prune.data.fetch import cached
    data = cached("sources", "c4").read_bytes()
    (tmp_path / "sources").mkdir()
    (tmp_path / "manifest.json").symlink_to(cache_dir() / "manifest.json")
    (tmp_path / "sources/c4.jsonl").write_bytes(data.replace(b"a", b"e"))
    monkeypatch.setenv("CALIB_PRUNE_CACHE", str(tmp_path))
    with pytest.raises(CalibPruneError, match="c4.jsonl"):
        SOURCES["c4"].documents()


@pytest.mark.real
def test_real_sizes_are_those_of_the_text():
    assert SOURCES["c4"].size == {"documents": 104, "megabytes": 0.13}
    assert all(s.size["documents"] >= 50 and s.size["megabytes"] > 0.1 for s in SOURCES.values())


@pytest.mark.real
def test_real_revisions_name_wheel_and_content():
    assert re.fullmatch(r"evals==3\.0\.1\.post1#[0-9a-f]{12}", SOURCES["c4"].revision)
    assert SOURCES["c4"].revision != SOURCES["wikipedia"].revision
    assert re.fullmatch(r"Python [\d.]+\S*#[0-9a-f]{12}", SOURCES["stdlib"].revision)


@pytest.mark.real
def test_real_heldout_text_is_in_no_general_source():
    def grams(texts, n=13):
        return {
            tuple(w[i:i + n]) for t in texts if (w := re.findall(r"\w+", t.lower()))
            for i in range(len(w) - n + 1)}
    held = grams(t for s in HELDOUT.values() for t in s.documents()[:50])
    assert len(held) > 50_000
    for name in ("c4", "openwebtext", "wikipedia", "news"):
        assert not held & grams(SOURCES[name].documents()), name


def test_replace_keeps_a_source_whole():
    s = replace(PAPER_SOURCES["paper:c4"], at="abc")
    assert isinstance(s, HubSource) and (s.name, s.config, s.at) == ("paper:c4", "en", "abc")


def test_a_source_without_an_entry_of_what_is_fetched_is_not_packaged():
    with pytest.raises(CalibPruneError, match="No entry of `SOURCE_TEXT` .* is 'letters'"):
        packaged("letters", "General", "CC0", "Letters")
