"The law of mixtures: shares, forms, predictions with intervals, the best mix, what is refused."
import json

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from calib_prune.core import DIMENSIONS, CalibPruneError
from calib_prune.statistics.mixing_law import (
    FORMS,
    LAW_FILE,
    _may_be_best,
    as_shares,
    best_mix,
    fit,
    fitted_law,
    left_out_error,
    simplex,
    super_additive,
)
from tests import ROOT

EVEN = dict.fromkeys(DIMENSIONS, 0.25)


def mixes(n=20, seed=0):
    return pd.DataFrame(np.random.default_rng(seed).dirichlet(np.ones(4), n), columns=DIMENSIONS)


def noisy(values, sd=0.01, b=200, seed=1):
    rng = np.random.default_rng(seed)
    return np.concatenate([values[None], values + sd * rng.normal(size=(b, *values.shape))])


@pytest.mark.parametrize("form", FORMS)
def test_a_law_of_each_form_is_found_again(form):
    x, rng = mixes(24), np.random.default_rng(3)
    terms = FORMS[form](x.to_numpy())
    truth = rng.uniform(0.2, 0.6, (terms.shape[1], 4))
    law = fit(x, noisy(terms @ truth, 0), form)
    np.testing.assert_allclose(law.coefficients[0], truth, atol=1e-8)
    new = mixes(50, 9)
    expected = FORMS[form](new.to_numpy()) @ truth
    got = law.predict(new).set_index(["mix", "dimension"]).value
    np.testing.assert_allclose(
        got.drop("Total", level=1).to_numpy().reshape(-1, 4), expected, atol=1e-8
    )
    np.testing.assert_allclose(got.xs("Total", level=1), expected.mean(1), atol=1e-8)


def test_error_of_mixes_left_out_is_that_of_refitting():
    x, kept = mixes(14).to_numpy(), np.random.default_rng(0).random((14, 4))
    for form, terms in FORMS.items():
        errors = []
        for i in range(14):
            rest = np.arange(14) != i
            found = np.linalg.lstsq(terms(x[rest]), kept[rest], rcond=None)[0]
            errors.append(kept[i] - terms(x[[i]])[0] @ found)
        assert left_out_error(form, x, kept) == pytest.approx(np.sqrt(np.mean(np.square(errors))))
    assert left_out_error("pairs", x[:11], kept[:11]) == np.inf


def test_a_straight_truth_is_not_taken_for_a_curved_one():
    x = mixes(16)
    truth = np.array(
        [[0.8, 0.5, 0.4, 0.4], [0.5, 0.7, 0.4, 0.4], [0.3, 0.5, 0.9, 0.5], [0.4, 0.5, 0.5, 0.8]]
    )
    law = fit(x, noisy(x.to_numpy() @ truth, 0.01))
    assert law.errors["linear"] < law.errors["pairs"]
    with pytest.raises(CalibPruneError):
        super_additive(fit(x, noisy(x.to_numpy() @ truth, 0.01), "linear"), EVEN)


def test_intervals_hold_the_truth_and_gains_of_mixing_are_seen():
    truth = lambda x: 0.3 + 0.4 * np.sqrt(x)
    x = pd.DataFrame(np.vstack([simplex(0.5), simplex(0.25)]), columns=DIMENSIONS)
    law = fit(x, noisy(truth(x.to_numpy()), 0.01))
    gains = super_additive(law, EVEN).set_index("dimension")
    assert (gains.ci_low > 0.05).all() and gains.value["Total"] == pytest.approx(
        gains.value[list(DIMENSIONS)].mean()
    )
    found = best_mix(law, dict(worst=1)).set_index("dimension")
    np.testing.assert_allclose(found.share, 0.25, atol=0.051)
    assert ((found.low <= found.share) & (found.share <= found.high)).all()


