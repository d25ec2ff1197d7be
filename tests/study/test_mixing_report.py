"The mixing law on the rows of a study."
import numpy as np
import pytest

from calib_prune.calibration.sources import SOURCES
from calib_prune.core import DIMENSIONS, CalibPruneError
from calib_prune.questions.mixing import (
    best_rows,
    best_text,
    errors,
    form_rows,
    form_table,
    gain_note,
    law_figure,
    law_of,
    mix_rows,
    mixes_of,
    mixing_gain,
    shares_of,
)
from calib_prune.statistics.examples import example_preset, example_study
from calib_prune.statistics.mixing_law import CONSTANT, DIMENSION_MEAN
from calib_prune.statistics.selection import bootstrap_study
from calib_prune.study.presets import load_preset

ONE = {d: next(k for k, o in SOURCES.items() if o.dimension == d) for d in DIMENSIONS}


def study_of(truth, n=18, unseen=4, seed=0):
    rng = np.random.default_rng(seed)
    mixes = {
        f"{'unseen-' if i >= n - unseen else ''}{i}": rng.multinomial(28, np.full(4, 0.25)) + 1
        for i in range(n)
    }
    kept = {k: truth(x / 32) for k, x in mixes.items()}
    study = example_study(kept, seeds=(0, 1), n=2000)
    preset = example_preset(study)
    preset["strategies"] = {
        k: ",".join(f"{ONE[d]}={v}" for d, v in zip(DIMENSIONS, x)) for k, x in mixes.items()
    }
    return preset, bootstrap_study(preset, study, 60).replicates, mixes


def test_shares_are_of_whole_windows():
    assert shares_of("c4=1,math=1", 32) == dict(General=0.5, Commonsense=0, Code=0, Math=0.5)
    assert (
        sum(shares_of("uniform", 32).values()) == pytest.approx(1)
        and shares_of("uniform", 32)["General"] != 5 / 15
    )
    preset, found, mixes = study_of(lambda x: 0.3 + 0.5 * x)
    table = mixes_of(preset, found).set_index("strategy")
    for name, x in mixes.items():
        np.testing.assert_allclose(table.loc[name, list(DIMENSIONS)].astype(float), x / 32)
    with pytest.raises(CalibPruneError): shares_of("nowhere.txt", 32)


def test_unseen_mixes_have_no_part_in_the_fit():
    preset, found, _ = study_of(lambda x: 0.3 + 0.5 * x)
    law = law_of(preset, found)
    changed = found.values.copy()
    changed[:, mixes_of(preset, found)["unseen"].to_numpy()] = 0.9
    from dataclasses import replace
    other = law_of(preset, replace(found, values=changed))
    for mine, same in zip(law.coefficients, other.coefficients):
        np.testing.assert_array_equal(mine, same)
    assert law.errors == other.errors and law.forms == other.forms


def test_a_true_law_predicts_and_a_wrong_one_does_not():
    preset, found, _ = study_of(lambda x: 0.3 + 0.5 * x)
    rows = mix_rows(preset, found, law_of(preset, found))
    good = errors(rows).set_index("dimension")
    assert (good.unseen[list(DIMENSIONS)] < 0.5).all() and (good.n == 4).all()
    assert good.spread["Code"] > 1
    assert np.isnan(good.unseen["Total"]), "four linear laws with one slope: the sum is constant"
    code = rows[rows["dimension"] == "Code"]
    known = code[~code["unseen"]]["value"].mean()
    assert good.constant["Code"] == pytest.approx(
        100 * np.sqrt(((code[code["unseen"]]["value"] - known) ** 2).mean())
    )
    assert (
        good.constant >= good.spread - 1e-9
    ).all(), "the mean of the unseen mixes is their best constant"
    rng = np.random.default_rng(7)
    preset, found, _ = study_of(lambda x: 0.3 + 0.4 * rng.random(4))
    law = law_of(preset, found, "entropy")
    bad = errors(mix_rows(preset, found, law)).set_index("dimension").loc[list(DIMENSIONS)]
    assert bad.unseen.mean() > bad.spread.mean() * 0.8


def half_known(x):
    "General and Commonsense do not depend on the mix; Code and Math follow their own shares."
    return 0.7 + np.array([0, 0, 0.08, 0.08]) * np.log(x + 1 / 32)


def test_words_and_pictures():
    preset, found, _ = study_of(half_known)
    law = law_of(preset, found)
    assert "not all" in gain_note(mixing_gain(preset, found))
    figure = law_figure(mix_rows(preset, found, law))
    assert len(figure.axes) == 4
    assert figure.get_suptitle().startswith("The mixing law predicts Code and Math better")


def test_no_prediction_is_drawn_where_a_constant_is_as_good():
    preset, found, _ = study_of(half_known)
    rows = mix_rows(preset, found, law_of(preset, found))
    assert set(rows[rows.predicted.isna()].dimension) == {"General", "Commonsense"}
    for ax, d in zip(law_figure(rows).axes, DIMENSIONS):
        said = any("no prediction" in text.get_text() for text in ax.texts)
        bars = len(ax.collections)  # of the predictions' intervals
        assert (said, bars) == ((True, 0) if d in ("General", "Commonsense") else (False, 2)), d
    wrong = errors(rows).set_index("dimension")
    assert wrong.unseen[["General", "Commonsense"]].isna().all()
    assert wrong.constant.notna().all() and wrong.unseen[["Code", "Math"]].notna().all()


