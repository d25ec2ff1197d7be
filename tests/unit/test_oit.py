"""Information metrics: exact counts, bounds, what order and repetition may and may not change,
perplexity against torch."""
import math
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy.spatial.distance import jensenshannon

from calib_prune.calibration.oit import (
    METRICS,
    aggregation,
    coverage,
    definitions,
    distinct_ngrams,
    entropy,
    frequent_ids,
    js_divergence,
    measure,
    ngram_ids,
    pieces,
    sentence_count,
    set_perplexity,
    text_metrics,
    window_nll,
)
from calib_prune.calibration.sets import CalibrationSet, build_calibration, tokenizer_identity
from calib_prune.core import DIMENSIONS, CalibPruneError
from calib_prune.evaluation.tasks import benchmark_tokens
from calib_prune.model.loading import load_tokenizer
from calib_prune.model.tiny import tiny_llama, tiny_model, tiny_tokenizer

TOKENIZER = tiny_tokenizer()
IDENTITY = tokenizer_identity(TOKENIZER)
SIZES = st.tuples(st.integers(1, 6), st.integers(4, 24))
# many repeats, many ends of text
SETS = SIZES.flatmap(lambda s: arrays(np.int64, s, elements=st.integers(0, 5)))
WORDS = SIZES.flatmap(lambda s: arrays(np.int64, s, elements=st.integers(0, 256)))
WITH_TEXT = st.one_of(SETS, WORDS).filter(lambda t: t.any())
TEXTS = st.lists(st.integers(0, 20), min_size=1, max_size=40).map(np.array)
ORDERED = {"volume_compressed"}  # compression sees the order of the windows


def as_set(tokens, documents=None, offsets=None):
    "A set whose windows begin in different documents, unless told otherwise."
    n = len(tokens)
    where = pd.DataFrame(dict(
        source="s",
        first_document=range(0, 100 * n, 100) if documents is None else documents,
        offset=0 if offsets is None else offsets,
        last_document=0),
                         index=range(n))
    return CalibrationSet(
        torch.from_numpy(np.ascontiguousarray(tokens)), where, IDENTITY, 0, {"s": "x"}
    )


@given(SETS, st.integers(1, 9))
def test_ngrams_are_counted_exactly_and_within_windows(tokens, n):
    if n > tokens.shape[1]:
        with pytest.raises(CalibPruneError, match=f"no {n}-grams"): ngram_ids(tokens, n)
        return
    grams = [tuple(w[i:i + n]) for w in tokens.tolist() for i in range(len(w) - n + 1)]
    ids = ngram_ids(tokens, n).ravel().tolist()
    assert (
        len(set(zip(grams, ids))) == len(set(grams)) == len(set(ids)) == distinct_ngrams(tokens, n)
    )
    assert aggregation(tokens, n) == pytest.approx(1 - len(set(grams)) / len(grams))
    assert aggregation(tokens, n) + aggregation(tokens, n, "distinct") == 1


def test_ngrams_of_a_large_vocabulary_do_not_collide():
    "128 thousand words: four of them do not fit into 64 bits side by side."
    rng = np.random.default_rng(0)
    tokens = rng.choice(np.array([0, 1, 65_536, 128_255, 2 ** 31 - 1]), (40, 200))
    assert distinct_ngrams(tokens, 4) == len(
        {tuple(w[i : i + 4]) for w in tokens.tolist() for i in range(197)}
    )


@settings(max_examples=40)
@given(WITH_TEXT)
def test_bounds(tokens):
    n, length = tokens.shape
    found = measure(as_set(tokens), TOKENIZER, references={"letters": np.arange(1, 200)}).set_index(
        "metric"
    )
    for key, row in found.iterrows():
        m = METRICS[key.partition(":")[0]]
        assert row.oit == m.oit and row.unit == m.unit
        assert math.isnan(
            row.value) if m.inapplicable or m.needs == "model" else m.low <= row.value <= m.high
    value = found.value
    assert value.volume_tokens == n * length and value.duration_window == length
    assert (
        value.scope_vocabulary <= min(n * length, 257)
        and value.variety_entropy <= math.log2(value.scope_vocabulary) + 1e-9
    )
    assert value.variety_ngrams <= min(n * (length - 1), value.scope_vocabulary ** 2)
    assert value.granularity_sentence <= length and 1 <= value.granularity_document <= length
    assert value.aggregation < 1
    assert value.volume_bytes >= (tokens != 0).sum()


@settings(max_examples=30)
@given(WITH_TEXT, st.randoms(use_true_random=False))
def test_the_order_of_windows_does_not_matter(tokens, random):
    cal = as_set(tokens)
    order = list(range(len(tokens)))
    random.shuffle(order)
    other = replace(
        cal, tokens=cal.tokens[order], provenance=cal.provenance.iloc[order].reset_index(drop=True)
    )
    a, b = (text_metrics(o, TOKENIZER) for o in (cal, other))
    assert {k: v for k, v in a.items() if k not in ORDERED} == pytest.approx(
        {k: v for k, v in b.items() if k not in ORDERED}
    )


