"A second rounding of the weights: changes of known size, verdicts, and what is missing."
import dataclasses
import json
import math
import re

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest

from calib_prune.core import CalibPruneError
from calib_prune.evaluation.measures import ANSWER_BITS
from calib_prune.questions import rounding
from calib_prune.questions.rounding import (
    METHOD_LEAD,
    WEIGHTS,
    change_class,
    changes_note,
    comparison_weights,
    end_errors,
    hypothesis_rows,
    hypothesis_verdict,
    rounding_figure,
    rounding_gaps,
    rounding_message,
    rounding_rows,
    rounding_text,
    weight_changes,
)
from calib_prune.statistics.examples import example_preset, example_study
from calib_prune.statistics.replicates import OUTCOMES
from calib_prune.statistics.selection import bootstrap_study
from calib_prune.study.presets import grid_cells, load_preset
from tests import ROOT
from tests.notebooks import run_cells

SETS = {"c4": (0.8, 0.8, 0.6, 0.7), "codeio": (0.8, 0.7, 0.8, 0.7), "uniform": (0.8, 0.8, 0.7, 0.7)}
OTHERS = {"news": (0.8, 0.7, 0.5, 0.6), "math": (0.7, 0.7, 0.7, 0.8)}  # stored weights alone
TOTAL = OUTCOMES.index("Total")


def made_up(retention=SETS, seed=None, draw_sd=0.0, n=100, seeds=(0, 1)):
    return example_study(retention, methods=("sparsegpt", "wanda"), sparsities=(0.5,), seeds=seeds,
                         n=n, draw_sd=draw_sd, seed=seed)


PRESET = example_preset(made_up())


def measure(study, n_boot=400): return bootstrap_study(PRESET, study, n_boot)


def changes_of(rows, dimension="Total"):
    mine = rows[(rows["weights"] == WEIGHTS[-1]) & (rows["dimension"] == dimension)]
    return mine.set_index(["comparison", "method"])


@pytest.fixture(autouse=True)
def no_windows():
    plt.switch_backend("agg")
    yield
    plt.close("all")


# --- numbers


def test_a_change_of_known_size_is_recovered():
    "Code of `codeio` loses 20 points with both methods: 5 in total. Nothing else changes."
    lower = SETS | {"codeio": (0.8, 0.7, 0.6, 0.7)}
    rows = rounding_rows(measure(made_up(SETS | OTHERS)), measure(made_up(lower)))
    code, total = changes_of(rows, "Code")["value"], changes_of(rows)["value"]
    for method in ("sparsegpt", "wanda"):
        assert math.isclose(code["codeio − c4", method], -0.2, abs_tol=1e-9)
        assert math.isclose(total["codeio", method], -0.05, abs_tol=1e-9)
        assert total["uniform − c4", method] == total["c4", method] == 0
    assert abs(total[METHOD_LEAD, ""]) < 1e-12


def test_the_change_is_second_minus_first():
    rows = rounding_rows(measure(made_up(seed=1)), measure(made_up(seed=2)))
    wide = rows.pivot_table(
        index=["comparison", "method", "dimension"], columns="weights", values="value"
    )
    np.testing.assert_allclose(wide["change"], wide["rounded again"] - wide["stored"], atol=1e-12)


def test_the_lead_of_wanda_is_a_mean_over_the_sets():
    study = made_up(seed=4)
    changes = weight_changes(measure(study), measure(study))
    of = {(row.comparison, row.method): changes.values[0, i, TOTAL]
          for i, row in enumerate(changes.cells.itertuples()) if row.weights == "stored"}
    leads = [of[name, "wanda"] - of[name, "sparsegpt"] for name in SETS]
    assert len(of) == 13 and math.isclose(of[METHOD_LEAD, ""], np.mean(leads))


def test_only_the_draws_of_the_second_study_count_but_the_spread_is_of_all():
    more = made_up(SETS | OTHERS, seed=7, draw_sd=0.02, seeds=(0, 1, 2))
    few = {name: result for name, result in more.items() if name == "dense" or (
        result.record["strategy"] in SETS and result.record["seed"] < 2)}
    again = measure(made_up(seed=8))
    wide, narrow = (weight_changes(measure(study), again) for study in (more, few))
    first = (wide.cells["weights"] == "stored").to_numpy()
    np.testing.assert_allclose(wide.values[0], narrow.values[0])
    assert not np.allclose(wide.values[1:, first], narrow.values[1:, first])
    assert set(wide.cells["draws"]) == {2}


# --- noise


def draw_noise_of(whole, values):
    "What the noise between draws adds to the mean of the draws of each group, `values`."
    cells = whole.cells.cells
    alike = cells.groupby(["strategy", "method"], sort=False).indices.values()
    means = np.stack([whole.cells.values[:, rows].mean(1) for rows in alike], 1)
    return (values - means)[1:, :, TOTAL]


