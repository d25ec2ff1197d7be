"Which measure can tell: reliability, chance, the headline, and the prompt gain."
from dataclasses import asdict

import numpy as np
import pandas as pd
import pytest

from calib_prune.calibration.sources import SUITE
from calib_prune.core import DIMENSIONS
from calib_prune.evaluation.measures import MEASURES
from calib_prune.evaluation.tasks import TASKS
from calib_prune.questions.prompt_gain import gain_figure, gain_lines, prompt_gain_rows
from calib_prune.questions.resolution import (
    chance_rows,
    headline_of,
    measured_study,
    resolution_rows,
    resolution_text,
    task_rows,
    task_text,
    totals_rows,
    totals_text,
    untotalled_text,
)
from calib_prune.resampling import draws
from calib_prune.statistics import replicates
from calib_prune.statistics.examples import example_preset, example_study
from calib_prune.statistics.replicates import _task_prompt_gain, bootstrap_retention
from calib_prune.statistics.selection import bootstrap_study, select_cells
from calib_prune.study.presets import Cell, grid_cells
from calib_prune.study.results import Result

CHANCE = dict(sciq=0.25, piqa=0.5, basic_skills_arithmetic=0.1)


def with_bits(study):
    "The made-up study with what every measure needs: a right answer costs 2 bits, a wrong one 4."
    for o in study.values():
        right = o.items[o.items.metric != "bits"]
        o.items = pd.concat([
            o.items.assign(chance=o.items.task.map(CHANCE)),
            right.assign(metric="bits", value=4 - 2 * right.value, bytes=2, chance=np.nan)],
                            ignore_index=True)
    return study


def fifteen(spread, at=0.7, n=300, seeds=(0, 1), seed=0):
    rng = np.random.default_rng(seed)
    kept = {o: np.clip(at + spread * rng.normal(size=4), 0.05, 1) for o in SUITE}
    study = with_bits(example_study(kept, seeds=seeds, n=n, seed=seed))
    return example_preset(study) | dict(calibration=dict(windows=32, length=512)), study


def test_reliability_is_high_where_sources_differ_and_low_where_they_do_not():
    wide, flat = (
        resolution_rows(*fifteen(o), 200).set_index(["measure", "dimension"]) for o in (0.15, 0.0)
    )
    assert (wide.reliability.loc[["plain", "answer-bits"]] > 0.8).all() and wide.can_tell.loc[
        "plain"
    ].all()
    assert (flat.reliability.dropna() < 0.5).all() and not flat.can_tell.any()
    assert (wide.sources == 15).sum() == 11
    assert not wide.can_tell["above-chance", "Code"]  # HumanEval by bits only
    o = wide.loc["plain", "General"]
    assert (
        o.reliability == pytest.approx(o.sd**2 / (o.sd**2 + o.noise_sd**2))
        and abs(o.sd - 0.15) < 0.06
    )


def test_models_at_chance_take_the_voice_of_accuracies_but_not_of_bits():
    preset, study = fifteen(0.02, at=0.5, n=4000)  # PIQA at chance, and yet the sources differ
    rows = resolution_rows(preset, study, 100).set_index(["measure", "dimension"])
    assert (
        rows.at_chance["plain", "Commonsense"] > 0.5
        and rows.reliability["plain", "Commonsense"] > 0.5
    )
    assert not rows.can_tell["plain", "Commonsense"] and rows.can_tell["answer-bits", "Commonsense"]
    shares = chance_rows(study, [o for o in study if o != "dense"])
    assert len(shares) == 30 * 3 and not shares[shares.dimension == "Math"].at_chance.any()


@pytest.mark.parametrize("measure", MEASURES.values(), ids=lambda o: o.name)
def test_replicates_do_not_depend_on_how_many_are_made_at_a_time(measure, monkeypatch):
    _, study = fifteen(0.15, n=12)
    items = study["dense"].items
    # then the dense model is not far above chance
    few = (items.task == "sciq") & (items.metric != "bits") & (items.item > "0004")
    study["dense"].items = items.assign(value=items.value.where(~few, 0.0))
    at_once = bootstrap_retention(study, 60, measure=measure).values
    monkeypatch.setattr(replicates, "BLOCK", 7)
    np.testing.assert_allclose(
        bootstrap_retention(study, 60, measure=measure).values, at_once, rtol=1e-12
    )
    assert np.isnan(at_once[1:, :, DIMENSIONS.index("General")]).any() == (
        measure.name == "above-chance"
    )


