"Which verdicts depend on the measure or the model."
import math
from functools import partial

import numpy as np
import pandas as pd
import pytest

from calib_prune.core import DIMENSIONS, CalibPruneError
from calib_prune.evaluation.measures import PLAIN
from calib_prune.questions.agreement import (
    ACROSS,
    DEPENDS,
    NONE,
    ONE,
    OPEN,
    PARTLY,
    ROBUST,
    UNTESTED,
    agreement,
    agreement_note,
    dimensions_of,
    ledgers,
    methods_of,
    model_agreement,
    model_difference,
    read_ledgers,
)
from calib_prune.questions.claims import study_evidence, study_ledger
from calib_prune.questions.estimates import (
    CHECKS,
    CONTRADICTED,
    MODEL,
    OTHER_SIZE,
    PRESET,
    REPRODUCED,
    UNDECIDED,
)
from calib_prune.statistics.examples import example_preset
from calib_prune.statistics.selection import bootstrap_study
from calib_prune.study.presets import load_preset
from tests import ROOT
from tests.notebooks import run_cells


def interval_of(verdict):
    low, high = {
        REPRODUCED: (1, 2), OTHER_SIZE: (1, 2), CONTRADICTED: (-2, -1), UNDECIDED: (-1, 1)
    }.get(verdict, (math.nan, math.nan))
    ours = dict(ci_low=low, ci_high=high, ours=(low + high) / 2)
    return ours | dict(unit="points", needed="", size=1.0)


def judged(*verdicts):
    "A ledger of one check under three measures: (verdict, whether the measure can tell)."
    rows = [
        dict(measure=m,
             name="C6",
             claim="C6",
             check="mix − best",
             verdict=v,
             tells=t,
             **interval_of(v))
        for m, (v, t) in zip(("answer-bits", "above-chance", "plain"), verdicts)]
    return agreement(pd.DataFrame(rows)).iloc[0]


@pytest.mark.parametrize("verdicts, said", [
    (((REPRODUCED, True), (OTHER_SIZE, True), (CONTRADICTED, False)), ROBUST),
    (((REPRODUCED, True), (OTHER_SIZE, False), (CONTRADICTED, True)), DEPENDS),
    (((UNDECIDED, True), (OTHER_SIZE, True), (OTHER_SIZE, True)), PARTLY),
    (((UNDECIDED, True), (CONTRADICTED, True), (CONTRADICTED, False)), PARTLY),
    (((CONTRADICTED, True), (OTHER_SIZE, False), (OTHER_SIZE, False)), ONE),
    (((CONTRADICTED, True), (CONTRADICTED, True), (CONTRADICTED, True)), ROBUST),
    (((CONTRADICTED, False), (OTHER_SIZE, False), (OTHER_SIZE, False)), NONE),
    (((UNDECIDED, True), (UNDECIDED, True), (OTHER_SIZE, False)), OPEN),
    (((PRESET, True), (PRESET, True), (MODEL, True)), UNTESTED),
    (((PRESET, True), (OTHER_SIZE, True), (REPRODUCED, True)), ROBUST)])
def test_agreement(verdicts, said):
    found = judged(*verdicts)
    assert found["agreement"] == said
    assert [found[o] for o in ("Answer bits", "Above chance", "Plain ratio")] == [
        v if t else "does not discriminate" for v, t in verdicts
    ]


@pytest.mark.parametrize("low, high, said", [(-2, 5, OPEN), (2, 5, PARTLY), (-5, -2, PARTLY)])
def test_sizes_do_not_count_where_measures_are_compared(low, high, said):
    "One interval excludes the paper's number, which another measure cannot be compared with."
    rows = pd.DataFrame([
        dict(measure=m,
             name="C6",
             claim="C6",
             check="mix − best",
             verdict=v,
             tells=True,
             ci_low=a,
             ci_high=b)
        for m, v, a, b in (
            ("above-chance", CONTRADICTED, low, high), ("answer-bits", UNDECIDED, -1, 1))])
    assert agreement(rows).iloc[0]["agreement"] == said


def test_a_check_of_wanda_asks_whether_wanda_can_tell():
    from tests.study.test_claims import like_paper
    study, metrics = like_paper()
    for o in study.values():
        o.items = o.items.assign(chance=np.where(o.items["metric"] == "bits", np.nan, 0.05))
    preset = example_preset(study) | dict(calibration=dict(windows=32, length=512))
    both = ledgers(preset, study, metrics, 60,
                   99).query("measure == 'plain'").set_index("name")["tells"]
    fewer = {k: v for k, v in study.items() if v.record.get("method") != "wanda"}
    one = ledgers(
        example_preset(fewer) | dict(calibration=dict(windows=32, length=512)), fewer, metrics, 60,
        99)
    one = one.query("measure == 'plain'").set_index("name")["tells"]
    mine = [o for o in CHECKS if "wanda" in methods_of(o)]
    assert set(mine) == {"C1 wanda", "C2", "C4", "C4 corrected", "O1 math", "O2 math"}
    assert both[["C1 wanda", "C2"]].all() and not one[mine].any(), "no model pruned with Wanda"
    assert one["C6 c4"] == both["C6 c4"] and one["C3"] == both["C3"] == True  # noqa: E712


