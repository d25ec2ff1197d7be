"Recipes: leads that hold at once, verdicts, and what the presets of the question `recipe` promise."

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest

from calib_prune.calibration.sets import allocate, parse_mix
from calib_prune.core import DIMENSIONS
from calib_prune.evaluation.measures import ANSWER_BITS
from calib_prune.questions.mixing import ALIKE, law_of, shares_of
from calib_prune.questions.recipe import (
    all_leads,
    families,
    holds,
    known_recipes,
    lead_rows,
    lead_text,
    recipe_figure,
    recipe_message,
    recipe_rows,
    recipe_text,
    recipe_times,
    recipe_verdict,
    target_rows,
    target_text,
    target_verdicts,
    without_shared,
)
from calib_prune.statistics.examples import example_preset, example_study
from calib_prune.statistics.mixing_law import best_mix
from calib_prune.statistics.selection import bootstrap_study, grid_part
from calib_prune.study.presets import load_preset
from calib_prune.study.results import Result, load_study
from calib_prune.study.tuning import mix_of_shares
from tests import ROOT

RECIPE, REFERENCES = ("half-code", "admm"), ("uniform", "igsp")


def made_up(more, gain=0.05, sd=0.003, seed=1):
    study = {}
    for method, plus in (("sparsegpt", 0.0), ("admm", gain)):
        kept = {k: tuple(0.55 + 0.05 * d + v + plus for d in range(4)) for k, v in more.items()}
        study |= example_study(kept, (method,), seeds=(0, 1, 2), n=1000, draw_sd=sd, seed=seed)
    return bootstrap_study(example_preset(study), study, 500).replicates


def said_of(found, recipe=RECIPE):
    return recipe_verdict(recipe, leads_of(found, recipe), families(recipe, REFERENCES))


def leads_of(found, recipe=RECIPE):
    return {k: lead_rows(found, o) for k, o in families(recipe, REFERENCES).items()}


TEXTS = dict(strategies={
    "uniform": "uniform", "igsp": "generated:igsp", "half-code": "c4=1,codeio=3"})
GOOD = made_up({"uniform": 0.04, "igsp": 0.0, "half-code": 0.12})


def test_a_lead_is_a_paired_difference():
    rows = leads_of(GOOD)["what the text adds"].set_index(["over", "goal"])
    ours, theirs = GOOD.of("half-code", method="admm"), GOOD.of("igsp", method="admm")
    assert rows.value["igsp, L-ADMM", "Total"] == pytest.approx(ours[0, 4] - theirs[0, 4])
    np.testing.assert_allclose(
        rows.loc[("igsp, L-ADMM", "Total"), ["ci_low", "ci_high"]].astype(float),
        np.quantile((ours - theirs)[1:, 4], [0.025, 0.975]),
    )
    assert len(rows) == 4 and (rows.all_low <= rows.ci_low).all() and (rows.all_high
                                                                       >= rows.ci_high).all()


def test_better_is_said_of_what_is_better_alone():
    assert all(map(holds, leads_of(GOOD).values())) and said_of(GOOD).endswith(
        "better than all references."
    )
    alike = made_up({"uniform": 0.12, "igsp": 0.0, "half-code": 0.12})
    same, said = leads_of(alike), said_of(alike)
    assert holds(same["compared with today's use"]) and not holds(same["what the text adds"])
    assert "what the text adds" in said and "over uniform, L-ADMM" in said and "igsp" not in said


def test_a_lead_within_noise_is_none():
    noisy = made_up({"uniform": 0.04, "igsp": 0.0, "half-code": 0.05}, gain=0.0, sd=0.05)
    assert "is not better everywhere" in said_of(noisy)


def test_what_has_not_been_run_decides_nothing():
    missing = ("half-code", "alps")
    found = leads_of(GOOD, missing)
    assert not any(map(len, found.values())) and not holds(found["what the text adds"])
    one_less = GOOD.rows(~((GOOD.cells.strategy == "igsp") & (GOOD.cells.method == "admm")))
    for study, recipe in ((GOOD, missing), (one_less, RECIPE),
                          (one_less.rows(one_less.cells.strategy != "igsp"), RECIPE)):
        assert "nothing is decided" in said_of(study, recipe)
    assert recipe_rows(TEXTS, GOOD, ("c4", "sparsegpt")).empty and lead_text(all_leads(found)).empty