def test_part_of_a_study_has_the_numbers_of_the_whole():
    study = with_bits(
        example_study({o: (0.5, 0.7, 0.6, 0.4) for o in list(SUITE)[:3]}, ("sparsegpt", "wanda"),
                      (0.5, 0.6), (0, 1),
                      n=40,
                      draw_sd=0.05))
    preset = example_preset(study)
    planned = grid_cells(preset)
    low = [c for c in planned if c.sparsity == 0.5]
    for wanted in (planned[:1], [c for c in low if c.method == "wanda"]):
        every, some = bootstrap_study(preset, study, 50), bootstrap_study(
            preset, study, 50, wanted=wanted
        )
        assert 1 < len(some.study) < len(study) and len(some.study) - 1 == len(some.cells.cells)
        one, two = (select_cells(o, wanted) for o in (every, some))
        assert len(one.replicates.cells) and one.study.keys() == two.study.keys()
        pd.testing.assert_frame_equal(one.replicates.cells, two.replicates.cells)
        # sums in another order
        np.testing.assert_allclose(one.replicates.values, two.replicates.values, rtol=1e-12)


def test_the_headline_follows():
    preset, study = fifteen(0.15)
    rows = resolution_rows(preset, study, 100)
    by = rows.groupby("measure").can_tell.sum()
    names = ("above-chance", "answer-bits", "plain")
    assert headline_of(rows).name == max(names, key=lambda o: by[o])
    assert measured_study(preset, study, 20).replicates.measure.name == "plain"
    assert measured_study(
        preset | dict(measure="headline"), study, 20
    ).replicates.measure == headline_of(rows)
    assert (
        measured_study(preset | dict(measure="answer-bits"), study, 20).replicates.measure.name
        == "answer-bits"
    )


def test_one_draw_per_source_cannot_tell():
    rows = resolution_rows(*fifteen(0.15, seeds=(0,)), 100)
    assert not rows.can_tell.any() and rows.note.str.contains("one draw").any() and headline_of(
        rows).name == "answer-bits"


def test_rows_that_lack_a_measure_say_so():
    preset, study = fifteen(0.15)
    for o in study.values(): o.items = o.items.drop(columns="chance")
    rows = resolution_rows(preset, study, 50)
    assert set(rows[rows.measure == "above-chance"].note) == {
        rows[rows.measure == "above-chance"].note.iloc[0]
    }
    assert "what guessing gets" in rows[rows.measure == "above-chance"].note.iloc[0]
    plain = rows[rows.measure == "plain"].set_index("dimension")
    assert not plain.can_tell["Commonsense"] and "guessing" in plain.note[
        "Commonsense"] and plain.can_tell["Code"], "Code is in bits"
    assert set(totals_rows(preset, study, 20).measure) == {"plain", "answer-bits"}
    assert resolution_rows(preset, {"dense": study["dense"]}, 20).can_tell.sum() == 0


def test_tables():
    preset, study = fifteen(0.15, seeds=(0,), n=60)
    text = resolution_text(resolution_rows(preset, study, 50))
    assert list(text.columns) == ["measure", *DIMENSIONS] and list(text["measure"]) == [
        o.label for o in MEASURES.values()
    ]
    assert text["General"].str.fullmatch(r"\d\.\d\d (yes|no)").all()
    resolved = resolution_rows(preset, study, 50)
    judged, totals = resolved.assign(note=""), totals_rows(preset, study, 20)
    assert [
        o
        for o in totals_text(totals, judged.assign(can_tell=judged.measure != "plain"))
        if "†" in o
    ] == ["Plain ratio †"]
    for none in (judged.assign(can_tell=True), resolved.assign(can_tell=False, note="one draw")):
        shown = totals_text(totals, none)
        assert len(shown) == 15 and not [
            o for o in shown if "†" in o
        ], "what was not judged is not marked"


def test_a_task_that_no_source_moves_does_not_resolve():
    preset, study = fifteen(0.15, n=400)
    rng = np.random.default_rng(0)
    for o in study.values():
        flat = (o.items["task"] == "sciq") & (o.items["metric"] == "bits")
        o.items.loc[flat, "value"] = 20 + rng.normal(size=flat.sum())
    found = task_rows(preset, study).set_index("task")
    by_dimension = resolution_rows(
        preset, study, 1000).query("measure == 'answer-bits'").set_index("dimension").reliability
    assert found.reliability["sciq"] < 0.5 and (found.reliability.drop("sciq") > 0.8).all()
    alone = found[found.dimension != "General"]
    assert np.allclose(
        alone.reliability, by_dimension[alone.dimension], atol=0.02
    ), "one task per dimension here"
    assert task_text(found.reset_index()).set_index("task").reliability["sciq"].endswith(" no")
    assert task_rows(preset, {"dense": study["dense"]}).empty and task_rows(preset, {}).empty
    one = fifteen(0.15, seeds=(0,), n=60)
    assert (
        task_text(task_rows(*one))["reliability"].str.fullmatch(r"\d\.\d\d").all()
    ), "one draw per source judges nothing"
    for o in study.values(): o.items = o.items[o.items.metric != "bits"]
    assert task_rows(preset, study).empty


