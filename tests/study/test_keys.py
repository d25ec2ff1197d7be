"""What a finished result survives: every committed one, under more entries in the registries,
raised versions, and other settings."""
import json
import os
import platform
import shutil
from dataclasses import replace

import pytest

from calib_prune.calibration.sources import SOURCES, get_source
from calib_prune.core import CalibPruneError
from calib_prune.evaluation.tasks import TASKS
from calib_prune.pipeline import records
from calib_prune.pipeline.records import versions
from calib_prune.pruning.methods import METHODS
from calib_prune.study import keys
from calib_prune.study.keys import OLDER, cell_key, changes, left_to_do, scored_items
from calib_prune.study.presets import (
    cells,
    find_cell,
    load_preset,
    measured_strategies,
    protocol_of,
)
from tests import ROOT

RESULTS = ROOT / "results/claims/smollm2-135m"
PRESET = load_preset(ROOT / "presets/claims/smollm2-135m.yaml")
PLANNED = cells(PRESET, ablations=True)
# a study may still be growing
CELLS = [c for c in PLANNED if (RESULTS / f"{c.name}.json").is_file()]
pytestmark = pytest.mark.real  # keys name the fetched text


def versions_recorded():
    """The versions of the stages that made the committed results; today's where none was made by a
    stage."""
    found = versions()
    for path in (*RESULTS.glob("*.json"), *RESULTS.glob("*/*.json")):
        done = json.loads(path.read_text())
        found |= (done.get("record", done).get("key") or {}).get("versions", {})
    return found


THEN = versions_recorded()


@pytest.fixture(autouse=True)
def as_the_committed_results_were_made(monkeypatch):
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(records, "versions", lambda: dict(THEN))


def left(preset=PRESET, folder=RESULTS, **options):
    "What a study has to make again; what was never made is another matter."
    return {
        kind: {k: why for k, why in found.items() if why != "not made yet"}
        for kind, found in left_to_do(preset, folder, **options).items()
    }


def of_method(*methods): return {c.name for c in CELLS if c.method in methods}
def of_protocol(name):
    return {
        c.mix
        for c in PLANNED
        if (own := protocol_of(PRESET["strategies"].get(c.strategy, ""))) and own[0] == name
    }


def test_every_committed_result_is_finished_but_for_raised_versions(monkeypatch):
    assert left() == dict(models={}, texts={}, metrics={}, audits={})
    monkeypatch.setattr(records, "versions", versions)
    raised = {f"versions.{k}: {v} → {versions()[k]}" for k, v in THEN.items() if versions()[k] != v}
    assert {
        part for mine in left().values() for why in mine.values() for part in why.split("; ")
    } <= raised
    kept = {
        str(o.relative_to(RESULTS))
        for o in RESULTS.rglob("*.json")
        if not o.name.startswith(".") and "notebooks" not in o.parts
    }
    assert (
        len(CELLS) == 364
        and {f"{c.name}.json" for c in CELLS} | {f"metrics/{k}.json" for k in STRATEGIES} <= kept
    )


def test_another_python_leaves_everything_finished(monkeypatch):
    library = vars(SOURCES["stdlib"])
    monkeypatch.setitem(library, "revision", "Python 3.13.5#0123456789ab")
    assert not any(left().values()), "its library is another text, which made no committed result"
    monkeypatch.setitem(library, "revision", "another text")
    assert "stdlib-sparsegpt-0.5-n32-s0" in left()["models"]


@pytest.mark.skipif(platform.python_version() != "3.11.7", reason="another Python, another text")
def test_the_library_of_one_python_is_one_text():
    recorded = json.loads((RESULTS / "stdlib-sparsegpt-0.5-n32-s0.json").read_text())["record"]
    assert recorded["key"]["calibration"]["sources"] == [["stdlib", SOURCES["stdlib"].revision, 32]]


def test_more_entries_in_the_registries_leave_everything_finished(monkeypatch):
    more = ((METHODS, "wanda"), (SOURCES, "stdlib"), (TASKS, "sciq"))
    for registry, name in more:
        monkeypatch.setitem(registry, "other", replace(registry[name], name="other"))
    assert left() == dict(models={}, texts={}, metrics={}, audits={})


