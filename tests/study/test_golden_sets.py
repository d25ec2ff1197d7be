"The calibration sets of every packaged source, token by token."
import json

import pytest

from calib_prune.calibration.sets import build_calibration
from calib_prune.calibration.sources import FURTHER, HELDOUT, SOURCES
from calib_prune.model.loading import load_tokenizer
from tests import ROOT

GOLDEN = json.loads((ROOT / "tests/study/golden_sets.json").read_text())


@pytest.fixture(scope="module")
def tokenizer(): return load_tokenizer("smollm2-135m")


@pytest.mark.real
@pytest.mark.parametrize("name", GOLDEN)
def test_packaged_sets_hold_the_same_tokens_for_ever(name, tokenizer):
    source, golden = (SOURCES | FURTHER | HELDOUT)[name], GOLDEN[name]
    if golden["revision"] != source.revision: pytest.skip("another text")
    made = build_calibration(name, tokenizer, 32, 512, seed=1)
    assert made.content == golden["content"]


@pytest.mark.real
def test_packaged_sources_fill_a_smoke_set(tokenizer):
    cal, again = (build_calibration("uniform", tokenizer, 32, 512) for _ in range(2))
    assert cal.tokens.shape == (32, 512) and set(cal.counts.values()) == {2, 3}
    assert cal.content == again.content