def test_the_best_mix_serves_the_need():
    x = pd.DataFrame(simplex(0.25), columns=DIMENSIONS)
    law = fit(x, noisy(x.to_numpy() * 0.8 + 0.1, 0.001), "linear")
    assert best_mix(law, dict(Code=1)).set_index("dimension").share.to_dict() == dict(
        General=0, Commonsense=0, Code=1, Math=0
    )
    both = best_mix(law, dict(Code=1, Math=1)).set_index("dimension")
    # a straight law leaves the two alike
    assert both.high["General"] <= 0.06 and both.high["Code"] == both.high["Math"] == 1


def test_any_of_equally_good_mixes_stays_possible():
    """Among 20 mixes that are alike but for noise, none is refused more often than in 5 % of
    studies."""
    rng, kept, studies = np.random.default_rng(0), 0, 200
    for _ in range(studies):
        measured = rng.normal(size=20)
        kept += _may_be_best(
            np.vstack([measured, measured + rng.normal(size=(500, 20))]), np.arange(20)
        )[0]
    assert 0.93 * studies <= kept < studies


def test_a_mix_that_is_worse_beyond_noise_is_refused():
    worth = np.array([0, 1, 1, -9.0]) + np.vstack(
        [np.zeros(4), np.random.default_rng(0).normal(size=(500, 4))]
    )
    assert _may_be_best(worth, np.arange(4)).tolist() == [True, True, True, False]
    assert _may_be_best(worth, np.array([0, 1])).tolist() == [True, True, True, False]


def test_a_grid_of_an_odd_number_of_steps():
    x = mixes(20)
    found = best_mix(
        fit(x, noisy(FORMS["entropy"](x.to_numpy()) @ np.full((8, 4), 0.1)), "entropy"), EVEN, 0.2
    )
    assert (found.low <= found.share).all() and (found.share <= found.high).all()


def test_noise_that_all_mixes_share_is_not_stretched_by_misfit():
    x, rng = mixes(40), np.random.default_rng(0)
    truth = np.repeat(0.3 + 0.3 * np.sqrt(x.to_numpy()[:, [2]]), 4, 1)
    together = 0.05 * rng.normal(size=(500, 1, 4))
    law = fit(
        x,
        np.concatenate([truth[None], truth + together + 0.001 * rng.normal(size=(500, 40, 4))]),
        "linear",
    )
    assert (law.wider > 5).all()
    found = law.predict(EVEN).query("dimension == 'Code'").iloc[0]
    assert found.ci_high - found.ci_low == pytest.approx(2 * 1.96 * 0.05, rel=0.15)


def test_a_misfit_that_dimensions_share_counts_in_their_mean():
    x = mixes(40)
    curve = 0.3 * np.sqrt(x.to_numpy()[:, [2]])
    widths = {}
    for name, signs in {"together": [1, 1, 1, 1], "against": [1, 1, -1, -1]}.items():
        truth = 0.5 + curve * signs
        found = fit(x, noisy(truth, 0.002, b=1000), "linear").predict(EVEN).set_index("dimension")
        widths[name] = (found.ci_high - found.ci_low)[["Code", "Total"]]
    assert widths["together"]["Code"] == pytest.approx(widths["against"]["Code"], rel=0.1)
    assert widths["together"]["Total"] > 3 * widths["against"]["Total"]


def test_intervals_hold_in_studies_with_misfit():
    """The true straight line, where each mix is off it by chance: intervals hold it in 95 % of
    studies, though noise is a third of that."""
    x, hits, studies = mixes(15), 0, 200
    line = x.to_numpy() @ np.full((4, 4), 0.1)
    for seed in range(studies):
        off = 0.003 * np.random.default_rng(seed).normal(size=line.shape)
        law = fit(x, noisy(line + off, 0.001, b=300, seed=seed + studies), "linear")
        found = law.predict(EVEN).query("dimension == 'Math'").iloc[0]
        hits += found.ci_low <= 0.1 <= found.ci_high
    assert 0.91 * studies <= hits < studies


