"""Sampling against a slow walk and transformers' own warpers; texts that depend on their name and
seed alone; degenerate models."""
import json
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chisquare
from transformers.generation.logits_process import (
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from calib_prune.calibration.sets import build_calibration, token_stream
from calib_prune.core import CalibPruneError
from calib_prune.data.files import read_jsonl, write_jsonl
from calib_prune.generation.baselines import self_cal, sgs, without_worst
from calib_prune.generation.sampling import (
    Sampling,
    SamplingJob,
    candidates,
    decode,
    draw,
    penalised,
    uniforms,
)
from calib_prune.generation.writing import (
    Generated,
    Writer,
    check_target,
    end_tokens,
    fill,
    repeated_share,
    start_token,
    write,
)
from calib_prune.model.tiny import tiny_llama, tiny_model, tiny_tokenizer

TOK = tiny_tokenizer()
ENDS = frozenset({0})


def logits(seed, rows=3, size=40, scale=4.0):
    return scale * torch.randn(rows, size, generator=torch.Generator().manual_seed(seed))


@settings(max_examples=60)
@given(
    seed=st.integers(0, 10_000),
    temperature=st.floats(0.2, 3),
    top_k=st.integers(0, 45),
    top_p=st.sampled_from([0.05, 0.5, 0.9, 0.95, 1.0]),
    penalty=st.sampled_from([1.0, 0.7, 1.2, 3.0]),
)
def test_candidates_are_those_of_transformers(seed, temperature, top_k, top_p, penalty):
    scores, said = logits(seed), torch.randint(
        0, 40, (3, 6), generator=torch.Generator().manual_seed(seed + 1)
    )
    seen = torch.zeros(3, 40, dtype=torch.bool).scatter(1, said, True)
    mine = penalised(scores, seen, penalty)
    theirs = RepetitionPenaltyLogitsProcessor(penalty)(said, scores) if penalty != 1 else scores
    assert torch.equal(mine, theirs)
    theirs = TemperatureLogitsWarper(temperature)(said, theirs)
    if top_k: theirs = TopKLogitsWarper(top_k)(said, theirs)
    if top_p < 1: theirs = TopPLogitsWarper(top_p)(said, theirs)
    p, ids = candidates(mine, torch.full((3, 1), temperature), top_k, top_p)
    full = p if ids is None else torch.zeros(3, 40).scatter(1, ids, p)
    assert torch.allclose(full / full.sum(-1, keepdim=True), theirs.softmax(-1), atol=1e-6)
    if ids is not None: assert (ids.diff(dim=-1) > 0).all(), "in the order of the ids"


@pytest.mark.parametrize("top_p", [0.3, 0.65, 0.99])
def test_top_p_by_hand(top_p):
    for row in logits(5).softmax(-1):
        kept, total = set(), 0.0
        for i in row.argsort(descending=True).tolist():
            if total >= top_p: break
            kept.add(i)
            total += row[i].item()
        p, _ = candidates(row.log()[None], torch.ones(1, 1), 0, top_p)
        assert set(p[0].nonzero().flatten().tolist()) == kept


def test_temperature_moves_on_a_line():
    rising = Sampling(temperature=0.5, final_temperature=1.5, over=10)
    assert [rising.temperature_at(n) for n in (0, 1, 5, 10, 500)] == pytest.approx(
        [0.5, 0.6, 1.0, 1.5, 1.5]
    )
    assert {Sampling(temperature=0.7).temperature_at(n) for n in range(9)} == {0.7}
    assert Sampling(temperature=3, final_temperature=1, over=0).temperature_at(0) == 1


@pytest.mark.parametrize("wrong", [
    dict(temperature=0),
    dict(temperature=math.inf),
    dict(final_temperature=-1),
    dict(over=-1),
    dict(top_k=-1),
    dict(top_p=0),
    dict(top_p=1.1),
    dict(repetition_penalty=0),
    dict(top_k=2.5),
    dict(temperature="hot"),
    dict(temperature=math.nan),
    dict(repetition_penalty=math.inf),
    dict(temperature=True)])
def test_impossible_sampling(wrong):
    with pytest.raises(CalibPruneError, match=f"{next(iter(wrong))} is"): Sampling(**wrong)


def test_uniforms_are_uniform_and_their_own():
    u = np.concatenate([uniforms(s, f"text/{i}", 50) for s in range(10) for i in range(20)])
    assert 0 <= u.min() and u.max() < 1 and len(np.unique(u)) == len(u)
    assert chisquare(np.bincount((u * 20).astype(int), minlength=20)).pvalue > 1e-3
    assert np.array_equal(uniforms(3, "a", 5), uniforms(3, "a", 9)[:5])


def test_draws_never_take_what_is_impossible():
    p = torch.tensor([[0.0, 0.3, 0.0, 0.7, 0.0]]).repeat(5, 1)
    u = torch.tensor([0.0, 0.2999, 0.3001, 0.9999999, 1 - 2.0 ** -53], dtype=torch.float64)[:, None]
    assert draw(p, u).flatten().tolist() == [1, 1, 3, 3, 3]


def toy(probabilities):
    "A tiny model whose next token has the same distribution whatever stands before."
    model = tiny_llama()
    for p in model.model.layers.parameters(): p.data.zero_()
    model.model.embed_tokens.weight.data.fill_(1.0)
    model.lm_head.weight.data.fill_(-10.0)
    for token, p in probabilities.items(): model.lm_head.weight.data[token] = math.log(p) / 32
    return model


def test_tokens_come_as_often_as_they_should():
    p = {10: 0.5, 11: 0.25, 12: 0.15, 13: 0.1}
    jobs = [SamplingJob(f"t/{i}", (0,)) for i in range(40)]
    samples = list(decode(toy(p), jobs, Sampling(), 50, 0, ENDS, batch=40))
    counts = np.bincount([t for s in samples for t in s.tokens], minlength=14)[10:14]
    assert (
        counts.sum() == 40 * 50
        and chisquare(counts, 2000 * np.array(list(p.values()))).pvalue > 1e-3
    )
    followed = np.bincount(
        [b for s in samples for a, b in zip(s.tokens, s.tokens[1:]) if a == 10], minlength=14
    )[10:14]
    assert (
        chisquare(followed, followed.sum() * np.array(list(p.values()))).pvalue > 1e-3
    ), "and whatever came before"
    assert sum(s.nll for s in samples) == pytest.approx(
        -(counts * np.log(list(p.values()))).sum(), rel=1e-4
    )


@torch.no_grad()
def slow(model, job, sampling, length, seed, ends):
    "One text, the whole of it through the model for every token, without a cache."
    ids, u, nll = list(job.prompt), uniforms(seed, job.key, length), 0.0
    while True:
        scores = model(torch.tensor([ids]), use_cache=False).logits[:, -1]
        written = len(ids) - len(job.prompt)
        if sampling.repetition_penalty != 1:
            said = [t for t in ids[1:] if t not in ends]
            seen = torch.zeros_like(scores, dtype=torch.bool)
            seen[0, said] = True
            scores = penalised(scores, seen, sampling.repetition_penalty)
        p, kept = candidates(scores, torch.tensor([[
            sampling.temperature_at(written) * job.warmth]]), sampling.top_k, sampling.top_p)
        at = draw(p, torch.tensor([[u[written]]]))[0, 0].item()
        token = at if kept is None else kept[0, at].item()
        if token in ends: break
        ids.append(token)
        if len(ids) > length: break
    if len(ids) > 1:
        nll = torch.nn.functional.cross_entropy(
            model(torch.tensor([ids])).logits[0, :-1], torch.tensor(ids[1:]), reduction="sum"
        ).item()
    return tuple(ids[1:]), nll


JOBS = [SamplingJob(f"x/{i}", (0, *range(40, 40 + i % 4 * 3)), 0.5 + i % 3) for i in range(11)]
WARM = Sampling(
    temperature=1.2, final_temperature=0.6, over=6, top_k=60, top_p=0.95, repetition_penalty=1.2
)
# many ends, so that rows finish at different times and are taken over
STOPS = frozenset({0, *range(100, 112)})


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen3", "gemma2", "opt", "gpt_neox"])
def test_same_text_as_the_slow_walk_whatever_the_batch(family):
    model = tiny_model(family)
    want = {j.key: slow(model, j, WARM, 24, 7, STOPS) for j in JOBS}
    assert len({len(t) for t, _ in want.values()}) > 3, "lengths differ"
    for batch in (1, 4, 32):
        got = {s.key: s for s in decode(model, JOBS, WARM, 24, 7, STOPS, batch=batch)}
        assert {k: s.tokens for k, s in got.items()} == {k: t for k, (t, _) in want.items()}, batch
        for k, (_, nll) in want.items(): assert got[k].nll == pytest.approx(nll, abs=2e-3)


def test_the_cache_keeps_no_more_columns_than_a_text_needs(monkeypatch):
    from calib_prune.generation.sampling import RollingLayer
    widest = []
    keep = RollingLayer.keep
    monkeypatch.setattr(
        RollingLayer,
        "keep",
        lambda self, *a: (widest.append(self.buffers[0].shape[-2]), keep(self, *a))[1],
    )
    samples = list(
        decode(tiny_llama(), [SamplingJob(f"x/{i}", (0, )) for i in range(40)],
               Sampling(),
               30,
               0,
               STOPS,
               batch=4))
    assert len(samples) == 40 and max(widest) <= 30 + 1 + 64


def test_seed_and_name_make_the_text():
    text = lambda seed, key: next(
        decode(tiny_llama(), [SamplingJob(key, (0,))], Sampling(), 20, seed, ENDS)
    ).tokens
    assert text(0, "a") == text(0, "a") and len({text(0, "a"), text(1, "a"), text(0, "b")}) == 3


def test_an_interrupted_run_goes_on_to_the_same_texts(tmp_path):
    how = dict(budget=400, length=24, seed=3, sampling=WARM, batch=4)
    whole = self_cal(tiny_llama(), TOK, **how)
    class Stop(Exception): pass
    finished = []
    def interrupt(stage, done, total):
        finished.append(done)
        if len(finished) == 6: raise Stop
    with pytest.raises(Stop):
        self_cal(tiny_llama(), TOK, **how, journal=tmp_path / "j", progress=interrupt)
    # and a line cut short
    with open(tmp_path / "j", "a") as f: f.write('{"key": "self-cal/9", "tok')
    seen = []
    again = self_cal(
        tiny_llama(), TOK, **how, journal=tmp_path / "j", progress=lambda *o: seen.append(o)
    )
    assert again.rows == whole.rows
    assert (
        again.report["written_tokens"] + finished[5] == whole.report["written_tokens"]
    ), "nothing was written twice"
    assert [done for _, done, _ in seen] == sorted(done for _, done, _ in seen) and seen[-1][
        1
    ] <= seen[-1][2]
    third = self_cal(tiny_llama(), TOK, **how, journal=tmp_path / "j")
    assert third.rows == whole.rows and third.report["written_tokens"] == 0 and third.report[
        "tokens_per_second"] is None


@pytest.mark.parametrize("change", [
    dict(seed=4),
    dict(length=25),
    dict(sampling=Sampling()),
    dict(about={"model": "other"}),
    dict(start=7)])
def test_a_journal_of_other_settings_is_refused(tmp_path, change):
    how = dict(budget=60, length=24, seed=3, sampling=WARM)
    self_cal(tiny_llama(), TOK, **how, journal=tmp_path / "j")
    before = (tmp_path / "j").read_bytes()
    with pytest.raises(CalibPruneError):
        self_cal(tiny_llama(), TOK, **(how | change), journal=tmp_path / "j")
    assert (tmp_path / "j").read_bytes() == before


def test_a_larger_budget_goes_on_from_the_same_journal(tmp_path):
    how = dict(length=24, seed=3, sampling=WARM, journal=tmp_path / "j")
    small, large = self_cal(tiny_llama(), TOK, budget=100, **how), self_cal(
        tiny_llama(), TOK, budget=300, **how
    )
    assert large.rows[:len(small.rows)] == small.rows and large.report["tokens"] >= 300


def test_where_texts_begin_and_end():
    class Silent:
        bos_token_id, eos_token_id = None, 7
        def __call__(self, text): return {"input_ids": []}
        def get_vocab(self): return {"a": 0, "<stop>": 7}
    assert start_token(Silent()) == 7, "no start token: the end of the text before"
    class Llama(Silent):
        bos_token_id = 3
        def __call__(self, text): return {"input_ids": [3]}
    assert start_token(Llama()) == 3
    model = tiny_llama()
    model.generation_config.eos_token_id = [5, 9]
    assert end_tokens(model, TOK) == {0, 5, 9}


def test_a_model_that_ends_at_once():
    with pytest.raises(CalibPruneError, match=r"0 of the 200 .* (\d+) .* \1 "):
        self_cal(toy({0: 1.0}), TOK, budget=200, length=16)


def test_a_model_that_repeats_itself_for_ever_does_bounded_work():
    done = []
    with pytest.raises(CalibPruneError):
        self_cal(
            toy({70: 1.0}),
            TOK,
            budget=200,
            length=16,
            progress=lambda stage, n, total: done.append(n),
        )
    assert sum(b for a, b in zip(done[1:] + [0], done) if a <= b) <= 4 * 200 + 32


def test_a_model_that_writes_nothing_but_blanks():
    with pytest.raises(CalibPruneError):
        self_cal(toy({TOK(" ")["input_ids"][0]: 1.0}), TOK, budget=100, length=16)


def test_an_opening_longer_than_the_text():
    writer = Writer(tiny_llama(), TOK, Sampling(), length=8)
    writer.begin("x")
    assert len(writer.write([writer.job("a", range(40, 47))])[0].tokens) <= 8
    with pytest.raises(CalibPruneError, match=" 8 .* 8"):
        writer.job("b", range(40, 48))


def test_texts_longer_than_the_context():
    with pytest.raises(CalibPruneError, match=" 512"):
        self_cal(tiny_llama(), TOK, length=513)


@pytest.mark.parametrize("wrong", [dict(batch=0), dict(length=0)])
def test_nothing_at_a_time(wrong):
    with pytest.raises(CalibPruneError):
        Writer(tiny_llama(), TOK, Sampling(), **wrong)


@pytest.fixture
def own_file(tmp_path):
    return str(
        write_jsonl(tmp_path / "own.jsonl", [{"text": f"{w} goes on with other words"}
                                             for w in ("Red", "Green", "Blue", "White")]))


def test_sgs_continues_prefixes_and_drops_the_worst(own_file):
    made = sgs(tiny_llama(), TOK, budget=300, length=24, source=own_file, prefix=3)
    assert {r["text"][:3] for r in made.rows} <= {"Red", "Gre", "Blu", "Whi"} and len(
        {r["text"][:3] for r in made.rows}
    ) == 4
    assert made.report["left_out"] == made.report["written"] // 5
    every = sgs(tiny_llama(), TOK, budget=300, length=24, source=own_file, prefix=3, drop=0.0)
    both = {r["key"]: r["perplexity"] for r in every.rows}
    kept = {r["key"] for r in made.rows} & set(both)
    assert (
        all(both[k] <= max(both.values()) for k in kept)
        and made.report["perplexity"] < every.report["perplexity"]
    )
    texts = [r["text"] for r in made.rows]
    assert made.report["tokens"] == len(token_stream(texts, TOK)[0]) >= 300


def test_the_worst_are_the_most_surprising():
    samples = [s for s in decode(tiny_llama(), JOBS[:10], Sampling(), 12, 0, ENDS)]
    kept = without_worst(samples, 0.2)
    assert len(kept) == 8 and kept == [s for s in samples if s in kept]
    assert max(s.log_perplexity for s in kept) <= min(
        s.log_perplexity for s in samples if s not in kept
    )


@pytest.mark.parametrize("wrong, message",
                         [(dict(drop=1.0), "drop is 1.0, but should be less than 1"),
                          (dict(prefix=0), "prefix is 0"),
                          (dict(prefix=24, length=10), "longer texts")])
def test_impossible_sgs(own_file, wrong, message):
    with pytest.raises(CalibPruneError, match=message):
        sgs(tiny_llama(), TOK, budget=50, **({"length": 24, "source": own_file} | wrong))


def test_the_file_feeds_a_calibration_set(tmp_path):
    made = self_cal(
        tiny_llama(), TOK, budget=8 * 32, length=24, about={"model": "tiny", "model_revision": "0"}
    )
    path = write(made, tmp_path / "calib.jsonl")
    assert build_calibration(str(path), TOK, 8, 32).tokens.shape == (8, 32)
    assert all(
        {"text", "protocol", "key", "seed", "tokens", "perplexity"} <= set(r)
        for r in read_jsonl(path)
    )
    report = json.loads((tmp_path / "calib.report.json").read_text())
    assert report["model"] == "tiny" and report["temperature"] == 1.5 and report["tokens"] >= 256
    with pytest.raises(CalibPruneError): write(made, path)
    with pytest.raises(CalibPruneError, match=".jsonl"):
        check_target(tmp_path / "calib.txt")


def test_empty_results_can_be_told():
    assert Generated([], {}).documents() == [] and repeated_share([]) == 0.0


def test_fill_counts_what_prune_counts():
    writer = Writer(tiny_llama(), TOK, WARM, length=24)
    writer.begin("x")
    kept, made = fill(writer, lambda i: writer.job(f"x/{i}"), 300, lambda s: s[::2], 0.5)
    assert kept == made[::2] and writer.count(kept) >= 300
