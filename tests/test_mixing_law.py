"The law of mixtures: shares, forms, predictions with intervals, the best mix, what is refused."
import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from calib_prune.core import DIMENSIONS, CalibPruneError
from calib_prune.study.mixing_law import FORMS, as_shares, best_mix, fit, left_out_error, simplex, super_additive

EVEN = dict.fromkeys(DIMENSIONS, 0.25)


def mixes(n=20, seed=0): return pd.DataFrame(np.random.default_rng(seed).dirichlet(np.ones(4), n), columns=DIMENSIONS)


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
    np.testing.assert_allclose(got.drop("Total", level=1).to_numpy().reshape(-1, 4), expected, atol=1e-8)
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
    truth = np.array([[0.8, 0.5, 0.4, 0.4], [0.5, 0.7, 0.4, 0.4], [0.3, 0.5, 0.9, 0.5], [0.4, 0.5, 0.5, 0.8]])
    law = fit(x, noisy(x.to_numpy() @ truth, 0.01))
    assert law.errors["linear"] < law.errors["pairs"]
    with pytest.raises(CalibPruneError, match="whatever was measured"): super_additive(fit(x, noisy(x.to_numpy() @ truth, 0.01), "linear"), EVEN)


def test_intervals_hold_the_truth_and_gains_of_mixing_are_seen():
    truth = lambda x: 0.3 + 0.4 * np.sqrt(x)
    x = pd.DataFrame(np.vstack([simplex(0.5), simplex(0.25)]), columns=DIMENSIONS)
    law = fit(x, noisy(truth(x.to_numpy()), 0.01))
    gains = super_additive(law, EVEN).set_index("dimension")
    assert (gains.ci_low > 0.05).all() and gains.value["Total"] == pytest.approx(gains.value[list(DIMENSIONS)].mean())
    found = best_mix(law, dict(worst=1)).set_index("dimension")
    np.testing.assert_allclose(found.share, 0.25, atol=0.051)
    assert ((found.low <= found.share) & (found.share <= found.high)).all()


def test_the_best_mix_serves_the_need():
    x = pd.DataFrame(simplex(0.25), columns=DIMENSIONS)
    law = fit(x, noisy(x.to_numpy() * 0.8 + 0.1, 0.001), "linear")
    assert best_mix(law, dict(Code=1)).set_index("dimension").share.to_dict() == dict(General=0, Commonsense=0, Code=1, Math=0)
    both = best_mix(law, dict(Code=1, Math=1)).set_index("dimension")
    assert both.high["General"] <= 0.06 and both.high["Code"] == both.high["Math"] == 1  # a straight law leaves the two alike


@pytest.mark.parametrize("step", [0.25, 0.2])
def test_the_best_mix_is_among_those_that_may_be_best(step):
    x, rng, hits, studies = mixes(20), np.random.default_rng(0), 0, 200
    terms = FORMS["entropy"](x.to_numpy())
    truth = np.vstack([rng.uniform(0.5, 0.6, (4, 4)), rng.uniform(-0.1, 0, (4, 4))])  # nearly flat: noise decides which looks best
    grid = simplex(step)
    best = grid[(FORMS["entropy"](grid) @ truth).mean(1).argmax()]
    for seed in range(studies):
        measured = terms @ truth + 0.01 * np.random.default_rng(seed).normal(size=(20, 4))
        found = best_mix(fit(x, noisy(measured, b=300, seed=seed + studies), "entropy"), EVEN, step)
        hits += ((found.low <= best) & (best <= found.high)).all()
    assert hits >= 0.93 * studies


def test_intervals_hold_what_a_law_of_the_wrong_form_misses():
    x, new = mixes(40), mixes(200, 5)
    def truth(o): return np.repeat(0.3 + 0.3 * np.sqrt(o.to_numpy()[:, [2]]), 4, 1)  # curved, and the law is straight
    wrong, right = (fit(x, noisy(o, 0.002, b=1000), "linear") for o in (truth(x), x.to_numpy() @ np.full((4, 4), 0.5)))
    assert (wrong.misfit > 3).all() and (right.misfit < 1.5).all()
    got = wrong.predict(new).query("dimension == 'Code'")
    narrow = (got.ci_high - got.ci_low) / wrong.misfit[2] / 2
    off = (got.value - truth(new)[:, 2]).abs()
    assert (off > narrow).mean() > 0.8, "noise alone says little of it"
    assert (off > wrong.misfit[2] * narrow).mean() < (off > narrow).mean() - 0.2


def test_without_noise_one_mix_is_the_best():
    x = mixes(20)
    found = best_mix(fit(x, noisy(FORMS["entropy"](x.to_numpy()) @ np.repeat([[0.5], [-0.2]], 4, 0).repeat(4, 1), 0), "entropy"), EVEN, 0.25)
    assert (found.low == found.high).all() and (found.share == 0.25).all()


@settings(max_examples=50)
@given(st.lists(st.integers(0, 10), min_size=4, max_size=4).filter(any))
def test_shares(parts):
    total = sum(parts)
    np.testing.assert_allclose(as_shares({d: p / total for d, p in zip(DIMENSIONS, parts)})[0], np.array(parts) / total)


def test_the_grid():
    assert len(simplex(0.1)) == 286 and np.allclose(simplex(0.05).sum(1), 1) and (simplex(0.2) >= 0).all()


@pytest.mark.parametrize("mix, said", [
    (dict(General=0.5, Code=0.6), "sum to 1"), (dict(General=1.5, Code=-0.5), "0 or more"), (dict(Coed=1.0), "'Coed'.*'Code'"),
    (dict(General=float("nan"), Code=1.0), "not one")])
def test_mixes_outside_the_simplex_are_refused(mix, said):
    with pytest.raises(CalibPruneError, match=said): as_shares(mix)
    law = fit(mixes(12), noisy(np.full((12, 4), 0.5)), "entropy")
    for ask in (law.predict, lambda o: super_additive(law, o)):
        with pytest.raises(CalibPruneError, match=said): ask(mix)


def test_what_cannot_be_fitted_is_refused():
    x = mixes(12)
    with pytest.raises(CalibPruneError, match="12 mixes need"): fit(x, np.zeros((3, 11, 4)))
    with pytest.raises(CalibPruneError, match="5 mixes are too few for the form linear"): fit(x[:5], np.zeros((3, 5, 4)))
    with pytest.raises(CalibPruneError, match="every dimension for every mix"): fit(x, np.full((3, 12, 4), np.nan))
    alone = x.assign(General=x.General + x.Code, Code=0.0)
    alone.loc[0] = dict(General=0, Commonsense=0, Code=1, Math=0)
    assert left_out_error("linear", alone.to_numpy(), np.full((12, 4), 0.5)) == np.inf, "one mix alone has Code"
    with pytest.raises(CalibPruneError, match="'cubic'"): fit(x, np.zeros((3, 12, 4)), "cubic")
    law = fit(x, noisy(np.full((12, 4), 0.5)), "linear")
    with pytest.raises(CalibPruneError, match="'Coed'"): best_mix(law, dict(Coed=1))
    with pytest.raises(CalibPruneError, match="'best'"): best_mix(law, dict(best=1))
    with pytest.raises(CalibPruneError, match="at least one dimension"): best_mix(law, dict(Code=0))
