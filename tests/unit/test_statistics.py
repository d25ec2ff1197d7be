import ast
import itertools
import math
import tracemalloc
import zlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from scipy.stats import bootstrap, false_discovery_control, permutation_test, rankdata, spearmanr

import calib_prune.resampling
from calib_prune import questions
from calib_prune.calibration.sources import SUITE
from calib_prune.core import DIMENSIONS, CalibPruneError
from calib_prune.evaluation.retention import commonsense_accuracy, difference, retention_draws
from calib_prune.evaluation.tasks import TASKS
from calib_prune.resampling import draws, interval
from calib_prune.statistics.effects import (
    best_of,
    contrasts,
    effects,
    shortfall,
    simultaneous,
    simultaneous_ends,
    strategy_contrasts,
    with_means,
)
from calib_prune.statistics.examples import example_study
from calib_prune.statistics.ranks import (
    correlate,
    leave_one_out,
    pairings,
    partial_spearman,
    permutation_p,
    resampled,
    resampling,
    row_ranks,
    spearman,
    unit_correlation,
)
from calib_prune.statistics.replicates import (
    OUTCOMES,
    bootstrap_retention,
    deviations,
    draw_noise,
    draw_spread,
    draw_variances,
    noise_variance,
    source_dimension,
    spread,
    strategy_retention,
    without_noise,
)

NUMBERS = st.lists(st.integers(-3, 3), min_size=4, max_size=12)  # few values, so many ties
ACCURACY = OUTCOMES.index("Accuracy")
SOME = {
    "c4": (0.8, 0.6, 0.5, 0.3), "stdlib": (0.4, 0.6, 0.8, 0.2), "uniform": (0.7, 0.65, 0.7, 0.4)}


def fifteen(seed=0, low=0.2, high=0.9):
    return dict(zip(SUITE, np.random.default_rng(seed).uniform(low, high, (15, 4))))


# --- replicates


def test_replicates_are_those_of_evaluation_for_every_cell():
    study = example_study(SOME, ("sparsegpt", "wanda"), (0.5, 0.6), (0, 1), seed=1, draw_sd=0.05)
    found = bootstrap_retention(study, 50, seed=3)
    assert found.values.shape == (51, 24, len(OUTCOMES)) and len(found.settings()) == 4
    for i, result in enumerate(list(study.values())[1:]):
        alone = retention_draws(study["dense"].items, result.items, 50, 3)
        for j, name in enumerate(DIMENSIONS):
            np.testing.assert_allclose(found.values[:, i, j], alone["dimension", name], rtol=1e-12)
        np.testing.assert_allclose(found.values[:, i, 4], alone["total", "total"], rtol=1e-12)
        assert math.isclose(
            found.values[0, i, ACCURACY], commonsense_accuracy(result.items), rel_tol=1e-12
        )


def test_replicates_do_not_depend_on_the_order_of_items():
    study = example_study(SOME, seed=1)
    shuffled = {
        k: type(r)(r.record, r.rows, r.items.sample(frac=1, random_state=5), {})
        for k, r in study.items()
    }
    np.testing.assert_array_equal(
        bootstrap_retention(study, 20).values, bootstrap_retention(shuffled, 20).values
    )


def test_a_missing_dimension_leaves_the_total_out():
    study = example_study(SOME)
    for r in study.values(): r.items = r.items[r.items.dimension != "Math"]
    found = strategy_retention(bootstrap_retention(study, 20))
    assert (
        np.isnan(found.values[..., [3, 4, 5]]).all()
        and not np.isnan(found.values[..., [0, 1, 2, 6]]).any()
    )
    assert set(spread(found)["dimension"]) == {"General", "Commonsense", "Code", "Accuracy"}


def test_bad_studies_are_named():
    study = example_study(SOME)
    with pytest.raises(CalibPruneError, match="'dense'"):
        bootstrap_retention({k: r for k, r in study.items() if k != "dense"}, 5)
    with pytest.raises(CalibPruneError, match="no pruned model"):
        bootstrap_retention({"dense": study["dense"]}, 5)
    cell = study["c4-sparsegpt-0.6-n32-s0"]
    cell.items = cell.items.iloc[:-1]
    with pytest.raises(CalibPruneError, match="basic_skills_arithmetic"):
        bootstrap_retention(study, 5)
    zero = example_study(SOME)
    zero["dense"].items.loc[lambda o: o.task == "piqa", "value"] = 0.0
    with pytest.raises(CalibPruneError, match="piqa"): bootstrap_retention(zero, 5)