ALL = {c.name for c in CELLS}
STRATEGIES = set(measured_strategies(PRESET))
USES = {  # stage → which results of each kind have to be made again when its version is raised
    "sparsegpt": dict(models=of_method("sparsegpt")), "wanda": dict(models=of_method("wanda")),
    "magnitude": {}, "balanced": dict(models=of_method("balanced")),
    "minimax": dict(models=of_method("minimax")), "scoring": dict(models=ALL),
    "calibration set": dict(models=ALL - {"dense", "floor"},
                            metrics=STRATEGIES), "metrics": dict(metrics=STRATEGIES),
    "audit": dict(audits={"contamination", "contamination-written"}), "sgs": dict(
        texts=of_protocol("sgs"),
        models={c.name for c in CELLS if c.mix in of_protocol("sgs")},
        metrics={"sgs"},
        audits={"contamination-written"})}


@pytest.mark.parametrize("stage", USES)
def test_a_raised_version_leaves_what_it_made_and_nothing_else(stage, monkeypatch):
    monkeypatch.setattr(records, "versions", lambda: THEN | {stage: THEN[stage] + 1})
    found = left()
    assert {k: set(v) for k, v in found.items()} == dict(
        models=set(), texts=set(), metrics=set(), audits=set()
    ) | USES[stage]
    assert all(f"versions.{stage}: {THEN[stage]} → {THEN[stage] + 1}" in why
               for mine in found.values() for why in mine.values())


def test_the_models_own_text_comes_before_the_metrics(monkeypatch):
    monkeypatch.setattr(records, "versions", lambda: THEN | {"self-cal": 2})
    assert set(left()["metrics"]) == STRATEGIES | {"own text"}


def test_another_damping_leaves_those_that_use_it():
    found = left(PRESET | dict(pruning=PRESET["pruning"] | dict(damping=0.02, offload=True)))
    assert (
        set(found["models"]) == of_method("sparsegpt", "balanced", "minimax")
        and not found["texts"] | found["metrics"] | found["audits"]
    )
    assert set(found["models"].values()) == {"pruning.damping: 0.01 → 0.02"}


def test_another_prompt_leaves_what_reads_it(monkeypatch):
    monkeypatch.setitem(TASKS, "piqa", replace(TASKS["piqa"], prompt="Goal: {goal}\nAnswer:"))
    found = left()
    assert set(found["models"]) == ALL and set(found["models"].values()) == {"tasks.piqa changed"}
    assert set(found["metrics"]) == STRATEGIES and set(found["audits"]) == {
        "contamination", "contamination-written"} and not found["texts"]
    monkeypatch.setitem(
        TASKS, "piqa",
        replace(TASKS["piqa"],
                prompt="Question: {goal}\nAnswer:",
                description="Better told",
                overlaps=("c4", )))
    assert not left()["models"], "a description is not scored"


def test_fewer_items_leave_the_models_alone_that_have_them():
    limit = PRESET["scoring"]["limit"]
    assert not left(PRESET | dict(scoring=PRESET["scoring"] | dict(limit=limit | dict(boolq=5))))[
        "models"
    ], "of a task that is not scored"
    assert set(
        left(PRESET
             | dict(scoring=PRESET["scoring"] | dict(limit=limit | dict(piqa=5))))["models"]) == ALL


def test_items_that_are_passed_over_are_part_of_the_key_and_of_no_reference():
    study = load_preset(ROOT / "presets/smoke.yaml")
    others = study | dict(scoring=study["scoring"] | dict(skip=64))
    cell = cells(study)[1]
    assert cell_key(others, cell)["tasks"].keys() == cell_key(study, cell)["tasks"].keys()
    assert not cell_key(others, cell)["tasks"].items() & cell_key(study, cell)["tasks"].items()
    assert all(scored_items(others)[k] == n + 64 for k, n in scored_items(study).items())


def test_how_many_answers_are_written_at_once_is_part_of_the_key_where_it_is_set():
    preset = load_preset(ROOT / "presets/smoke.yaml")
    other = preset | dict(scoring=preset["scoring"] | dict(batch_size=32))
    usual, larger = (cell_key(o, cells(o)[0]) for o in (preset, other))
    assert "batch_size" not in usual and larger == usual | dict(batch_size=32)


