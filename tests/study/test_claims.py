import math
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from calib_prune.calibration.sources import SUITE
from calib_prune.core import CalibPruneError
from calib_prune.evaluation.tasks import TASKS
from calib_prune.questions.claims import (
    claim_levels,
    further_correlations,
    judge,
    ledger,
    save_ledger,
    study_evidence,
    study_ledger,
    verdict_text,
)
from calib_prune.questions.estimates import (
    CHECKS,
    CLAIMS,
    CONTRADICTED,
    JUDGED,
    LEAD,
    MODEL,
    MORE_SOURCES,
    NO_EFFECT,
    OTHER_SIZE,
    PAPER,
    PRESET,
    REPRODUCED,
    UNDECIDED,
    VERDICTS,
    YET,
    Estimate,
    Evidence,
    Levels,
    claims_q,
    draws_needed,
    estimate_growth,
    estimates,
    paper_size,
    power,
    same_sources,
    sources_needed,
    strategy_for,
    verdict,
)
from calib_prune.statistics.examples import example_preset, example_study
from calib_prune.statistics.ranks import (
    correlate,
    correlation_contrast,
    correlation_contrasts,
    resampling,
)
from calib_prune.statistics.replicates import bootstrap_retention, strategy_retention
from calib_prune.statistics.selection import bootstrap_study
from calib_prune.study.presets import load_preset
from tests import ROOT

PRESETS = ROOT / "presets"
NO_METRICS = pd.DataFrame(columns=["strategy", "metric", "value"])
ENDS = st.tuples(st.integers(-20, 20), st.integers(-20, 20)).map(sorted)


@given(ENDS, st.integers(1, 15) | st.none(), st.sampled_from([1, -1]))
def test_the_rule(ends, size, sign):
    low, high = ends
    gap = (math.nan, math.nan) if size is None else (low - sign * size, high - sign * size)
    found = verdict(low, high, sign, gap)
    right = low > 0 if sign > 0 else high < 0
    wrong = high < 0 if sign > 0 else low > 0
    includes_size = size is None or low <= sign * size <= high
    assert (found in (REPRODUCED, OTHER_SIZE)) == right
    assert (found == CONTRADICTED) == wrong
    assert (found in (UNDECIDED, NO_EFFECT)) == (low <= 0 <= high)
    assert (found in (REPRODUCED, UNDECIDED)) == (includes_size and not wrong)
    assert found == verdict(-high, -low, -sign, (-gap[1], -gap[0]))


@pytest.mark.parametrize("ours, size, said", [
    (3, 2, "larger"), (1, 2, "smaller"), (-3, -2, "larger"), (-1, -2, "smaller")])
def test_another_size_is_larger_or_smaller(ours, size, said):
    row = dict(verdict=OTHER_SIZE, ours=ours, size=size, needed="")
    assert verdict_text(row) == f"{OTHER_SIZE} ({said})"
    assert verdict_text(row | dict(verdict=UNDECIDED, needed="9 draws")) == "undecided (9 draws)"
    assert verdict_text(row | dict(verdict=REPRODUCED)) == "reproduced"


@pytest.mark.parametrize("low,high", [(math.nan, 1), (0, math.nan), (2, 1)])
def test_no_verdict_without_an_interval(low, high):
    with pytest.raises(CalibPruneError, match="interval"): verdict(low, high, 1)


def ledger_of(study, metrics, n_boot, n_perm=99):
    whole = bootstrap_study(example_preset(study), study, n_boot)
    evidence = study_evidence(whole, metrics, n_perm=n_perm)
    return study_ledger(evidence).set_index(pd.Index(CHECKS))