@pytest.mark.parametrize("mix,dimension", [("c4", "General"), ("stdlib", "Code"),
                                           ("paper:metamath", "Math"), ("uniform", ""),
                                           ("c4=0.5,math=0.5", ""), ("my/text.txt", "")])
def test_which_mix_is_one_source(mix, dimension):
    assert source_dimension(mix) == dimension


def test_windows_are_a_coordinate():
    study = example_study(SOME) | {
        k + "w": r for k, r in example_study({"c4": (0.5,) * 4}).items() if k != "dense"
    }
    for k, r in study.items(): r.record["windows"] = 64 if k.endswith("w") else None
    found = strategy_retention(bootstrap_retention(study, 10))
    assert [o["windows"] for o in found.settings()] == [None, 64]
    assert (
        math.isclose(found.of("c4", windows=64)[0, 4], 0.5)
        and len(found.where(windows=None).cells) == 3
    )
    with pytest.raises(CalibPruneError, match="2 rows"): found.of("c4")


# --- draws


@pytest.mark.parametrize("n, n_boot", [(1, 9), (7, 100), (301, 40)])
def test_resamples_do_not_depend_on_how_many_are_drawn_at_once(monkeypatch, n, n_boot):
    whole = np.random.default_rng([3, zlib.crc32(b"piqa")]).integers(0, n, (n_boot, n))
    expected = [np.ones(n), *(np.bincount(row, minlength=n) for row in whole)]
    for numbers in (1, 3 * n, 1 << 20):
        monkeypatch.setattr(calib_prune.resampling, "DRAWN_AT_ONCE", numbers)
        found = draws(n, n_boot, 3, "piqa")
        assert np.array_equal(found, expected) and found.dtype == float


def test_resamples_take_little_more_memory_than_their_counts():
    tracemalloc.start()
    counts = draws(10_000, 500, 0, "hellaswag")
    most = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert most < 2 * counts.nbytes


def test_means_over_draws():
    study = example_study({"c4": (0.5, 0.5, 0.5, 0.5)}, seeds=(0,)) | {
        k + "b": r
        for k, r in example_study({"c4": (0.7, 0.6, 0.5, 0.4)}, seeds=(1,)).items()
        if k != "dense"
    }
    found = strategy_retention(bootstrap_retention(study, 30))
    np.testing.assert_allclose(found.values[0, 0, :4], [0.6, 0.55, 0.5, 0.45])
    assert found.cells["draws"].tolist() == [2] and found.noise == "items and draws"


@given(st.lists(st.integers(1, 4), min_size=1, max_size=5), st.integers(0, 99))
def test_deviations_have_the_pooled_variance(sizes, seed):
    values = np.random.default_rng(seed).normal(size=(sum(sizes), 1))
    ends = np.cumsum([0, *sizes])
    groups = [list(range(a, b)) for a, b in itertools.pairwise(ends)]
    found, many = deviations(values, groups), [g for g in groups if len(g) > 1]
    assert len(found) == sum(map(len, many))
    if many:
        assert np.isclose(
            (found**2).mean(),
            np.average([values[g].var(ddof=1) for g in many], weights=list(map(len, many))),
        )


def test_the_spread_between_draws_is_unbiased():
    kept = dict.fromkeys(SUITE, (0.5, 0.5, 0.6, 0.5))
    found = [
        draw_spread(
            bootstrap_retention(example_study(kept, seeds=(0, 1, 2), n=100, draw_sd=0.04, seed=s),
                                60)) for s in range(6)]
    sd = pd.concat(found).query("dimension in ('General', 'Code', 'Math')")
    assert 0.85 * 0.04 < math.sqrt((sd["sd"] ** 2).mean()) < 1.15 * 0.04
    # √(0.5·0.5/100)
    assert np.isclose(sd.query("dimension == 'Math'")["items_sd"].mean(), 0.05, atol=0.004)
    assert (sd["freedom"] == 30).all()