def test_the_draw_noise_of_both_studies_is_independent():
    "One study twice: items are shared, the noise between draws is not."
    whole = measure(made_up(seed=3, draw_sd=0.03), 4000)
    found = weight_changes(whole, whole)
    groups = ~found.cells["comparison"].str.contains("−").to_numpy()
    first, second = (
        draw_noise_of(whole, found.values[:, groups & (found.cells["weights"] == name)])
        for name in WEIGHTS[:2]
    )
    for one, other in zip(first.T, second.T, strict=True):
        assert min(one.std(), other.std()) > 0.005 and abs(np.corrcoef(one, other)[0, 1]) < 0.08
    change = found.values[1:, groups & (found.cells["weights"] == "change"), TOTAL]
    np.testing.assert_allclose(change.var(0), first.var(0) + second.var(0), rtol=0.1)


def test_one_seed_for_both_studies_would_hide_the_draw_noise(monkeypatch):
    study = made_up(seed=3, draw_sd=0.03)
    monkeypatch.setattr(rounding, "DRAW_SEEDS", (0, 0))
    found = weight_changes(measure(study), measure(study))
    change = found.values[1:, (found.cells["weights"] == "change").to_numpy()]
    assert not np.nanmax(np.abs(change[..., TOTAL]))


def test_items_are_paired():
    "Exact draws: the change of a study against itself has no noise at all."
    study = made_up(seed=3)
    exact = {name: dataclasses.replace(result, items=study[name.replace("-s1", "-s0")].items)
             for name, result in study.items()}
    rows = rounding_rows(measure(exact), measure(exact))
    change = changes_of(rows)
    assert (change["ci_low"] == 0).all() and (change["ci_high"] == 0).all()
    stored = rows[rows["weights"] == "stored"]
    assert (stored["ci_low"] < stored["ci_high"]).all()


def test_no_change_does_not_move_in_most_seeds():
    "Two studies with small draw noise: few of the changes move, and R2 holds in most seeds."
    classes, verdicts, n = [], [], 12
    for seed in range(n):
        pair = (made_up(seed=None, draw_sd=0.0), made_up(seed=None, draw_sd=0.0))
        rng = np.random.default_rng(seed)
        noisy = [
            {name: jittered(result, rng) for name, result in study.items()} for study in pair
        ]
        rows = rounding_rows(*(measure(study, 300) for study in noisy))
        for row in changes_of(rows).itertuples():
            classes.append(change_class(row.ci_low, row.ci_high, row.end_error))
        verdicts.append(hypothesis_rows(rows).set_index("hypothesis")["verdict"]["R2"])
    counts = pd.Series(classes).value_counts(normalize=True)
    assert counts["does not move"] > 0.6 and counts.get("moves", 0) < 0.1
    assert verdicts.count("holds") > 0.6 * n


def jittered(result, rng, sd=0.01):
    "A pruned model whose bits differ a little, as between draws."
    if result.record["strategy"] == "dense": return result
    items = result.items
    value = np.where(items["metric"] == "bits", items["value"] * np.exp(sd * rng.normal()),
                     items["value"])
    return dataclasses.replace(result, items=items.assign(value=value))


# --- verdicts


def verdict_of(low, high, bound=0.02, tolerated=0.0, error=0.0):
    changes = pd.DataFrame(dict(ci_low=low, ci_high=high, end_error=error))
    return hypothesis_verdict(changes, bound, tolerated)


@pytest.mark.parametrize("low, high, expected", [
    ([-0.01, -0.01], [0.01, 0.019], "holds"),
    ([-0.01, -0.01], [0.01, 0.021], "undecided"),
    ([-0.01, 0.001], [0.01, 0.01], "does not hold"),
    ([-0.05, -0.05], [0.05, -0.01], "does not hold"),
    ([-0.01, math.nan], [0.01, math.nan], "undecided"),
    ([], [], "undecided")])
def test_verdicts_follow_the_intervals(low, high, expected):
    assert verdict_of(low, high) == expected


def test_r3_tolerates_small_changes_that_are_significant():
    assert verdict_of([0.001], [0.029], 0.03, 0.03) == "holds"
    assert verdict_of([0.001], [0.05], 0.03, 0.03) == "undecided"
    assert verdict_of([0.031], [0.05], 0.03, 0.03) == "does not hold"


@pytest.mark.parametrize("end", [-0.0004, 0.0, 0.0004])
def test_no_verdict_depends_on_the_seed(end):
    assert verdict_of([-0.01], [end], error=0.0005) == "undecided"
    assert change_class(-0.01, end, 0.0005) == "undecided"
    assert change_class(-0.01, -0.0006, 0.0005) == "moves"


def test_the_resampling_error_is_the_spread_of_the_ends():
    rng = np.random.default_rng(5)
    replicates = rng.normal(size=(400, 1001, 1, 1))
    ends = np.quantile(replicates[:, 1:, 0, 0], 0.025, axis=1)
    error = np.mean([end_errors(values)[0, 0] for values in replicates])
    assert 0.8 < error / (1.96 * ends.std()) < 1.5


