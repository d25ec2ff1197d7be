"Measures of what is kept: values, formulas, the rule, and what is refused."
import math
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest

from calib_prune.core import CalibPruneError
from calib_prune.evaluation.measures import (
    ABOVE_CHANCE,
    ANSWER_BITS,
    HEADLINE,
    MEASURES,
    PLAIN,
    get_measure,
    headline_measure,
)
from calib_prune.evaluation.retention import difference, left_out_reasons, retention
from calib_prune.evaluation.scoring import scores
from calib_prune.evaluation.tasks import TASKS
from calib_prune.statistics.examples import example_study
from calib_prune.statistics.replicates import OUTCOMES, bootstrap_retention

ONE_OF_EACH = dict(
    General="sciq", Commonsense="piqa", Code="humaneval_generate", Math="basic_skills_arithmetic"
)


def items(task: str, bits, right=(), chance: float = 0.25) -> pd.DataFrame:
    "Rows as `evaluate` returns them."
    found = [
        dict(item=str(i), metric="bits", value=float(b), bytes=4, chance=math.nan)
        for i, b in enumerate(bits)
    ]
    metric = TASKS[task].metric if TASKS[task].kind != "bpb" else "acc"
    found += [
        dict(item=str(i), metric=metric, value=float(r), bytes=0, chance=chance)
        for i, r in enumerate(right)
    ]
    return pd.DataFrame(found).assign(task=task, dimension=TASKS[task].dimension)


def test_each_measure_reads_its_own_rows():
    both = pd.concat([items("sciq", [8, 4], [1, 0]), items("mbpp", [20, 30])], ignore_index=True)
    assert [o.metric(TASKS["sciq"]) for o in MEASURES.values()] == ["bits", "acc", "acc"]
    assert [o.metric(TASKS["mbpp"]) for o in MEASURES.values()] == ["bits", None, "bits"]
    assert [o.metric(TASKS["gsm8k_generate"]) for o in MEASURES.values()] == [
        None, "exact_match", "exact_match"]
    assert ANSWER_BITS.table(both).value.tolist() == [8, 4, 20, 30]
    assert ABOVE_CHANCE.table(both).value.tolist() == [0.75, -0.25]
    assert PLAIN.table(both).value.tolist() == [1, 0, 20, 30]
    assert ABOVE_CHANCE.not_scored(both) == ["mbpp"] and not PLAIN.not_scored(both)


def test_formulas():
    two = lambda *o: np.array([o, o], float)
    assert ANSWER_BITS.retention("sciq", two(80.0), two(100.0))[0] == 0.8
    assert PLAIN.retention("sciq", two(80.0), two(40.0))[0] == 0.5
    assert ABOVE_CHANCE.retention("sciq", two(60.0), two(-6.0))[0] == -0.1
    kept = ABOVE_CHANCE.retention(
        "sciq", np.array([[2.0], [0.0], [-1.0]]), np.array([[1.0], [1.0], [-3.0]])
    )
    assert (
        kept[0] == 0.5 and np.isnan(kept[1:]).all()
    ), "a replicate in which the dense model only guesses says nothing"


def test_a_guess_keeps_nothing_above_chance():
    rng = np.random.default_rng(0)
    dense = items("sciq", np.ones(4000), rng.random(4000) < 0.7)
    guessing = items("sciq", np.ones(4000), rng.random(4000) < 0.25)
    kept = {
        name: retention(dense, guessing, 20, measure=o).retention[0]
        for name, o in MEASURES.items()
    }
    assert abs(kept["above-chance"]) < 0.05 and abs(kept["plain"] -
                                                    0.25 / 0.7) < 0.03 and kept["answer-bits"] == 1
    by_name = retention(dense, guessing, 20, measure="above-chance").retention[0]
    assert by_name == kept["above-chance"]
    assert difference(dense, dense, guessing, 20, measure=ABOVE_CHANCE).difference[
        0
    ] == pytest.approx(1 - kept["above-chance"])


def test_rows_hold_what_every_measure_needs():
    both = pd.concat([
        items("sciq", [8, 4], [1, 0]),
        items("mbpp", [20, 30]),
        items("gsm8k_generate", [], [1, 0], 0)])
    rows = scores(both).set_index("task")
    assert rows.bits_per_byte[["sciq", "mbpp"]].tolist() == [1.5, 6.25] and math.isnan(
        rows.bits_per_byte["gsm8k_generate"]
    )
    assert rows.accuracy[["sciq", "gsm8k_generate"]].tolist() == [0.5, 0.5] and math.isnan(
        rows.accuracy["mbpp"]
    )
    assert rows.chance[["sciq", "gsm8k_generate"]].tolist() == [0.25, 0] and math.isnan(
        rows.chance["mbpp"]
    )