def test_intervals_cover_the_truth_with_two_draws_and_would_not_without_their_noise():
    covered, without = [], []
    for s in range(6):
        kept = fifteen(s, 0.3, 0.8)
        cells = bootstrap_retention(
            example_study(kept, seeds=(0, 1), n=300, draw_sd=0.06, seed=s), 300
        )
        truth = np.array(list(kept.values())).ravel()
        inside = lambda table: table[table["dimension"].isin(DIMENSIONS)].assign(t=truth).eval(
            "ci_low <= t <= ci_high").mean()
        covered.append(inside(effects(strategy_retention(cells))))
        items_only = np.stack(
            [cells.values[:, cells.cells["strategy"] == o].mean(1) for o in kept], 1
        )
        low, high = np.quantile(items_only[1:, :, :4], [0.025, 0.975], axis=0)
        without.append(((low.ravel() <= truth) & (truth <= high.ravel())).mean())
    assert 0.90 < np.mean(covered) < 0.985 and np.mean(without) < 0.8


def test_intervals_cover_the_truth_where_few_draws_tell_of_their_spread(monkeypatch):
    kept = {
        "c4": (0.5, 0.5, 0.5, 0.5), "math": (0.4, 0.6, 0.7, 0.5), "uniform": (0.6, 0.5, 0.4, 0.6)}
    truth = np.array(list(kept.values())).ravel()
    made = [
        bootstrap_retention(example_study(kept, seeds=(0, 1), n=200, draw_sd=0.08, seed=s), 300)
        for s in range(25)
    ]
    inside = lambda table: table[table["dimension"].isin(DIMENSIONS)].assign(t=truth).eval(
        "ci_low <= t <= ci_high").mean()
    covered = np.mean([inside(effects(strategy_retention(o))) for o in made])
    def known(spread, n_boot, rng):
        variance = (spread.set_index("dimension")["sd"] ** 2).reindex(OUTCOMES).fillna(0)
        return np.broadcast_to(variance.to_numpy(float), (n_boot, len(OUTCOMES)))
    monkeypatch.setattr("calib_prune.statistics.replicates.draw_variances", known)
    plain = np.mean([inside(effects(strategy_retention(o))) for o in made])
    assert plain + 0.02 < covered and 0.91 < covered < 0.99, (plain, covered)


def test_a_variance_between_draws_is_never_cut_to_zero():
    """The items' part is larger than all that is seen, as chance has it in a third of the studies:
    the interval still includes draws."""
    known = pd.DataFrame([
        dict(dimension="Code", seen=1.0, items=2.0, freedom=29),
        dict(dimension="Math", seen=4.0, items=1.0, freedom=29),
        dict(dimension="Total", seen=0.0, items=0.0, freedom=29),
        dict(dimension="General", seen=4.0, items=1.0, freedom=1)])
    taken = pd.DataFrame(draw_variances(known, 20_000, np.random.default_rng(0)), columns=OUTCOMES)
    assert (taken["Code"] > 0).all() and 0.02 < taken["Code"].median() < 1
    assert np.isclose(taken["Math"].median(), 3,
                      atol=0.2) and (taken["Math"] > 0).all() and (taken["Total"] == 0).all()
    assert (
        taken["General"].quantile(0.975) > 100 > taken["Math"].quantile(0.975)
    ), "one degree of freedom says little"


def test_a_replicate_without_a_number_does_not_remove_the_noise_of_draws():
    study = example_study(SOME, ("sparsegpt",), (0.5,), (0, 1, 2), n=200, draw_sd=0.1, seed=4)
    whole = bootstrap_retention(study, 400)
    few, many = (replace(whole, values=whole.values.copy()) for _ in range(2))
    few.values[7, 2, DIMENSIONS.index("Code")] = np.nan
    many.values[1:20, 2, DIMENSIONS.index("Code")] = np.nan
    sd, of_few, of_many = (
        draw_spread(cells).set_index("dimension")["sd"] for cells in (whole, few, many)
    )
    assert sd["Code"] > 0 and math.isclose(of_few["Code"], sd["Code"], rel_tol=0.05)
    assert np.isnan(of_many["Code"]) and of_many["Math"] == sd["Math"]
    table = effects(strategy_retention(many)).set_index(["strategy", "dimension"])["ci_low"]
    assert table[:, "Code"].isna().all() and table[:, "Math"].notna().all()


def test_a_single_item_cannot_be_resampled():
    study = example_study(SOME, ("sparsegpt",), (0.5,), (0,), n=1)
    found = bootstrap_retention(study, 20)
    assert np.isfinite(found.values[0, :, :4]).any() and np.isnan(found.values[1:]).all()