def like_paper(sign=1, at=0.6, low=0.3, high=None):
    """The higher its perplexity, the more General, the less Code and Math a source keeps; the mix
    keeps everything; the low sparsity costs nothing."""
    steps = np.random.default_rng(0).permutation(np.linspace(0, 1, 15))
    kept = {o: (0.45 + 0.3 * s, 0.6, 0.75 - 0.5 * s, 0.65 - 0.3 * s) for o, s in zip(SUITE, steps)}
    kept["c4"] = (0.75, 0.6, 0.25, 0.35)
    study = example_study(
        kept | {"uniform": (0.75, 0.65, 0.8, 0.65), "igsp": (0.7,) * 4, "sgs": (0.6,) * 4},
        ("sparsegpt", "wanda"),
        sparsities=(at,),
        seeds=(0, 1),
        n=200,
    )
    few = dict(c4=(0.9, ) * 4, uniform=(0.9, ) *
               4) if high is None else dict(c4=(0.2, ) * 4, uniform=(0.7, ) * 4)
    study |= example_study(few, sparsities=(low if high is None else high,), n=200)
    metrics = pd.DataFrame([
        dict(strategy=o, seed=s, metric="distortion", value=math.exp(sign * 4 * v[0]))
        for o, v in kept.items() for s in (0, 1)])
    return study, metrics


@pytest.fixture(scope="module")
def right():
    return ledger_of(*like_paper(), 300, 999)


def right_answers(items):
    "Code by right answers instead of bits per byte, with the same retention."
    bits = items["metric"] == "bits"
    values = items["value"].to_numpy(copy=True)
    values[bits] = np.arange(bits.sum()) < round(bits.sum() / values[bits].mean())
    name = items["task"].where(~bits, "humaneval_generate")
    return items.assign(task=name, metric=[TASKS[o].metric for o in name], value=values, bytes=0)


def test_every_claim_has_its_checks_and_a_verdict(right):
    assert set(right["claim"]) == set(CLAIMS) and set(right["verdict"]) <= set(VERDICTS)
    assert right["why"].str.len().min() > 20 and not right["why"].str.contains("nan").any()


def test_a_study_in_which_the_paper_is_right(right):
    for name in ("C1 wanda", "C1 sparsegpt", "C2", "C3", "C4", "C4 corrected", "C5", "C6", "C6 c4",
                 "C6 math", "C6 single", "C8", "C9"):
        found = right.loc[name]
        assert found["verdict"] in (REPRODUCED, OTHER_SIZE), (name, found["why"])
    # both keep 90% at 30%, which is no quarter of the margin at 60%
    assert right.loc["C9 low", "verdict"] == NO_EFFECT and right.loc["C9 low", "ours"] == 0


def test_the_numbers_are_those_of_the_study(right):
    assert np.isclose(right.loc["C6 c4", "ours"], 100 * (0.7125 - 0.4875), atol=0.2)
    assert np.isclose(right.loc["C9", "ours"], right.loc["C6 c4", "ours"])
    assert (
        np.isclose(right.loc["C7 sgs", "ours"], 10)
        and right.loc["C7 self-cal", "verdict"] == PRESET
    )
    assert "self-cal" in right.loc["C7 self-cal", "why"] and math.isnan(
        right.loc["C7 self-cal", "ours"]
    )
    assert (
        np.isclose(right.loc["C5 c4", "ours"], 50, atol=0.3)
        and "3.21 of mix − c4" in right.loc["C5 c4", "why"]
    )
    assert (
        right.loc["C4", "ours"] == 4
        and right.loc["C1 wanda", "n"] == 15
        and right.loc["C8", "n_of"] == "strategies"
    )


def test_the_chance_of_a_p_value_is_told_of_p_values_only(right):
    assert (
        "p < 0.05 in 85, 55" in right.loc["C4", "why"]
        and "p < 0.05" not in right.loc["C4 corrected", "why"]
    )


def test_growth_says_where_the_margin_peaks_and_which_noise_its_interval_has(right):
    assert (
        "60%: +22.5; the peak is at 60% (in 100% of replicates)." in right.loc["C9", "why"]
        and "over items and draws." in right.loc["C9", "why"]
    )
    margin = lambda m, sparsity, seeds: example_study(
        {"c4": (0.5,) * 4, "uniform": (0.5 + m,) * 4}, sparsities=(sparsity,), seeds=seeds, n=100
    )
    study = margin(0.02, 0.3, (0, 1)) | margin(0.1, 0.5,
                                               (0, )) | margin(0.05, 0.6,
                                                               (0, 1)) | margin(0, 0.7, (0, ))
    evidence = Evidence(strategy_retention(bootstrap_retention(study, 50)))
    said = estimate_growth("C9", evidence).detail
    assert "70%: +0.0; the peak is at 50% (in" in said and "draws." in said
    step = estimate_growth("C9 step", evidence)
    assert step.detail.startswith("From 50% to 60%") and np.isclose(step.ours, -5)