@pytest.mark.parametrize("wrong, measure, said", [
    (lambda o: o.drop(columns="chance"), "above-chance", "do not say what guessing gets"),
    (lambda o: o.assign(chance=math.nan), "above-chance", "do not say what guessing gets"),
    (lambda o: o[o.metric != "bits"], "answer-bits", "task 'sciq' have no 'bits'"),
    (lambda o: o[o.metric == "bits"], "plain", "task 'sciq' have no 'acc'"),
    (lambda o: pd.concat([o, o]), "answer-bits", "is there twice"),
    (lambda o: o, "answer-bit", "answer-bits")])
def test_what_cannot_be_measured_is_refused(wrong, measure, said):
    with pytest.raises(CalibPruneError, match=said):
        get_measure(measure).table(wrong(items("sciq", [8, 4], [1, 0])))


def aside(found: pd.DataFrame) -> dict:
    return {k: found.attrs[k] for k in ("not_scored", "at_chance", "left_aside")}


def test_a_task_without_choices_has_no_accuracy():
    program = items("mbpp", [20, 30])
    with pytest.raises(CalibPruneError, match="above-chance cannot score any of these tasks: mbpp"):
        retention(program, program, 20, measure=ABOVE_CHANCE)
    both = pd.concat([items("sciq", np.ones(40), np.arange(40) < 30), program], ignore_index=True)
    found = retention(both, both, 20, measure=ABOVE_CHANCE)
    assert aside(found) == {"not_scored": ["mbpp"], "at_chance": [], "left_aside": []
                            } and "mbpp" not in set(found["name"])
    code = found.set_index("name").loc["Code"]
    assert (
        math.isnan(code.retention)
        and code.n == 0
        and found.attrs["reasons"]["mbpp"] == "above-chance cannot score it"
    )


def test_a_dense_model_at_chance_is_refused_or_left_out():

    def right(*shares):
        return pd.concat([
            items(t, np.ones(100),
                  np.arange(100) < n) for t, n in zip(("sciq", "hellaswag"), shares)])
    for near in (25, 26, 35):
        with pytest.raises(CalibPruneError, match="not clearly above chance in sciq"):
            retention(
                items("sciq", np.ones(100), np.arange(100) < near),
                right(30)[:200],
                20,
                measure=ABOVE_CHANCE,
            )
    dense, pruned = right(90, 26), right(40, 30)
    found = retention(dense, pruned, 20, measure=ABOVE_CHANCE)
    assert found.attrs["at_chance"] == found.attrs["left_aside"] == ["hellaswag"] and set(
        found["name"]
    ) == {"sciq", "General", "Commonsense", "total"}
    both = difference(dense, dense, pruned, 20, measure=ABOVE_CHANCE)
    assert set(both["name"]) == {"sciq", "General", "Commonsense", "total"}
    assert (
        both.attrs == aside(found)
        and retention(dense.drop(columns="chance"), pruned, 20).attrs["at_chance"] is None
    )
    few = items("sciq", [1] * 2, [1, 1])
    # may be luck
    with pytest.raises(CalibPruneError, match="not clearly above chance"):
        retention(few, few, 20, measure=ABOVE_CHANCE)
    plain = retention(dense, pruned, 20)
    assert plain.attrs["at_chance"] == plain.attrs["left_aside"] == [
        "hellaswag"
    ] and "hellaswag" not in set(plain["name"])
    studied = retention(dense, pruned, 20, count_at_chance=True)
    assert studied.attrs["at_chance"] == ["hellaswag"] and "hellaswag" in set(
        studied["name"]) and studied.attrs["left_aside"] == []
    assert retention(dense, pruned, 20, measure=ANSWER_BITS).attrs["at_chance"] == []


def test_a_task_with_nothing_right_is_left_out_if_its_dimension_has_others():
    def right(*shares):
        return pd.concat([
            items(t, np.ones(100),
                  np.arange(100) < n) for t, n in zip(("sciq", "hellaswag", "piqa"), shares)],
                         ignore_index=True)
    found = retention(right(80, 0, 90), right(40, 5, 45), 20)
    assert found.attrs["left_aside"] == ["hellaswag"] and found.set_index("name")["retention"][[
        "sciq", "General", "Commonsense"]].tolist() == [0.5] * 3
    assert "hellaswag" not in set(found["name"]) and "hellaswag" in found.attrs["at_chance"]
    with pytest.raises(CalibPruneError, match="scores zero on task 'hellaswag'"):
        retention(right(80, 0, 0), right(40, 5, 45), 20, count_at_chance=True)
    assert (
        retention(right(80, 0, 90), right(40, 5, 45), 20, measure=ANSWER_BITS).attrs["left_aside"]
        == []
    )


