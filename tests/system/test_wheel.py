"""The wheel, away from the repository: the library, the command line, and studies that `init` lays
out."""
import json
import re
import subprocess
import sys
import tarfile
import zipfile
from importlib.metadata import (
    Distribution,
    PackageNotFoundError,
    distribution,
    packages_distributions,
)

import pytest
import yaml
from packaging.requirements import Requirement

from calib_prune.advice.nearest import PRUNED_REGRETS, QUANTISED_REGRETS, STUDIED
from calib_prune.cli.advise import DEMO
from calib_prune.cli.init import lay_out
from calib_prune.model.tiny import tiny_llama, tiny_tokenizer
from calib_prune.statistics.mixing_law import LAW_FILE
from calib_prune.study.presets import load_preset
from tests import ROOT, processes

OLD = "of_an_older_build.py"


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    old = ROOT / "build" / "lib" / "calib_prune" / OLD
    old.parent.mkdir(parents=True, exist_ok=True)
    old.touch()
    command = [
        sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation",
        "--wheel-dir", folder, ROOT]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    (found,) = folder.glob("*.whl")
    return found


@pytest.fixture(scope="module")
def python(wheel, tmp_path_factory):
    "A Python that has the wheel, the packages it needs, and no checkout."
    folder = tmp_path_factory.mktemp("venv")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
    (site,) = folder.glob("lib/python*/site-packages")
    with zipfile.ZipFile(wheel) as w: w.extractall(site)
    packages = next(o for o in sys.path if o.endswith("site-packages"))
    # its own .pth files, such as that of the checkout, are not read
    (site / "needed.pth").write_text(packages + "\n")
    return folder / "bin" / "python"


def run(python, cwd, *words, **how):
    "Without the path of a checkout."
    return processes.run(*words, python=python, cwd=cwd, PYTHONPATH=None, **how)


def test_the_wheel_is_small_and_holds_what_studies_need(wheel, tmp_path):
    names = zipfile.ZipFile(wheel).namelist()
    assert wheel.stat(
    ).st_size < 1e6 and "calib_prune/py.typed" in names and f"calib_prune/{OLD}" not in names
    for name in ("Snakefile", "presets/smoke.yaml", "nbs/paper/prune_and_score.ipynb"):
        assert f"calib_prune/project/{name}" in names
    presets = {o.split("/presets/")[1] for o in names if "/presets/" in o}
    assert presets == {
        o.relative_to(ROOT / "presets").as_posix() for o in (ROOT / "presets").rglob("*.yaml")
    }
    held = {
        o.removeprefix("calib_prune/project/")
        for o in names
        if o.startswith("calib_prune/project/")
    }
    assert held == {
        *lay_out(tmp_path / "from-checkout"),
        *MEASURED,
    }, "the wheel holds what `init` copies from a checkout"
    assert not [o for o in names if o.startswith(("tests", "results", "nbs", "bench"))]


MEASURED = {  # of committed studies, and a stored advice
    LAW_FILE, f"{DEMO}.md", f"{DEMO}.json",
    *(name.format(model) for name in (PRUNED_REGRETS, QUANTISED_REGRETS) for model in STUDIED)}
STUDY = {
    "snakemake", "papermill", "ipykernel", "ipywidgets", "jupyterlab",
    "nbformat"}
HIDE = '''
import sys
from importlib.machinery import PathFinder

class Hiding(PathFinder):
    "Finds what is installed, without the packages of extras."
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return None if name.partition(".")[0] in {hidden} else PathFinder.find_spec(name, path, target)

sys.meta_path[sys.meta_path.index(PathFinder)] = Hiding
'''  # noqa: E501


def normal(name): return re.sub(r"[-_.]+", "-", name).lower()


def wanted_by(found, extras):
    "The packages that an installed distribution requires, each with its extras."
    needs = map(Requirement, found.requires or [])
    return [
        o for o in needs if not o.marker or any(o.marker.evaluate({"extra": e}) for e in extras)
    ]


