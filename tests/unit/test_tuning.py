"""Shares tuned on held-out text: mixes that read, text that stays clear of calibration, and moves
towards the worst."""

import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from calib_prune.calibration.sets import build_calibration, parse_mix
from calib_prune.calibration.sources import SOURCES
from calib_prune.core import DIMENSIONS
from calib_prune.model.tiny import tiny_tokenizer
from calib_prune.study.presets import load_preset
from calib_prune.study.tuning import (
    best_round_mix,
    heldout_windows,
    mix_of_shares,
    objective,
    tune_shares,
)
from tests import ROOT


@given(st.lists(st.floats(0.05, 1), min_size=4, max_size=4))
def test_a_mix_has_the_shares(values):
    shares = dict(zip(DIMENSIONS, values))
    weights = parse_mix(mix_of_shares(shares))
    for d in DIMENSIONS:
        mine = sum(w for k, w in weights.items() if SOURCES[k].dimension == d) / sum(
            weights.values()
        )
        assert mine == pytest.approx(shares[d] / sum(values), abs=1e-3)


@pytest.mark.real
def test_held_out_windows_are_in_no_calibration_set():
    tokenizer = tiny_tokenizer()
    held = heldout_windows(tokenizer, 5, 32, seed=100, used=8)
    sets = [
        build_calibration(mix, tokenizer, 20, 32, seed=100).tokens.tolist()
        for mix in ("uniform", "uniform-dimensions")
    ]
    used = {tuple(w) for one in sets for w in one}
    assert all(len(o) == 5 for o in held.values()) and not used & {
        tuple(w) for o in held.values() for w in o.tolist()
    }


def test_the_best_round_is_the_first_of_the_best():
    flat = tune_shares(lambda mix: dict.fromkeys(DIMENSIONS, 0.5), rounds=3)
    assert (flat[[f"share {d}" for d in DIMENSIONS]] == 0.25).all(axis=None) and best_round_mix(
        flat
    ) == flat["mix"].iloc[0]
    assert objective(dict(a=0.2, b=0.6)) == pytest.approx(0.6)


def test_every_round_prunes_the_mix_that_it_reports():
    seen = []
    table = tune_shares(
        lambda mix: seen.append(mix) or dict(General=0.6, Commonsense=0.6, Code=0.2, Math=0.4),
        rounds=4,
    )
    assert list(table["mix"]) == seen and table["share Code"].is_monotonic_increasing


def test_the_study_uses_the_best_round():
    root = ROOT
    rounds = pd.read_csv(root / "results/claims/smollm2-135m/tuning.csv")
    assert load_preset(root / "presets/claims/smollm2-135m.yaml")["strategies"][
        "tuned"
    ] == best_round_mix(rounds)