def test_a_dimension_at_chance_is_left_out_of_a_study():
    rng = np.random.default_rng(1)
    values = {t: (rng.random(400) < p) - 0.25 for t, p in (("sciq", 0.26), ("piqa", 0.8))}
    assert ABOVE_CHANCE.nothing_to_lose(values) == ("sciq",)
    assert (
        PLAIN.nothing_to_lose({k: 0 * v for k, v in values.items()}) == ()
    ), "nothing else measures the dimensions: an error will say so"
    more = values | {"jeopardy": values["piqa"]}
    assert ABOVE_CHANCE.nothing_to_lose(more) == ("sciq",)


def test_a_dimension_without_a_task_above_chance_has_no_number():
    study, rng = example_study(
        {"c4": (0.8, 0.6, 0.5, 0.3), "math": (0.5, 0.5, 0.5, 0.9)}, n=200
    ), np.random.default_rng(0)
    for result in study.values():
        guessed = (result.items["task"] == "piqa") & (result.items["metric"] != "bits")
        result.items = result.items.assign(
            chance=np.where(result.items["metric"] != "bits", 0.25, np.nan)
        )
        result.items.loc[guessed, "value"] = (rng.random(guessed.sum()) < 0.25).astype(float)
    found = bootstrap_retention(study, 20, measure=ABOVE_CHANCE)
    at = {d: i for i, d in enumerate(OUTCOMES)}
    kept = found.of("c4")
    assert found.left_out == ("piqa",) and found.items["Commonsense"] == 0
    assert (
        np.isnan(kept[:, [at["Commonsense"], at["Total"]]]).all()
        and not np.isnan(kept[:, at["General"]]).any()
    )
    guesses = {
        k: type(v)(v.record, v.rows, v.items[v.items["task"] == "piqa"], {})
        for k, v in study.items()
    }
    with pytest.raises(CalibPruneError, match="not clearly above chance in piqa"):
        bootstrap_retention(guesses, 20, measure=ABOVE_CHANCE)


def test_a_study_by_every_measure():
    study = example_study({"c4": (0.8, 0.6, 0.5, 0.3), "math": (0.5, 0.5, 0.5, 0.9)}, n=40)
    for result in study.values():  # a made-up study has own scores only
        right = result.items.metric != "bits"
        result.items = pd.concat([
            result.items.assign(chance=np.where(right, 0.2, np.nan)), result.items[right].assign(
                metric="bits", value=4 - 2 * result.items.value[right], bytes=2, chance=np.nan)],
                                 ignore_index=True)
    found = {name: bootstrap_retention(study, 20, measure=o) for name, o in MEASURES.items()}
    at = {d: i for i, d in enumerate(OUTCOMES)}
    assert found["above-chance"].of("c4")[0, at["General"]] == pytest.approx((0.8 - 0.2) / 0.8)
    assert found["answer-bits"].of("c4")[0, at["General"]] == pytest.approx(2 / (4 - 2 * 0.8))
    assert found["plain"].of("c4")[0, at["General"]] == pytest.approx(0.8)
    # HumanEval by bits has no accuracy
    assert np.isnan(found["above-chance"].of("c4")[0, at["Code"]])
    assert all(
        o.of("c4")[0, at["Accuracy"]] == found["plain"].of("c4")[0, at["Accuracy"]]
        for o in found.values()
    )
    assert (
        found["answer-bits"].scored["General"] == "bits per byte"
        and found["above-chance"].measure == ABOVE_CHANCE
    )


def test_the_rule():
    assert ANSWER_BITS.reliable(0.5, 1.0) and not ANSWER_BITS.reliable(0.49, 0.0)
    assert PLAIN.reliable(0.9, 0.5) and not PLAIN.reliable(0.9, 0.51)
    assert not ABOVE_CHANCE.reliable(math.nan, 0)
    assert PLAIN.reliable(0.9, math.nan)  # no choice task, no floor
    names = [o.name for o in HEADLINE]
    assert [headline_measure({name: 4}) for name in names] == [*HEADLINE]
    assert set(names) == set(MEASURES)
    assert headline_measure(dict.fromkeys(names, 3)) == HEADLINE[0]
    assert headline_measure(dict.fromkeys(names, 0)) == ANSWER_BITS


# --- what a user reads: rows, reasons, verdict

def bits(
    loss: dict[str, float], n: int = 100, tasks=("jeopardy", "mbpp", "gsm8k"), seed: int = 0
) -> list[pd.DataFrame]:
    "A dense model and a pruned one whose right answers cost more bits, by task."
    rng = np.random.default_rng(seed)
    dense = {t: rng.gamma(8, 10, n) for t in tasks}
    worse = {t: v * rng.normal(1 + loss.get(t, 0), 0.05, n) for t, v in dense.items()}
    return [
        pd.concat([items(t, v) for t, v in o.items()], ignore_index=True) for o in (dense, worse)
    ]


