"""The repository keeps its promises about itself: notebooks are the source, README follows,
versions agree."""
import ast
import configparser
import json
import re
import subprocess
import sys
import tomllib
from functools import cache
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import calib_prune
from calib_prune.study.artefacts import NOTEBOOKS as NOTEBOOKS_OF_TABLES
from calib_prune.study.artefacts import made_by
from tests import ROOT

NOTEBOOKS = sorted(ROOT.glob("nbs/**/*.ipynb"))


class Part(dict):
    "Of a notebook; nbformat has the same, and takes two seconds to import."
    __getattr__ = dict.__getitem__


@cache
def cells(path: Path) -> list[Part]:
    found = json.loads(path.read_text(), object_hook=Part).cells
    for cell in found: cell["source"] = "".join(cell.source)
    return found


def modules(folder: Path) -> dict[str, Path]:
    "Module → file, of the package in a folder."
    files = {
        p.relative_to(folder).with_suffix("").as_posix().replace("/", "."): p
        for p in (folder / "calib_prune").rglob("*.py")
    }
    assert len(files) > 40
    return files


def test_modules_are_what_the_notebooks_export(tmp_path):
    "Exporting into a copy changes no module."
    import shutil
    for name in ("nbs", "calib_prune"): shutil.copytree(ROOT / name, tmp_path / name)
    shutil.copy(ROOT / "settings.ini", tmp_path)
    subprocess.run(
        [str(Path(sys.executable).parent / "nbdev_export")],
        cwd=tmp_path,
        check=True,
        capture_output=True,
    )
    exported, committed = modules(tmp_path), modules(ROOT)
    for name, path in exported.items():
        assert path.read_text() == committed[name].read_text(), f"{name}: run `make export`"
    assert set(exported) == set(committed)


