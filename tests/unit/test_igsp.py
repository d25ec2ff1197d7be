"""The selection against brute force, its balance to the token, and the protocol from openings to a
calibration set."""
import itertools
import math

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from calib_prune.calibration.sets import build_calibration
from calib_prune.core import DIMENSIONS, CalibPruneError
from calib_prune.generation.igsp import (
    OPENINGS,
    CannotBalance,
    Greedy,
    Shuffled,
    common_mean,
    describe,
    frontier,
    igsp,
    nearest_run,
    pool_record,
    select,
    shortest_intervals,
    take_candidates,
    tightest_bins,
)
from calib_prune.generation.sampling import Sampling
from calib_prune.generation.writing import write
from calib_prune.model.tiny import tiny_llama, tiny_tokenizer

TOK = tiny_tokenizer()


def random_pool(seed, n=40, dimensions=("A", "B", "C"), vocabulary=30, low=4, high=12, shift=0.4):
    "Candidates with random 4-grams: some texts say much the same."
    rng = np.random.default_rng(seed)
    rows = []
    for k, d in enumerate(dimensions):
        for i in range(n):
            tokens = int(rng.integers(low, high))
            grams = {(int(g), 0, 0, 0)
                     for g in rng.choice(vocabulary, size=min(tokens, vocabulary), replace=True) +
                     100 * k}
            rows.append(
                dict(dimension=d,
                     key=f"{d}/{i}",
                     text=f"{d}{i}",
                     tokens=tokens,
                     log_perplexity=rng.normal(2 + shift * k, 0.6),
                     grams=grams,
                     sample=None))
    return pd.DataFrame(rows)


def covered(sets):
    return len(set().union(*sets))


@settings(max_examples=80)
@given(seed=st.integers(0, 10_000), budget=st.integers(5, 40))
def test_greedy_covers_what_it_promises(seed, budget):
    pool = random_pool(seed, n=9, dimensions=("A",), vocabulary=20)
    grams, cost = list(pool.grams), list(pool.tokens)
    budget = min(budget, sum(cost))
    got = covered(
        grams[i]
        for i in take_candidates([Greedy(range(9), grams, cost)], budget, grams, cost, set())
    )
    best = max(
        covered(grams[i] for i in c) for r in range(10)
        for c in itertools.combinations(range(9), r) if sum(cost[i] for i in c) <= budget)
    assert got >= (1 - 1 / math.e) * best


def test_greedy_is_nearly_the_best():
    shares = []
    for seed in range(30):
        pool = random_pool(seed, n=10, dimensions=("A",), low=6, high=7)
        grams, cost = list(pool.grams), list(pool.tokens)
        got = covered(
            grams[i]
            for i in take_candidates([Greedy(range(10), grams, cost)], 24, grams, cost, set())
        )
        shares.append(
            got / max(covered(grams[i] for i in c) for c in itertools.combinations(range(10), 4))
        )
    assert min(shares) >= 0.85 and np.mean(shares) >= 0.97


@settings(max_examples=40)
@given(seed=st.integers(0, 10_000))
def test_lazy_greedy_is_greedy(seed):
    pool = random_pool(seed, n=15, dimensions=("A",))
    grams, cost, left, done, want = list(pool.grams), list(pool.tokens), list(range(15)), set(), []
    while left:
        i = min(left, key=lambda i: (-len(grams[i] - done) / cost[i], i))
        left.remove(i)
        done |= grams[i]
        want.append(i)
    queue, done, got = Greedy(range(15), grams, cost), set(), []
    while (i := queue.pop(done)) is not None:
        got.append(i)
        done |= grams[i]
    assert got == want


