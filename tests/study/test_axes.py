"How many different things metrics measure."
import numpy as np
import pandas as pd
import pytest
from scipy.stats import spearmanr

from calib_prune.calibration.sources import SUITE
from calib_prune.core import CalibPruneError
from calib_prune.questions.correlations import (
    axes_figure,
    axes_note,
    groups_of,
    metric_ranks,
    n_axes,
)


def frame(**columns):
    return pd.DataFrame([
        dict(strategy=s, seed=0, metric=m, value=float(v[i])) for m, v in columns.items()
        for i, s in enumerate(SUITE)])


def test_correlations_are_those_of_scipy_over_single_sources_only():
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(2, 15))
    metrics = frame(distortion=a, coverage=b, volume_tokens=np.ones(15))
    mixes = pd.DataFrame([
        dict(strategy="uniform", seed=0, metric=m, value=99.0)
        for m in ("distortion", "coverage", "volume_tokens")])
    rho, why = metric_ranks(pd.concat([metrics, mixes]), [*SUITE, "not measured"])
    assert rho.loc["distortion", "coverage"] == pytest.approx(spearmanr(a, b).statistic) and list(
        why
    ) == ["volume_tokens"]


def test_axes_and_groups():
    rng = np.random.default_rng(1)
    one, other = rng.normal(size=(2, 15))
    rho, _ = metric_ranks(
        frame(distortion=one,
              coverage=one**3,
              aggregation=-one,
              scope_vocabulary=other,
              variety_ngrams=np.exp(other)), list(SUITE))
    assert groups_of(rho) == [
        ["distortion", "coverage", "aggregation"],
        ["scope_vocabulary", "variety_ngrams"],
    ]
    assert 1.5 < n_axes(rho) < 2.1
    independent = pd.DataFrame(np.eye(3), index=list("abc"), columns=list("abc"))
    assert n_axes(independent) == pytest.approx(3) and groups_of(independent) == [["a"], ["b"], [
        "c"]]


def test_words_and_picture():
    rng = np.random.default_rng(2)
    rho, why = metric_ranks(
        frame(distortion=rng.normal(size=15),
              coverage=np.arange(15),
              variety_ngrams=np.arange(15),
              volume_tokens=np.ones(15)), list(SUITE))
    said = axes_note(rho, why)
    assert "coverage (vocabulary) and variety (ngrams)" in said and "volume (tokens)" in said
    title = axes_figure(rho, said).get_suptitle().replace("\n", " ")
    assert title.startswith("Effective number of independent axes of 3 metrics: 1.")
    with pytest.raises(CalibPruneError, match="nothing to draw"): axes_figure(rho.iloc[:0, :0])