def test_tables_hold_every_recipe_and_the_figure_names_the_best_if_its_lead_is_significant():
    rows = recipe_rows(TEXTS, GOOD, ("uniform", "sparsegpt"))
    text = recipe_text(rows)
    assert len(text) == len(known_recipes(GOOD)) == 6 and set(DIMENSIONS) < set(text)
    assert rows.drop_duplicates("recipe").method.tolist() == ["SparseGPT"] * 3 + ["L-ADMM"] * 3
    assert set(rows.kind[rows.recipe.str.startswith("igsp")]) == {"self-generated"} and set(
        rows.kind
    ) == {"mix", "self-generated"}
    pooled = lead_text(all_leads(leads_of(GOOD)))
    assert pooled.question.value_counts().to_dict() == {
        "compared with today's use": 2,
        "what the text adds": 2,
    }
    base = ("uniform", "sparsegpt")
    title = recipe_figure(rows, recipe_message(GOOD, base)).get_suptitle()
    assert (
        title == recipe_message(GOOD, RECIPE)
        == "Highest total retention of 6 recipes: half-code, L-ADMM"
    )
    close = made_up({"uniform": 0.0, "igsp": 0.05, "half-code": 0.05}, gain=0.05, sd=0.004)
    assert (
        recipe_message(close, base)
        == "Total retention: 5 of 5 recipes above uniform, SparseGPT, 0 below"
    )
    assert recipe_message(GOOD, ("c4", "sparsegpt")) == "Retention of 6 recipes: no comparison"


def test_a_question_that_nothing_answers_leaves_numbers_numbers():
    leads = leads_of(GOOD) | {
        "ALPS against L-ADMM": lead_rows(GOOD, [(("half-code", "alps"), RECIPE)])}
    pd.testing.assert_frame_equal(all_leads(leads), all_leads(leads_of(GOOD)))


def leads_like(low, high, total=(16, 20)):
    ends = [total, *[(low, high)] * 4]
    return pd.DataFrame([dict(goal=goal, all_low=a / 100, all_high=b / 100)
                         for goal, (a, b) in zip(("Total", *DIMENSIONS), ends)])


@pytest.mark.parametrize("low, high, total, x1, x2", [
    (10, 14, (15, 19), "supported", "supported"),
    (9, 14, (14, 16), "undecided", "undecided"),
    (2, 9, (10, 14.9), "refuted", "refuted")])
def test_a_target_is_judged_by_simultaneous_intervals(low, high, total, x1, x2):
    assert target_verdicts(leads_like(low, high, total)) == {"X1": x1, "X2": x2}


def test_one_dimension_below_the_target_refutes_the_target():
    leads = leads_like(12, 15)
    leads.loc[leads["goal"] == "Code", ["all_low", "all_high"]] = 0.05, 0.09
    assert target_verdicts(leads) == {"X1": "supported", "X2": "refuted"}


def timed(pruning, recovery=None, threads=1, **about):
    record = dict(processor="kind", threads=threads, sparsity=0.6) | about
    if recovery: record["recovery"] = {}
    seconds = {"pruning": pruning, "recovery": recovery or 0.3}  # a skipped stage takes some time
    return Result(record, pd.DataFrame(), pd.DataFrame(), seconds)


TRAINED = ("half-code", "admm+recover=c4")


def test_times_are_ratios_of_medians_and_contain_the_training():
    base, chain = (dict(zip(("strategy", "method"), one))
                   for one in (("uniform", "sparsegpt"), TRAINED))
    study = {"dense": timed(0.0, strategy="dense", method=None, seed=0)}
    for seed, (alone, pruned, trained) in enumerate([(10, 20, 60), (20, 40, 80), (10, 30, 900)]):
        study[f"b{seed}"] = timed(alone, seed=seed, **base)
        study[f"c{seed}"] = timed(pruned, trained, seed=seed, **chain)
    study["b3"], study["c3"] = timed(1, seed=3, threads=2, **base), timed(
        500, seed=3, processor="other", **chain)
    times = recipe_times(study, ("uniform", "sparsegpt"))
    assert times == {TRAINED: 12.0, ("uniform", "sparsegpt"): 1.0}
    assert recipe_times({}, ("uniform", "sparsegpt")) == {}


