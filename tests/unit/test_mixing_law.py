"The law of mixtures: shares, forms, predictions with intervals, the best mix, what is refused."
import json

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from calib_prune.core import DIMENSIONS, CalibPruneError
from calib_prune.statistics.mixing_law import (
    CONSTANT,
    DIMENSION_MEAN,
    FORMS,
    LAW_FILE,
    OFFSET,
    _may_be_best,
    as_shares,
    best_mix,
    chosen_form,
    clearly_better,
    fit,
    fitted_law,
    law_text,
    left_out_errors,
    simplex,
    super_additive,
    unpredicted,
)
from tests import ROOT

EVEN = dict.fromkeys(DIMENSIONS, 0.25)


def mixes(n=20, seed=0):
    return pd.DataFrame(np.random.default_rng(seed).dirichlet(np.ones(4), n), columns=DIMENSIONS)


def noisy(values, sd=0.01, b=200, seed=1):
    rng = np.random.default_rng(seed)
    return np.concatenate([values[None], values + sd * rng.normal(size=(b, *values.shape))])


def of_form(form, x, coefficients):
    "[n, 4], exact retention of a law; coefficients [terms, 4]."
    terms = [FORMS[form].terms(x, i) for i in range(4)]
    return np.stack([each @ coefficients[:, i] for i, each in enumerate(terms)], 1)


def own_share(x, slopes):
    "[n, 4], retention that follows the logarithm of the own share."
    return 0.7 + np.array(slopes) * np.log(x + OFFSET)


def studied():
    "Fifteen mixes as in the study: corners, middles of edges, the centre, four points between."
    half, corners = simplex(0.5), np.eye(4)
    return np.vstack([half, np.full((1, 4), 0.25), 0.125 + 0.5 * corners])


@pytest.mark.parametrize("form", FORMS)
def test_a_law_of_each_form_is_found_again(form):
    x, rng = mixes(24), np.random.default_rng(3)
    truth = rng.uniform(0.2, 0.6, (FORMS[form].terms(x.to_numpy(), 0).shape[1], 4))
    law = fit(x, noisy(of_form(form, x.to_numpy(), truth), 0), form)
    for i in range(4): np.testing.assert_allclose(law.coefficients[i][0], truth[:, i], atol=1e-8)
    new = mixes(50, 9)
    expected = of_form(form, new.to_numpy(), truth)
    got = law.predict(new).pivot(index="mix", columns="dimension", values="value")
    if form == CONSTANT:
        assert got.isna().all(axis=None)
        return
    np.testing.assert_allclose(got[list(DIMENSIONS)], expected, atol=1e-8)
    np.testing.assert_allclose(got["Total"], expected.mean(1), atol=1e-8)


def test_errors_of_mixes_left_out_are_those_of_refitting():
    x, kept = mixes(14).to_numpy(), np.random.default_rng(0).random((14, 4))
    for form in FORMS:
        errors = left_out_errors(form, x, kept)
        for i, d in np.ndindex(14, 4):
            terms, rest = FORMS[form].terms(x, d), np.arange(14) != i
            found = np.linalg.lstsq(terms[rest], kept[rest, d], rcond=None)[0]
            assert errors[i, d] == pytest.approx(kept[i, d] - terms[i] @ found)
    assert (left_out_errors("pairs", x[:11], kept[:11]) == np.inf).all()


def test_a_form_with_more_terms_needs_one_standard_error():
    simpler = np.array([1.0, 2, 1, 2])
    squares = np.array([0.5, 3.5, 0.5, 3.5])  # differences of 0.5
    assert clearly_better(np.sqrt(squares), simpler)
    # differences 3, −1, 3, −1 → mean 1, standard error 1.15; then 3, 0, 3, 0: 1.5 and 0.87
    assert not clearly_better(np.sqrt([1.0, 5, 1, 5]), np.full(4, 2.0))
    assert clearly_better(np.sqrt([1.0, 4, 1, 4]), np.full(4, 2.0))
    assert not clearly_better(simpler, simpler) and not clearly_better(simpler, np.sqrt(squares))
    assert not clearly_better(np.full(4, np.inf), simpler)
    errors = dict(constant=np.full(4, 2.0), line=np.full(4, 1.0), curve=np.full(4, 0.5))
    assert chosen_form(errors) == "curve"
    assert chosen_form(errors | dict(curve=np.sqrt([0.0, 1.9, 0.0, 1.9]))) == "line"