def core_packages(package):
    """The distributions that `pip install calib-prune` brings, by what the installed ones say that
    they require."""
    brought, todo = {}, wanted_by(package, [""])
    while todo:
        need = todo.pop()
        extras = {"", *need.extras} - brought.get(name := normal(need.name), set())
        brought.setdefault(name, set()).update(extras)
        try:
            if extras: todo += wanted_by(distribution(name), extras)
        except PackageNotFoundError: pass  # for another machine
    return {*brought}


@pytest.fixture(scope="module")
def core_only(python):
    "Code that hides every package that only extras bring."
    (info,) = python.parent.parent.glob("lib/python*/site-packages/calib_prune-*.dist-info")
    core = core_packages(Distribution.at(info))
    assert {"torch", "lm-eval"} <= core and not STUDY & core
    packages = packages_distributions().items()
    hidden = {name for name, owners in packages if not core & {*map(normal, owners)}} - {
        "calib_prune"
    }
    assert STUDY <= hidden
    return HIDE.replace("{hidden}", repr(hidden))


@pytest.mark.real
def test_the_core_prunes_and_scores(python, core_only, tmp_path):
    "Nothing that only an extra brings is needed, and `reproduce` names the extra."
    def call(*words, code=0):
        program = core_only + processes.COMMAND
        done = run(python, tmp_path, *words, program=program, code=code)
        return done.stdout + " ".join(done.stderr.split())
    tiny_llama(max_position_embeddings=2048).save_pretrained(tmp_path / "tiny")
    tiny_tokenizer().save_pretrained(tmp_path / "tiny")
    call("prune", "--model", "tiny", "--calibration", "c4", "--windows", 4, "--length", 32,
         "--output", "pruned")
    assert "jeopardy" in call("evaluate", "--model", "pruned", "--dense", "tiny", "--tasks",
                              "jeopardy,mbpp", "--limit", 4, "--json")
    assert "study.ipynb" in call("new-study", "mine", "--method", "wanda")
    said = call("reproduce", "--preset", "smoke", code=1)
    assert (
        "pip install 'calib-prune[study]'" in said
        and "snakemake" in said
        and "Traceback" not in said
    )


def test_the_package_is_that_of_the_wheel(python, tmp_path):
    ask = "import calib_prune; print(calib_prune.__file__)"
    assert str(python.parent.parent) in run(python, tmp_path, program=ask).stdout


def test_without_a_study_reproduce_says_what_to_do(python, tmp_path):
    said = run(python, tmp_path, "reproduce", "--preset", "smoke", code=1).stderr
    assert "calib-prune init my-study" in " ".join(said.split())


def test_init_lays_out_and_refuses(python, tmp_path):
    assert "calib-prune reproduce --preset smoke" in run(python, tmp_path, "init", "mine").stdout
    for name in ("Snakefile", "presets/smoke.yaml", "nbs/paper/prune_and_score.ipynb"):
        assert (tmp_path / "mine" / name).read_bytes() == (ROOT / name).read_bytes()
    before = sorted(o.name for o in tmp_path.rglob("*"))
    said = run(python, tmp_path, "init", "mine", code=1).stderr
    assert "is not empty" in said and sorted(o.name for o in tmp_path.rglob("*")) == before
    (tmp_path / "file").write_text("x")
    assert "is not empty" in run(python, tmp_path, "init", "file", code=1).stderr
    (tmp_path / "empty").mkdir()
    place = (tmp_path / "empty").stat().st_ino
    run(python, tmp_path / "empty", "init", ".")
    assert (tmp_path / "empty" / "Snakefile").is_file() and (
        tmp_path / "empty"
    ).stat().st_ino == place, "one may stand in it"
    assert not [o for o in (tmp_path / "empty").iterdir() if o.name.startswith(".init")]