def test_a_study_in_which_it_is_wrong():
    study, metrics = like_paper(sign=-1)
    for r in study.values():  # the mix and the default change places
        r.record["strategy"] = {"c4": "uniform", "uniform": "c4"}.get(
            r.record["strategy"], r.record["strategy"]
        )
        r.record["mix"] = r.record["strategy"]
    found = ledger_of(study, metrics, 200, 499)
    for name in ("C1 wanda", "C2", "C3", "C4", "C6", "C6 c4", "C9"):
        assert found.loc[name, "verdict"] == CONTRADICTED, found.loc[name, "why"]


def test_sizes_in_bits_are_shares_of_the_mix_over_c4():
    study, metrics = like_paper()
    evidence = Evidence(strategy_retention(bootstrap_retention(study, 200)))
    found = estimates(evidence).set_index("check")
    lead = found.loc["C6 c4", "ours"]
    for name in ("C5 c4", "C6", "C6 math", "C6 single", "C7 sgs", "C9"):
        share = CHECKS[name].paper / LEAD
        assert np.isclose(found.loc[name, "size"], share * lead), name
    assert math.isnan(found.loc["C6 c4", "size"])  # the unit itself
    # the unit is resampled with the number
    assert paper_size("C6", evidence, "Code").std() > 0
    rights = {k: replace(r, items=right_answers(r.items)) for k, r in study.items()}
    accuracies = Evidence(strategy_retention(bootstrap_retention(rights, 50)))
    plain = estimates(accuracies).set_index("check")
    for name in ("C5 c4", "C6", "C6 c4", "C7 sgs", "C9"):
        assert plain.loc[name, "size"] == CHECKS[name].paper


@pytest.mark.parametrize("measured", ["bits", "accuracies"])
def test_growth_between_other_sparsities_has_no_size(measured):
    study, _ = like_paper(at=0.5, low=0.5, high=0.6)
    if measured == "accuracies":
        study = {k: replace(r, items=right_answers(r.items)) for k, r in study.items()}
    found = strategy_retention(bootstrap_retention(study, 50))
    row = estimates(Evidence(found, Levels(0.5, 0.5, 0.6))).set_index("check").loc["C9"]
    assert math.isnan(row["size"]) and "of other sparsities" in row["detail"]


def test_no_unit_no_size():
    study = example_study(
        dict.fromkeys((*SUITE, "uniform"), (0.5,) * 4), seeds=(0, 1), n=80, draw_sd=0.02
    )
    found = estimates(Evidence(strategy_retention(bootstrap_retention(study, 200))))
    found = found.set_index("check")
    assert found.loc["C6 c4", "ci_low"] < 0 < found.loc["C6 c4", "ci_high"]
    assert found.loc[["C6", "C6 math", "C6 single", "C7 sgs", "C9"], "size"].isna().all()
    assert "not significant" in found.loc["C6", "detail"]


def test_the_size_of_an_effect_is_judged_with_the_noise_of_its_unit():
    """A mix that leads math by the paper's share of its lead over c4: the interval of the
    difference includes 0 in nearly all studies."""
    included, kept = 0, {"c4": 0.4, "uniform": 0.6, "math": 0.6 - 0.2 * 8.8 / LEAD}
    for seed in range(20):
        study = example_study(
            {k: (v,) * 4 for k, v in kept.items()}, seeds=(0, 1, 2), n=100, draw_sd=0.02, seed=seed
        )
        e = Evidence(strategy_retention(bootstrap_retention(study, 300)))
        row = estimates(e).set_index("check").loc["C6 math"]
        included += row["gap_low"] <= 0 <= row["gap_high"]
    assert included >= 17