def test_a_constant_truth_has_no_prediction_in_most_studies():
    x, studies = pd.DataFrame(studied(), columns=DIMENSIONS), 60
    forms, totals = [], []
    for seed in range(studies):
        measured = 0.7 + 0.02 * np.random.default_rng(seed).normal(size=(15, 4))
        law = fit(x, noisy(measured, 0.01, b=2))
        forms += [law.forms[d] for d in DIMENSIONS]
        totals.append(law.forms["Total"])
    assert forms.count(CONSTANT) > 0.8 * len(forms)
    assert totals.count(CONSTANT) > 0.8 * studies


def test_a_truth_of_the_own_share_has_two_terms():
    x, studies, forms = pd.DataFrame(studied(), columns=DIMENSIONS), 40, []
    for seed in range(studies):
        noise = 0.02 * np.random.default_rng(seed).normal(size=(15, 4))
        law = fit(x, noisy(own_share(x.to_numpy(), [0.05] * 4) + noise, 0.01, b=2))
        forms += [law.forms[d] for d in DIMENSIONS]
        assert law.forms["Total"] == DIMENSION_MEAN
    assert forms.count("own share") > 0.8 * len(forms)


def mixed_law():
    "General and Commonsense are constant, Code and Math follow their own shares."
    x = pd.DataFrame(studied(), columns=DIMENSIONS)
    rng = np.random.default_rng(0)
    law = fit(x, noisy(own_share(x.to_numpy(), [0, 0, 0.08, 0.04])
                       + 0.01 * rng.normal(size=(15, 4)), 0.01, b=500))
    assert [law.forms[d] for d in DIMENSIONS] == [CONSTANT] * 2 + ["own share"] * 2
    return law


def test_there_is_no_prediction_where_a_constant_is_as_good():
    found = mixed_law().predict(mixes(5)).set_index("dimension")
    numbers = ["value", "ci_low", "ci_high"]
    for d in ("General", "Commonsense"):
        assert found.loc[d, numbers].isna().all(axis=None)
        assert (found.loc[d, "form"] == CONSTANT).all()
    for d in ("Code", "Math", "Total"): assert found.loc[d, numbers].notna().all(axis=None)


def test_the_total_has_no_prediction_where_its_error_is_no_smaller_than_the_constants():
    """What Code gains, Math loses: both have predictions, and their sum is constant."""
    x = pd.DataFrame(studied(), columns=DIMENSIONS)
    shape = x.to_numpy() @ np.array([0, 0, 0.2, -0.2])
    truth = 0.6 + np.stack([0 * shape, 0 * shape, shape, -shape], 1)
    law = fit(x, noisy(truth + 0.01 * np.random.default_rng(2).normal(size=(15, 4)), 0.01))
    assert law.forms["Code"] != CONSTANT and law.forms["Math"] != CONSTANT
    assert law.forms["Total"] == CONSTANT
    assert np.isnan(law.predict(EVEN).set_index("dimension").value["Total"])


@pytest.mark.parametrize("need, missing", [
    (dict(General=1), ["General"]),
    (dict(Code=1, Commonsense=0.1), ["Commonsense"]),
    (dict(worst=1), ["General", "Commonsense"]),
    (EVEN, ["General", "Commonsense"])])
def test_a_need_that_rests_on_a_dimension_without_a_prediction_is_refused(need, missing):
    law = mixed_law()
    assert unpredicted(law, need) == missing
    with pytest.raises(CalibPruneError, match=f"{' or '.join(missing)}.*Code, Math"):
        best_mix(law, need, 0.25)


def test_a_need_of_predicted_dimensions_is_answered():
    law = mixed_law()
    # slopes 0.08 and 0.04: the maximum is near two thirds of Code
    found = best_mix(law, dict(Code=1, Math=1, General=0)).set_index("dimension")
    assert found.share["Code"] == pytest.approx(0.65, abs=0.11)
    assert found.share["General"] == 0 == found.share["Commonsense"]


def test_a_gain_of_mixing_needs_a_curved_form():
    gains = super_additive(mixed_law(), EVEN).set_index("dimension")
    assert gains.value[["General", "Commonsense", "Total"]].isna().all()
    assert (gains.ci_low[["Code", "Math"]] > 0).all()
    x = mixes(16)
    with pytest.raises(CalibPruneError):
        super_additive(fit(x, noisy(x.to_numpy(), 0.01), "linear"), EVEN)