def test_what_each_check_needs():
    assert dimensions_of("C1 wanda") == ("General",) and dimensions_of("O2 math") == (
        "General",
        "Math",
    )
    assert set(dimensions_of("C4")) == {"General", "Code", "Math"} and "Code" not in dimensions_of(
        "O3 best"
    )
    for name in ("C5", "C6", "C6 math", "C7 sgs", "C9"): assert dimensions_of(name) == DIMENSIONS
    assert (
        agreement_note(pd.DataFrame(dict(agreement=[ROBUST, ONE, ROBUST])))
        == f"2 of 3 checks: {ROBUST}; 1 of 3 checks: {ONE}."
    )


def test_rows_without_a_measure_leave_it_out():
    from calib_prune.statistics.examples import example_preset
    from tests.study.test_claims import like_paper
    study, metrics = like_paper()
    for o in study.values():
        right = o.items[o.items.metric != "bits"]
        o.items = pd.concat(
            [o.items, right.assign(metric="bits", value=3 - right.value, bytes=1)],
            ignore_index=True,
        )
    preset = example_preset(study) | dict(calibration=dict(windows=32, length=512))
    table = ledgers(preset, study, metrics, 60, 99)
    assert set(table["measure"]) == {"answer-bits", "plain"} and len(table) == 2 * len(CHECKS)
    at = table.set_index(["measure", "name"])
    assert (
        np.isclose(at.loc[("plain", "C6 c4"), "ours"], 22.5)
        and at.loc[("answer-bits", "C6 c4"), "ours"] < 22.5
    )
    again = ledgers(
        preset,
        study,
        metrics,
        60,
        99,
        known={PLAIN: study_ledger(
            study_evidence(bootstrap_study(preset, study, 60), metrics, n_perm=99))},
    )
    pd.testing.assert_frame_equal(again, table)


# --- models

def ledger_of(*verdicts):
    "One check under two measures: (verdict, whether the measure can tell)."
    return pd.DataFrame([
        dict(measure=m,
             name="C6",
             claim="C6",
             check="mix − best",
             verdict=v,
             tells=t,
             headline=m == "answer-bits",
             **interval_of(v)) for m, (v, t) in zip(("answer-bits", "plain"), verdicts)])


@pytest.mark.parametrize("one, other, together", [
    (((REPRODUCED, True), (OTHER_SIZE, True)), ((OTHER_SIZE, True), (CONTRADICTED, False)), ROBUST),
    (((REPRODUCED, True), (OTHER_SIZE, True)), ((CONTRADICTED, True), (CONTRADICTED, True)),
     ACROSS[DEPENDS]),
    (((REPRODUCED, True), (CONTRADICTED, True)), ((OTHER_SIZE, True), (CONTRADICTED, False)),
     ACROSS[DEPENDS]),
    (((UNDECIDED, True), (CONTRADICTED, False)), ((UNDECIDED, True), (CONTRADICTED, False)), OPEN),
    (((UNDECIDED, True), (OTHER_SIZE, True)), ((OTHER_SIZE, True), (OTHER_SIZE, True)), PARTLY),
    (((CONTRADICTED, True), (OTHER_SIZE, False)), ((PRESET, True), (PRESET, True)), ACROSS[ONE]),
    (((CONTRADICTED, False), (OTHER_SIZE, False)), ((OTHER_SIZE, False), (OTHER_SIZE, False)),
     ACROSS[NONE]),
    (((MODEL, False), (MODEL, False)), ((PRESET, True), (PRESET, True)), UNTESTED)])
def test_a_check_is_robust_if_all_models_and_measures_that_discriminate_agree(one, other, together):
    row = model_agreement({"small": ledger_of(*one), "large": ledger_of(*other)}).iloc[0]
    assert row["agreement"] == together
    for model, verdicts in (("small", one), ("large", other)):
        first, _ = verdicts[0]  # with the measure of the study's tables
        assert row[model].endswith(first + " (larger)" * (first == OTHER_SIZE))


