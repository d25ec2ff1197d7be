"A part of the attack of tests/attack.py, every kind of input in it: nothing ends in a traceback, and JSON is JSON."
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PART = 3  # every third of some 2,900 inputs


@pytest.mark.real  # presets are checked against the fetched text
def test_an_attack_from_outside_is_refused_in_plain_words():
    "In a process of its own, whose memory and time are limited."
    done = subprocess.run([sys.executable, "-W", "ignore", "-m", "tests.attack", str(PART)], cwd=ROOT, capture_output=True, text=True)
    lines = done.stdout.splitlines()
    assert done.returncode == 0, "\n".join(lines[-40:]) + done.stderr[-2000:]
    inputs, tracebacks, no_json = (int(o.split()[0]) for o in lines[-1].split(", "))
    assert inputs > 300 and not tracebacks and not no_json, lines[-1]
