"""Rules frozen on fifteen sources, asked for fifteen others."""
import math

import numpy as np
import pandas as pd
import pytest
from scipy.stats import linregress, spearmanr

from calib_prune.calibration.sources import FURTHER, SUITE
from calib_prune.core import DIMENSIONS
from calib_prune.questions.new_sources import (
    KIND,
    as_predictor,
    chosen_note,
    chosen_rules,
    kind_means,
    line_through,
    predictions,
    rule_rows,
    rule_text,
    source_error,
    split_sources,
    unseen_figure,
    unseen_message,
)
from calib_prune.statistics.examples import example_preset, example_study
from calib_prune.statistics.selection import bootstrap_study

NAMES = [*SUITE, *FURTHER]


def study_of(names=NAMES, seed=None):
    """Code falls with the logarithm of perplexity; Math goes by the kind of source; the rest is the
    same for all."""
    rng = np.random.default_rng(3)
    perplexity = dict(zip(NAMES, np.exp(rng.uniform(1, 4, len(NAMES)))))
    of_kind = dict(zip(DIMENSIONS, (0.5, 0.6, 0.7, 0.8)))
    kinds = {k: o.dimension for k, o in {**SUITE, **FURTHER}.items()}
    kept = {k: (0.7, 0.8, 0.95 - 0.1 * math.log(perplexity[k]), of_kind[kinds[k]]) for k in names}
    study = example_study(kept, seeds=(0,), n=1000, seed=seed)
    rows = [
        dict(strategy=k, seed=0, metric=m, value=v) for k, o in perplexity.items()
        for m, v in (("distortion", o), ("coverage", float(rng.random())), ("volume_tokens",
                                                                            16384.0))]
    return bootstrap_study(example_preset(study), study, 100).replicates, pd.DataFrame(rows)


FOUND, METRICS = study_of()
SPLIT = split_sources(FOUND, METRICS)
ROWS = rule_rows(SPLIT, 1999)


def test_the_first_fifteen_are_those_of_the_study():
    assert SPLIT.first == list(SUITE) and SPLIT.further == list(FURTHER) and len(
        FURTHER) == 15 and not SUITE.keys() & FURTHER.keys()
    assert list(SPLIT.metrics) == ["distortion", "coverage"], "what does not vary predicts nothing"


def test_a_rule_sees_nothing_of_the_further_sources():
    values = FOUND.values.copy()
    values[:, [i for i, o in enumerate(FOUND.cells["strategy"]) if o in FURTHER]] = 0.123
    from dataclasses import replace
    blind = split_sources(replace(FOUND, values=values), METRICS)
    for metric in (KIND, "distortion"):
        assert (
            predictions(blind, metric, "Code")["predicted"]
            == predictions(SPLIT, metric, "Code")["predicted"]
        ).all()
    assert (
        rule_rows(blind, 99)["left_out"] == ROWS["left_out"]
    ).all(), "what is chosen does not depend on them either"


def test_lines_and_errors_are_scipys():
    rng = np.random.default_rng(0)
    x, y, at = rng.normal(size=9), rng.normal(size=9), rng.normal(size=4)
    line = linregress(x, y)
    assert np.allclose(line_through(x, y, at), line.intercept + line.slope * at)
    errors = [(lambda o: o.intercept + o.slope * x[i] - y[i])(linregress(
        np.delete(x, i), np.delete(y, i))) for i in range(9)]
    assert source_error(line_through, x, y) == pytest.approx(np.sqrt(np.mean(np.square(errors))))
    table = predictions(SPLIT, "distortion", "Code")
    row = ROWS[(ROWS["metric"] == "distortion") & (ROWS["dimension"] == "Code")].iloc[0]
    assert row["rho"] == pytest.approx(spearmanr(table["predicted"], table["value"])[0])
    assert row["error"] == pytest.approx(
        np.sqrt(((table["predicted"] - table["value"]) ** 2).mean())
    )


def test_each_rule_finds_what_is_its_own():
    of = ROWS.set_index(["metric", "dimension"])
    assert (
        of.loc[("distortion", "Code"), "rho"] > 0.99
        and of.loc[("distortion", "Code"), "error"] < 0.002
    )
    assert of.loc[(KIND, "Math"), "error"] < 0.002 < 0.02 < of.loc[("coverage", "Math"), "error"]
    assert of.loc[("coverage", "Code"), "q"] > 0.05 > of.loc[("distortion", "Code"), "q"]
    assert chosen_rules(ROWS).set_index("dimension").loc["Code", "metric"] == "distortion"


def test_kinds():
    kinds = np.array(["Code", "Code", "Math"])
    assert kind_means(
        kinds, np.array([0.2, 0.4, 0.9]), np.array(["Code", "Math", "General"])
    ).tolist() == pytest.approx([0.3, 0.9, 0.5])


def test_metrics_without_a_bound_are_logarithms():
    assert as_predictor("distortion", np.array([math.e, 1.0])).tolist() == [1, 0]
    assert as_predictor("mismatch:Code", np.array([0.5, 0.2])).tolist() == [0.5, 0.2]


def test_words_and_picture():
    text = rule_text(ROWS).set_index("metric")
    assert (
        list(text.index) == [KIND, "distortion (perplexity)", "coverage (vocabulary)"]
        and ", q " in text.loc[KIND, "Math"]
    )
    assert "Code: distortion (perplexity), ρ +1.00" in chosen_note(ROWS)
    figure = unseen_figure(SPLIT, ROWS)
    assert "Code" in figure.get_suptitle() and len(figure.axes) == 4
    best = chosen_rules(ROWS).set_index("dimension")
    assert (
        unseen_message(best.assign(q=0.5))
        == "Unseen sources: no chosen metric predicts retention significantly (q < 0.05)"
    )


def test_too_few_sources_say_nothing():
    found, metrics = study_of([*SUITE, *list(FURTHER)[:4]])
    assert split_sources(found, metrics) is None
    assert (
        split_sources(FOUND, METRICS[~METRICS["strategy"].isin(list(SUITE))]) is None
    ), "those not measured do not count"
