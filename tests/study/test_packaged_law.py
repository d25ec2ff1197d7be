"The mixing law that the package holds is that of the committed study."
import numpy as np
import pandas as pd

import calib_prune
from calib_prune.core import DIMENSIONS
from calib_prune.questions.mixing import NEEDS
from calib_prune.statistics.mixing_law import best_mix
from tests import ROOT


def test_the_packaged_law_is_that_of_the_study():
    law, table = calib_prune.fitted_law(), pd.read_csv(
        ROOT / "figures/mixing/smollm2-135m/T12-mixes.csv"
    )
    shares = [o for o in table if o.startswith("share_")]
    for strategy, mine in table.groupby("strategy"):
        said = law.predict(dict(zip(DIMENSIONS, mine[shares].iloc[0]))).set_index("dimension")
        mine = mine.set_index("dimension")
        assert np.allclose(said.value, mine.predicted.loc[said.index], atol=1e-6), strategy
        assert np.allclose(
            said[["ci_low", "ci_high"]], mine.loc[said.index, ["ci_low", "ci_high"]], atol=0.005
        ), strategy
    best, own = best_mix(law, NEEDS["the worst dimension"]), pd.read_csv(
        ROOT / "figures/mixing/smollm2-135m/T12-best.csv"
    )
    own = own[own.need == "the worst dimension"]
    assert np.allclose(best.share, own.share) and np.allclose(
        best[["low", "high"]], own[["low", "high"]], atol=0.051
    ), "a step apart at most"
    assert law.about.startswith("Answer bits. smollm2-135m; SparseGPT at 50%;")