@settings(max_examples=60)
@given(seed=st.integers(0, 10_000), need=st.integers(1, 12), bins=st.integers(1, 3))
def test_bins_are_the_tightest(seed, need, bins):
    rng = np.random.default_rng(seed)
    x = {d: np.round(rng.normal(k, 1, 6), 1) for k, d in enumerate("ab")}
    cost = {d: rng.integers(1, 5, 6) for d in x}
    enough = lambda lo, hi: all(cost[d][(lo <= x[d]) & (x[d] <= hi)].sum() >= need for d in x)
    edges = sorted({*x["a"], *x["b"]})
    good = [(lo, hi) for lo in edges for hi in edges if lo <= hi and enough(lo, hi)]
    sets = [
        c
        for c in itertools.combinations(good, bins)
        if all(a[1] < b[0] for a, b in itertools.pairwise(c))
    ]
    if not sets:
        with pytest.raises(CalibPruneError, match="cannot be balanced"):
            tightest_bins(x, cost, need, bins)
        return
    found = tightest_bins(x, cost, need, bins)
    assert (
        len(found) == bins
        and all(enough(*b) for b in found)
        and all(a[1] < b[0] for a, b in itertools.pairwise(found))
    )
    width = lambda c: sum(hi - lo for lo, hi in c)
    assert width(found) == pytest.approx(min(map(width, sets)))


def test_shortest_intervals_by_hand():
    edges, last = shortest_intervals({"a": np.array([3., 1.]), "b": np.array([2., 4.])},
                                     {"a": np.array([1., 1]), "b": np.array([1., 2])}, 1)
    assert list(edges) == [1, 2, 3, 4] and list(last) == [1, 2, 3, 4]


@settings(max_examples=25)
@given(seed=st.integers(0, 10_000), aggregation=st.booleans())
def test_quantile_balance_holds(seed, aggregation):
    pool = random_pool(seed, n=60)
    chosen = select(pool, 3 * 60, aggregation=aggregation, bins=3, choice=1.5, seed=seed)
    by = {d: g for d, g in chosen.groupby("dimension", sort=False)}
    bounds = chosen.groupby("part").log_perplexity.agg(["min", "max"])
    for g in by.values():
        for part in range(3): assert abs(g.tokens[g.part == part].sum() - 20) < pool.tokens.max()
        assert (
            60 <= g.tokens.sum() < 60 + pool.tokens.max()
        ), "a dimension has its budget to one text"
    assert (
        bounds["max"].to_numpy()[:-1] < bounds["min"].to_numpy()[1:]
    ).all(), "the same intervals in every dimension, one above the other"
    # each dimension has as much in each interval, so quantiles differ by less than its width
    for part in range(3):
        width = bounds["max"][part] - bounds["min"][part]
        medians = [g.log_perplexity[g.part == part].median() for g in by.values()]
        assert max(medians) - min(medians) <= width


@settings(max_examples=25)
@given(seed=st.integers(0, 10_000), aggregation=st.booleans())
def test_mean_balance_holds_to_one_text(seed, aggregation):
    pool = random_pool(seed, n=60)
    x, cost = (
        {d: g[c].to_numpy(float) for d, g in pool.groupby("dimension")}
        for c in ("log_perplexity", "tokens")
    )
    target = common_mean(x, cost, 2 * 60)
    chosen = select(pool, 3 * 60, aggregation=aggregation, balance="mean", choice=2.0, seed=seed)
    for d, g in chosen.groupby("dimension"):
        items, mean = nearest_run(x[d], cost[d], 2 * 60, target)
        worst = (cost[d][items] * np.abs(x[d][items] - mean)).max()
        assert abs((g.tokens * (g.log_perplexity - mean)).sum()) <= worst + 1e-9
        assert 60 <= g.tokens.sum() < 60 + pool.tokens.max()