def test_a_number_is_the_same_in_every_part_of_a_study():
    """Windows that vary elsewhere, other methods and ablations change nothing: one stream of
    resamples for the whole study."""
    study = example_study(SOME, ("sparsegpt", "wanda"), (0.5, 0.6), (0, 1), draw_sd=0.05, seed=0)
    small = {
        k + "w": replace(r, record=r.record | dict(windows=8))
        for k, r in study.items()
        if k != "dense"
    }
    all_of_it, without = (
        strategy_retention(bootstrap_retention(o, 50)) for o in (study | small, study)
    )
    at = dict(method="sparsegpt", sparsity=0.6, windows=32)
    for name in SOME:
        np.testing.assert_allclose(all_of_it.of(name, **at), without.of(name, **at), rtol=1e-12)


def test_settings_with_the_same_draws_have_the_same_variance():
    """Two methods with two degrees of freedom each take the draws of both, and the common variance
    is one unknown number. Methods that take their own draws have variances of their own."""
    cells = bootstrap_retention(
        example_study({"c4": (0.5,) * 4}, ("sparsegpt", "wanda"), (0.6,), (0, 1, 2),
                      draw_sd=0.05, seed=0), 60)
    shared, own = draw_noise(cells, 0), draw_noise(cells, 0, fewest=(2, 1))
    one, other = (noise.variances for noise in shared.values())
    np.testing.assert_array_equal(one, other)
    assert (one.std(0) > 0).any(), "the common variance is uncertain"
    one, other = (noise.variances for noise in own.values())
    assert abs(np.corrcoef(one[:, 0], other[:, 0])[0, 1]) < 0.5


def test_same_seed_same_numbers():
    cells = bootstrap_retention(example_study(SOME, seeds=(0, 1), draw_sd=0.05, seed=0), 40)
    same, other = (strategy_retention(cells, s).values for s in (0, 1))
    np.testing.assert_array_equal(same, strategy_retention(cells, 0).values)
    assert not np.array_equal(same[1:], other[1:]) and np.array_equal(same[0], other[0])


# --- differences, ranges, the best of many


def test_a_difference_is_that_of_evaluation():
    study = example_study(SOME, seed=2)
    margin = strategy_contrasts(bootstrap_retention(study, 80), [("uniform", "c4")])
    mine = effects(margin).set_index("dimension")
    theirs = difference(study["dense"].items, study["uniform-sparsegpt-0.6-n32-s0"].items,
                        study["c4-sparsegpt-0.6-n32-s0"].items, 80).set_index("name")
    for name, other in (("Total", "total"), *((d, d) for d in DIMENSIONS)):
        expected = theirs[theirs["level"] != "task"].loc[
            other, ["difference", "ci_low", "ci_high"]].astype(float)
        np.testing.assert_allclose(
            mine.loc[name, ["value", "ci_low", "ci_high"]].astype(float), expected, rtol=1e-9
        )


def test_contrasts_need_both_rows_and_spreads_two_strategies():
    found = bootstrap_retention(example_study(SOME), 5)
    assert effects(strategy_contrasts(found, [("unifrom", "c4")])).empty
    none = found.rows([False] * len(found.cells))
    assert contrasts(none, [], [], ["strategy"]).cells.empty
    assert with_means(none, ["method"]).cells.empty
    with pytest.raises(CalibPruneError, match="two strategies"): spread(found.where(strategy="c4"))


def test_a_spread_without_noise():
    found = [
        spread(
            strategy_retention(bootstrap_retention(example_study(kept, n=100, seed=s), 150))
        ).set_index("dimension")
        for s, kept in enumerate([dict.fromkeys(SUITE, (0.5,) * 4)] * 5)
    ]
    assert all(o.loc["Math", "spread"] > 0.1 for o in found)
    assert np.isclose(
        np.mean([o.loc["Math", "by_chance"] / o.loc["Math", "spread"] for o in found]), 1, atol=0.2
    )
    assert (
        np.mean([o.loc["Math", "true_spread"] for o in found]) < 0.09
        and np.mean([o.loc["Math", "ci_low"] < 0.03 for o in found]) > 0.7
    )
    exact = spread(
        bootstrap_retention(
            example_study({"c4": (0.9, 0.5, 0.5, 0.5), "math": (0.4, 0.5, 0.5, 0.5)}, n=4000), 50
        )
    )
    assert np.isclose(exact["true_spread"][0], 0.5, atol=0.01) and exact["true_spread"][1] == 0
    assert exact["lowest"][0] == "math" and exact["highest"][0] == "c4"


