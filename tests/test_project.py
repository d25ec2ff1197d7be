"The repository keeps its promises about itself: notebooks are the source, README follows, versions agree."
import ast
import configparser
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import nbformat
import pytest

import calib_prune

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS = sorted(ROOT.glob("nbs/**/*.ipynb"))


def test_modules_are_what_the_notebooks_export(tmp_path):
    "Exporting into a copy changes no module."
    import shutil
    for name in ("nbs", "calib_prune"): shutil.copytree(ROOT / name, tmp_path / name)
    shutil.copy(ROOT / "settings.ini", tmp_path)
    subprocess.run([str(Path(sys.executable).parent / "nbdev_export")], cwd=tmp_path, check=True, capture_output=True)
    for path in (tmp_path / "calib_prune").glob("*.py"):
        assert path.read_text() == (ROOT / "calib_prune" / path.name).read_text(), f"{path.name}: run `make export`"
    assert {p.name for p in (tmp_path / "calib_prune").glob("*.py")} == {p.name for p in (ROOT / "calib_prune").glob("*.py")}


def test_readme_is_rendered_from_its_notebook():
    done = subprocess.run([sys.executable, "scripts/readme.py", "--check"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_versions_agree():
    settings = configparser.ConfigParser()
    settings.read(ROOT / "settings.ini")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    citation = re.search(r"^version: (.+)$", (ROOT / "CITATION.cff").read_text(), re.M)[1]
    assert settings["DEFAULT"]["version"] == project["version"] == calib_prune.__version__ == citation


def test_notebooks_are_in_reading_order_and_titled():
    assert NOTEBOOKS
    for path in NOTEBOOKS:
        first = nbformat.read(path, 4).cells[0]
        assert first.cell_type == "markdown" and re.match(r"# .+\n+> .+", first.source), path.name


@pytest.mark.parametrize("path", [p for p in NOTEBOOKS if p.parent.name != "paper"], ids=lambda p: p.name)
def test_library_notebooks_hold_their_outputs(path):
    "Readers see results without running anything: no error, and something shown."
    outputs = [o for c in nbformat.read(path, 4).cells if c.cell_type == "code" for o in c.outputs]
    assert outputs and all(o.output_type != "error" for o in outputs)


@pytest.mark.parametrize("path", sorted(ROOT.glob("nbs/paper/*.ipynb")), ids=lambda p: p.name)
def test_parameter_cells_hold_literals_only(path):
    "papermill injects after this cell, so nothing in it may be derived."
    cells = [c for c in nbformat.read(path, 4).cells if "parameters" in c.metadata.get("tags", [])]
    assert len(cells) == 1
    for statement in ast.parse(cells[0].source).body:
        assert isinstance(statement, ast.Assign)
        ast.literal_eval(statement.value)


def test_paper_notebooks_are_committed_without_outputs():
    "Their results belong to a run, not to the source."
    for path in ROOT.glob("nbs/paper/*.ipynb"):
        assert not any(c.get("outputs") for c in nbformat.read(path, 4).cells), path.name


def test_nothing_runs_code_that_came_with_a_model():
    for path in (ROOT / "calib_prune").glob("*.py"):
        assert not re.search(r"trust_remote_code\s*[=:]\s*True|torch\.load\(|pickle\.load", path.read_text()), path.name