def test_a_run_is_the_nearest_one():
    rng = np.random.default_rng(0)
    x, cost = rng.normal(size=12), rng.integers(1, 4, 12)
    order = np.argsort(x)
    for target in (-9, -0.5, 0.0, 0.7, 9):
        means = []
        for i in range(12):
            for j in range(i + 1, 13):
                if cost[order[i:j]].sum() >= 8:
                    means.append(np.average(x[order[i:j]], weights=cost[order[i:j]]))
                    break
        items, mean = nearest_run(x, cost, 8, target)
        assert mean == pytest.approx(min(means, key=lambda m: abs(m - target))) == pytest.approx(
            np.average(x[items], weights=cost[items]))


def test_each_switch_does_what_it_says():
    aggregation = lambda chosen: float(np.mean(describe(chosen).aggregation))
    imbalance = lambda chosen: float(np.ptp(describe(chosen).log_perplexity))
    pool = random_pool(1, n=80, vocabulary=60, low=12, high=13)
    best = select(pool, 360, balance=None)
    some = [select(pool, 360, balance=None, aggregation=False, seed=s) for s in range(5)]
    assert aggregation(best) < min(map(aggregation, some)), "less repetition than any random subset"
    assert len({tuple(o.key) for o in some}) == 5 and tuple(some[0].key) == tuple(
        select(pool, 360, balance=None, aggregation=False).key
    )
    assert (
        imbalance(select(pool, 360, bins=3)) < 0.15 < imbalance(best)
        and imbalance(select(pool, 360, balance="mean")) < 0.05
    )
    one = select(pool, 360, balance=None, dimensions=False)
    assert (
        one.tokens.sum() == 360 and aggregation(one) <= 1 and {"A", "B", "C"} >= set(one.dimension)
    )
    assert sum(map(len, [set().union(*one.grams)])) >= covered(
        best.grams
    ), "without dimensions, more 4-grams of all together"


@pytest.mark.parametrize("wrong, message", [(dict(balance="medians"), "Unknown balance"),
                                            (dict(bins=0), "at least one bin"),
                                            (dict(choice=0.5), "at least 1"),
                                            (dict(budget=10_000), "larger pool"),
                                            (dict(bins=60), "cannot be balanced")])
def test_impossible_selections(wrong, message):
    with pytest.raises(CalibPruneError, match=message):
        select(random_pool(0), **({"budget": 90} | wrong))


def test_an_empty_pool():
    with pytest.raises(CalibPruneError, match="pool"): select(random_pool(0).iloc[:0], 90)


def test_dimensions_that_have_nothing_in_common():
    pool = random_pool(0, shift=20.0)
    for balance in ("quantiles", "mean"):
        with pytest.raises(CalibPruneError, match="cannot be balanced"):
            select(pool, 90, balance=balance)
    assert len(select(pool, 90, balance=None))


def test_the_frontier_stays_within_reach():
    curve = frontier(random_pool(2, n=60), 180, levels=5)
    for _, g in curve.groupby("dimension"):
        assert len(g) == 5 and g.log_perplexity.is_monotonic_increasing and (g.tokens >= 60).all()


def test_a_pool_without_choice_has_a_frontier_too():
    pool = random_pool(2, n=12)
    least = int(pool.groupby("dimension").tokens.sum().min())
    assert (frontier(pool, 3 * least, levels=3).tokens >= least).all()
    with pytest.raises(CalibPruneError, match="larger pool"): frontier(pool, 3 * (least + 1))


def test_one_text_has_no_spread():
    assert describe(random_pool(0, n=1)).spread.tolist() == [0, 0, 0]


def test_shuffled_takes_each_once():
    queue = Shuffled([3, 5, 9], 0, "x")
    assert {queue.pop(set()) for _ in range(3)} == {3, 5, 9} and queue.pop(set()) is None


def test_openings_are_few_and_the_models_dimensions():
    assert tuple(OPENINGS) == DIMENSIONS and all(
        4 <= len(set(o)) == len(o) <= 8 for o in OPENINGS.values()
    )
    assert max(len(o.split()) for texts in OPENINGS.values() for o in texts) <= 8


HOW = dict(budget=4 * 200, length=40, bins=2, choice=1.5, pool=3.0)