def test_the_best_of_equals_is_not_better():
    rng, wrong = np.random.default_rng(0), 0
    for _ in range(200):
        seen = rng.normal(size=12)
        wrong += best_of(seen + np.vstack([np.zeros(12), rng.normal(size=(400, 12))]))[1] > 0
    assert wrong <= 12  # 2.5% expected of 200


@given(st.integers(0, 999))
def test_shortfall_is_zero_only_for_a_source_that_is_best_everywhere(seed):
    values = np.random.default_rng(seed).permutation(20).reshape(1, 5, 4).repeat(3, 0) / 20
    one = any((values[0, s] >= values[0]).all() for s in range(5))
    estimate, low, high = shortfall(values)
    assert (estimate == 0) == one and low <= estimate <= high
    values[:, 2] = 1
    assert shortfall(values) == (0, 0, 0)


def test_a_replicate_without_a_value_leaves_no_interval_of_zero():
    delta = np.random.default_rng(0).normal(size=(1001, 6)) + 3
    one, many = delta.copy(), delta.copy()
    one[7, 2], many[1:30, 2] = np.nan, np.nan
    assert (
        best_of(one) == pytest.approx(best_of(delta), abs=0.1) and np.isnan(best_of(many)[1:]).all()
    )
    low, high = simultaneous(one)
    assert np.isfinite([low, high]).all()
    assert [*np.flatnonzero(np.isnan(simultaneous(many)).any(0))] == [2]
    for column in range(6): one[10 * column:10 * column + 8, column] = np.nan
    one[0] = delta[0]  # together over 1 % of the replicates, none alone
    assert np.allclose(simultaneous(one), simultaneous(delta), atol=0.1)
    values = np.random.default_rng(1).normal(size=(1001, 3, 4)) * 0.01 + np.eye(4)[:3]
    values[1:30, 1, 2] = np.nan
    estimate, *ends = shortfall(values)
    assert estimate > 0.5 and np.isnan(ends).all(), "not 0, which would be a verdict"


def test_noise_that_is_not_known_is_no_signal():
    values = np.random.default_rng(0).normal(size=(501, 15, 2))
    few, many = values.copy(), values.copy()
    few[1:4, 0, 0], many[1:30, 0, 0] = np.nan, np.nan
    assert noise_variance(few) == pytest.approx(noise_variance(values), rel=0.05)
    assert (
        np.isnan(noise_variance(many)).tolist() == [True, False]
        and np.isnan(without_noise(many)[:, 0]).all()
    )


# --- rank correlation


@given(NUMBERS, st.randoms())
def test_spearman_is_scipys(x, random):
    y = random.choices(range(-3, 4), k=len(x))
    if len(set(x)) == 1 or len(set(y)) == 1: assert np.isnan(spearman(np.array(x), np.array(y)))
    else: assert np.isclose(spearman(np.array(x), np.array(y)), spearmanr(x, y).statistic)


@given(st.integers(1, 12), st.integers(2, 20), st.randoms())
def test_ranks_of_many_rows_are_scipys(rows, n, random):
    values = np.array(random.choices(range(-3, 4), k=rows * n)).reshape(rows, n)
    unknown = np.where(values == 3, np.nan, values)  # a row with a NaN has no ranks
    for some in (values, values + 0.5, values.astype(np.int16), unknown):
        np.testing.assert_array_equal(row_ranks(some), rankdata(some, axis=1))


@given(st.integers(2, 15), st.randoms())
def test_ranks_in_resamples_correlate_as_the_resamples_do(n, random):
    x, y = (np.array(random.choices(range(-3, 4), k=n)) for _ in "xy")
    many = np.vstack([y, np.random.default_rng(n).normal(size=(30, n))])
    plan = resampling(np.zeros(n, int), 30, 9, 0)
    for other, drawn in ((y, y[plan.taken]), (many, np.take_along_axis(many[1:], plan.taken, 1))):
        mine = unit_correlation(plan.ranks(x), plan.ranks(other))
        # NaN where one does not vary
        np.testing.assert_allclose(mine, spearman(x[plan.taken], drawn), atol=1e-12)