def test_intervals_hold_the_truth_and_gains_of_mixing_are_seen():
    truth = lambda x: 0.3 + 0.4 * np.sqrt(x)
    x = pd.DataFrame(np.vstack([simplex(0.5), simplex(0.25)]), columns=DIMENSIONS)
    law = fit(x, noisy(truth(x.to_numpy()), 0.01), "entropy")
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
        fit(x, noisy(of_form("entropy", x.to_numpy(), np.full((8, 4), 0.1))), "entropy"), EVEN, 0.2
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
    coefficients = np.repeat([[0.5], [-0.2]], 4, 0).repeat(4, 1)
    law = fit(x, noisy(of_form("entropy", x.to_numpy(), coefficients), 0), "entropy")
    found = best_mix(law, EVEN, 0.25)
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
    with pytest.raises(CalibPruneError, match="5 mixes .* 'linear'"):
        fit(x[:5], np.zeros((3, 5, 4)), "linear")
    with pytest.raises(CalibPruneError, match="3 mixes .* 'own share'"):
        fit(x[:3], np.zeros((3, 3, 4)))
    with pytest.raises(CalibPruneError):
        fit(x, np.full((3, 12, 4), np.nan))
    alone = x.assign(General=x.General + x.Code, Code=0.0)
    alone.loc[0] = dict(General=0, Commonsense=0, Code=1, Math=0)
    assert (
        left_out_errors("linear", alone.to_numpy(), np.full((12, 4), 0.5)) == np.inf
    ).all(), "one mix alone has Code"
    with pytest.raises(CalibPruneError, match="'cubic'"): fit(x, np.zeros((3, 12, 4)), "cubic")
    law = fit(x, noisy(np.full((12, 4), 0.5)), "linear")
    with pytest.raises(CalibPruneError, match="'Coed'"): best_mix(law, dict(Coed=1))
    with pytest.raises(CalibPruneError, match="'best'"): best_mix(law, dict(best=1))
    with pytest.raises(CalibPruneError): best_mix(law, dict(Code=0))


def test_a_law_comes_back_from_its_file(tmp_path):
    law, path = mixed_law(), tmp_path / "law.json"
    path.write_text(law_text(law, "made up"))
    read, new = fitted_law(path), mixes(10)
    assert read.forms == law.forms and read.about == "made up"
    old, found = law.predict(new), read.predict(new)
    pd.testing.assert_frame_equal(
        old[["mix", "dimension", "form", "value"]], found[["mix", "dimension", "form", "value"]]
    )
    np.testing.assert_allclose(old.ci_low, found.ci_low, atol=0.01)
    for d, errors in law.errors.items(): assert read.errors[d] == pytest.approx(errors)


def test_a_law_of_an_older_version_is_refused_by_name(tmp_path):
    path = tmp_path / "law.json"
    older = dict(about="", form="entropy", dimensions=["Math"], coefficients=[[0.0] * 4] * 8)
    path.write_text(json.dumps(older))
    with pytest.raises(CalibPruneError, match="law.json.*version 1.*version 2"): fitted_law(path)
    path.write_text(json.dumps(older | dict(version=3)))
    with pytest.raises(CalibPruneError, match="version 3"): fitted_law(path)


PACKAGED = json.loads((ROOT / LAW_FILE).read_text())
SIZE = len(PACKAGED["covariance"])


@pytest.mark.parametrize("change", [
    dict(forms=PACKAGED["forms"] | dict(Code="cubic")),
    dict(forms=PACKAGED["forms"] | dict(Total="entropy")),
    dict(forms=dict(Math=CONSTANT)),
    dict(coefficients=PACKAGED["coefficients"] | dict(Code=[1.0])),
    dict(coefficients=PACKAGED["coefficients"] | dict(Code=["a", "b"])),
    dict(coefficients=dict(Math=[0.5, 0.5])),
    dict(covariance=[[0.0]]),
    dict(wider=[1.0]),
    dict(wider=[[1.0], 1.0]),
    dict(covariance=(-np.eye(SIZE)).tolist()),
    dict(covariance=np.full((SIZE, SIZE), np.nan).tolist()),
    dict(covariance=np.tri(SIZE).tolist()),
    dict(about=1)])
def test_a_damaged_law_is_refused(tmp_path, change):
    path = tmp_path / "law.json"
    path.write_text(json.dumps(PACKAGED | change))
    with pytest.raises(CalibPruneError, match="law.json"): fitted_law(path)
    with pytest.raises(CalibPruneError, match="absent.json"):
        fitted_law(tmp_path / "absent.json")
