"Verification: tables from rows, rows by their checksums, models from code."
import json
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from matplotlib.image import imsave

from calib_prune.cli.reproduce import stems_of
from calib_prune.cli.verify import claims_in
from calib_prune.core import CalibPruneError, file_sha256
from calib_prune.study import verify
from calib_prune.study.plan import study_of, table_jobs
from calib_prune.study.presets import load_preset
from calib_prune.study.provenance import FROM_FILE, read_provenance, sources_of_job
from calib_prune.study.results import load_cell
from calib_prune.study.rows import ROWS_FILE, all_rows
from calib_prune.study.sums import (
    SUMS,
    add_sums,
    changed_results,
    drop_sums,
    read_sums,
    result_names,
)
from tests import ROOT
from tests.processes import call, run

SMALL = "pruners/qwen-0.5b"  # the study whose tables take the shortest time
ROW = f"results/{SMALL}/uniform-wanda-0.6-n32-s0"


@pytest.fixture
def checkout(tmp_path):
    "A checkout with one study, whose rows and tables may be changed."
    for name in ("nbs", "presets", "Snakefile"): (tmp_path / name).symlink_to(ROOT / name)
    for kind in ("results", "figures"):
        shutil.copytree(ROOT / kind / SMALL, tmp_path / kind / SMALL)
    return tmp_path


@pytest.mark.parametrize("study", sorted(
    str(path.parent.relative_to(ROOT / "results")) for path in ROOT.glob(f"results/*/*/{SUMS}")))
def test_committed_results_are_as_they_were_made(study):
    folder = ROOT / "results" / study
    assert result_names(folder) and changed_results(folder) == {}


def test_every_study_with_rows_has_checksums():
    studies = [dense.parent for dense in ROOT.glob("results/[!.]*/[!.]*/dense.json")]
    assert len(studies) >= 12 and all(map(read_sums, studies))


WITH_TABLES = [path.parent for path in sorted(ROOT.glob(f"figures/*/*/{FROM_FILE}"))]


@pytest.mark.parametrize("study", [str(path.relative_to(ROOT / "figures")) for path in WITH_TABLES])
def test_committed_tables_are_in_step_with_rows_and_notebooks(study, monkeypatch):
    "Without running them: `verify --all` runs them, and takes minutes."
    monkeypatch.chdir(ROOT)
    made = read_provenance(ROOT / "figures" / study)
    plan = study_of(load_preset(f"presets/{study}.yaml"), f"presets/{study}.yaml", tables_only=True)
    jobs = {job.notebook: job for job in table_jobs(plan)}
    assert made.keys() == jobs.keys()
    for notebook, about in made.items():
        now = sources_of_job(jobs[notebook], ROOT)
        for name in ("results_sha256", "notebook_sha256"):
            assert about[name] == now[name], f"{notebook}: reproduce --preset {study} --tables-only"
        for file, digest in about["files"].items():
            assert file_sha256(ROOT / "figures" / study / file) == digest, file


def test_every_study_with_tables_says_what_they_are_made_from():
    assert {path.parent for path in ROOT.glob("figures/*/*/T*.csv")} == {*WITH_TABLES}


@pytest.mark.real
def test_changed_rows_and_tables_are_named(checkout, monkeypatch):
    monkeypatch.chdir(checkout)
    good = run("verify", SMALL, "--json", cwd=checkout)
    files = json.loads(good.stdout)["tables"][SMALL]
    assert len(files) >= 7 and {one["state"] for one in files} == {"identical"}

    row, table = Path(f"{ROW}.items.parquet"), Path(f"figures/{SMALL}/T10-pruners.md")
    items = pd.read_parquet(row)
    items.assign(value=items["value"] * 1.2).to_parquet(row)
    table.write_text(table.read_text().replace("Wanda", "Wandas", 1))
    bad = run("verify", "T10", code=1, cwd=checkout)
    assert f"{row}: changed after it was made" in bad.stdout
    assert f"{table}: differs (line" in bad.stdout
    assert "T10-pruners.csv: differs" in bad.stdout, "the row is part of the table"
    row.write_bytes(row.read_bytes()[:-100])
    broken = run("verify", SMALL, code=1, cwd=checkout)
    assert "pruners: differs (its notebook failed: " in broken.stdout and "identical." not in (
        broken.stdout)


def test_what_is_not_known_is_refused(checkout, monkeypatch):
    monkeypatch.chdir(checkout)
    assert "Say what to verify" in call("verify", code=1).stderr
    assert "Unknown study, table or figure 'T1O'. Did you mean 'T10'" in call(
        "verify", "T1O", code=1).stderr
    assert "the rows hold 8" in call("verify", SMALL, "--rerun", "99", code=1).stderr


def test_a_folder_without_rows_has_nothing_to_verify(tmp_path, monkeypatch):
    for name in ("nbs", "presets", "Snakefile"): (tmp_path / name).symlink_to(ROOT / name)
    monkeypatch.chdir(tmp_path)
    assert "has rows to verify" in call("verify", "--all", code=1).stderr