@given(st.permutations(range(7)))
def test_spearman_in_closed_form(order):
    d = np.arange(7) - np.array(order)
    assert np.isclose(spearman(np.arange(7), np.array(order)), 1 - 6 * (d**2).sum() / (7 * 48))


@given(NUMBERS, st.randoms())
def test_partial_is_the_correlation_of_residuals(x, random):
    y, own = (np.array(random.choices(o, k=len(x))) for o in (range(-3, 4), (0, 1)))
    assume(0 < own.sum() < len(own))
    rest = [
        r - np.where(own == 1, r[own == 1].mean(), r[own == 0].mean())
        for r in (rankdata(x), rankdata(y))
    ]
    assume(all(np.abs(o).max() > 1e-9 for o in rest))
    assert np.isclose(partial_spearman(np.array(x), y, own), np.corrcoef(*rest)[0, 1], atol=1e-7)


@given(NUMBERS.filter(lambda o: len(o) <= 5), st.randoms())
@settings(max_examples=25)
def test_permutation_p_is_scipys(x, random):
    y = random.choices(range(-3, 4), k=len(x))
    assume(len(set(x)) > 1 and len(set(y)) > 1)
    theirs = permutation_test(
        (x,),
        lambda o: spearmanr(o, y).statistic,
        permutation_type="pairings",
        n_resamples=math.factorial(len(x)),
    )
    assert np.isclose(
        permutation_p(np.array(x), np.array(y)[:, None], *pairings(np.zeros(len(x)), 120, 0))[0],
        theirs.pvalue,
    )


def test_drawn_permutations_come_near_all_of_them():
    x, y = np.random.default_rng(4).normal(size=(2, 8))
    exact, drawn = (
        permutation_p(x, y[:, None], *pairings(np.zeros(8), n, 0))[0]
        for n in (math.factorial(8), 20000)
    )
    assert abs(exact - drawn) < 0.015 and pairings(np.zeros(8), 20000, 0)[1] is False


@given(st.lists(st.integers(0, 2), min_size=3, max_size=9), st.integers(0, 99))
def test_sources_change_places_inside_their_group_only(groups, seed):
    groups = np.array(groups)
    for n_perm in (5, 1000):
        taken, whole = pairings(groups, n_perm, seed)
        assert (groups[taken] == groups).all() and (
            np.sort(taken, 1) == np.arange(len(groups))
        ).all()
        if whole:
            assert len(np.unique(taken, axis=0)) == len(taken) == math.prod(
                math.factorial(o) for o in np.bincount(groups))
    assert (groups[resampled(groups, 7, seed)] == groups).all()


def test_p_values_are_uniform_without_a_relation():
    rng, plan = np.random.default_rng(0), pairings(np.r_[np.zeros(11), np.ones(4)], 999, 0)
    p = np.array([
        permutation_p(*rng.normal(size=(2, 15))[[0]], rng.normal(size=(15, 1)), *plan)[0]
        for _ in range(600)])
    assert abs((p < 0.05).mean() - 0.05) < 0.025 and abs((p < 0.5).mean() - 0.5) < 0.06


def test_leave_one_out_is_a_loop():
    x, y = np.random.default_rng(1).normal(size=(2, 9))
    np.testing.assert_allclose(
        leave_one_out(x, y),
        [spearmanr(np.delete(x, i), np.delete(y, i)).statistic for i in range(9)],
    )


def test_rho_intervals_cover_the_truth():
    rng, r, hits = np.random.default_rng(3), 0.6, 0
    for _ in range(300):
        x = rng.normal(size=15)
        y = r * x + math.sqrt(1 - r**2) * rng.normal(size=15)
        taken = rng.integers(0, 15, (400, 15))
        low, high = interval(spearman(x[taken], y[taken]))
        hits += low <= 6 / math.pi * math.asin(r / 2) <= high
    assert 0.88 < hits / 300 < 0.99


def test_the_interval_is_the_percentile_bootstrap():
    x, y = np.random.default_rng(2).normal(size=(2, 15))
    taken = resampled(np.zeros(15), 4000, 0)
    theirs = bootstrap(
        (x, y),
        lambda a, b: spearmanr(a, b).statistic,
        paired=True,
        vectorized=False,
        method="percentile",
        n_resamples=1500,
        rng=np.random.default_rng(0),
    ).confidence_interval
    np.testing.assert_allclose(interval(spearman(x[taken], y[taken])), theirs, atol=0.05)


