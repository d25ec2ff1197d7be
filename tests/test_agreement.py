"Which verdicts depend on the measure."
import numpy as np
import pandas as pd
import pytest

from calib_prune.core import DIMENSIONS
from calib_prune.report.agreement import (DEPENDS, NONE, ONE, OPEN, ROBUST, UNTESTED, agreement, agreement_note, dimensions_of,
                                          ledgers)
from calib_prune.report.claims import study_ledger
from calib_prune.report.estimates import CHECKS, MODEL, NOT, PRESET, SIGN, SIZE, UNCLEAR
from calib_prune.report.selection import measured


def judged(*verdicts):
    "A ledger of one check under three measures: (verdict, whether the measure can tell)."
    rows = [dict(measure=m, name="C6", claim="C6", check="mix − best", verdict=v, tells=t)
            for m, (v, t) in zip(("answer-bits", "above-chance", "plain"), verdicts)]
    return agreement(pd.DataFrame(rows)).iloc[0]


@pytest.mark.parametrize("verdicts, said", [
    (((SIZE, True), (SIGN, True), (NOT, False)), ROBUST),    # both on the paper's side
    (((SIZE, True), (SIGN, False), (NOT, True)), DEPENDS),
    (((UNCLEAR, True), (SIGN, True), (SIGN, True)), DEPENDS),
    (((NOT, True), (SIGN, False), (SIGN, False)), ONE),
    (((NOT, True), (NOT, True), (NOT, True)), ROBUST),
    (((NOT, False), (SIGN, False), (SIGN, False)), NONE),
    (((UNCLEAR, True), (UNCLEAR, True), (SIGN, False)), OPEN),
    (((PRESET, True), (PRESET, True), (MODEL, True)), UNTESTED),
    (((PRESET, True), (SIGN, True), (SIZE, True)), ROBUST)])
def test_agreement(verdicts, said):
    found = judged(*verdicts)
    assert found["agreement"] == said
    assert [found[o] for o in ("Answer bits", "Above chance", "Plain ratio")] == [v if t else "cannot tell" for v, t in verdicts]


def test_what_each_check_needs():
    assert dimensions_of("C1 wanda") == ("General",) and dimensions_of("O2 math") == ("General", "Math")
    assert set(dimensions_of("C4")) == {"General", "Code", "Math"} and "Code" not in dimensions_of("O3 best")
    for name in ("C5", "C6", "C6 share", "C7 sgs", "C9"): assert dimensions_of(name) == DIMENSIONS
    assert agreement_note(pd.DataFrame(dict(agreement=[ROBUST, ONE, ROBUST]))) == f"2 of 3 checks: {ROBUST}; 1 of 3 checks: {ONE}."


def test_rows_without_a_measure_leave_it_out():
    from tests.test_claims import like_paper
    from calib_prune.report.examples import example_preset
    study, metrics = like_paper()
    for o in study.values():
        right = o.items[o.items.metric != "bits"]
        o.items = pd.concat([o.items, right.assign(metric="bits", value=3 - right.value, bytes=1)], ignore_index=True)
    preset = example_preset(study) | dict(calibration=dict(windows=32, length=512))
    table = ledgers(preset, study, metrics, 60, 99)
    assert set(table["measure"]) == {"answer-bits", "plain"} and len(table) == 2 * len(CHECKS)
    at = table.set_index(["measure", "name"])
    assert np.isclose(at.loc[("plain", "C6 c4"), "ours"], 22.5) and at.loc[("answer-bits", "C6 c4"), "ours"] < 22.5
    again = ledgers(preset, study, metrics, 60, 99, known={"plain": study_ledger(measured(preset, study, 60), metrics, n_perm=99)})
    pd.testing.assert_frame_equal(again, table)
