"Methods side by side: gains by draw, costs, and the rule that picks."
from dataclasses import asdict, replace

import numpy as np
import pandas as pd
import pytest

from calib_prune.core import CalibPruneError
from calib_prune.questions.pruners import (
    GAINS,
    chosen,
    cost_rows,
    gain_message,
    gain_rows,
    gain_text,
    gains,
    method_rows,
    pruner_figure,
    pruner_text,
    total_gains,
    totals,
)
from calib_prune.statistics.examples import example_items, example_preset
from calib_prune.statistics.replicates import OUTCOMES
from calib_prune.statistics.selection import bootstrap_study
from calib_prune.study.presets import Cell
from calib_prune.study.results import Result

TOTAL = OUTCOMES.index("Total")


def made_up(
    methods: dict[str, tuple[float, float]],
    strategies=("uniform", "c4"),
    seeds=(0, 1, 2),
    noise=0.003,
    n=1000,
):
    """A study in which each method (gain, seconds) keeps more than SparseGPT by its gain, on the
    same draws."""
    rng = np.random.default_rng(3)
    study = {"dense": Result(asdict(Cell("dense")), pd.DataFrame(), example_items([1] * 4, n), {})}
    for method, (more, seconds) in ({"sparsegpt": (0.0, 20.0)} | methods).items():
        for name in strategies:
            for seed in seeds:
                cell = Cell(name, name, method, 0.6, seed, 32)
                kept = np.full(4, 0.6 + more + 0.1 * (name == "c4") + noise * rng.normal())
                rows = pd.DataFrame([dict(metric="perplexity per token", score=30.0 + seed)])
                about = asdict(cell) | dict(peak_gib=1.5, mean_error=0.03)
                study[cell.name] = Result(
                    about, rows, example_items(kept, n), {"pruning": seconds * (1 + seed)}
                )
    return bootstrap_study(example_preset(study), study, 400)


def test_gains_are_paired_by_draw():
    whole = made_up({"admm": (0.05, 28)})
    found = gains(whole)
    assert len(found.cells) == 6 and set(found.cells["method"]) == {"admm"}
    row = found.cells.index[(found.cells["strategy"] == "c4") & (found.cells["seed"] == 2)][0]
    at = dict(strategy="c4", seed=2)
    mine, theirs = (whole.cells.where(method=m, **at).values[:, 0] for m in ("admm", "sparsegpt"))
    np.testing.assert_array_equal(found.values[:, row], mine - theirs)
    rows = gain_rows(whole).set_index(["strategy", "dimension"])
    mean = np.mean([found.values[0, :, TOTAL]])
    assert rows.value["mean", "Total"] == pytest.approx(mean) and abs(mean - 0.05) < 0.01
    assert rows.value["uniform − c4", "Total"] == pytest.approx(
        rows.value["uniform", "Total"] - rows.value["c4", "Total"]
    )
    assert rows.draws["mean", "Total"] == rows.draws["c4", "Total"] == 3
    assert list(gain_text(gain_rows(whole))["strategy"]) == [
        "uniform", "c4", "mean", "uniform − c4"]


def test_costs_are_ratios_of_the_same_draw():
    costs = cost_rows(made_up({"admm": (0.05, 28), "alps": (0.06, 60)}).study).set_index("method")
    assert costs["times"].to_dict() == pytest.approx({"sparsegpt": 1, "admm": 1.4, "alps": 3})
    assert costs["seconds"]["admm"] == 56 and costs["error"]["alps"] == 0.03
    assert costs["perplexity"]["admm"] == pytest.approx((30 * 31 * 32) ** (1 / 3))


def test_times_of_two_kinds_of_processor_are_not_compared():
    whole = made_up({"admm": (0.05, 28)})
    def on(kind):  # by cell; a slow processor takes three times as long
        moved = {
            k: replace(
                o,
                record=o.record | dict(processor=kind(k)),
                seconds={w: s * (3 if kind(k) == "slow" else 1) for w, s in o.seconds.items()},
            )
            for k, o in whole.study.items()
        }
        return cost_rows(moved).set_index("method")["times"], moved
    other, _ = on(
        lambda name: "slow" if "sparsegpt" in name and not name.endswith("s0") else "fast"
    )
    assert other["admm"] == pytest.approx(1.4), "of the first draw alone"
    none, moved = on(lambda name: "slow" if "sparsegpt" in name else "fast")
    assert np.isnan(none["admm"]) and none["sparsegpt"] == 1
    text = pruner_text(method_rows(whole), gain_rows(whole), cost_rows(moved)).set_index("method")
    assert text["time"].to_dict() == {"SparseGPT": "1.00×", "L-ADMM": "–"}
    with pytest.raises(CalibPruneError, match="times compared with SparseGPT's"):
        pruner_figure(total_gains(whole), cost_rows(moved))


@pytest.mark.parametrize("methods, names", [
    ({"admm": (0.05, 28)}, ["admm"]),
    ({"admm": (0.05, 28), "alps": (0.06, 60)}, ["admm"]),
    ({"admm": (0.05, 28), "alps": (0.12, 60)}, ["admm", "alps"]),
    # 1.55 times: not affordable, but the best at any cost
    ({"admm": (0.05, 31)}, ["admm"]),
    ({"admm": (0.015, 28), "alps": (0.02, 60)}, []),        # a lead too small to matter
    ({"admm": (0.01, 28), "alps": (0.09, 60)}, ["alps"]),
    # better than the worse one is not good enough
    ({"wanda": (-0.06, 10), "alps": (0.0, 60)}, []),
    ({"wanda": (-0.05, 10)}, []), ({}, [])])