# --- correlate


def metrics(kept, **more):
    rows = [
        dict(strategy=o,
             seed=s,
             metric=m,
             value=v,
             applicable=m != "delay",
             note="static" if m == "delay" else "") for s in (0, 1) for o, k in kept.items() for m,
        v in dict(distortion=math.exp(k[0]), code=k[2] +
                  0.1 * s, same=3.0, delay=math.nan, **more).items()]
    return pd.DataFrame(rows)


@pytest.fixture(scope="module")
def table():
    kept, other = fifteen(0), fifteen(1)
    study = example_study(kept, ("sparsegpt",), seeds=(0, 1), n=200) | example_study(
        other, ("wanda",), n=200
    )
    return correlate(metrics(kept), strategy_retention(bootstrap_retention(study, 200)), 999)


def test_methods_are_never_pooled(table):
    general = table.query("metric == 'distortion' and dimension == 'General'").set_index("method")[
        "rho"
    ]
    assert general["sparsegpt"] > 0.97
    expected = spearmanr(
        [o[0] for o in fifteen(0).values()], [round(o[0] * 200) for o in fifteen(1).values()]
    ).statistic
    assert np.isclose(general["wanda"], expected)


def test_the_family_is_the_whole_table(table):
    tested = table[table["p"].notna()]
    assert len(tested) == 2 * 2 * 5 and len(table) == 2 * 4 * 5
    np.testing.assert_allclose(tested["q"], false_discovery_control(tested["p"]))
    assert (tested["p"] >= 2 / 1000).all()


def test_what_cannot_be_correlated_has_a_reason_and_no_number(table):
    reasons = table[table["p"].isna()].groupby("metric")["reason"].unique()
    assert reasons["same"].tolist() == ["the same for every source"] and reasons[
        "delay"
    ].tolist() == ["static"]
    assert table.loc[table["p"].isna(), ["rho", "ci_low", "q", "partial"]].isna().all(axis=None)
    assert (
        table.query("dimension == 'Total'")["partial"].isna().all()
        and table.loc[table["p"].notna() & (table["dimension"] == "Code"), "partial"].notna().all()
    )


def test_only_the_metrics_asked_for_get_intervals(table):
    kept = fifteen(0)
    found = strategy_retention(
        bootstrap_retention(
            example_study(kept, ("sparsegpt", ), seeds=(0, 1), n=200)
            | example_study(fifteen(1), ("wanda", ), n=200), 200))
    some = correlate(metrics(kept), found, 999, in_full=["distortion"])
    same = ["n", "rho", "p", "q", "reason"]
    pd.testing.assert_frame_equal(some[same], table[same])
    asked = table["metric"] == "distortion"
    pd.testing.assert_frame_equal(some[asked], table[asked])
    assert some.loc[~asked, ["ci_low", "partial", "loo_low"]].isna().all(axis=None)


def test_which_noise_the_interval_has_is_said(table):
    # Wanda's one draw has the draw variance of SparseGPT's
    assert set(table["noise"]) == {"items and draws"}
    assert ((table["ci_low"] <= table["rho"]) & (table["loo_low"] <= table["rho"]) &
            (table["rho"] <= table["loo_high"]))[table["p"].notna()].all()


def test_code_text_that_keeps_code_is_seen_through():
    rng = np.random.default_rng(0)
    kept = {
        o: (0.5, 0.5, (0.8 if s.dimension == "Code" else 0.4) + 0.05 * rng.random(), 0.5)
        for o, s in SUITE.items()
    }
    found = strategy_retention(bootstrap_retention(example_study(kept, n=50), 200))
    # a low metric for code, luck otherwise
    low = {o: (0, 0, 0 if s.dimension == "Code" else 1) for o, s in SUITE.items()}
    measured = pd.DataFrame([
        dict(strategy=o, metric="distortion", value=10 * v[2] + rng.random())
        for o, v in low.items()])
    row = correlate(measured, found, 999).query("dimension == 'Code'").iloc[0]
    assert row["rho"] < -0.5 and row["p"] < 0.1 and abs(
        row["partial"]
    ) < 0.3 and row["partial_p"] > 0.2 and row["partial_low"] < 0 < row["partial_high"]
    assert correlate(measured, found, 999).query("dimension == 'General'")["reason"].tolist() == [
        "every source kept the same"
    ]


