"What stands around the package: the Makefile, the scripts."
import importlib.util
import os
import re
import subprocess

import pytest

from tests import ROOT


def say(*command):
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


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
    spec = importlib.util.spec_from_file_location("site_pages", ROOT / "scripts/site.py")
    site = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(site)
    for preset in (ROOT / "presets").glob("*.yaml"):
        assert site.first_sentence(preset.read_text())[-1] in ".?", preset.name
    assert site.first_sentence("# One 3.1\n# two. Three.\nname: x\n# four") == "One 3.1 two."