def test_the_rule(methods, names): assert chosen(made_up(methods)) == names


def test_table_and_figure():
    whole = made_up({"admm": (0.05, 28), "sparsegpt+reconstruct": (0.1, 90)})
    kept, gained, costs = method_rows(whole), gain_rows(whole), cost_rows(whole.study)
    text = pruner_text(kept, gained, costs).set_index("method")
    assert (
        text.loc["SparseGPT", "total over SparseGPT"] == "–"
        and text.loc["L-ADMM", "time"] == "1.40×"
    )
    assert text.loc["L-ADMM", "Total"] == f"{100 * totals(kept, 0.6).value['admm']:.1f}"
    title = pruner_figure(total_gains(whole), costs).get_suptitle()
    assert title == "Total retention at 60%: 2 of 2 methods above SparseGPT, 0 below"


def test_a_title_on_methods_states_only_significant_gains():
    alike = total_gains(made_up({"admm": (0.0, 28), "alps": (0.0, 60)}))
    assert (
        gain_message(alike)
        == "Total retention at 60%: no method significantly different from SparseGPT"
    )
    assert (
        gain_message(total_gains(made_up({"admm": (0.05, 28)})))
        == "L-ADMM has higher total retention than SparseGPT at 60%"
    )
    both = made_up({"admm": (0.05, 28), "alps": (0.06, 60)})
    alone, together = gain_rows(both), total_gains(both).set_index("method")
    alone = alone[(alone.strategy == "mean") & (alone.dimension == "Total")].set_index("method")
    assert (together.ci_high - together.ci_low > alone.ci_high - alone.ci_low).all()
    assert total_gains(made_up({})).empty


def test_a_pattern_that_only_the_base_has_so_far():
    whole = made_up({"admm": (0.05, 28)})
    cell = Cell("c4", "c4", "sparsegpt", "2:4", 0, 32)
    about = asdict(cell) | dict(peak_gib=1.5, mean_error=0.03)
    rows = pd.DataFrame([dict(metric="perplexity per token", score=30.0)])
    more = {cell.name: Result(about, rows, example_items(np.full(4, 0.5), 1000), {"pruning": 20.0})}
    both = bootstrap_study(example_preset(whole.study | more), whole.study | more, 60)
    assert len(pruner_text(method_rows(both), gain_rows(both), cost_rows(both.study))) == 3
    assert len(pruner_figure(total_gains(both), cost_rows(both.study)).axes) == 1 and chosen(
        both
    ) == ["admm"]


def test_a_method_with_fewer_draws_is_not_looked_at():
    whole = made_up({"admm": (0.05, 28), "alps": (0.12, 60)})
    study = {
        k: o
        for k, o in whole.study.items()
        if o.record["method"] != "alps" or o.record["seed"] == 0
    }
    assert chosen(bootstrap_study(whole.preset, study, 400)) == ["admm"]
    assert cost_rows({"dense": study["dense"]}).empty


def test_a_method_on_fewer_calibration_sets_says_so_and_draws_are_shown():
    whole = made_up({"admm": (0.05, 28), "alps": (0.12, 60)}, strategies=("uniform", "c4", "math"))
    lacks = lambda o: o.record["method"] == "alps" and (
        o.record["strategy"] == "uniform" or o.record["seed"]
    )
    study = {k: o for k, o in whole.study.items() if not lacks(o)}
    part = bootstrap_study(whole.preset, study, 400)
    text = pruner_text(method_rows(part), gain_rows(part), cost_rows(study)).set_index("method")
    assert text["draws"].to_dict() == {"SparseGPT": 3, "L-ADMM": 3, "ALPS (c4, math alone)": 1}
    assert set(gain_text(gain_rows(part)).query("method == 'ALPS'")["draws"]) == {1}


def test_many_calibration_sets_are_counted_not_named():
    sets = ("uniform", "c4", "math", "codeio", "papers")
    whole = made_up({"wanda": (0.05, 10)}, strategies=sets)
    study = {
        k: o
        for k, o in whole.study.items()
        if o.record["method"] != "wanda" or o.record["strategy"] != "papers"
    }
    part = bootstrap_study(whole.preset, study, 60)
    assert pruner_text(method_rows(part), gain_rows(part), cost_rows(study))["method"].tolist() == [
        "SparseGPT",
        "Wanda (4 of 5 sets)",
    ]


def test_a_gain_rests_on_pairs():
    whole = made_up({"admm": (0.05, 28)})
    study = {
        k: o
        for k, o in whole.study.items()
        if o.record["method"] != "sparsegpt" or not o.record["seed"]
    }
    part = bootstrap_study(whole.preset, study, 400)
    assert pruner_text(method_rows(part), gain_rows(part), cost_rows(study))["draws"].tolist() == [
        1,
        1,
    ]


def test_a_study_of_the_dense_model_alone_has_no_lines():
    whole = made_up({})
    alone = bootstrap_study(whole.preset, {"dense": whole.study["dense"]}, 100)
    assert pruner_text(method_rows(alone), gain_rows(alone), cost_rows(alone.study)).empty


def test_a_study_without_other_methods_or_draws():
    alone = made_up({})
    assert gain_rows(alone).empty and list(gain_rows(alone).columns) == GAINS and gain_text(
        gain_rows(alone)).empty
    one = made_up({"admm": (0.05, 28)}, strategies=("c4",), seeds=(0,))
    assert set(gain_rows(one)["strategy"]) == {"c4", "mean"} and chosen(one) == ["admm"]
    text = pruner_text(method_rows(one), gain_rows(one), cost_rows(one.study))
    assert text["method"].tolist() == [
        "SparseGPT",
        "L-ADMM",
    ]