def test_needs_without_a_prediction_have_no_best_mix():
    preset, found, _ = study_of(half_known)
    best = best_rows(law_of(preset, found))
    answered = best[best.share.notna()]
    assert set(answered.need) == {"Code and Math"} and (answered.unpredicted == "").all()
    text = best_text(best).set_index("need")
    assert text.loc["the worst dimension", "not predicted"] == "General, Commonsense"
    assert text.loc["the worst dimension", "Code"] == "–"
    assert text.loc["Code and Math", "not predicted"] == "–"


def test_the_errors_of_the_candidate_forms():
    preset, found, _ = study_of(half_known)
    law = law_of(preset, found)
    rows = form_rows(preset, found, law)
    chosen = rows[rows.chosen].set_index("dimension").form.to_dict()
    assert chosen == law.forms and chosen["Code"] == "own share" and chosen["General"] == CONSTANT
    known = errors(mix_rows(preset, found, law)).set_index("dimension")
    taken = rows[rows.chosen].set_index("dimension").unseen
    np.testing.assert_allclose(taken[["Code", "Math", "Total"]],
                               known.unseen[["Code", "Math", "Total"]])
    # the constant form is the mean of the fitted mixes
    constant = rows[rows.form == CONSTANT].set_index("dimension").unseen
    np.testing.assert_allclose(constant, known.constant[constant.index], atol=1e-9)
    text = form_table(rows).set_index("dimension")
    assert text.loc["Code", "own share"].endswith("*")
    assert not text.loc["Code", CONSTANT].endswith("*")
    assert text.loc["Code", DIMENSION_MEAN] == "–"


def test_the_preset_of_mixes_spans_the_simplex():
    preset = load_preset("presets/mixing/smollm2-135m.yaml")
    shares = np.array([
        list(shares_of(o, 32).values()) for k, o in preset["strategies"].items()
        if not k.startswith("unseen")])
    unseen = [k for k in preset["strategies"] if k.startswith("unseen")]
    assert shares.shape == (15, 4) and len(unseen) == 5 and (shares.max(0) == 1).all()
    for k, o in preset["strategies"].items():
        nominal = [int(part[1]) / 8 for part in k.split("-")[1:]]
        np.testing.assert_allclose(list(shares_of(o, 32).values()), nominal, atol=0.08)


def test_the_gain_of_mixing_is_measured():
    kept = {
        "g": (0.8, 0.4, 0.3, 0.3), "c": (0.5, 0.7, 0.3, 0.3), "p": (0.3, 0.4, 0.9, 0.4),
        "m": (0.3, 0.4, 0.4, 0.8), "even": (0.7, ) * 4, "near": (0.1, ) * 4}
    study = example_study(kept, seeds=(0, 1), n=2000)
    preset = example_preset(study)
    mixes = {"g": "General", "c": "Commonsense", "p": "Code", "m": "Math"}
    preset["strategies"] = {k: ONE[d] for k, d in mixes.items()} | dict(
        even=",".join(f"{o}=8" for o in ONE.values()),
        near=",".join(f"{o}={n}" for o, n in zip(ONE.values(), (11, 7, 7, 7))),
    )
    replicates = bootstrap_study(preset, study, 60).replicates
    gains = mixing_gain(preset, replicates).set_index("dimension")
    expected = 0.7 - np.mean([kept[k] for k in mixes], axis=0)
    np.testing.assert_allclose(gains.value[list(DIMENSIONS)], expected, atol=1e-3)
    assert gains.value["Total"] == pytest.approx(expected.mean(), abs=1e-3)


def test_the_gain_of_mixing_weighs_the_kinds_by_their_shares():
    kept = {
        "g": (0.8, 0.4, 0.3, 0.3), "g2": (0.6, 0.4, 0.3, 0.3), "c": (0.5, 0.7, 0.3, 0.3),
        "p": (0.3, 0.4, 0.9, 0.4), "m": (0.3, 0.4, 0.4, 0.8), "even": (0.7, ) * 4}
    study = example_study(kept, seeds=(0, 1), n=2000)
    preset = example_preset(study)
    shares = (6, 8, 9, 9)
    preset["strategies"] = dict(zip(("g", "c", "p", "m"), ONE.values())) | dict(
        g2=ONE["General"], even=",".join(f"{o}={n}" for o, n in zip(ONE.values(), shares)))
    replicates = bootstrap_study(preset, study, 60).replicates
    gains = mixing_gain(preset, replicates).set_index("dimension")
    alone = np.array([np.mean([kept["g"], kept["g2"]], axis=0), *(kept[o] for o in "cpm")])
    np.testing.assert_allclose(
        gains.value[list(DIMENSIONS)], 0.7 - np.array(shares) / 32 @ alone, atol=1e-3
    )
    preset["strategies"]["c"] = ONE["General"]
    assert not len(
        mixing_gain(preset, bootstrap_study(preset, study, 60).replicates)
    ), "three kinds are no four, however many mixes there are"
