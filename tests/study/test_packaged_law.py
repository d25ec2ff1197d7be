"The mixing law that the package holds is that of the committed study."
import numpy as np
import pandas as pd
import pytest

import calib_prune
from calib_prune.core import DIMENSIONS, CalibPruneError
from calib_prune.questions.mixing import NEEDS
from calib_prune.statistics.mixing_law import CONSTANT, best_mix
from tests import ROOT


def test_the_packaged_law_is_that_of_the_study():
    law, table = calib_prune.fitted_law(), pd.read_csv(
        ROOT / "figures/mixing/smollm2-135m/T12-mixes.csv"
    )
    shares = [o for o in table if o.startswith("share_")]
    for strategy, mine in table.groupby("strategy"):
        said = law.predict(dict(zip(DIMENSIONS, mine[shares].iloc[0]))).set_index("dimension")
        mine = mine.set_index("dimension")
        expected = mine.predicted.loc[said.index]
        assert np.allclose(said.value, expected, atol=1e-6, equal_nan=True), strategy
        assert said.value.isna().equals(said.form == CONSTANT)
        assert np.allclose(
            said[["ci_low", "ci_high"]],
            mine.loc[said.index, ["ci_low", "ci_high"]],
            atol=0.005,
            equal_nan=True,
        ), strategy
    best, own = best_mix(law, NEEDS["Code and Math"]), pd.read_csv(
        ROOT / "figures/mixing/smollm2-135m/T12-best.csv"
    )
    own = own[own.need == "Code and Math"]
    assert np.allclose(best.share, own.share) and np.allclose(
        best[["low", "high"]], own[["low", "high"]], atol=0.051
    ), "a step apart at most"
    assert law.about.startswith("Answer bits. smollm2-135m; SparseGPT at 50%;")


def test_the_packaged_law_predicts_code_and_math_only():
    law = calib_prune.fitted_law()
    assert [d for d in DIMENSIONS if law.forms[d] != CONSTANT] == ["Code", "Math"]
    for need in (dict(General=1), dict(Commonsense=1), dict(worst=1), NEEDS["all alike"]):
        with pytest.raises(CalibPruneError): best_mix(law, need)


def test_the_table_of_forms_marks_what_the_law_takes():
    law, table = calib_prune.fitted_law(), pd.read_csv(
        ROOT / "figures/mixing/smollm2-135m/T12-forms.csv"
    )
    chosen = table[table.chosen].set_index("dimension").form
    assert chosen.to_dict() == law.forms
    for row in table.itertuples():
        assert row.left_out == pytest.approx(100 * law.errors[row.dimension][row.form], abs=1e-5)