def test_draws_needed_shorten_the_interval_to_the_size():
    known = Estimate(1, -3, 5, 100, "items", size=4.0, variance=4.0, draws=(("a", 2), ("b", 2)))
    # 8 points long, and 4 wanted: a quarter of the variance
    assert draws_needed(known, dict(a=2, b=2)) == "8 draws"
    # items give 3 of 4, more than a quarter: half of the quarter each
    assert draws_needed(known, dict(a=1, b=1)) == "4 draws, 600 items"
    for unknown in (replace(known, draws=()), replace(known, size=math.nan)):
        assert draws_needed(unknown, dict(a=1, b=1)) == ""
    assert draws_needed(known, {}) == ""


@pytest.mark.parametrize("rho", [0.5, 0.7])
def test_with_the_sources_needed_the_interval_of_rho_is_shorter_than_rho(rho):
    n = int(sources_needed(rho).split()[0])
    half = 1.96 * math.sqrt(1.06 / (n - 3))
    z = math.atanh(rho)
    assert z - 2 * half > -1e-9 and z - 2 * half * math.sqrt((n - 3) / (n - 4)) < 0
    assert sources_needed(-rho) == sources_needed(rho)


def test_q_values_are_over_the_four_claims_alone():
    study, metrics = like_paper()
    found = strategy_retention(bootstrap_retention(study, 50))
    table = correlate(metrics, found, 99)
    e = Evidence(found, correlations=table)
    q = claims_q(e)
    assert len(q) == 4
    many = pd.concat([table, table.assign(metric="other", p=0.9)], ignore_index=True)
    assert claims_q(Evidence(found, correlations=many)) == q
    assert claims_q(Evidence(found)) == {}


def test_significance_is_refuted_by_the_other_sign_alone():
    found = [
        judge(CHECKS["C4"], dict(status="", ours=n, contradicted=against))
        for n, against in ((4, False), (2, False), (0, False), (2, True))
    ]
    assert found == [REPRODUCED, UNDECIDED, UNDECIDED, CONTRADICTED]


def test_an_unfinished_study_says_not_yet():
    found = strategy_retention(
        bootstrap_retention(example_study({"stdlib": (0.5,) * 4, "hellaswag": (0.6,) * 4}), 50)
    )
    one, other = (
        estimates(Evidence(found), complete=o).set_index("check")["status"]
        for o in (True, False)
    )
    assert set(one) >= {PRESET} and YET not in set(one) and list(other) == [{PRESET: YET}.get(o, o)
                                                                            for o in one]


def test_equal_strategies_win_nothing():
    wrong = {o: 0 for o in ("C5", "C6", "C6 single", "C8")}
    for s in range(12):
        study = example_study(dict.fromkeys((*SUITE, "uniform"), (0.5,) * 4), n=80, seed=s)
        found = ledger(
            estimates(Evidence(strategy_retention(bootstrap_retention(study, 150))))
        ).set_index(pd.Index(CHECKS))
        for name in wrong: wrong[name] += found.loc[name, "verdict"] in (REPRODUCED, OTHER_SIZE)
    assert max(wrong.values()) <= 3, wrong


def test_a_preset_without_the_cells():
    found = ledger_of(
        example_study({"stdlib": (0.5,) * 4, "hellaswag": (0.6,) * 4}), NO_METRICS, 50
    )
    assert set(found["verdict"]) <= {PRESET, YET, *JUDGED}
    for name in ("C1 wanda", "C4", "C5 c4", "C6", "C6 c4", "C9 low", "C9"):
        assert found.loc[name, "verdict"] == PRESET
    assert "uniform" in found.loc["C6 c4", "why"] and "30%" in found.loc["C9 low", "why"]


def test_a_model_without_the_number():
    study, metrics = like_paper()
    for r in study.values(): r.items = r.items[r.items.dimension != "Math"]
    found = ledger_of(study, metrics.assign(value=1.0), 50, 99)
    for name in ("C1 wanda", "C2", "C4", "C5", "C6", "C9"):
        assert found.loc[name, "verdict"] == MODEL
    assert "same for every source" in found.loc["C1 wanda", "why"]
    assert found.loc["C8", "verdict"] == REPRODUCED