def test_the_protocol_is_reproducible_and_goes_on(tmp_path):
    one, two = igsp(tiny_llama(), TOK, **HOW, batch=8), igsp(
        tiny_llama(), TOK, **HOW, batch=32, journal=tmp_path / "j"
    )
    assert one.rows == two.rows and one.pool.text.equals(two.pool.text)
    assert all(
        one.report[k] == two.report[k]
        for k in ("tokens", "perplexity", "repeated_4grams", "written", "left_out", "openings")
    )
    three = igsp(tiny_llama(), TOK, **HOW, journal=tmp_path / "j")
    assert three.rows == one.rows and three.report["written_tokens"] == 0
    other = igsp(
        tiny_llama(), TOK, **(HOW | dict(balance=None, aggregation=False)), journal=tmp_path / "j"
    )
    assert (
        other.report["written_tokens"] == 0 and other.rows != one.rows
    ), "another choice from the same pool costs nothing"


def test_the_report_counts_every_text_that_was_written():
    "With three tokens after an opening, the tiny model repeats texts."
    openings = {d: ("a",) for d in DIMENSIONS}
    made = igsp(tiny_llama(), TOK, 64, 4, openings=openings, balance=None,
                sampling=Sampling(top_k=4))
    assert made.report["written"] > len(made.pool) and made.report["duplicates"] > 0
    assert made.report["left_out"] == made.report["written"] - len(made.rows)


def test_a_pool_that_cannot_be_balanced_grows(tmp_path):
    few = HOW | dict(pool=1.6, bins=3)
    with pytest.raises(CannotBalance):
        igsp(tiny_llama(), TOK, **few, most=1.6, journal=tmp_path / "j")
    grown = igsp(tiny_llama(), TOK, **few, journal=tmp_path / "j")
    assert grown.report["pool_asked"] == 1.6 < grown.report["pool"] <= 8 and (
        quarters := 4 * grown.report["pool"] / 1.6
    ) == pytest.approx(round(quarters))
    at_once = igsp(tiny_llama(), TOK, **(few | dict(pool=grown.report["pool"])))
    assert at_once.rows == grown.rows and at_once.report["pool_asked"] == at_once.report["pool"]


def test_the_output_is_calibration_text(tmp_path):
    made = igsp(tiny_llama(), TOK, **HOW)
    assert made.report["tokens"] >= HOW["budget"] and set(made.pool.dimension) == set(OPENINGS)
    for d, texts in OPENINGS.items():
        assert all(r["text"].startswith(tuple(t.strip() for t in texts)) for r in made.rows
                   if r["dimension"] == d)
    assert build_calibration(str(write(made, tmp_path / "c.jsonl")), TOK, 20, 40).tokens.shape == (
        20,
        40,
    )
    assert made.pool.chosen.sum() == len(made.rows)


def test_the_smallest_pool_and_choice_end_in_a_record():
    for least in (dict(pool=1.0, most=1.0, balance=None), dict(pool=1.5, choice=1.2, bins=1)):
        made = igsp(tiny_llama(), TOK, **(HOW | least))
        assert len(pool_record(made.pool, HOW["budget"])["frontier"])


@pytest.mark.parametrize("wrong, message", [
    (dict(openings={}), "at least one dimension"), (dict(openings={"Code": ()}), "openings is"),
    (dict(warmths=(0.0, )), "warmths is .* greater than 0"), (dict(pool=0.5), "pool is 0.5"),
    (dict(pool=1.2), "larger pool"),
    (dict(openings={"Math": ("x" * 40, )}), "has 40 tokens, and a text may have 40"),
    (dict(sampling=Sampling(top_k=1, temperature=1e-3)), "repeat another|cannot be balanced")])
def test_impossible_protocols(wrong, message):
    with pytest.raises(CalibPruneError, match=message): igsp(tiny_llama(), TOK, **(HOW | wrong))
