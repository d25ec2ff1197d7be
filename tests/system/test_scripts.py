"What stands around the package: the Makefile, the scripts."
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import zipfile
from urllib.parse import unquote

import pytest
from rocrate.rocrate import ROCrate

from calib_prune.core import CalibPruneError
from calib_prune.study.sums import read_sums
from tests import ROOT


def say(*command):
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


def load_script(name):
    spec = importlib.util.spec_from_file_location(f"script_{name}", ROOT / f"scripts/{name}.py")
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    return script


def test_every_target_is_listed_in_the_makefile():
    text = (ROOT / "Makefile").read_text()
    targets = set(re.findall(r"^([a-z-]+):", text, re.M))
    assert targets == set(re.search(r"^\.PHONY: (.+)$", text, re.M)[1].split()) == set(
        re.findall(r"^# make ([a-z-]+) ", text, re.M))
    assert len({len(o) for o in re.findall(r"^# make [a-z-]+ +", text, re.M)}) == 1


def test_jupyter_is_told_of_root():
    command = say("make", "-n", "-o", ".venv/installed", "lab").stdout
    assert ("--allow-root" in command) == (os.getuid() == 0) and "jupyter lab" in command


@pytest.mark.parametrize(
    "arguments, says",
    [(["--help"], "default: .venv"), (["python-of-nobody"], "There is no python-of-nobody")],
)
def test_setup_explains_itself(arguments, says):
    done = say("bash", "scripts/setup.sh", *arguments)
    assert says in done.stdout + done.stderr and done.returncode == (arguments != ["--help"])


def test_setup_without_arguments_takes_the_usual_ones(tmp_path):
    "A Python that only notes what it was asked, in a copy without anything else."
    (tmp_path / "scripts").mkdir()
    (tmp_path / "scripts/setup.sh").write_text((ROOT / "scripts/setup.sh").read_text())
    (tmp_path / "bin").mkdir()
    python = tmp_path / "bin/python3"
    python.write_text(
        '#!/bin/sh\nif [ "$2" = venv ]; then mkdir -p "$3/bin"; cp "$0" "$3/bin/python"; fi\necho'
        ' "$@" >> asked\n'
    )
    python.chmod(0o755)
    path = f"{tmp_path}/bin:{os.environ['PATH']}"
    subprocess.run(
        ["bash", tmp_path / "scripts/setup.sh"],
        check=True,
        env=os.environ | dict(PATH=path),
        stdout=subprocess.DEVNULL,
    )
    assert (tmp_path / ".venv/installed").is_file() and "-m venv .venv" in (
        tmp_path / "asked"
    ).read_text()


def test_the_intro_of_a_study_is_a_sentence():
    site = load_script("site")
    for preset in (ROOT / "presets").glob("*.yaml"):
        assert site.first_sentence(preset.read_text())[-1] in ".?", preset.name
    assert site.first_sentence("# One 3.1\n# two. Three.\nname: x\n# four") == "One 3.1 two."


def test_the_container_and_the_bare_debian_have_the_same_packages():
    container = (ROOT / "Containerfile").read_text()
    bare = (ROOT / "scripts/bare.sh").read_text()
    packages = set(re.search(r"--no-install-recommends (.+?) *\\\n", container)[1].split())
    included = set(re.search(r"--include=(\S+)", bare)[1].split(","))
    assert packages - included == {"python3-venv"}, "setup.sh installs it where it is missing"
    assert included <= packages


def test_bare_says_what_is_missing(tmp_path):
    assert "an absent folder" in say("bash", "scripts/bare.sh", "--help").stdout
    done = say("bash", "scripts/bare.sh", tmp_path)
    assert done.returncode == 1 and done.stderr.startswith(
        ("A Debian in a folder is made as root", "There is no debootstrap", f"{tmp_path} exists"))


STUDY = "pruners/qwen-0.5b"


def test_a_study_is_a_crate(tmp_path):
    done = say(sys.executable, "scripts/crate.py", STUDY, tmp_path / "study.zip")
    assert done.returncode == 0, done.stderr
    again = say(sys.executable, "scripts/crate.py", STUDY, tmp_path / "study.zip")
    assert again.returncode == 1 and "study.zip exists" in again.stderr
    with zipfile.ZipFile(tmp_path / "study.zip") as archive: archive.extractall(tmp_path / "crate")
    crate = ROCrate(tmp_path / "crate")
    for entity in crate.data_entities:
        assert (tmp_path / "crate" / unquote(entity.id)).is_file()
    assert crate.mainEntity.id == "Snakefile" and "ComputationalWorkflow" in crate.mainEntity.type
    notebook, study = (action for action in crate.contextual_entities
                       if action.type == "CreateAction")
    assert notebook["instrument"].id == "nbs/paper/pruners.ipynb"
    tables = {entity.id for entity in notebook["result"]}
    assert f"figures/{STUDY}/T10-pruners.csv" in tables <= {e.id for e in study["result"]}
    assert {entity.id for entity in study["object"]} >= {f"presets/{STUDY}.yaml"}
    rows = {unquote(entity.id) for entity in notebook["object"]}
    assert rows == {f"results/{STUDY}/{file}" for file in read_sums(ROOT / "results" / STUDY)}


def test_a_crate_needs_whole_results(tmp_path, monkeypatch):
    script = load_script("crate")
    monkeypatch.setattr(script, "ROOT", tmp_path)
    for part in ("figures", "results"):
        shutil.copytree(ROOT / part / STUDY, tmp_path / part / STUDY)
    row = tmp_path / "results" / STUDY / "dense.json"
    row.write_text(row.read_text() + " ")
    with pytest.raises(CalibPruneError, match="dense.json: changed after it was made"):
        script.study_crate(STUDY)
    shutil.copy(ROOT / "results" / STUDY / "dense.json", row)
    (tmp_path / "figures" / STUDY / "T10-gains.csv").write_text("mine")
    with pytest.raises(CalibPruneError, match="T10-gains.csv was changed or removed"):
        script.study_crate(STUDY)
    (tmp_path / "figures" / STUDY / "made-from.json").unlink()
    with pytest.raises(CalibPruneError, match=f"reproduce --preset {STUDY} --tables-only"):
        script.study_crate(STUDY)
    assert say(sys.executable, "scripts/crate.py", "a").returncode == 1