def test_a_dense_model_with_one_right_answer_gives_no_interval():
    study = example_study({"c4": (0.5,) * 4, "uniform": (0.6,) * 4}, n=40)
    for r in study.values():
        r.items.loc[(r.items["task"] == "sciq") & (r.items["item"] > "0000"), "value"] = 0.0
    found = ledger_of(study, NO_METRICS, 100)
    assert found.loc["C6 c4", "verdict"] == MODEL and "more items" in found.loc["C6 c4", "why"]


def test_of_several_calibration_sizes_the_one_with_most_strategies_counts():
    study, metrics = like_paper()
    extra = {
        k + "w": r
        for k, r in example_study({"c4": (0.1,) * 4, "uniform": (0.9,) * 4}, n=200).items()
        if k != "dense"
    }
    for k, r in (study | extra).items(): r.record["windows"] = 16 if k in extra else 128
    found = strategy_retention(bootstrap_retention(study | extra, 50))
    evidence = Evidence(found, correlations=correlate(metrics, found, 99))
    table = ledger(estimates(evidence)).set_index(pd.Index(CHECKS))
    assert table.loc["C6 c4", "ours"] < 30


def test_wrong_input_is_named():
    found = strategy_retention(bootstrap_retention(example_study({"c4": (0.5,) * 4}), 20))
    with pytest.raises(CalibPruneError, match="'mixx'.*'mix'"): strategy_for(found, "mixx")
    with pytest.raises(CalibPruneError, match="O3 best"):
        ledger(estimates(Evidence(found)).iloc[:-1])


def test_a_study_of_another_sparsity_is_judged_there():
    "The same made-up study at 50 instead of 60 %, and 40 instead of 30: the same verdicts."
    found = ledger_of(*like_paper(at=0.5, low=0.4), 300, 999)
    assert {"ρ(perplexity, General), Wanda 50%", "mix − c4, total, SparseGPT 40%",
            "growth of mix − c4 from 40% to 50%, total, SparseGPT"} <= set(found["check"])
    there = ledger_of(*like_paper(), 300, 999)
    # growth between other sparsities has no size of the paper
    growth = found.index.isin(["C9", "C9 low"])
    assert found.loc[growth, "size"].isna().all() and there.loc[growth, "size"].notna().all()
    assert found["verdict"][~growth].tolist() == there["verdict"][~growth].tolist()
    np.testing.assert_array_equal(found["ours"].isna(), there["ours"].isna())


def test_claims_are_judged_where_the_preset_says():
    found = {
        o: claim_levels(load_preset(PRESETS / f"claims/{o}.yaml"))
        for o in ("smollm2-135m", "qwen-0.5b", "llama-3.1-8b")
    }
    assert found["llama-3.1-8b"] == PAPER == Levels(0.6, 0.3, 0.6)
    assert found["smollm2-135m"] == Levels(0.5, 0.3, 0.6)
    assert found["qwen-0.5b"] == Levels(0.5, 0.5, 0.6)
    preset = load_preset(PRESETS / "claims/smollm2-135m.yaml") | dict(judged_at=None)
    assert claim_levels(preset) == PAPER


@pytest.mark.parametrize(
    "made, levels",
    [
        # SparseGPT's count
        ([("sparsegpt", 0.6, "c4 math uniform"),
          ("wanda", 0.5, "c4 math uniform stdlib")], Levels(0.6, 0.3, 0.6)),
        ([("wanda", 0.5, "c4 uniform")], Levels(0.5, 0.3, 0.6)),
        ([("sparsegpt", "2:4", "c4 uniform")], Levels("2:4", 0.3, 0.6)),
        ([("sparsegpt", o, "c4 uniform") for o in (0.4, 0.5, 0.7)], Levels(0.7, 0.4, 0.7)),
        ([("sparsegpt", 0.5, "c4 uniform math"),
          ("sparsegpt", 0.7, "uniform")], Levels(0.5, 0.3, 0.6))])
