"""Calibration sets: exact shares, disjoint windows, the same bytes for ever, provenance that can be
checked."""
import hashlib
import os
from dataclasses import dataclass, field

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from calib_prune.calibration.sets import (
    allocate,
    build_calibration,
    load_calibration,
    named_mixes,
    parse_mix,
    save_calibration,
    source_stream,
    token_stream,
    window_starts,
)
from calib_prune.calibration.sources import SOURCES, get_source
from calib_prune.core import CalibPruneError, cache_dir, content_hash
from calib_prune.model.tiny import tiny_llama, tiny_tokenizer
from calib_prune.pipeline.prune import PruneSettings, prune_loaded

TOKENIZER = tiny_tokenizer()


@dataclass
class Texts:
    texts: list = field(default_factory=lambda: [chr(97 + i) * (10 + i) for i in range(26)])
    name: str = "texts"


    @property
    def revision(self): return content_hash(self.texts)

    def documents(self): return self.texts


@pytest.fixture(autouse=True, scope="module")
def own_cache(tmp_path_factory):
    "Token streams of these tests go to a cache of their own; what was fetched stays in reach."
    with pytest.MonkeyPatch.context() as m:
        fetched = cache_dir()
        here = tmp_path_factory.mktemp("cache")
        for name in ("models", "sources", "benchmarks", "manifest.json"):
            (here / name).symlink_to(fetched / name)
        m.setenv("CALIB_PRUNE_CACHE", str(here))
        yield


@given(st.lists(st.integers(1, 10 ** 6), min_size=1, max_size=20), st.integers(1, 500))
def test_allocation_is_exact_and_fair(weights, n):
    mix = {str(i): w for i, w in enumerate(weights)}
    counts = allocate(mix, n)
    assert sum(counts.values()) == n
    for k, w in mix.items(): assert abs(counts[k] - n * w / sum(weights)) < 1 + 1e-9


@given(st.integers(1, 5000), st.integers(1, 64), st.integers(0, 99))
def test_windows_are_disjoint_and_inside(n_tokens, length, seed):
    starts = np.sort(window_starts(n_tokens, length, seed, "x"))
    assert len(starts) == n_tokens // length
    assert (np.diff(starts) == length).all()
    assert not len(starts) or (starts[0] >= 0 and starts[-1] + length <= n_tokens)


def test_same_bytes_for_ever():
    cal = build_calibration(Texts(), TOKENIZER, n_windows=8, length=16, seed=3)
    assert cal.content == "8d836f861d94d44e", "released sets must never change"


