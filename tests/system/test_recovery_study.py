"A study whose models are recovered after pruning: the method `…+recover=STRATEGY` of a preset."
import json
from dataclasses import replace

import pytest
import yaml

from calib_prune.core import CalibPruneError
from calib_prune.study.cost import cell_seconds
from calib_prune.study.keys import cell_key
from calib_prune.study.presets import cells, load_preset
from tests.processes import finish, start
from tests.tiny_study import text_study

METHODS = ["wanda", "wanda+recover=own"]
TOKENS = 12 * 4 * 32  # twelve steps
RECOVERY = dict(tokens=TOKENS, windows=24, length=32, batch=4, rate=1e-3, loss="distil",
                temperature=1)


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    root = tmp_path_factory.mktemp("checkout")
    return text_study(root, METHODS, recovery=RECOVERY, tables=["recovery"])


def changed(checkout, tmp_path, **entries):
    preset = yaml.safe_load((checkout / "tiny.yaml").read_text()) | entries
    (tmp_path / "changed.yaml").write_text(yaml.safe_dump(preset))
    return load_preset(tmp_path / "changed.yaml")


@pytest.mark.real
def test_models_are_pruned_recovered_and_scored(checkout):
    finish(start("reproduce", "--preset", "tiny.yaml", "--jobs", "1", cwd=checkout, session=True,
                 PYTHONPATH=str(checkout)), 0)
    plain, trained = (json.loads((checkout / f"results/tiny/own-{method}-2of4-n4-s0.json")
                                 .read_text()) for method in METHODS)
    made = trained["record"]["recovery"]
    assert made["tokens"] == TOKENS and made["last_loss"] < made["first_loss"]
    assert made["windows_read"] == 24, "read twice"
    assert "recovery" not in plain["record"] and plain["rows"] != trained["rows"]
    assert plain["record"]["mean_error"] == trained["record"]["mean_error"], "the same prune"
    assert trained["record"]["key"]["versions"]["recover"] == 1
    assert not [*(checkout / "results/tiny").glob(".*.recovery")]
    lines = (checkout / "figures/tiny/T19-recovery.md").read_text().splitlines()
    assert "| before " in lines[0] and "| after own " in lines[0]
    assert (checkout / "figures/tiny/F16-recovery.png").is_file()


def test_keys_and_hours_count_the_training(checkout, tmp_path):
    def key(**entries):
        preset = changed(checkout, tmp_path, **entries)
        return [cell_key(preset, cell) for cell in cells(preset) if cell.method]
    plain, trained = key()
    longer = key(recovery=RECOVERY | dict(tokens=2 * TOKENS))
    assert longer[0] == plain and longer[1] != trained
    assert {*trained} - {*plain} == {"recovery"} and trained["pruning"] == plain["pruning"]
    preset = changed(checkout, tmp_path)
    [cell] = [cell for cell in cells(preset) if "recover" in cell.method]
    of_draw = [cell_key(preset, replace(cell, seed=seed))["recovery"]["text"]["seed"]
               for seed in (0, 1)]
    assert of_draw == [1000, 1001], "each draw has its own windows"
    seconds = cell_seconds(load_preset(checkout / "tiny.yaml"))
    assert seconds["own-wanda+recover=own-2:4-n4-s0".replace(":", "of")] > seconds[
        "own-wanda-2of4-n4-s0"]


@pytest.mark.parametrize("entries, says", [
    (dict(recovery=None), "needs the section `recovery`"),
    (dict(strategies=dict(own="generated:igsp")), "too short to train on"),
    (dict(strategies=dict(other="c4")), "strategy in wanda.recover=own"),
    (dict(dtype="bfloat16"), "needs dtype float32"),
    (dict(recovery=RECOVERY | dict(tokens=0)), "recovery.tokens"),
    (dict(recovery=dict(tokens=TOKENS)), "recovery.rate")])
def test_a_preset_that_cannot_recover_is_refused(checkout, tmp_path, entries, says):
    with pytest.raises(CalibPruneError, match=says): changed(checkout, tmp_path, **entries)