def test_the_target_is_asked_of_trained_recipes_over_one_reference():
    cells = GOOD.cells.assign(method=GOOD.cells["method"].where(
        GOOD.cells["strategy"] != "igsp", GOOD.cells["method"] + "+recover=c4"))
    cells = cells.assign(strategy=cells["strategy"].replace("igsp", "half-code"))
    rows = target_rows(replace(GOOD, cells=cells), {}, ("uniform", "sparsegpt"),
                       [("half-code", "sparsegpt"), ("c4", "wanda")])
    asked = rows["recipe"].str.contains("trained") & (rows["over"] == "uniform, SparseGPT")
    assert rows["X1"].notna().equals(asked) and asked.sum() == 2 * 5
    before = rows[rows["over"] == "half-code, L-ADMM"]
    trained = {"half-code, L-ADMM + trained on c4"}
    assert set(before["recipe"]) == trained, "before and after training"
    assert rows["X3"].isna().all() and rows["times"].isna().all()
    text = target_text(rows)
    assert not {"times a prune", "X3"} & {*text}, "empty columns are left out"
    assert set(text["X1"]) <= {"", "supported", "undecided", "refuted"}


@pytest.mark.parametrize("leads", [
    leads_like(12, 15)[:1], leads_like(12, 15)[:0], leads_like(np.nan, np.nan)])
def test_a_target_without_all_intervals_is_undecided(leads):
    assert target_verdicts(leads)["X2"] == "undecided"


def test_text_that_was_trained_on_counts_as_used():
    items = pd.DataFrame(dict(task=["mbpp", "sciq"]))
    record = dict(calibration=None, recovery=dict(text=dict(counts={"polyglot": 3})))
    study = {"x": Result(record, pd.DataFrame(), items, {})}
    assert [*without_shared(study)["x"].items.task] == ["sciq"]


def test_shared_problems_are_left_out_where_a_source_shares_them():
    def scored(sources):
        items = pd.DataFrame(dict(task=["mbpp", "gsm8k", "sciq"]))
        return {
            k: Result(dict(calibration=c), pd.DataFrame(), items, {})
            for k, c in (("dense", None), ("x", dict(counts=sources)))
        }
    left = lambda sources: [
        *map(list, (r.items.task for r in without_shared(scored(sources)).values()))
    ]
    assert (
        left({"polyglot": 3}) == [["gsm8k", "sciq"]] * 2
        and left({"c4": 3}) == [["mbpp", "gsm8k", "sciq"]] * 2
    )


# --- the presets

@pytest.fixture(scope="module")
def first_law():
    "The law that named the recipe: the entropy form in every dimension."
    preset = load_preset(ROOT / "presets/mixing/smollm2-135m.yaml")
    study = load_study(preset, ROOT / "results/mixing/smollm2-135m", partial=True)
    part = grid_part(bootstrap_study(preset, study, 200, measure=ANSWER_BITS))
    return law_of(preset, part.replicates, "entropy")


@pytest.mark.parametrize("name", ["smollm2-135m", "qwen-0.5b"])
def test_the_recipe_is_the_mix_that_the_law_names_and_is_judged_by_other_items(name, first_law):
    preset, learnt = (
        load_preset(ROOT / f"presets/{question}.yaml")
        for question in (f"recipe/{name}", "mixing/smollm2-135m")
    )
    best = best_mix(first_law, ALIKE | dict(worst=1)).set_index("dimension").share
    n = preset["calibration"]["windows"]
    assert preset["strategies"]["half-code"] == "half-code"
    assert allocate(parse_mix("half-code"), n) == allocate(
        parse_mix(mix_of_shares(best.to_dict())), n
    )
    taken = shares_of(preset["strategies"]["half-code"], n)
    assert all(abs(taken[d] - best[d]) <= 1 / n + 1e-9 for d in DIMENSIONS), taken
    assert preset["scoring"]["skip"] >= max(learnt["scoring"]["limit"].values())
    assert preset["calibration"] == learnt["calibration"]


def test_no_item_of_a_recipe_taught_the_law():
    items = lambda o: set(
        pd.read_parquet(ROOT / f"results/{o}/dense.items.parquet")[["task", "item"]].itertuples(
            index=False
        )
    )
    judged = [
        o
        for o in ("recipe/smollm2-135m", "recipe/qwen-0.5b")
        if (ROOT / f"results/{o}/dense.items.parquet").is_file()
    ]
    assert len(judged) == 2 and not any(items("mixing/smollm2-135m") & items(o) for o in judged)