@settings(max_examples=25)
@given(st.lists(st.text(min_size=1, max_size=40), min_size=1, max_size=12), st.integers(0, 5))
def test_provenance_leads_back_to_the_text(texts, seed):
    stream, starts = token_stream(texts, TOKENIZER)
    length = 5
    if len(stream) < length: return
    cal = build_calibration(Texts(texts), TOKENIZER, len(stream) // length, length, seed)
    for row, window in zip(cal.provenance.itertuples(), cal.tokens.numpy(), strict=True):
        at = starts[row.first_document] + row.offset
        assert (stream[at:at + length] == window).all()
        ids = TOKENIZER(texts[row.first_document], split_special_tokens=True)["input_ids"] + [0]
        inside = ids[row.offset:row.offset + length]
        assert list(window[:len(inside)]) == inside
        assert row.first_document <= row.last_document < len(texts)


def test_a_mix_shares_its_draw_with_its_parts(tmp_path):
    (tmp_path / "a.txt").write_text("alpha beta gamma " * 40)
    (tmp_path / "b.txt").write_text("0123456789 " * 60)
    a, b = str(tmp_path / "a.txt"), str(tmp_path / "b.txt")
    alone = build_calibration(a, TOKENIZER, 8, 20, seed=1)
    mixed = build_calibration({a: 3, b: 1}, TOKENIZER, 8, 20, seed=1)
    assert list(mixed.counts.values()) == [6, 2]
    assert torch.equal(mixed.tokens[:6], alone.tokens[:6])


def test_a_files_draw_does_not_depend_on_where_it_lies(tmp_path, monkeypatch):
    for name in ("notes.txt", "elsewhere/other.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("".join(map(str, range(400))))
    monkeypatch.chdir(tmp_path)
    names = ("notes.txt", "./notes.txt", str(tmp_path / "notes.txt"), "elsewhere/other.txt")
    assert len({build_calibration(n, TOKENIZER, 5, 16).content for n in names}) == 1
    named = Texts([(tmp_path / "notes.txt").read_text()], name="notes.txt")
    assert (
        build_calibration(named, TOKENIZER, 5, 16).content
        != build_calibration("notes.txt", TOKENIZER, 5, 16).content
    )


def test_a_folders_draw_does_not_depend_on_where_it_lies(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "train.jsonl").write_text(
            "".join(f'{{"text": "{i:09}"}}\n' for i in range(40))
        )
    a, b = (build_calibration(f"hub:{tmp_path / name}", TOKENIZER, 5, 16) for name in ("a", "b"))
    assert a.content == b.content


def test_packaged_sources_are_drawn_by_their_name():
    assert all(s.draw_key == k for k, s in SOURCES.items())
    assert get_source("paper:c4").draw_key == get_source("paper:c4@abc").draw_key == "paper:c4"


def test_sources_of_one_name_are_kept_apart(monkeypatch):
    known = {f"same@{c}": Texts([c * 300], name="same") for c in "ab"}
    monkeypatch.setattr("calib_prune.calibration.sets.get_source", known.get)
    cal = build_calibration("same@a=3,same@b=1", TOKENIZER, 8, 16)
    assert cal.counts == {"same@a": 6, "same@b": 2}
    assert cal.sources == {k: s.revision for k, s in known.items()}
    for label, window in zip(cal.provenance["source"], cal.tokens, strict=True):
        assert set(TOKENIZER.decode(window).replace("<|endoftext|>", "")) == {label[-1]}


@pytest.mark.parametrize("part", ["tokens", "documents"])
@pytest.mark.parametrize("keep", [0, 60, -4])
def test_a_cut_token_cache_is_made_again(part, keep):
    source = Texts(["cut", "short"], name=f"cut-{part}-{keep}")
    whole = [np.array(o) for o in source_stream(source, TOKENIZER)]
    path = max((cache_dir() / "tokens").glob(f"*.{part}.npy"), key=os.path.getmtime)
    data = path.read_bytes()
    path.write_bytes(data[:keep])
    for again, wanted in zip(source_stream(source, TOKENIZER), whole, strict=True):
        assert (again == wanted).all()
    assert path.read_bytes() == data


def kept(): return {o.name: o.read_bytes() for o in (cache_dir() / "tokens").glob("*.npy")}


@pytest.mark.parametrize("end", ["txt", "jsonl", "parquet"])
def test_tokens_of_a_text_that_changes_meanwhile_are_not_kept(tmp_path, end, monkeypatch):
    "The text is another one between its hash and its reading, as if an editor saved it then."
    from calib_prune.calibration.sources import READERS
    from tests.unit.test_sources import write_texts
    path, before, read = tmp_path / f"a.{end}", kept(), READERS[f".{end}"]
    write_texts(path, [f"the old text, {i}" for i in range(50)])
    def other(file, field, seen=None):
        if seen: write_texts(path, [f"the new text, {i}" for i in range(50)])
        return read(file, field, seen)
    with monkeypatch.context() as m:
        m.setitem(READERS, f".{end}", other)
        with pytest.raises(CalibPruneError, match=f"a.{end}"):
            build_calibration(str(path), TOKENIZER, 2, 16)
    assert kept() == before
    write_texts(path, [f"the old text, {i}" for i in range(50)])
    cal = build_calibration(str(path), TOKENIZER, 4, 16)
    assert "new" not in "".join(TOKENIZER.decode(o) for o in cal.tokens)
    assert cal.sources == {
        str(path): f"sha256:{hashlib.sha256(path.read_bytes()).hexdigest()[:12]}"
    }


@pytest.mark.parametrize("end", ["txt", "jsonl", "parquet"])
def test_a_text_that_is_replaced_between_two_draws_is_drawn_anew(tmp_path, end):
    "By its name or as an object: tokens, order and record are those of the new text."
    from tests.unit.test_sources import write_texts
    path, found = tmp_path / f"a.{end}", []
    write_texts(path, ["a" * 40, "b" * 40])
    source = get_source(str(path))
    for texts in (["a" * 40, "b" * 40], ["a" * 40, "c" * 40]):
        write_texts(path, texts)
        by_name, by_object = (
            build_calibration(o, TOKENIZER, 4, 16, seed=1) for o in (str(path), source)
        )
        assert by_name.content == by_object.content and by_name.sources == by_object.sources
        found.append(by_name)
    assert found[0].sources != found[1].sources and "b" not in "".join(
        TOKENIZER.decode(o) for o in found[1].tokens
    )


def test_a_source_of_ones_own_that_changes_meanwhile_is_refused():
    class Moving(Texts):
        def documents(self):
            yield from self.texts
            self.texts = [*self.texts, "later"]
    before = kept()
    with pytest.raises(CalibPruneError, match="moving"):
        source_stream(Moving(name="moving"), TOKENIZER)
    assert kept() == before


def test_a_source_of_ones_own_is_a_group_of_its_own():
    cal = build_calibration(Texts(), TOKENIZER, 4, 16)
    assert cal.groups == ["texts"] * 4
    report = prune_loaded(tiny_llama(), cal, PruneSettings(method="sparsegpt", sparsity="0.5"))
    assert report["sparsity"].between(0.49, 0.51).all()


def test_a_text_is_hashed_once_and_read_once(tmp_path, monkeypatch):
    from calib_prune.calibration import sources
    calls = []
    monkeypatch.setattr(
        sources, "judged_sha256", lambda *a, f=sources.judged_sha256: calls.append(a) or f(*a)
    )
    (tmp_path / "a.txt").write_text("alpha beta gamma " * 40)
    for n in (1, 2):
        build_calibration(str(tmp_path / "a.txt"), TOKENIZER, 8, 20)
        assert len(calls) == n


def fast(model, **more):
    "A tokenizer of words that end at spaces."
    backend = Tokenizer(model)
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, name_or_path="./my-model", eos_token="e", **more
    )


WORDS = {"a": 0, "e": 1}

@pytest.mark.parametrize("model, lacks", [
    (models.WordPiece(WORDS, unk_token="[UNK]"), r"Missing \[UNK\] token"),
    (models.WordLevel(WORDS, unk_token="[UNK]"), r"Missing \[UNK\] token"),
    (models.BPE(WORDS, [], unk_token="[UNK]"), r"[Uu]nk"),
    (models.Unigram([("a", 0.0), ("e", -1.0)], None), "unk_id")])
def test_what_a_tokenizer_cannot_encode_is_an_error_that_names_it(model, lacks):
    tokenizer = fast(model)
    with pytest.raises(CalibPruneError, match=f"./my-model .*{lacks}.*unk_token"):
        build_calibration(Texts(["a b " * 20]), tokenizer, 2, 4)


def test_another_end_of_text_token_is_another_stream(monkeypatch):
    """A tokenizer without a known separator falls back to its end token, which its backend does not
    hold."""
    monkeypatch.setattr("calib_prune.model.loading.END_OF_TEXT", ())
    other = tiny_tokenizer()
    other.eos_token = "a"
    source = Texts(["one", "two"], name="ends")
    ends = [source_stream(source, t)[0][-1] for t in (TOKENIZER, other)]
    assert ends == [TOKENIZER.eos_token_id, other.eos_token_id] and ends[0] != ends[1]


def test_uniform_mixes_are_uniform():
    mixes = named_mixes()
    assert set(mixes["uniform"].values()) == {1.0} and len(mixes["uniform"]) == 15
    by_dimension = {}
    for k, w in mixes["uniform-dimensions"].items():
        by_dimension[SOURCES[k].dimension] = by_dimension.get(SOURCES[k].dimension, 0) + w
    assert len(by_dimension) == 4 and len(set(by_dimension.values())) == 1


def test_too_little_text_says_how_much():
    with pytest.raises(CalibPruneError, match=r"(?s)'texts'.* 611 .* 39 .* 624.* 38"):
        build_calibration(Texts(), TOKENIZER, 39, 16)


def test_a_named_mix_is_a_part_of_a_mix():
    mix, alone = parse_mix("uniform-dimensions=3,notes.txt=1"), named_mixes()["uniform-dimensions"]
    assert list(mix) == [*alone, "notes.txt"]
    for source, weight in alone.items():
        assert mix[source] == pytest.approx(3 * weight / sum(alone.values()))
    assert parse_mix("c4=1,uniform=1")["c4"] == pytest.approx(1 + 1 / 15)


def test_an_equals_sign_in_a_path_is_no_weight(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    for folder in ("data=2", "data", "lang=en"): (tmp_path / folder).mkdir()
    for name in ("n.txt", "n.jsonl"): (tmp_path / "lang=en" / name).touch()
    assert parse_mix("data=2") == {"data=2": 1} and parse_mix("data=3") == {"data": 3}
    assert parse_mix("lang=en/n.txt") == parse_mix("lang=en/n.txt=1") == {"lang=en/n.txt": 1}
    assert parse_mix("~/lang=en/n.txt, lang=en/n.jsonl:body=2") == {
        "~/lang=en/n.txt": 1, "lang=en/n.jsonl:body": 2}
    assert parse_mix("lang=en/n.jsonl:body") == {"lang=en/n.jsonl:body": 1}
    assert parse_mix("lang=en/*.txt") == parse_mix("lang=en/*.txt=1") == {"lang=en/*.txt": 1}


@pytest.mark.parametrize("wrong", ["c4=0", "c4=inf", "=1", "c4,,math", "c4=half"])
def test_unreadable_mixes(wrong):
    with pytest.raises(CalibPruneError): parse_mix(wrong)


def test_unknown_source_suggests():
    with pytest.raises(CalibPruneError, match="'wikipedia'"):
        build_calibration("wikipeda", TOKENIZER)


def test_damaged_file_is_noticed(tmp_path):
    cal = build_calibration(Texts(), TOKENIZER, 4, 16)
    path = save_calibration(cal, tmp_path / "set.parquet")
    assert load_calibration(path).content == cal.content
    (tmp_path / "cut.parquet").write_bytes(path.read_bytes()[:-100])
    with pytest.raises(CalibPruneError, match="cut.parquet"):
        load_calibration(tmp_path / "cut.parquet")