@settings(max_examples=30)
@given(WITH_TEXT)
def test_saying_it_twice_raises_aggregation_and_leaves_variety(tokens):
    once, twice = (
        text_metrics(as_set(o), TOKENIZER) for o in (tokens, np.concatenate([tokens, tokens]))
    )
    assert twice["aggregation"] > once["aggregation"]
    for same in ("variety_ngrams", "scope_vocabulary", "coverage", "granularity_sentence",
                 "granularity_document"):
        assert twice[same] == once[same]
    assert twice["variety_entropy"] == pytest.approx(once["variety_entropy"])
    assert twice["volume_tokens"] == 2 * once["volume_tokens"]


def test_repetition_compresses():
    rng = np.random.default_rng(0)
    varied, same = rng.integers(34, 90, (8, 128)), np.tile(rng.integers(34, 90, (1, 128)), (8, 1))
    a, b = (text_metrics(as_set(o), TOKENIZER) for o in (varied, same))
    assert (
        b["volume_compressed"] < a["volume_compressed"] / 3
        and a["volume_bytes"] == b["volume_bytes"]
    )


@given(st.lists(st.integers(1, 30), min_size=1, max_size=12), st.integers(2, 16))
def test_pieces_lead_back_to_the_documents(lengths, length):
    "Each token of a stream says where it stands: token 1 + its position in its document."
    stream = np.concatenate([[*range(1, n + 1), 0] for n in lengths])
    starts, n = np.cumsum([0, *[o + 1 for o in lengths[:-1]]]), len(stream) // length
    if not n: return
    at = np.arange(n) * length
    first = np.searchsorted(starts, at, side="right") - 1
    windows = stream[:n * length].reshape(n, length)
    found = pieces(as_set(windows, first, at - starts[first]), 0)
    for o in found.itertuples():
        assert windows.ravel()[o.at : o.at + o.length].tolist() == list(
            range(o.start + 1, o.start + o.length + 1)
        )
        assert o.start + o.length <= lengths[o.document]
    assert found.length.sum() == (windows != 0).sum()


def test_disjoint_windows_never_sample_more_than_the_span(tmp_path):
    class Texts:
        name, revision = "texts", "1"
        def documents(self): return ["a. b! " * (5 + i) for i in range(30)]
    found = text_metrics(build_calibration(Texts(), TOKENIZER, 40, 16), TOKENIZER)
    assert (
        0 < found["sampling_density"] <= 1 <= found["sampling_windows"]
        and found["scope_documents"] <= 30
    )
    assert found["granularity_sentence"] == pytest.approx(3, abs=0.5)


@pytest.mark.parametrize("text, n", [("One. Two! Three?", 3), ('He said "no." Then', 2),
                                     ("v1.2.3", 1), ("a\n\n\nb", 2), (" \n ", 0)])
def test_sentences(text, n):
    assert sentence_count(np.array([TOKENIZER(text)["input_ids"]]), TOKENIZER, 0) == n


@given(TEXTS, TEXTS)
def test_divergence(a, b):
    d = js_divergence(a, b)
    assert 0 <= d <= 1 and d == js_divergence(b, a) and js_divergence(a, np.tile(
        a[::-1], 3)) == pytest.approx(0, abs=1e-12)
    assert js_divergence(a, a) == 0 and js_divergence(a, b + 21) == pytest.approx(1)
    p, q = (np.bincount(o, minlength=21) for o in (a, b))
    assert math.sqrt(d) == pytest.approx(np.nan_to_num(jensenshannon(p, q, base=2)), abs=1e-6)


def test_entropy_and_coverage():
    assert entropy(np.ones(8)) == 3 and entropy(np.array([0, 7, 0])) == 0
    frequent = frequent_ids(TOKENIZER)
    assert frequent.tolist() == list(range(1, 26)) and 0 not in frequent_ids(TOKENIZER, 1)
    assert (
        coverage(np.array([[1, 2, 0, 99]]), frequent) == 2 / 25
        and coverage(np.arange(257)[None], frequent) == 1
    )


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_perplexity_is_exp_of_mean_nll(family):
    model, tokens = tiny_model(family, seed=1), torch.from_numpy(
        np.random.default_rng(0).integers(0, 257, (5, 24))
    )
    logits = model(tokens).logits[:, :-1].double().log_softmax(-1)
    nll = -logits.gather(-1, tokens[:, 1:, None]).squeeze(-1).detach().numpy()
    assert window_nll(model, tokens) == pytest.approx(nll.sum(1), rel=1e-5)
    value, low, high = set_perplexity(model, tokens, batch_tokens=50)
    assert value == pytest.approx(math.exp(nll.mean()), rel=1e-5) and low < value < high
    assert set_perplexity(model, tokens.flip(0))[0] == pytest.approx(value, rel=1e-6)
    assert set_perplexity(model, tokens.repeat(2, 1))[0] == pytest.approx(value, rel=1e-6)