def test_levels_of_other_studies(made, levels):
    study = {}
    for method, sparsity, names in made:
        study |= example_study(
            {o: (0.5,) * 4 for o in names.split()}, (method,), sparsities=(sparsity,), n=10
        )
    preset = example_preset(study)
    assert claim_levels(preset) == levels
    if levels.at != "2:4": assert PRESET in set(ledger_of(study, NO_METRICS, 20)["verdict"])


def test_a_study_without_a_lower_sparsity_has_no_second_margin():
    study, metrics = like_paper(at=0.5, low=0.5, high=0.6)
    found = ledger_of(study, metrics, 100)
    assert (
        found.loc["C9 low", "verdict"] == PRESET and "lower sparsity" in found.loc["C9 low", "why"]
    )
    assert found.loc["C9 step", "verdict"] == PRESET
    assert found.loc["C9", "verdict"] in (REPRODUCED, OTHER_SIZE) and np.isclose(
        found.loc["C9", "ours"], 50 - found.loc["C6 c4", "ours"], atol=0.3
    )


@pytest.mark.parametrize("rho,n,chance", [(0.71, 15, 0.85), (0.55, 15, 0.55)])
def test_power_is_that_of_a_simulation(rho, n, chance):
    from scipy.stats import spearmanr
    # Pearson's r that has this Spearman ρ
    rng, r = np.random.default_rng(0), 2 * math.sin(math.pi * rho / 6)
    x = rng.normal(size=(n, 1500))
    y = r * x + math.sqrt(1 - r**2) * rng.normal(size=x.shape)
    seen = np.mean([spearmanr(x[:, i], y[:, i]).pvalue < 0.05 for i in range(x.shape[1])])
    assert abs(power(rho, n) - seen) < 0.05 and abs(power(rho, n) - chance) < 0.03


def test_the_saved_ledger_is_the_same_every_time(right, tmp_path):
    for name in ("a", "b"):
        save_ledger(right.reset_index(drop=True), tmp_path / name / "T7", "Preset x.")
    for suffix in (".csv", ".md", ".tex"):
        assert (tmp_path / f"a/T7{suffix}").read_bytes() == (
            tmp_path / f"b/T7{suffix}"
        ).read_bytes()
    back, text = pd.read_csv(tmp_path / "a/T7.csv"), (tmp_path / "a/T7.md").read_text()
    assert back["verdict"].tolist() == right["verdict"].tolist() and "nan" not in text
    assert (
        all(f"**{claim}**" in text for claim in CLAIMS) and "Preset x." in text and "18.8" in text
    )


def test_a_number_is_the_same_in_every_committed_table():
    "T2, T3, T7 and T8 read one stream of resamples."
    folder = ROOT / "figures/claims/smollm2-135m"
    read = lambda name, **at: pd.read_csv(folder / f"{name}.csv").loc[
        lambda t: np.logical_and.reduce([t[k] == v for k, v in at.items()])
    ]
    numbers = lambda t, *names: t[list(names)].to_numpy(float).ravel()
    ends = ("ci_low", "ci_high")
    pair = dict(mix="igsp", over="self-cal", dimension="Total")
    ledger = numbers(
        read("T7-claims", check="IGSP − Self-Cal, total, SparseGPT 50%"), "ours", *ends
    )
    np.testing.assert_allclose(
        100 * numbers(read("T2-differences", **pair, method="sparsegpt"), "value", *ends),
        ledger,
        atol=1e-4,
    )
    rho = numbers(read("T7-claims", check="ρ(perplexity, General), Wanda 50%"), "ours", *ends)
    found = read(
        "T3-correlations", metric="distortion", method="wanda", sparsity=0.5, dimension="General"
    )
    np.testing.assert_allclose(numbers(found, "rho", *ends), rho, atol=1e-6)
    kept = dict(strategy="uniform", method="sparsegpt", dimension="Code", sparsity=0.6)
    in_sweep = read("T4-sparsity", **kept, quantity="retention")
    of_own_text = read("T8-self-generated", **kept)
    np.testing.assert_array_equal(
        *(numbers(table, "value", *ends) for table in (in_sweep, of_own_text))
    )
    lead = dict(over="c4", method="sparsegpt")
    np.testing.assert_array_equal(
        numbers(read("T2-differences", mix="uniform", **lead), "value", *ends),
        numbers(read("T2-over-c4", strategy="uniform", **lead), "value", *ends),
    )