def test_hypotheses_are_judged_by_the_right_rows():
    "A change of a set with Wanda says nothing about R1, which is about SparseGPT."
    moved = made_up()
    lower = made_up(SETS | {"codeio": (0.4, 0.3, 0.4, 0.3)})
    moved |= {name: result for name, result in lower.items() if "wanda" in name}
    rows = rounding_rows(measure(made_up()), measure(moved))
    verdicts = hypothesis_rows(rows).set_index("hypothesis")["verdict"]
    assert verdicts.to_dict() == {"R1": "holds", "R2": "does not hold", "R3": "does not hold"}
    assert "3 of 7 differences" in rounding_message(rows)
    assert len(rounding_message(rows).split()) <= 12
    assert changes_note(rows).startswith("26 changes were looked at.")


# --- what is missing


def without(study, *names):
    return {k: r for k, r in study.items() if not any(name in k for name in names)}


def test_missing_rows_are_named_and_the_rest_is_shown():
    stored, again = measure(made_up(seed=1)), measure(
        without(made_up(seed=2), "uniform-wanda-0.5-n32-s1", "codeio-sparsegpt"))
    assert rounding_gaps(stored, again) == (
        "Not compared, because draws are missing: codeio with SparseGPT and uniform with Wanda."
    )
    rows = rounding_rows(stored, again)
    known = changes_of(rows)["value"].dropna()
    assert len(changes_of(rows)) == 13 and set(known.index) == {
        ("uniform − c4", "sparsegpt"), ("codeio − c4", "wanda"), ("c4", "sparsegpt"),
        ("uniform", "sparsegpt"), ("c4", "wanda"), ("codeio", "wanda")}
    shown = rounding_text(rows)
    assert (shown.query("comparison == @METHOD_LEAD")[["change", "verdict"]] == "").all(axis=None)
    assert hypothesis_rows(rows).query("hypothesis == 'R2'")["verdict"].item() == "undecided"
    assert "of 2 differences" in rounding_figure(rows).get_suptitle()


def test_a_gap_in_the_study_of_the_stored_weights_counts_as_well():
    stored = measure(without(made_up(), "c4-wanda-0.5-n32-s0"))
    assert rounding_gaps(stored, measure(made_up())).endswith("missing: c4 with Wanda.")


@pytest.mark.parametrize("some", [{}, {"dense": made_up()["dense"]}], ids=["nothing", "dense"])
def test_a_study_without_results_has_a_note_and_no_rows(some):
    full, empty = measure(made_up()), measure(some)
    for pair in ((full, empty), (empty, full)):
        assert rounding_rows(*pair).empty
        assert re.search(r"ha(s not|s) been scored yet", rounding_gaps(*pair))


def test_other_items_cannot_be_compared():
    with pytest.raises(CalibPruneError, match="different items"):
        rounding_rows(measure(made_up(n=100)), measure(made_up(n=90)))
    with pytest.raises(CalibPruneError, match="resamples"):
        rounding_rows(measure(made_up(), 100), measure(made_up(), 200))


def test_the_notebook_says_that_nothing_has_been_run(tmp_path):
    preset = ROOT / "presets/rounding/qwen-0.5b.yaml"
    run_cells("rounding", preset=preset, results=tmp_path / "results", figures=tmp_path / "figures")
    table = (tmp_path / "figures/T16-rounding.md").read_text()
    assert "dense model has not been scored yet" in table and "0 of 12 cells" in table
    assert (tmp_path / "figures/F15-rounding.png").is_file()


# --- the committed studies


def test_the_studies_agree_in_calibration_windows():
    "Of every draw, the calibration windows of both studies are identical."
    paths = sorted(ROOT.glob("results/rounding/*/*-s[0-9].json"))
    assert len(paths) >= 12
    for path in paths:
        stored = ROOT / "results/claims" / path.parent.name / path.name
        records = [json.loads(one.read_text())["record"] for one in (path, stored)]
        assert records[0]["calibration"] == records[1]["calibration"], path.name


@pytest.mark.parametrize("model", ["smollm2-135m", "qwen-0.5b"])
def test_the_presets_name_the_study_of_the_stored_weights(model):
    preset = load_preset(ROOT / f"presets/rounding/{model}.yaml")
    other = load_preset(ROOT / f"presets/{preset['compared_with']}.yaml")
    stored = {cell.name for cell in grid_cells(other)}
    assert {cell.name for cell in grid_cells(preset)} <= stored
    scoring = [{k: v for k, v in some["scoring"].items() if k != "swapped"}  # rows of the floor
               for some in (preset, other)]
    assert scoring[0] == scoring[1] and preset["resamples"] == other["resamples"]
    assert len(comparison_weights(grid_cells(preset))) == 13
    assert preset["measure"] == ANSWER_BITS.name