def test_a_claim_is_the_line_of_each_ledger(tmp_path):
    for study in ("claims/a", "claims/b"):
        (file := tmp_path / "figures" / study / "T7-claims.csv").parent.mkdir(parents=True)
        file.write_text(f"claim,check,verdict\nC1,rho,{study[-1]}\nC2,lead,no\n")
    found = claims_in(tmp_path, ["claims/a", "claims/b", "claims/c"])
    assert [(line["study"], line["verdict"]) for line in found["C1"]] == [
        ("claims/a", "a"), ("claims/b", "b")]


def test_pictures_are_compared_by_their_pixels(tmp_path):
    kept, made = tmp_path / "kept.png", tmp_path / "made.png"
    pixels = np.zeros((100, 100, 3))
    imsave(kept, pixels)
    states = []
    for changed in (0, 5, 50):  # of 10,000
        pixels[0, :changed] = 1
        imsave(made, pixels, metadata={"Software": str(changed)})
        states.append(verify.compare_files(made, kept).state)
    assert states == [verify.IDENTICAL, verify.WITHIN, verify.DIFFERS]
    made.write_bytes(made.read_bytes()[:60])
    assert "cannot be read" in verify.compare_files(made, kept).far


def test_results_that_a_study_will_make_lose_their_checksums_first(tmp_path):
    left = dict(models={"c4-s0": "new"}, texts={"results/x/generated/igsp-s0.jsonl": "new"},
                metrics={"c4": "new", "own text": "new"}, audits={})
    names = ("c4-s0.json", "c4-s0.items.parquet", "c4-s01.json", "generated/igsp-s0.pool.json",
             "metrics/own-text.jsonl", "metrics/c4.json", "metrics/c4b.json")
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    add_sums(tmp_path)
    assert {*read_sums(tmp_path)} == {*names}
    drop_sums(tmp_path, stems_of(left))
    assert {*read_sums(tmp_path)} == {"c4-s01.json", "metrics/c4b.json"}


def test_models_are_compared_by_their_items_and_keys():
    study = study_of(load_preset(f"presets/{SMALL}.yaml"), "p.yaml", tables_only=True)
    folder = ROOT / study.results
    dense, kept, other = (load_cell(folder / f"{name}.json") for name in (
        "dense", "uniform-wanda-0.6-n32-s0", "uniform-sparsegpt-0.6-n32-s0"))
    assert verify.compare_rows("x", kept, kept, dense).state == verify.IDENTICAL
    assert "other settings" in verify.compare_rows("x", other, kept, dense).far
    key = kept.record["key"]
    moved = key | dict(calibration=[["stdlib", "Python 3.11.7#0123456789ab"]])
    here = key | dict(calibration=[["stdlib", "Python 3.13.5#0123456789ab"]])
    assert verify.compare_keys("x", here, moved).state == verify.OTHER_TEXT
    near, far = load_cell(folder / "uniform-wanda-0.6-n32-s0.json"), load_cell(
        folder / "uniform-wanda-0.6-n32-s0.json")
    near.items["value"] *= 1.0001
    far.items["value"] *= 1.1
    assert verify.compare_rows("x", near, kept, dense).state == verify.DIFFERS, "the same machine"
    for made in (near, far): made.record["processor"] = "another kind"
    found = [verify.compare_rows("x", made, kept, dense) for made in (near, far)]
    assert [one.state for one in found] == [verify.WITHIN, verify.DIFFERS]
    for part in (near, far, kept, dense):  # a study without all dimensions has no total
        part.items = part.items[part.items["dimension"] != "Math"].reset_index(drop=True)
    far.items["value"] *= 1.1  # of a dimension, more may differ than of the total
    found = [verify.compare_rows("x", made, kept, dense) for made in (near, far)]
    assert [one.state for one in found] == [verify.WITHIN, verify.DIFFERS]
    assert "no total; here another kind" in found[0].far


def test_the_same_seed_draws_the_same_models():
    study = study_of(load_preset(f"presets/{SMALL}.yaml"), "p.yaml", tables_only=True)
    drawn = [[name for _, name in verify.rows_to_repeat([study], [SMALL], 3, seed)]
             for seed in (0, 0, 1)]
    assert drawn[0] == drawn[1] != drawn[2] and "dense" not in drawn[0]
    with pytest.raises(CalibPruneError, match="99 models cannot be made again"):
        verify.rows_to_repeat([study], [SMALL], 99, 0)


def test_the_table_of_all_rows_is_in_step():
    rows, kept = all_rows(ROOT), pd.read_parquet(ROOT / ROWS_FILE)
    assert rows.equals(kept), "calib-prune reproduce --tables-only renews it"
    models = kept.drop_duplicates(["study", "cell"])
    assert len(models) > 800 and not kept.duplicated(["study", "cell", "task", "metric"]).any()


def test_the_data_sheet_names_every_column():
    text = (ROOT / "docs/data-sheet.md").read_text()
    assert [name for name in pd.read_parquet(ROOT / ROWS_FILE) if f"`{name}`" not in text] == []


def test_a_damaged_row_is_named(tmp_path):
    (file := tmp_path / "results/claims/mine/dense.json").parent.mkdir(parents=True)
    file.write_text("{")
    with pytest.raises(CalibPruneError, match=str(file)): all_rows(tmp_path)