@pytest.mark.real
def test_an_own_study_starts_with_a_preset_and_a_notebook(python, tmp_path):
    (tmp_path / "notes.txt").write_text("Some text. " * 50)
    said = run(python, tmp_path, "new-study", "mine", "--calibration", "notes.txt=0.5,c4=0.5",
               "--calibration", "csqa", "--method", "admm", "--sparsity", "2:4").stdout
    assert "presets/mine.yaml" in said and "study.ipynb" in said
    preset = yaml.safe_load((tmp_path / "mine/presets/mine.yaml").read_text())
    assert preset["strategies"] == {
        "notes-0.5-c4-0.5": f"{tmp_path}/notes.txt=0.5,c4=0.5",
        "csqa": "csqa",
    } and preset["grid"][0]["sparsities"] == ["2:4"]
    assert 'preset = "presets/mine.yaml"' in "".join(
        c["source"][0] for c in json.loads((tmp_path / "mine/study.ipynb").read_text())["cells"]
    )
    said = run(python, tmp_path, "new-study", "other", "--method", "wnda", code=1).stderr
    assert "Did you mean 'wanda'" in said and not (tmp_path / "other").exists()
    assert "is not empty" in run(python, tmp_path, "new-study", "mine", code=1).stderr


@pytest.mark.real
def test_a_study_runs_where_it_was_laid_out(python, tmp_path):
    "A tiny model, two cells, one table, through Snakemake and papermill."
    run(python, tmp_path, "init", "mine")
    root, model = tmp_path / "mine", tmp_path / "tiny"
    tiny_llama().save_pretrained(model)
    tiny_tokenizer().save_pretrained(model)
    preset = load_preset(root / "presets/smoke.yaml")
    preset |= dict(name="tiny",
                   model=str(model),
                   calibration=dict(windows=4, length=32),
                   strategies=dict(csqa="csqa", arithmetic="arithmetic"),
                   grid=[
                       dict(strategies="all",
                            methods=["wanda"],
                            sparsities=[0.5],
                            seeds=[0],
                            windows=["default"])],
                   tables=["main"])
    preset["scoring"] |= dict(
        tasks=["jeopardy", "piqa", "mbpp", "gsm8k"], limit=dict(choice=12, bpb=2)
    )
    preset["heldout"] |= dict(documents=1, window=32)
    (root / "presets/tiny.yaml").write_text(yaml.safe_dump(preset))
    run(python, root, "reproduce", "--preset", "presets/tiny.yaml", "--jobs", "2")
    assert (root / "figures/tiny/T2-retention.csv").is_file() and len(
        list((root / "results/tiny").glob("csqa-*.json"))
    ) == 1
    again = run(
        python, root, "reproduce", "--preset", "presets/tiny.yaml", "--dry-run", "--verbose"
    )
    assert "Nothing to be done" in again.stdout + again.stderr, "what is finished is known there"
    words = ["-m", "papermill", "--no-progress-bar", "nbs/paper/own_study.ipynb", "own.ipynb"]
    for k, v in dict(
        preset="presets/tiny.yaml", results="results/tiny", figures="figures/tiny"
    ).items():
        words += ["-r", k, v]
    done = subprocess.run([python, *words], cwd=root, capture_output=True, text=True)
    assert (
        done.returncode == 0 and (root / "figures/tiny/own-retention.png").is_file()
    ), done.stderr[-2000:]


def test_the_mixing_law_is_in_the_wheel(python, tmp_path):
    ask = (
        "import calib_prune; print(calib_prune.fitted_law().predict(dict(Code=0.5,"
        " Math=0.5)).shape)"
    )
    assert run(python, tmp_path, program=ask).stdout == "(5, 6)\n"


def test_the_source_distribution_holds_all_that_its_wheel_needs(tmp_path):
    "Building the wheel from it fails if one of these is missing."
    make = "import sys; from setuptools.build_meta import build_sdist; build_sdist(sys.argv[1])"
    processes.run(tmp_path, program=make, cwd=ROOT)
    (found,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(found) as t: names = {o.partition("/")[2] for o in t.getnames()}
    assert {*lay_out(tmp_path / "from-checkout"), *MEASURED, "setup.py", "pyproject.toml"} <= names
