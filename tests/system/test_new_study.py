"`new-study`, and what `reproduce` says of presets and results of older layouts."
import json
import subprocess
from pathlib import Path

import pytest
import yaml

from calib_prune.cli.init import new_study, study_files, whole_paths
from calib_prune.cli.reproduce import (
    MOVED,
    check_layout,
    check_names,
    check_notebooks,
    check_workflow,
    preset_file,
)
from calib_prune.core import CalibPruneError
from calib_prune.pipeline.prune import DEFAULT_RECIPE, RECIPES
from calib_prune.study.plan import notebooks_of
from calib_prune.study.presets import load_preset


def test_a_new_study_holds_only_what_it_runs(tmp_path, capsys):
    new_study(str(tmp_path / "mine"), calibration=["c4", "generated:igsp"], windows=4, length=128,
              items=8, seed=[3], measure="answer-bits")
    files = {o.relative_to(tmp_path / "mine").as_posix() for o in tmp_path.rglob("*.*")}
    books = {f"nbs/paper/{o}.ipynb" for o in ("prune_and_score", "main", "generate")}
    assert files == books | {"presets/mine.yaml", "profiles/slurm/config.yaml", "study.ipynb"}
    assert (tmp_path / "mine/Snakefile").is_file()
    preset = load_preset(tmp_path / "mine/presets/mine.yaml")
    assert preset["calibration"] == dict(windows=4, length=128)
    assert preset["scoring"]["limit"] == 8 and preset["measure"] == "answer-bits"
    assert preset["grid"][0]["seeds"] == [3]
    assert preset["grid"][0]["methods"] == [RECIPES[DEFAULT_RECIPE].method], "as `prune` does"
    assert "--preset presets/mine.yaml" in capsys.readouterr().out
    check_notebooks(tmp_path / "mine", preset)


@pytest.mark.parametrize(
    "wrong,name",
    [(dict(windows=0), "--windows"), (dict(length=-1), "--length"), (dict(items=0), "--items"),
     (dict(seed=[0, -1]), "--seed"), (dict(measure="plane"), "measure 'plane'"),
     (dict(method=["admn"]), "'admn'"), (dict(calibration=["c5"]), "'c5'"),
     (dict(calibration=["c4", "-"]), "standard input (-)"),
     (dict(model="no/such/model"), "'no/such/model'"), (dict(sparsity=["2"]), "Sparsity 2")])
def test_a_wrong_option_is_named_before_anything_is_written(tmp_path, wrong, name):
    with pytest.raises(CalibPruneError) as e: new_study(str(tmp_path / "mine"), **wrong)
    assert name in str(e.value) and not (tmp_path / "mine").exists()


@pytest.mark.parametrize("text", [
    "a.jsonl:body", "*.jsonl:body", "~/?.txt", "c4=0.5, a.txt=0.5", "lang=en/a.txt",
    "lang=en/a.txt=2"])
def test_a_new_study_finds_its_text_from_its_own_folder(tmp_path, monkeypatch, text):
    (tmp_path / "a.jsonl").write_text('{"body": "Some text."}\n')
    (tmp_path / "lang=en").mkdir()
    for name in ("a.txt", "lang=en/a.txt"): (tmp_path / name).write_text("Some text.")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    new_study("mine", calibration=[text])
    monkeypatch.chdir(tmp_path / "mine")
    check_names(load_preset("presets/mine.yaml"))


def test_a_name_is_no_folder_of_this_name(tmp_path, monkeypatch):
    for name in ("c4", "uniform", "smollm2-135m"): (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path)
    new_study("my study", calibration=["c4", "uniform=0.5,c4=0.5"])
    preset = load_preset("my study/presets/my-study.yaml")
    assert [*preset["strategies"].values()] == ["c4", "uniform=0.5,c4=0.5"]
    assert preset["model"] == "smollm2-135m"


@pytest.mark.parametrize("mix", ["hub:a/b[c]:train#{text}", "generated:igsp warmths=[[1],[2]]"])
def test_what_is_no_path_stays_as_it_is(mix): assert whole_paths(mix) == mix


def test_a_study_without_a_notebook_that_it_runs_is_refused(tmp_path):
    preset = load_preset(study_files() / "presets/smoke.yaml") | dict(tables=["main", "draws"])
    (tmp_path / "nbs/paper").mkdir(parents=True)
    for name in ("main", "prune_and_score"): (tmp_path / f"nbs/paper/{name}.ipynb").touch()
    with pytest.raises(CalibPruneError, match="nbs/paper/draws.ipynb.* `calib-prune init"):
        check_notebooks(tmp_path, preset)


def test_the_notebooks_of_every_preset_are_known():
    for path in (study_files() / "presets").rglob("*.yaml"):
        if path.parent.name == "base": continue
        for name in notebooks_of(load_preset(path)):
            assert (study_files() / f"nbs/paper/{name}.ipynb").is_file(), f"{path}: {name}"


@pytest.mark.parametrize("old", ["{}", "presets/{}.yaml", "/some/where/presets/{}.yml"])
def test_an_old_preset_name_is_answered_with_the_new_one(tmp_path, old):
    for name, new in MOVED.items():
        with pytest.raises(CalibPruneError, match=f"now called '{new}'"):
            preset_file(old.format(name), tmp_path)


@pytest.mark.parametrize("old", ["default", "pruners"])
def test_the_command_that_moves_old_rows_moves_them(tmp_path, old):
    "The old folder of `pruners` is the parent of its new one."
    tmp_path = tmp_path / "my studies"
    (rows := tmp_path / "results" / old).mkdir(parents=True)
    (rows / "dense.json").write_text("{}")
    with pytest.raises(CalibPruneError, match="Nothing was changed") as e:
        check_layout(tmp_path, MOVED[old])
    assert [o.name for o in rows.iterdir()] == ["dense.json"]
    command = str(e.value).partition("Move them: ")[2]
    subprocess.run(command, shell=True, check=True)
    assert (tmp_path / "results" / MOVED[old] / "dense.json").read_text() == "{}"
    check_layout(tmp_path, MOVED[old])


@pytest.mark.parametrize(
    "extends,said",
    [("mine", "extends itself: mine.yaml → mine.yaml"),
     ("absent", "extends 'absent', but there is no file"), ([1], "must be the path of a file")])
def test_a_preset_on_a_wrong_base_is_refused(tmp_path, extends, said):
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(dict(name="mine", extends=extends)))
    with pytest.raises(CalibPruneError) as e: load_preset(tmp_path / "mine.yaml")
    assert said in str(e.value)


def test_the_notebook_of_a_new_study_names_its_preset_and_ends_in_the_choice(tmp_path, capsys):
    new_study(str(tmp_path / "mine"))
    cells = json.loads(Path(tmp_path, "mine/study.ipynb").read_text())["cells"]
    assert any('preset = "presets/mine.yaml"' in "".join(o["source"]) for o in cells)
    assert "choice_text(part)" in "".join(cells[-1]["source"])


def test_a_workflow_of_an_older_version_is_refused(tmp_path):
    old = "from calib_prune.study.plan import job_command, plan\n"
    (tmp_path / "Snakefile").write_text(old)
    with pytest.raises(CalibPruneError, match="older version.*`calib-prune init FOLDER`"):
        check_workflow(tmp_path)
    assert (tmp_path / "Snakefile").read_text() == old
    (tmp_path / "Snakefile").write_bytes((study_files() / "Snakefile").read_bytes())
    check_workflow(tmp_path)
