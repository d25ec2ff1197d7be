"""The golden numbers hold, and they notice: what moves the numbers of a stage is told, with the
version to raise."""
import json
from dataclasses import replace
from functools import partial

import pytest

from calib_prune.pipeline import records
from calib_prune.pruning import methods
from tests import ROOT, golden

pytestmark = pytest.mark.real  # a slice of the default model, on fetched text
SEEN = json.loads(golden.FILE.read_text())
BESIDE = {
    "calibration set": "CALIBRATION_VERSION = ", "scoring": "SCORING_VERSION = ",
    "metrics": "METRICS_VERSION = ", "audit": "AUDIT_VERSION = ", "self-cal": "SELF_CAL_VERSION = ",
    "sgs": "SGS_VERSION = ", "igsp": "IGSP_VERSION = ", "third": "THIRD_VERSION = "}


def notebook(stage):
    "Where the version of a stage stands."
    text = BESIDE.get(stage, f'Method(\\"{stage}\\"')
    found = [
        o.relative_to(ROOT) for o in sorted(ROOT.glob("nbs/**/*.ipynb")) if text in o.read_text()
    ]
    assert len(found) == 1, (stage, found)
    return str(found[0])


def check(stage, now, then=None):
    "Fail if the numbers of a stage moved, and say which version to raise and where."
    then = then or SEEN["stages"][stage]
    found = golden.deviations(now, {k: v for k, v in then["numbers"].items() if k in now})
    worst = max(found, key=found.get)
    if found[worst] <= golden.tolerance(stage): return
    pytest.fail(
        f"Numbers of the stage {stage!r} moved: {worst} by {found[worst]:.2g}, more than"
        f" {golden.tolerance(stage):g}. If that is meant, raise its version in {notebook(stage)}"
        " and run python -m tests.golden --renew; if not, it is a fault."
    )


def test_every_stage_has_golden_numbers():
    assert set(golden.STAGES) == set(records.versions()) == set(SEEN["stages"])


@pytest.mark.parametrize("stage", golden.STAGES)
def test_numbers_hold(stage):
    assert (
        SEEN["stages"][stage]["version"] == records.versions()[stage]
    ), "write down the new version: python -m tests.golden --renew"
    check(stage, golden.compute(stage))


def shifted(original): return lambda *args, **how: original(*args, **how) + 1
def scaled(original):
    return lambda logits, *args: tuple(
        o * (1 + 1e-4) if o.dtype.is_floating_point else o for o in original(logits, *args)
    )
def with_method(name, **changes):
    return methods.METHODS | {name: replace(methods.METHODS[name], **changes)}
def not_rooted(original): return lambda w, h, *how: original(w, h.square(), *how)


CHANGES = {  # what an edit might do by the way → stage, module, name, the new value of it
    "windows begin a token later": ("calibration set", "calib_prune.calibration.sets",
                                    "window_starts", shifted),
    "other random numbers": ("self-cal", "calib_prune.generation.sampling", "uniforms",
                             lambda o: lambda seed, *more: o(seed + 1, *more)),
    "no repetition penalty": ("sgs", "calib_prune.generation.sampling", "penalised",
                              lambda o: lambda logits, *_: logits),
    "a pool chosen at random": ("igsp", "calib_prune.generation.igsp", "select",
                                lambda o: lambda *a: o(*a[:2], False, *a[3:])),
    "damping of 0.0101": ("sparsegpt", "tests.golden", "prune",
                          lambda o: partial(o, damping=0.0101)),
    "the last window forgotten": (
        "wanda", "calib_prune.pruning.walk", "split",
        lambda o: lambda tokens, size, groups: o(tokens[:-1], size, groups[:-1])),
    "Wanda without its root": ("wanda", "calib_prune.pruning.methods", "wanda", not_rooted),
    "a weight fewer": ("magnitude", "calib_prune.pruning.methods", "magnitude",
                       lambda o: lambda w, h, s, p: o(w, h, s - 0.002, p)),
    "fewer rounds": ("minimax", "calib_prune.pruning.methods", "METHODS", lambda o: o | {
        "minimax": replace(o["minimax"], solve=partial(methods._minimax, rounds=4))}),
    "groups by their size": ("balanced", "calib_prune.pruning.robust", "relative_moments",
                             lambda o: lambda weights, moments: moments),
    "log-likelihoods off by a ten-thousandth": ("scoring", "calib_prune.model.likelihood",
                                                "token_scores", scaled),
    "the first number counts": ("scoring", "calib_prune.evaluation.scoring", "last_number",
                                lambda o: lambda text: o(text.split(",")[0])),
    "triples, not 4-grams": ("metrics", "calib_prune.calibration.oit", "aggregation",
                             lambda o: lambda tokens, n, reading: o(tokens, 3, reading)),
    "numbers as they stand": ("audit", "calib_prune.evaluation.contamination", "words",
                              lambda o: lambda text, numbers: o(text, "keep"))}


@pytest.mark.parametrize("what", CHANGES)
def test_a_change_of_numbers_is_noticed(what, monkeypatch):
    stage, module, name, change = CHANGES[what]
    monkeypatch.setattr(
        f"{module}.{name}", change(getattr(__import__(module, fromlist=[name]), name))
    )
    with pytest.raises(
        pytest.fail.Exception,
        match=rf"stage {stage!r} moved.*raise its version in nbs/\w+/\w+\.ipynb",
    ):
        check(stage, golden.compute(stage, slice(1)))


def test_moved_numbers_are_written_down_only_under_a_new_version(monkeypatch, tmp_path):
    monkeypatch.setattr(golden, "FILE", tmp_path / "golden.json")
    monkeypatch.setattr(golden, "STAGES", {"wanda": golden.STAGES["wanda"][:1]})
    golden.renew(["wanda"])
    first, version = golden.FILE.read_text(), methods.METHODS["wanda"].version
    monkeypatch.setattr(methods, "wanda", not_rooted(methods.wanda))
    with pytest.raises(
        SystemExit, match=f"wanda: .* moved by .* under version {version}: raise the version first"
    ):
        golden.renew(["wanda"])
    assert golden.FILE.read_text() == first
    monkeypatch.setattr(methods, "METHODS", with_method("wanda", version=version + 1))
    monkeypatch.setattr(records, "METHODS", methods.METHODS)
    golden.renew(["wanda"])
    kept = json.loads(golden.FILE.read_text())
    assert (
        kept["stages"]["wanda"]["version"] == version + 1
        and kept["stages"]["wanda"]["numbers"] != json.loads(first)["stages"]["wanda"]["numbers"]
    )


def test_machines_that_were_seen_are_far_within_the_tolerance():
    kinds = {o["machine"]["instructions"] for o in SEEN["seen"]}
    assert {"AVX2", "AVX512"} <= kinds
    assert all(10 * v <= golden.tolerance(k) for o in SEEN["seen"] for k, v in o["largest"].items())