def test_the_opposite_signs_as_one_test(right):
    for name in ("O1 code", "O1 math"):
        row = right.loc[name]
        assert row["verdict"] in (REPRODUCED, OTHER_SIZE) and row["ours"] > 1, row["why"]
        assert "Permutation p = 0.00" in row["why"], row["why"]
    assert np.isclose(
        right.loc["O1 code", "ours"], right.loc["C1 sparsegpt", "ours"] - right.loc["C3", "ours"]
    )
    # perplexity works inside the registers, too
    for name in ("O2 code", "O2 math"): assert right.loc[name, "verdict"] == REPRODUCED


def test_a_metric_that_only_tells_the_registers_apart():
    of_code = {o: SUITE[o].dimension in ("Code", "Math") for o in SUITE}
    rng = np.random.default_rng(5)
    kept = {
        o: (0.7 - 0.3 * c + 0.05 * rng.normal(), 0.6, 0.3 + 0.3 * c + 0.05 * rng.normal(),
            0.3 + 0.3 * c) for o, c in of_code.items()}
    study = example_study(
        kept | {"uniform": (0.7,) * 4}, ("sparsegpt", "wanda"), seeds=(0, 1), n=400, seed=1
    )
    metrics = pd.DataFrame([
        dict(strategy=o, seed=0, metric="distortion", value=10.0 - 5 * c + rng.random())
        for o, c in of_code.items()])
    whole = bootstrap_study(example_preset(study), study, 300)
    more = further_correlations(whole, metrics, "distortion", 999, 0)
    evidence = study_evidence(whole, metrics, n_perm=999, more=more)
    found = study_ledger(evidence).set_index(pd.Index(CHECKS))
    for claim in ("C1", "C3"):
        assert found.loc[f"{claim} more", "verdict"] in (REPRODUCED, OTHER_SIZE)
        assert found.loc[f"{claim} held", "verdict"] == UNDECIDED
    assert (
        found.loc["O1 code", "verdict"] in (REPRODUCED, OTHER_SIZE)
        and found.loc["O2 code", "verdict"] == UNDECIDED
    )
    assert found.loc["O2 code", "ci_low"] < 0 < found.loc["O2 code", "ci_high"]


def test_the_best_source_allows_for_the_choice():
    held, wider, kept = [], [], dict.fromkeys(SUITE, (0.6, ) * 4) | {
        "c4": (0.4, ) * 4, "uniform": (0.6, ) * 4}
    for seed in range(20):  # the mix leads no source but c4: whoever looks best, looks best by luck
        found = strategy_retention(
            bootstrap_retention(
                example_study(kept, seeds=(0, 1), n=1000, draw_sd=0.04, seed=seed), 200
            )
        )
        row = estimates(Evidence(found)).set_index("check").loc["C6"]
        held.append(row["ci_low"] <= 0 <= row["ci_high"])
        total = {o: found.of(o, method="sparsegpt", sparsity=0.6)[:, 4] for o in kept}
        best = total[max(SUITE, key=lambda o: total[o][0])]
        # as if the best had been known before
        alone = 100 * np.ptp(np.quantile((total["uniform"] - best)[1:], (0.025, 0.975)))
        wider.append((row["ci_high"] - row["ci_low"]) / alone)
        assert "simultaneous over all 15 sources" in row["detail"]
    assert sum(held) >= 18 and np.median(wider) > 1.2