def test_a_measure_without_a_total_says_why():
    preset, study = fifteen(0.15, seeds=(0,), n=60)
    items = study["dense"].items
    guessed = (items["task"] == "piqa") & (items["metric"] == "acc_norm")
    study["dense"].items = items.assign(
        value=items["value"].where(~guessed, items.groupby("task").cumcount() % 2)
    )
    totals = totals_rows(preset, study, 20)  # the code task has no choices at all
    resolved = resolution_rows(preset, study, 50).assign(can_tell=True, note="")
    assert (
        untotalled_text(totals, resolved)
        == "Above chance has no total here, since it has no number for Commonsense and Code."
    )
    blind = resolved.assign(can_tell=(resolved.measure != "plain") | (resolved.dimension != "Code"))
    assert untotalled_text(totals, blind).endswith(
        "† The total with plain ratio includes dimensions in which it does not discriminate: Code."
    )
    assert untotalled_text(totals[totals.measure == "above-chance"],
                           resolved).count("no number for General") == 2, "the other two measures"


# --- prompt gain


def swapped(gain, seed=0, n=12):
    rng, rows = np.random.default_rng(seed), []
    for task in ("jeopardy", "triviaqa", "mbpp"):
        other = rng.uniform(10, 30, n)
        about = dict(task=task, dimension=TASKS[task].dimension, bytes=5, chance=np.nan)
        for metric, bits in (("bits", other * (1 - gain)), ("swapped_bits", other[: n // 2])):
            rows += [dict(about, item=str(i), metric=metric, value=v) for i, v in enumerate(bits)]
    return pd.DataFrame(rows)


def made_up():
    found = {"dense": Result(asdict(Cell("dense")), pd.DataFrame(), swapped(0.4), {})}
    for seed, gain in ((0, 0.1), (1, 0.3)):
        cell = Cell("uniform", "uniform", "sparsegpt", 0.6, seed, 32)
        found[cell.name] = Result(asdict(cell), pd.DataFrame(), swapped(gain, seed), {})
    return found


def test_prompt_gains_are_shares_of_the_same_items():
    rows = prompt_gain_rows(made_up(), 200).set_index(["strategy", "dimension"])
    assert (
        rows.value["dense", "General"] == pytest.approx(0.4)
        and rows.n_items["dense", "General"] == 12
    )
    assert (
        rows.value["uniform", "Code"] == pytest.approx(0.2) and rows.draws["uniform", "Code"] == 2
    )
    assert rows.ci_low["dense", "Code"] == pytest.approx(0.4)  # every item has the same share
    assert set(rows.index.get_level_values(1)) == {"General", "Code"}
    assert gain_lines(prompt_gain_rows(made_up(), 50)).loc[1, "Code"].startswith("20 [")


def test_prompt_gain_figure_and_rows_without():
    figure = gain_figure(prompt_gain_rows(made_up(), 50), ["c4", "uniform"])
    assert (
        len(figure.axes) == 1
        and "below the dense model's in 2 of 2 dimensions" in figure.get_suptitle()
    )
    bare = {
        k: Result(o.record, o.rows, o.items[o.items.metric == "bits"], {})
        for k, o in made_up().items()
    }
    assert prompt_gain_rows(bare, 50).empty and gain_lines(prompt_gain_rows(bare, 50)).empty


def test_few_items_do_not_make_prompt_gains_surer_than_they_are():
    """With the other prompt's bits all the same, the gain is 1 less a mean, whose variance is
    known: sample variance / n."""
    own = np.random.default_rng(0).uniform(2, 6, (4, 1))
    replicates = _task_prompt_gain(draws(4, 40_000, 0, "x"), own, np.full((4, 1), 10.0))
    assert replicates[0, 0] == pytest.approx(1 - own.mean() / 10)
    assert replicates[1:, 0].std() == pytest.approx((own / 10).std(ddof=1) / 2, rel=0.02)
    assert np.isfinite(_task_prompt_gain(draws(1, 9, 0, "x"), own[:1], own[:1])).all()