def test_the_interval_covers_what_scipy_finds():
    from scipy.stats import bootstrap
    model, tokens = tiny_llama(), torch.from_numpy(
        np.random.default_rng(1).integers(0, 257, (30, 12))
    )
    found = set_perplexity(model, tokens, n_boot=5000)
    assert found == set_perplexity(model, tokens, n_boot=5000) != set_perplexity(
        model, tokens, n_boot=5000, seed=1)
    low, high = found[1:]
    theirs = bootstrap(
        (window_nll(model, tokens) / 11,), np.mean, n_resamples=5000, method="percentile", rng=0
    ).confidence_interval
    assert (math.log(low), math.log(high)) == pytest.approx(tuple(theirs), rel=0.01)


def test_one_window_has_no_interval_and_progress_is_told():
    seen = []
    value, low, high = set_perplexity(
        tiny_llama(), torch.tensor([[1, 2, 3]]), progress=lambda *o: seen.append(o)
    )
    assert value > 1 and math.isnan(low) and math.isnan(high) and seen == [("perplexity", 0, 2),
                                                                           ("perplexity", 2, 2)]


CAL = as_set(np.arange(1, 33).reshape(2, 16))

@pytest.mark.parametrize("wrong, words", [
    (lambda: measure(replace(CAL, tokenizer="other"), TOKENIZER), "another tokenizer"),
    (lambda: measure(as_set(np.zeros((2, 8), np.int64)), TOKENIZER), "no text"),
    (lambda: measure(CAL, TOKENIZER, n=17), "no 17-grams"),
    (lambda: measure(CAL, TOKENIZER, n=0), "n must be 1 to 16"),
    (lambda: measure(CAL, TOKENIZER, reading="repeat"), "Did you mean 'repeated'"),
    (lambda: measure(CAL, TOKENIZER, frequent=1.5), "must lie in"),
    (lambda: measure(CAL, TOKENIZER, frequent=0.001), "at least one"),
    (lambda: measure(CAL, TOKENIZER, references={"model": np.zeros(3, np.int64)}),
     "'model' holds no text"),
    (lambda: js_divergence([], [1]), "no tokens"),
    (lambda: window_nll(tiny_llama(), CAL.tokens[:, :1]), "at least two tokens"),
    (lambda: window_nll(tiny_llama(), CAL.tokens + 300), "another model's tokenizer"),
    (lambda: window_nll(tiny_llama(), CAL.tokens.repeat(1, 40)), "longer than the model's context"),
    (lambda: load_tokenizer("smolm"), "Unknown model"), ])
def test_mistakes_are_named(wrong, words):
    with pytest.raises(CalibPruneError, match=words): wrong()


def test_definitions_are_complete():
    table = definitions()
    assert table.oit.nunique() == 11 and (table.groupby("oit").main.sum() == 1).all()
    assert set(table.key[table.inapplicable != ""]) == {"delay"}
    assert set(table.key[table.constant != ""]) == {"volume_tokens", "duration_window"}


def test_constants_differ_by_size_only():
    rng = np.random.default_rng(0)
    a, b = (text_metrics(as_set(rng.integers(1, high, (3, 20))), TOKENIZER) for high in (5, 200))
    assert all(a[k] == b[k] for k, m in METRICS.items() if m.constant)
    assert all(
        a[k] != b[k]
        for k in ("aggregation", "variety_entropy", "scope_vocabulary", "volume_compressed")
    )


def test_rows_say_what_was_not_measured():
    bare = measure(CAL, TOKENIZER).set_index("metric")
    assert (
        bare.note["distortion"] == "not measured: needs the dense model"
        and "references" in bare.note["mismatch"]
    )
    assert (
        bare.value[["distortion", "mismatch", "delay"]].isna().all()
        and not bare.applicable["delay"]
    )
    full = measure(
        CAL, TOKENIZER, tiny_llama(), {"a": np.array([1]), "b": np.array([99])}
    ).set_index("metric")
    assert full.value["mismatch:b"] == 1 and full.ci_low["distortion"] < full.ci_high["distortion"]
    assert full.ci_low.drop("distortion").isna().all() and "mismatch" not in full.index


@pytest.mark.real
def test_benchmark_prompts_by_dimension():
    found = benchmark_tokens(TOKENIZER, limit=5)
    assert list(found) == list(DIMENSIONS) and all(
        o.dtype == np.int64 and len(o) > 100 for o in found.values()
    )
    assert list(benchmark_tokens(TOKENIZER, 5, ["gsm8k"])) == ["Math"]
    shown = TOKENIZER.decode(benchmark_tokens(TOKENIZER, 5, ["basic_skills_arithmetic"])["Math"])
    assert "58 - 23" not in shown, "the worked examples that all prompts share are left out"