def test_more_sources_are_a_study_of_their_own():
    study, metrics = like_paper()
    whole = bootstrap_study(example_preset(study), study, 200)
    more = further_correlations(whole, metrics, "distortion", 99, 0)
    evidence = study_evidence(whole, metrics, n_perm=99, more=more)
    found = study_ledger(evidence).set_index(pd.Index(CHECKS))
    for name in MORE_SOURCES:
        assert found.loc[name, "verdict"] in JUDGED and found.loc[name, "n"] == 15
    assert found.loc["C1 more", "ours"] == pytest.approx(found.loc["C1 sparsegpt", "ours"])
    nothing = bootstrap_study(example_preset(study), {}, 20)
    assert further_correlations(nothing, metrics, "distortion", 99, 0).empty
    assert further_correlations(whole, NO_METRICS, "distortion", 99, 0).empty


def test_sparsities_with_other_sources_are_not_compared():
    kept = {"c4": (0.5,) * 4, "math": (0.6,) * 4, "uniform": (0.6,) * 4}
    study = example_study(kept, sparsities=(0.5,), n=20)
    study |= example_study({k: kept[k] for k in ("c4", "uniform")}, sparsities=(0.6,), n=20)
    study |= example_study(kept, sparsities=(0.7,), n=20)
    found = strategy_retention(bootstrap_retention(study, 20))
    assert not same_sources(found, 0.5, 0.6) and same_sources(found, 0.5, 0.7)
    assert not same_sources(found, 0.5, 0.9)


def test_the_partial_p_belongs_to_the_partial_difference():
    groups = np.repeat([0, 1], (9, 6))
    free, held = resampling(np.zeros(15, int), 50, 999, 0), resampling(groups, 50, 999, 0)
    low, shown = 0, 0
    for seed in range(60):
        rng = np.random.default_rng(seed)
        x = rng.normal(size=15)
        a, b = 5 * groups + 0.8 * x + 0.5 * rng.normal(size=15), rng.normal(size=15)
        found = correlation_contrast(x, np.tile(a, (51, 1)), np.tile(b, (51, 1)), free, held)
        low += found["partial_p"] < 0.05
        unrelated, *kept = rng.normal(size=15), np.tile(a, (51, 1)), np.tile(b, (51, 1))
        null = correlation_contrast(unrelated, *kept, free, held)
        shown += null["partial_p"] < 0.05
    # power where there is an effect inside the registers, and the right size where there is none
    assert low > 25 and shown <= 8


def test_retention_that_is_the_same_inside_each_register_has_no_p_there():
    groups, rng = np.repeat([0, 1], (9, 6)), np.random.default_rng(0)
    free, held = resampling(np.zeros(15, int), 50, 999, 0), resampling(groups, 50, 999, 0)
    flat, other = np.tile(groups.astype(float), (51, 1)), np.tile(rng.normal(size=15), (51, 1))
    found = correlation_contrast(rng.normal(size=15), flat, other, free, held)
    assert np.isnan(found["partial_p"]) and 0 < found["p"] <= 1


def test_a_dimension_that_every_source_keeps_alike_has_no_contrast():
    study = example_study(
        {o: (0.5 + 0.02 * i, 0.5, 0.5, 0.5) for i, o in enumerate(SUITE)}, seeds=(0,), n=400
    )
    metrics = pd.DataFrame(
        [dict(strategy=o, seed=0, metric="distortion", value=float(i)) for i, o in enumerate(SUITE)]
    )
    kept = strategy_retention(bootstrap_retention(study, 20))
    found = correlation_contrasts(metrics, kept, "distortion", 99)
    assert set(found["reason"]) == {"every source kept the same"} and found["p"].isna().all()
    assert set(
        correlation_contrasts(metrics, kept, "coverage", 99)["reason"]
    ) == {"not measured"}


def test_the_total_without_code(right):
    study, metrics = like_paper()
    at = dict(method="sparsegpt", sparsity=0.6)
    found = strategy_retention(bootstrap_retention(study, 20)).where(**at)
    three = {o: 100 * found.of(o)[0, [0, 1, 3]].mean() for o in found.cells["strategy"]}
    assert right.loc["O3 c4", "ours"] == pytest.approx(three["uniform"] - three["c4"])
    assert right.loc["O3 best", "ours"] == pytest.approx(
        three["uniform"] - max(three[o] for o in SUITE)
    )
    assert right.loc["O3 best", "ci_low"] < right.loc["O3 best", "ours"]