def test_every_row_counts_the_items_of_the_tasks_that_count():
    dense, pruned = bits({}, 30, ("jeopardy", "triviaqa", "mbpp", "gsm8k"))
    guessed, solved = items("piqa", np.ones(100), np.arange(100) < 55, 0.5), items(
        "hellaswag", np.ones(100), np.arange(100) < 90
    )
    both = [pd.concat([o, guessed, solved], ignore_index=True) for o in (dense, pruned)]
    n = retention(*both, 20).set_index("name").n
    assert (
        n[["General", "Commonsense", "Code", "Math", "total"]].tolist() == [60, 100, 30, 30, 220]
        and "piqa" not in n
    )
    assert retention(*both, 20, count_at_chance=True).set_index("name").n[
        ["Commonsense", "total"]
    ].tolist() == [200, 320]


def test_a_dimension_at_chance_has_a_row_and_a_reason():
    dense, pruned = bits({})
    guess = items("piqa", np.ones(100), np.arange(100) < 55, 0.5)
    found = retention(pd.concat([dense, guess]), pd.concat([pruned, guess]), 100)
    rows, why = found.set_index("name"), found.attrs["reasons"]
    assert (
        rows.loc[["Commonsense", "total"], ["retention", "ci_low", "ci_high"]].isna().all(axis=None)
    )
    assert rows.n[["Commonsense", "total"]].tolist() == [0, 0]
    assert (
        why["piqa"]
        == "the dense model has 55 of 100 answers right, not clearly more than guessing (50 %)"
    )
    assert why["Commonsense"] == "no task counts (piqa)" and why["total"].endswith(
        "Commonsense has no retention"
    )
    assert found.attrs["verdict"].endswith("Commonsense cannot be judged: no task counts (piqa).")


def test_a_task_that_is_a_dimension_of_its_own_keeps_its_reason(monkeypatch):
    own = replace(TASKS["piqa"], name="mine", dimension="mine")
    monkeypatch.setitem(TASKS, "mine", own)
    guess = items("mine", np.ones(100), np.arange(100) < 55, 0.5)
    assert "has 55 of 100 answers right" in left_out_reasons(guess)["mine"]


def test_lost_most_is_said_only_if_every_difference_excludes_0():
    far = retention(*bits({"mbpp": 1.0, "gsm8k": 0.3}), 500)
    code, math_ = (far.set_index("name").retention[d] for d in ("Code", "Math"))
    said = far.attrs["verdict"]
    assert said.startswith(f"Code has lost most: retention {100 * code:.1f} % (95 % CI ")
    assert (
        f"{100 * (math_ - code):.1f} points (95 % CI " in said
        and "below Math, the next lowest" in said
    )
    assert "Not significantly different from the dense model: General" in said
    near = retention(*bits({"mbpp": 0.3, "gsm8k": 0.3}, 20), 500).attrs["verdict"]
    assert (
        "has the lowest retention" in near
        and "not significantly lower than" in near
        and "lost most" not in near
    )


def test_a_verdict_on_no_loss():
    dense, pruned = bits({})
    same = retention(dense, dense, 20)
    rows = same[same.level != "total"]
    assert (rows[["retention", "ci_low", "ci_high"]] == 1).all(axis=None)
    assert same.attrs["verdict"].startswith(
        "No judged dimension has a significant loss. Not significantly different from the dense "
        "model: General 100.0 % (95 % CI 100.0 to 100.0)"
    )
    better = retention(dense, bits({"mbpp": -0.3})[1], 200).attrs["verdict"]
    assert "Significantly above the dense model: Code" in better and "lowest" not in better


def test_few_items_have_no_verdict_and_one_has_no_interval():
    one = retention(*bits({"mbpp": 1.0}, 1), 50)
    rows = one[one.level != "total"]
    assert rows.retention.notna().all() and rows[["ci_low", "ci_high"
                                                  ]].isna().all(axis=None) and (rows.n == 1).all()
    assert one.attrs["reasons"]["mbpp"] == one.attrs["reasons"][
        "Code"] == "no interval, as a single item cannot be resampled"
    assert (
        "Code cannot be judged: fewer than 10 items: mbpp has 1." in one.attrs["verdict"]
        and "lost" not in one.attrs["verdict"]
    )
    nine, ten = (retention(*bits({"mbpp": 1.0}, n), 200) for n in (9, 10))
    assert nine.ci_low[:6].notna().all() and "lost" not in nine.attrs["verdict"] and ten.attrs[
        "verdict"].startswith("Code has lost most")


def test_items_that_do_not_fit_one_model_are_named_as_a_cause():
    dense, pruned = bits({}, 20)
    pruned.attrs["left_out"] = {"mbpp": 1}
    with pytest.raises(
        CalibPruneError, match="task 'mbpp' has 20 .* 19 .*longer than a model's context"
    ):
        retention(dense, pruned.drop(pruned.index[pruned.task == "mbpp"][0]), 20)