def test_readme_is_rendered_from_its_notebook():
    done = subprocess.run(
        [sys.executable, "scripts/readme.py", "--check"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


def test_versions_agree():
    settings = configparser.ConfigParser()
    settings.read(ROOT / "settings.ini")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    citation = re.search(r"^version: (.+)$", (ROOT / "CITATION.cff").read_text(), re.M)[1]
    cards = [json.loads((ROOT / name).read_text())["version"]
             for name in ("codemeta.json", ".zenodo.json")]
    assert {settings["DEFAULT"]["version"], project["version"], citation, *cards} == {
        calib_prune.__version__}


def test_a_version_has_at_most_60_lines_in_the_changelog():
    first, *versions = re.split(r"^## ", (ROOT / "CHANGELOG.md").read_text(), flags=re.M)
    assert len(versions) > 1 and f"{calib_prune.__version__} " in versions[0] + versions[1]
    for text in versions: assert len(text.splitlines()) <= 60, text.splitlines()[0]


def test_notebooks_are_in_reading_order_and_titled():
    assert NOTEBOOKS
    for path in NOTEBOOKS:
        first = cells(path)[0]
        assert first.cell_type == "markdown" and re.match(r"# .+\n+> .+", first.source), path.name


UNNUMBERED = {ROOT / "nbs/paper", ROOT / "nbs/pages"}


def test_notebooks_are_numbered_without_gaps():
    "In every folder from 01 on, each number once. Papermill and the site order the others."
    for folder in sorted({p.parent for p in ROOT.glob("nbs/*/*.ipynb")} - UNNUMBERED):
        numbers = sorted(p.name[:2] for p in folder.glob("[0-9][0-9]_*.ipynb"))
        assert numbers == [f"{i:02}" for i in range(1, len(numbers) + 1)], folder.name


@pytest.mark.parametrize(
    "path", [p for p in NOTEBOOKS if p.parent.name != "paper"], ids=lambda p: p.name
)
def test_library_notebooks_hold_their_outputs(path):
    "Readers see results without running anything: no error, and something shown."
    outputs = [o for c in cells(path) if c.cell_type == "code" for o in c.outputs]
    assert outputs and all(o.output_type != "error" for o in outputs)
    assert "jupyter.widget" not in path.read_text(), "the state of a progress bar"


@pytest.mark.parametrize("path", sorted(ROOT.glob("nbs/paper/*.ipynb")), ids=lambda p: p.name)
def test_parameter_cells_hold_literals_only(path):
    "papermill injects after this cell, so nothing in it may be derived."
    tagged = [c for c in cells(path) if "parameters" in c.metadata.get("tags", [])]
    assert len(tagged) == 1
    for statement in ast.parse(tagged[0].source).body:
        assert isinstance(statement, ast.Assign)
        ast.literal_eval(statement.value)


def test_paper_notebooks_find_the_root_before_they_read():
    "JupyterLab starts them in their own folder."
    for path in sorted(ROOT.glob("nbs/paper/*.ipynb")):
        code = "\n".join(c.source for c in cells(path) if c.cell_type == "code")
        if path.stem != "own_study":
            assert "\nat_root()" in re.split(r"load_preset\(|load_results\(", code)[0], path.name


def test_paper_notebooks_are_committed_without_outputs():
    "Their results belong to a run, not to the source."
    for path in ROOT.glob("nbs/paper/*.ipynb"):
        assert not any(c.get("outputs") for c in cells(path)), path.name


def test_nothing_runs_code_that_came_with_a_model():
    for path in modules(ROOT).values():
        assert not re.search(
            r"trust_remote_code\s*[=:]\s*True|torch\.load\(|pickle\.load", path.read_text()
        ), path.name


def library() -> dict[str, tuple[int, str]]:
    """Module → its place in the reading order, and the code of its notebook: exported cells,
    examples and all."""
    settings = configparser.ConfigParser()
    settings.read(ROOT / "settings.ini")
    folders = settings["DEFAULT"]["reading_order"].split()
    order = [path for folder in folders for path in sorted(ROOT.glob(f"nbs/{folder}/*.ipynb"))]
    found = {}
    for place, path in enumerate(order):
        code = "\n".join(c.source for c in cells(path) if c.cell_type == "code")
        found["calib_prune." + re.search(r"^#\| default_exp (\S+)", code, re.M)[1]] = place, code
    return found


def test_every_module_has_its_notebook():
    made = {m for m in modules(ROOT) if not m.endswith(("__init__", "_modidx"))}
    assert set(library()) == made


def test_imports_point_backwards():
    """A notebook needs only what stands before it: in exported code, in imports inside functions,
    and in its examples."""
    found = library()
    for module, (place, code) in found.items():
        for wanted in re.findall(r"(?:from|import) (calib_prune[\w.]*)", code):
            if wanted == "calib_prune": continue  # its version
            assert wanted in found, f"{module} imports {wanted}: name the module that defines it"
            assert found[wanted][0] < place, f"{module} imports {wanted}, which comes later"


def test_public_names_are_loaded_lazily():
    "`import calib_prune` gives every name of `__all__`."
    for name in calib_prune.__all__:
        made = getattr(calib_prune, name)
        assert callable(made) and made.__name__ == name and name in dir(calib_prune)
    with pytest.raises(AttributeError, match="prunes"):
        _ = calib_prune.prunes


# Packages that take long to import, or that only the extra `study` brings.
LATE = {"torch", "transformers", "lm_eval", "datasets", "numba", "scipy", "pandas", "pyarrow",
        "pydantic", "yaml", "psutil", "nbformat", "papermill", "snakemake", "matplotlib", "seaborn"}


@pytest.mark.parametrize("module", ["calib_prune", "calib_prune.cli.app"])
def test_the_command_line_starts_without_slow_packages(module):
    """`calib-prune --help` needs none of these packages; the list stands for a time, which would
    depend on the machine."""
    code = f"import sys, {module}; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert not LATE & {*done.stdout.split()}


PAGES = [
    ROOT / o for o in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "LOG.md", "SECURITY.md")
] + sorted(ROOT.glob("docs/*.md")) + sorted(ROOT.glob("docs/questions/*.md"))


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_links_lead_somewhere(page):
    for link in re.findall(r"\]\(([^)#\s]+)", page.read_text()):
        if not link.startswith("http"): assert (page.parent / link).exists(), link


def test_readme_is_short():
    assert len((ROOT / "README.md").read_text().split()) <= 500


def test_the_results_page_is_short():
    assert len((ROOT / "docs/results.md").read_text().split()) <= 2500


def test_paper_notebooks_write_what_is_declared():
    "The names in `save_table`, `save_rows` and `save_figure` are those of the list of artefacts."
    for book in NOTEBOOKS_OF_TABLES:
        code = "\n".join(c.source for c in cells(ROOT / f"nbs/paper/{book}.ipynb")
                         if c.cell_type == "code")
        assert set(re.findall(r"\b[TF]\d+-[\w-]+", code)) == {
            Path(f).stem for o in made_by([book]) for f in o.files
        }, book


def test_the_snakefile_can_be_read_at_one_sitting():
    assert len((ROOT / "Snakefile").read_text().splitlines()) <= 60


def test_the_lock_is_in_step_with_the_ranges():
    "Every requirement of what `make setup` installs has an exact version within its range."
    about = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = about["optional-dependencies"]
    asked = [*about["dependencies"], *(r for e in ("study", "dev", "docs", "cluster")
                                       for r in extras[e])]
    text = (ROOT / "requirements.lock").read_text()
    locked = dict(re.findall(r"^([a-z0-9.-]+)==(\S+)", text, re.M))
    for requirement in map(Requirement, asked):
        version = locked.get(canonicalize_name(requirement.name))
        assert version and requirement.specifier.contains(version), f"{requirement}: make lock"
    unhashed = [block for block in re.split(r"\n(?=[a-z0-9])", text)[1:] if "--hash=" not in block]
    assert not unhashed, unhashed