def test_metrics_that_do_not_fit():
    found = strategy_retention(bootstrap_retention(example_study(fifteen()), 20))
    good = metrics(fifteen())
    with pytest.raises(CalibPruneError, match="'value'"):
        correlate(good.drop(columns="value"), found)
    with pytest.raises(CalibPruneError, match="math"):
        correlate(good[good["strategy"] != "math"], found)
    with pytest.raises(CalibPruneError, match="5 single sources"):
        correlate(good, found.where(source_dimension="Code"))
    holes = good.assign(value=good["value"].where(good["strategy"] != "c4"))
    assert (
        "not measured"
        in correlate(holes, found, 99).query("metric == 'distortion'")["reason"].iloc[0]
    )


def test_a_task_that_the_dense_model_cannot_do_is_left_out_where_others_measure_the_dimension():
    study = example_study(SOME)
    for r in study.values():
        more = r.items[r.items.task == "piqa"].assign(
            task="hellaswag", metric=TASKS["hellaswag"].metric, value=0.0
        )
        r.items = pd.concat([r.items, more], ignore_index=True)
    found, plain = bootstrap_retention(study, 20), bootstrap_retention(example_study(SOME), 20)
    assert found.left_out == ("hellaswag",) and plain.left_out == ()
    np.testing.assert_array_equal(found.values, plain.values)
    assert found.items == plain.items


def test_simultaneous_intervals_hold_for_all_at_once():
    rng = np.random.default_rng(5)
    truth, sizes = np.linspace(-1, 1, 12), np.linspace(0.1, 2, 12)
    missed = 0
    for _ in range(200):
        seen = truth + sizes * rng.normal(size=12)
        low, high = simultaneous(np.vstack([seen, seen + sizes * rng.normal(size=(500, 12))]))
        missed += ((truth < low) | (truth > high)).any()
    assert 1 <= missed <= 22, "5 % of 200, within chance"
    one = simultaneous(np.vstack([[0.0], rng.normal(size=(20_000, 1))]))
    assert one[1][0] == pytest.approx(1.96, abs=0.05), "a single difference needs no allowance"


def test_means_follow_their_group_with_the_fewest_draws():
    found = bootstrap_retention(example_study(SOME, ("sparsegpt", "wanda")), 20)
    found = replace(found, cells=found.cells.assign(draws=range(2, 2 + len(found.cells))))
    rows = with_means(found, ["method"])
    names = [*SOME, "mean"]
    assert list(rows.cells["strategy"]) == names * 2
    mean = rows.where(strategy="mean", method="wanda")
    np.testing.assert_allclose(mean.values[:, 0], found.where(method="wanda").values.mean(1))
    assert list(mean.cells["draws"]) == [2 + len(SOME)]
    assert list(with_means(found, ["strategy"], fewest=3).cells["strategy"]).count("mean") == 0


def test_simultaneous_intervals_are_those_of_their_set():
    found = bootstrap_retention(example_study(SOME, ("sparsegpt", "wanda"), seed=1), 400)
    table = effects(found, DIMENSIONS, together=["method"])
    for method, rows in table.groupby("method"):
        values = found.where(method=method).values[..., :len(DIMENSIONS)]
        low, high = simultaneous(values.reshape(len(values), -1))
        np.testing.assert_allclose(rows["all_low"], low)
        np.testing.assert_allclose(rows["all_high"], high)
    lost = found.values.copy()
    lost[1:, 0, 0] = np.nan
    table = effects(replace(found, values=lost), DIMENSIONS, together=[])
    assert table["all_low"].isna().sum() == 1, "a row without an interval is in no set"
    ends = simultaneous_ends(table)
    assert list(ends) == list(effects(found)) and (ends["ci_low"][1:] == table["all_low"][1:]).all()


@pytest.mark.parametrize("path", sorted(Path(questions.__file__).parent.glob("*.py")),
                         ids=lambda path: path.stem)
def test_questions_leave_intervals_to_statistics(path):
    "They ask for contrasts and effects; resampling and quantiles are `statistics`."
    imported = {
        name.name for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.ImportFrom) for name in node.names}
    assert not imported & {"interval", "simultaneous", "draws", "resampled", "pairings"}