def test_without_noise_one_mix_is_the_best():
    x = mixes(20)
    found = best_mix(
        fit(
            x,
            noisy(FORMS["entropy"](x.to_numpy()) @ np.repeat([[0.5], [-0.2]], 4, 0).repeat(4, 1),
                  0), "entropy"), EVEN, 0.25)
    assert (found.low == found.high).all() and (found.share == 0.25).all()


@settings(max_examples=50)
@given(st.lists(st.integers(0, 10), min_size=4, max_size=4).filter(any))
def test_shares(parts):
    total = sum(parts)
    np.testing.assert_allclose(
        as_shares({d: p / total for d, p in zip(DIMENSIONS, parts)})[0], np.array(parts) / total
    )


def test_the_grid():
    assert len(simplex(0.1)) == 286 and np.allclose(simplex(0.05).sum(1), 1) and (simplex(0.2)
                                                                                  >= 0).all()


@pytest.mark.parametrize("mix, said", [(dict(General=0.5, Code=0.6), "sum to 1"),
                                       (dict(General=1.5, Code=-0.5), "0 or more"),
                                       (dict(Coed=1.0), "'Coed'.*'Code'"),
                                       (dict(General=float("nan"), Code=1.0), "not one")])
def test_mixes_outside_the_simplex_are_refused(mix, said):
    with pytest.raises(CalibPruneError, match=said): as_shares(mix)
    law = fit(mixes(12), noisy(np.full((12, 4), 0.5)), "entropy")
    for ask in (law.predict, lambda o: super_additive(law, o)):
        with pytest.raises(CalibPruneError, match=said): ask(mix)


def test_what_cannot_be_fitted_is_refused():
    x = mixes(12)
    with pytest.raises(CalibPruneError, match="12 mixes"): fit(x, np.zeros((3, 11, 4)))
    with pytest.raises(CalibPruneError, match="5 mixes .* linear"):
        fit(x[:5], np.zeros((3, 5, 4)))
    with pytest.raises(CalibPruneError):
        fit(x, np.full((3, 12, 4), np.nan))
    alone = x.assign(General=x.General + x.Code, Code=0.0)
    alone.loc[0] = dict(General=0, Commonsense=0, Code=1, Math=0)
    assert (
        left_out_error("linear", alone.to_numpy(), np.full((12, 4), 0.5)) == np.inf
    ), "one mix alone has Code"
    with pytest.raises(CalibPruneError, match="'cubic'"): fit(x, np.zeros((3, 12, 4)), "cubic")
    law = fit(x, noisy(np.full((12, 4), 0.5)), "linear")
    with pytest.raises(CalibPruneError, match="'Coed'"): best_mix(law, dict(Coed=1))
    with pytest.raises(CalibPruneError, match="'best'"): best_mix(law, dict(best=1))
    with pytest.raises(CalibPruneError): best_mix(law, dict(Code=0))





@pytest.mark.parametrize("change", [
    dict(form="cubic"),
    dict(coefficients=[[1.0]]),
    dict(covariance=[[0.0]]),
    dict(coefficients=[["a"] * 4] * 8),
    dict(wider=[1.0]),
    dict(wider=[[1.0], 1.0]),
    dict(dimensions=["Math"]),
    dict(covariance=(-np.eye(32)).tolist()),
    dict(covariance=np.full((32, 32), np.nan).tolist()),
    dict(covariance=np.tri(32).tolist()),
    dict(about=1)])
def test_a_damaged_law_is_refused(tmp_path, change):
    path = tmp_path / "law.json"
    path.write_text(json.dumps(json.loads((ROOT / LAW_FILE).read_text()) | change))
    with pytest.raises(CalibPruneError, match="law.json"): fitted_law(path)
    with pytest.raises(CalibPruneError, match="absent.json"):
        fitted_law(tmp_path / "absent.json")