def test_the_key_of_a_folder_is_that_of_its_weights(tmp_path, monkeypatch):
    (weights := tmp_path / "m/model.safetensors").parent.mkdir()
    weights.write_bytes(b"weights")
    monkeypatch.setenv("HOME", str(tmp_path))
    key = lambda name=str(tmp_path / "m"): keys.model_key(PRESET | dict(model=name))["weights"]
    first = key()
    for name in ("report.json", "calib_prune.json"): (tmp_path / "m" / name).write_text("{}")
    assert key() == key("~/m") == first, "our own notes beside it change no result"
    weights.write_bytes(b"others")
    assert key("~/m") != first
    large = bytearray(3 << 20)
    weights.write_bytes(large)
    os.utime(weights, (1, 1))
    before = key()
    large[len(large) // 2] = 1
    weights.write_bytes(large)
    assert key() != before, "also if only the middle of a large file changed"


def test_another_text_in_a_file_is_another_key(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "one", "other": "two"}\n')
    key = lambda name: keys.calibration_key(str(name), 4, 8, 0)
    first = key(path)
    assert key(shutil.copy(path, tmp_path / "b.jsonl")) == first, "wherever it lies"
    assert "other" in changes(first, key(f"{path}:other")), "another field of it"
    path.write_text('{"text": "three"}\n')
    assert key(path) != first


def test_text_that_changes_while_a_model_is_made_keeps_no_row(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("one")
    preset = PRESET | dict(strategies=dict(own=str(path)))
    cell = replace(find_cell(PRESET, "c4-sparsegpt-0.5-n32-s0"), strategy="own", mix=str(path))
    drawn = dict(sources={str(path): get_source(str(path)).revision})
    assert keys.describe_run(preset, cell, "sha256:0", drawn)["calibration"] == drawn
    path.write_text("two")
    with pytest.raises(CalibPruneError, match="has changed while the model was made"):
        keys.describe_run(preset, cell, "sha256:0", drawn)


# --- results of an older scheme, and damaged ones

@pytest.fixture
def copied(tmp_path):
    shutil.copytree(
        RESULTS,
        tmp_path / "results",
        ignore=shutil.ignore_patterns("notebooks", ".*", "*.parquet", "*.log"),
    )
    return tmp_path / "results"


def contents(folder):
    return {o.relative_to(folder): o.read_bytes() for o in sorted(folder.rglob("*")) if o.is_file()}


def with_old_keys(folder):
    "Results as version 0.1 left them: instead of a key, a hash of whole modules."
    found = [
        path
        for path in (*folder.glob("*.json"), *folder.glob("*/*.json"))
        if '"key"' in path.read_text()
    ]
    for path in found:
        done = json.loads(path.read_text())
        record = done.get("record", done)
        del record["key"]
        record["identity"] = "0123456789abcdef"
        path.write_text(json.dumps(done))
    return len(found)


def test_results_of_an_older_scheme_are_refused_and_kept(copied):
    count, before = with_old_keys(copied), contents(copied)
    assert count > len(CELLS) + len(STRATEGIES)
    with pytest.raises(CalibPruneError, match=f"{count} .*--preset claims/smollm2-135m --again"):
        left(folder=copied)
    found = left(folder=copied, again=True)
    assert all(why.endswith(OLDER) for mine in found.values() for why in mine.values())
    assert sum(map(len, found.values())) == count and set(found["models"]) == ALL and set(
        found["metrics"]) == STRATEGIES | {"own text"}
    assert contents(copied) == before, "asking changes nothing"


@pytest.mark.parametrize("name, text", [  # each kind of record, each kind of damage
    ("dense.json", ""), ("generated/sgs-s0.report.json", '{"record": '), ("metrics/c4.json", "[]"),
    ("metrics/own-text.report.json", "<<<<<<< HEAD\n{}\n=======\n{}\n>>>>>>> other\n"),
    ("contamination.json", "[" * 100_000), ("metrics/own-text.report.json", "\udcff")])
def test_a_damaged_record_is_named(copied, name, text):
    (copied / name).write_bytes(text.encode(errors="surrogateescape"))
    before = contents(copied)
    with pytest.raises(CalibPruneError, match=f"{name} .*git checkout"):
        left(folder=copied)
    assert contents(copied) == before
