"The short form of the torture; and what is broken on purpose must be found by it."
import json
import re
import subprocess
import sys

import pytest

from calib_prune.model.loading import RECORD_FILE, save_model
from calib_prune.model.tiny import tiny_llama, tiny_tokenizer
from tests import ROOT

LEAST = dict(inputs=200, kills=10, steps=20, writers=9)  # tries in short


def run(*argv):
    "In a process of its own: it forks, and limits its memory and time."
    return subprocess.run(
        [sys.executable, "-W", "ignore", "-m", *argv],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=1800,
    )


@pytest.mark.skipif(sys.platform != "linux", reason="it watches processes in /proc")
@pytest.mark.real  # presets are checked against the fetched text
def test_nothing_ends_in_a_traceback_and_nothing_is_half_written():
    done = run("tests.torture", "--short")
    said = re.findall(r"^(\w+): (\d+) tries, (\d+) failures, \d+ skipped, \d+ s", done.stdout, re.M)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    counts = {name: (int(tries), int(failures)) for name, tries, failures in said}
    assert all(counts[k][0] >= n for k, n in LEAST.items()) and not any(
        failures for _, failures in counts.values()
    ), counts


@pytest.fixture(scope="module")
def broken():
    done = run("tests.torture.broken")
    found = {name: rest for name, *rest in map(json.loads, done.stdout.splitlines())}
    assert done.returncode == 0 and found, done.stderr
    return found


@pytest.mark.skipif(sys.platform != "linux", reason="it watches processes in /proc")
@pytest.mark.parametrize("part, least", [("kills", 5), ("steps", 2), ("writers", 4), ("inputs", 4)])
def test_what_is_broken_on_purpose_is_found(broken, part, least):
    bad, good = (
        {k: v for k, v in broken.items() if k.startswith(f"{o} {part}")} for o in ("bad", "good")
    )
    assert len(bad) >= least and good
    assert all(failures for _, failures, _ in bad.values()), bad
    assert not any(failures for _, failures, _ in good.values()), good


@pytest.mark.parametrize("name, said", [("bad kills: half", "a.json is half-written"),
                                        ("bad kills: never_again", "run again"),
                                        ("bad kills: grows", "another result"),
                                        ("bad kills: litters", "left behind"),
                                        ("bad kills: crashes_again", "FileExistsError"),
                                        ("bad steps: half_in_between", "a.json is half-written"),
                                        ("bad writers: badly", "another reason"),
                                        ("bad inputs: hangs", "did not end")])
def test_it_says_what_is_wrong(broken, name, said):
    assert said in broken[name][2], broken[name]


@pytest.mark.parametrize("damage, said", [
    (lambda m: None, ""), (lambda m: (m / RECORD_FILE).unlink(), "is a part of a model"),
    (lambda m: (m / "model.safetensors").unlink(), "does not load"),
    (lambda m: (m / "config.json").unlink(), "does not load"),
    (lambda m: (m / "model.safetensors").write_bytes(b"half"), "model.safetensors is half-written"),
    (lambda m: (m / "tokenizer.json").write_text("{"), "tokenizer.json is half-written")])
def test_a_model_must_be_whole(tmp_path, damage, said):
    from tests.torture.kills import half_written
    damage(save_model(tiny_llama(), tiny_tokenizer(), tmp_path / "out", {}))
    found = half_written(tmp_path)
    assert said in found and bool(said) == bool(found)


@pytest.mark.parametrize("name, text, whole", [("a.jsonl", '{"a": 1}\n', True),
                                               ("a.jsonl", '{"a": 1}\n{"a"', False),
                                               ("a.jsonl", '{"a": 1}', False),
                                               ("a.yaml", "a: 1\n", True), ("a.yaml", "", False),
                                               ("a.parquet", "PAR1", False),
                                               ("a.npy", "half", False), (".a.json", "{", True),
                                               (".b/a.json", "{", True)])
def test_files_are_read_as_their_names_say(tmp_path, name, text, whole):
    from tests.torture.kills import half_written
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text(text)
    assert bool(half_written(tmp_path)) != whole


def test_every_option_of_the_command_line_is_attacked():
    "An option that is added is attacked without being written down anywhere."
    from tests.torture.inputs import attacked_elsewhere, option_cases, options
    cases = [o.name for o in option_cases()]
    for command, option, *_ in options():
        here = any(o.startswith(f"{command} {option} ") for o in cases)
        assert (
            here or option in ("--json", "--help") or (command, option) in attacked_elsewhere()
        ), (command, option)


def test_a_part_that_breaks_off_or_tries_nothing_is_a_failure(capfd):
    code = (
        "import tests.torture.__main__ as m; from tests.torture import Budget, Result\ndef ok(b):"
        " yield Result('x')\ndef off(b):\n    yield Result('x')\n    raise"
        " ValueError('broken')\ndef none(b): yield from ()\nprint([m.report(k, f, Budget()) for k,"
        " f in dict(ok=ok, off=off, none=none).items()])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.splitlines()[-1] == "[0, 1, 1]" and "it broke off" in done.stdout, done