def test_a_difference_between_models_is_shown_where_it_is_significant():
    of = lambda ours, half, unit="points": pd.Series(
        dict(ours=ours, ci_low=ours - half, ci_high=ours + half, unit=unit))
    # half width: √(3² + 4²) = 5
    assert model_difference({"a": of(6, 3), "b": of(0, 4)}) == "a − b: +6.0 [+1.0, +11.0]"
    assert model_difference({"a": of(4.9, 3), "b": of(0, 4)}) == ""
    assert model_difference({"a": of(1, 0.1, "ρ"), "b": of(0, 0.1, "ρ")}) == ""
    assert model_difference({"a": of(6, 3), "b": of(math.nan, 4)}) == ""
    three = model_difference({"a": of(6, 3), "b": of(0, 4), "c": of(-9, 3)})
    assert [text.partition(":")[0] for text in three.split("; ")] == ["a − b", "a − c", "b − c"]


def test_a_ledger_that_is_not_there_or_is_none_is_named(tmp_path):
    with pytest.raises(CalibPruneError, match="reproduce --preset claims/qwen-0.5b"):
        read_ledgers(tmp_path / "claims" / "qwen-0.5b" / "T7-measures.csv")
    (tmp_path / "T7-measures.csv").write_text("claim,check\nC1,x\n")
    with pytest.raises(CalibPruneError, match="no column 'measure'"):
        read_ledgers(tmp_path / "T7-measures.csv")


@pytest.mark.parametrize("old, new, said", [
    ("\nbeside: [qwen-0.5b, qwen-1.5b]", "\n#", "needs `beside`"),
    ("measures, claims,", "measures,", "name `claims`")])
def test_models_are_set_beside_what_a_preset_names(old, new, said, tmp_path):
    text = (ROOT / "presets/claims/smollm2-135m.yaml").read_text()
    text = text.replace("../base", str(ROOT / "presets/base"))
    assert text.count(old) == 1
    (tmp_path / "default.yaml").write_text(text.replace(old, new))
    with pytest.raises(CalibPruneError, match=said): load_preset(tmp_path / "default.yaml")


def test_the_notebook_sets_two_ledgers_side_by_side(tmp_path):
    from tests.study.test_claims import like_paper
    study, metrics = like_paper(at=0.5)
    study |= {k: r for k, r in like_paper(at=0.6)[0].items() if "sparsegpt-0.6" in k}
    preset = example_preset(study) | dict(
        calibration=dict(windows=32, length=512), judged_at=0.5
    )
    table = ledgers(preset, study, metrics, 60, 99)
    (tmp_path / "smollm2-135m").mkdir()
    run = partial(run_cells, "models", preset=ROOT / "presets/claims/smollm2-135m.yaml",
                  results="none", figures=tmp_path / "smollm2-135m")
    begun = tmp_path / "smollm2-135m/T7-measures.csv"
    begun.write_text("status\n\n")
    run()
    assert "No study has a ledger yet" in (tmp_path / "smollm2-135m/T7-models.md").read_text()
    table.to_csv(begun, index=False)
    run()
    alone = (tmp_path / "smollm2-135m/T7-models.md").read_text()
    assert "not run yet: qwen2.5-coder-0.5b, qwen2.5-coder-1.5b" in alone
    assert "smollm2-135m" in alone
    (tmp_path / "qwen-0.5b").mkdir()
    table.to_csv(tmp_path / "qwen-0.5b/T7-measures.csv", index=False)
    with pytest.raises(
        Exception,
        match="judges 'mix − c4, total, SparseGPT 30%', but its preset asks for .* SparseGPT 50%",
    ):
        run()
    study, metrics = like_paper(at=0.5, low=0.5, high=0.6)
    half = ledgers(
        example_preset(study) | dict(calibration=dict(windows=32, length=512)),
        study,
        metrics,
        60,
        99,
        complete=False,
    )
    half.to_csv(tmp_path / "qwen-0.5b/T7-measures.csv", index=False)
    run()
    said = (tmp_path / "smollm2-135m/T7-models.md").read_text()
    assert (
        "not run yet: qwen2.5-coder-1.5b" in said and
        "smollm2-135m: 50%, growth from 30% to 60%; qwen2.5-coder-0.5b: 50%, growth from 50% to 60%"
        in said)
    assert "not run to the end, so verdicts may change: qwen2.5-coder-0.5b." in said
    lines = said.split("\n\n")[0]
    assert (
        "| mix − c4, total, SparseGPT, low sparsity  " in lines
        and "| mix − c4, total, SparseGPT 50%  " in lines
    ), "a check that models judge at different sparsities names none"
    assert set(pd.read_csv(tmp_path / "smollm2-135m/T7-models.csv")["model"]) == {
        "smollm2-135m",
        "qwen2.5-coder-0.5b",
    }
