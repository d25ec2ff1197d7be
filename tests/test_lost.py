"Nothing of a user's is lost: folders that are not ours, two runs at once, runs that are killed at any moment."
import hashlib
import json
import os
import random
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from calib_prune.core import Busy, CalibPruneError, only_run
from calib_prune.generation.sampling import Sample
from calib_prune.generation.writing import Journal, check_target
from calib_prune.model.loading import (PART, RECORD, OutputFolder, check_output, load_model,
                                       save_model)
from calib_prune.model.tiny import tiny_llama, tiny_tokenizer
from calib_prune.pruning.checkpoint import (MARKER, Checkpoint, check_checkpoint, own_files,
                                            remove_checkpoint)
from calib_prune.pruning.walk import prune

TOKENS = torch.randint(1, 264, (4, 16), generator=torch.Generator().manual_seed(0))


def contents(folder):
    "Every file below a folder, with its bytes."
    return {str(o.relative_to(folder)): hashlib.sha256(o.read_bytes()).hexdigest() for o in sorted(Path(folder).rglob("*")) if o.is_file()}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    root = tmp_path_factory.mktemp("inputs")
    save_model(tiny_llama(num_hidden_layers=4), tiny_tokenizer(), root / "model", {})
    (root / "text.txt").write_text("".join(f"Line {i}: {i} times {i} is {i * i}.\n" for i in range(400)))
    return root


def start(inputs, command, *more, cwd=None):
    usual = {"prune": ["--model", inputs / "model", "--calibration", inputs / "text.txt", "--windows", "8", "--length", "32"],
             "generate": ["--model", inputs / "model", "--protocol", "self-cal", "--windows", "8", "--length", "32", "--text-length", "24"]}
    argv = [sys.executable, "-c", "from calib_prune.cli.app import main; main()", command, *map(str, [*usual[command], *more])]
    return subprocess.Popen(argv, cwd=cwd, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=os.environ | dict(OMP_NUM_THREADS="1"))


def run(inputs, command, *more, **how):
    process = start(inputs, command, *more, **how)
    out, err = process.communicate(timeout=120)
    assert "Traceback" not in err, err
    return process.returncode, out, err


# --- folders that are not ours

def test_a_folder_of_the_users_is_no_checkpoint(inputs, tmp_path):
    mine = tmp_path / "thesis"
    (mine / "chapters").mkdir(parents=True)
    (mine / "a.txt").write_text("mine")
    (mine / "chapters" / "layer-0000.safetensors").write_text("mine too")
    before = contents(mine)
    code, _, err = run(inputs, "prune", "--output", tmp_path / "out", "--checkpoint", mine)
    assert code == 1 and "is not empty, and is no checkpoint: it holds a.txt" in err and contents(mine) == before
    with pytest.raises(CalibPruneError, match="no checkpoint"): prune(tiny_llama(), TOKENS, "wanda", checkpoint=mine)
    assert contents(mine) == before and not (tmp_path / "out").exists()


@pytest.mark.parametrize("option", ["--checkpoint", "--output"])
def test_an_empty_name_is_no_folder(inputs, tmp_path, option):
    (tmp_path / "a.txt").write_text("mine")
    code, _, err = run(inputs, "prune", *(["--output", tmp_path / "out"] if option == "--checkpoint" else []), option, "", cwd=tmp_path)
    assert code == 1 and "the name is empty" in err and [o.name for o in tmp_path.iterdir()] == ["a.txt"]


def test_only_our_own_files_are_removed(tmp_path):
    folder = tmp_path / "cp"
    prune(tiny_llama(), TOKENS, "wanda", checkpoint=folder)
    (folder / "notes.txt").write_text("mine")
    remove_checkpoint(folder)
    assert [o.name for o in folder.iterdir()] == ["notes.txt"]
    (folder / "notes.txt").unlink()
    prune(tiny_llama(), TOKENS, "wanda", checkpoint=folder)
    remove_checkpoint(folder)
    assert not folder.exists()


def test_layers_without_their_marker_are_refused(tmp_path):
    prune(tiny_llama(), TOKENS, "wanda", sparsity=0.5, checkpoint=tmp_path)
    (tmp_path / MARKER).unlink()
    with pytest.raises(CalibPruneError, match="holds layers, but no run.json"): prune(tiny_llama(), TOKENS, "wanda", sparsity=0.7, checkpoint=tmp_path)


def test_a_marker_that_is_being_written_is_no_layer(tmp_path):
    (tmp_path / f".{MARKER}.0123abcd.part").write_text("{")  # of a run that begins at the same moment, or was killed then
    assert len(prune(tiny_llama(), TOKENS, "wanda", sparsity=0.5, checkpoint=tmp_path)) > 0


@pytest.mark.parametrize("points", range(8))
def test_a_kill_while_a_checkpoint_is_removed_leaves_nothing_that_is_believed(tmp_path, monkeypatch, points):
    "However many of its files are gone, another run starts from nothing, and the same one goes on."
    prune(tiny_llama(num_hidden_layers=3), TOKENS, "wanda", sparsity=0.5, checkpoint=tmp_path / "cp")
    left, unlink = iter(range(points)), Path.unlink
    def dying(self, **how):
        if next(left, None) is None: raise KeyboardInterrupt
        unlink(self, **how)
    monkeypatch.setattr(Path, "unlink", dying)
    try: remove_checkpoint(tmp_path / "cp")
    except KeyboardInterrupt: pass
    monkeypatch.undo()
    model = tiny_llama(num_hidden_layers=3)
    report = prune(model, TOKENS, "wanda", sparsity=0.7, checkpoint=tmp_path / "cp")
    wanted = prune(alone := tiny_llama(num_hidden_layers=3), TOKENS, "wanda", sparsity=0.7)
    assert report.equals(wanted) and all(torch.equal(a, b) for a, b in zip(model.parameters(), alone.parameters(), strict=True))


@pytest.mark.parametrize("at", [9, 60, 200, -1, -500])
def test_a_layer_whose_bytes_have_changed_is_refused(tmp_path, at):
    prune(tiny_llama(), TOKENS, "wanda", checkpoint=tmp_path)
    file = tmp_path / "layer-0001.safetensors"
    data = bytearray(file.read_bytes())
    data[at] ^= 1
    file.write_bytes(bytes(data))
    with pytest.raises(CalibPruneError, match="layer-0001.safetensors is damaged"): prune(tiny_llama(), TOKENS, "wanda", checkpoint=tmp_path)


def test_a_layer_of_another_run_is_refused(tmp_path):
    for sparsity, name in ((0.5, "a"), (0.7, "b")): prune(tiny_llama(), TOKENS, "wanda", sparsity=sparsity, checkpoint=tmp_path / name)
    (tmp_path / "a" / "layer-0000.safetensors").replace(tmp_path / "b" / "layer-0000.safetensors")
    with pytest.raises(CalibPruneError, match="it is of another run"): prune(tiny_llama(), TOKENS, "wanda", sparsity=0.7, checkpoint=tmp_path / "b")


def test_a_checkpoint_of_another_version_is_refused(tmp_path, monkeypatch):
    from dataclasses import replace
    from calib_prune.pruning import walk
    prune(tiny_llama(), TOKENS, "wanda", checkpoint=tmp_path)
    monkeypatch.setattr(walk, "METHODS", walk.METHODS | {"wanda": replace(walk.METHODS["wanda"], version=99)})
    with pytest.raises(CalibPruneError, match="differs in: version"): prune(tiny_llama(), TOKENS, "wanda", checkpoint=tmp_path)


# --- outputs

def test_an_output_on_a_disk_of_its_own_is_filled(tmp_path, monkeypatch):
    "An empty folder may be a volume: nothing can be moved into it in one step from beside it."
    out, rename = tmp_path / "volume", Path.rename
    out.mkdir()
    def across(self, target):
        if (out in self.parents) != (out in Path(target).parents): raise OSError(18, "Invalid cross-device link")
        return rename(self, target)
    monkeypatch.setattr(Path, "rename", across)
    save_model(tiny_llama(), tiny_tokenizer(), out, {})
    assert load_model(str(out))[0].num_parameters() and not [o for o in tmp_path.rglob(".*")]


@pytest.mark.skipif(os.getuid() != 0 or bool(subprocess.run(["unshare", "-m", "true"], capture_output=True).returncode), reason="cannot mount")
def test_an_output_that_is_a_mount_point(inputs, tmp_path):
    (tmp_path / "volume").mkdir()
    code = f"from calib_prune.model.loading import *; from calib_prune.model.tiny import *; save_model(tiny_llama(), tiny_tokenizer(), {str(tmp_path / 'volume')!r}, {{}}); " \
           f"print(load_model({str(tmp_path / 'volume')!r})[0].num_parameters())"
    done = subprocess.run(["unshare", "-m", "sh", "-c", f"mount -t tmpfs none {tmp_path}/volume && exec {sys.executable} -c \"$0\"", code],
                          capture_output=True, text=True)
    if "mount:" in done.stderr: pytest.skip(done.stderr)
    assert done.returncode == 0 and int(done.stdout) > 0, done.stderr


def test_what_a_killed_run_left_is_removed_by_the_next(tmp_path):
    part = tmp_path / ".out.part"
    part.mkdir()
    (part / PART).touch()
    (part / "model.safetensors").write_bytes(b"half")
    save_model(tiny_llama(), tiny_tokenizer(), tmp_path / "out", {})
    assert [o.name for o in tmp_path.iterdir()] == ["out"] and RECORD in {o.name for o in (tmp_path / "out").iterdir()}


@pytest.mark.parametrize("moved", range(6))
def test_a_kill_while_files_are_moved_into_an_empty_folder(tmp_path, moved):
    (tmp_path / "out").mkdir()
    save_model(tiny_llama(), tiny_tokenizer(), tmp_path / "whole", {})
    if not (pid := os.fork()):
        rename, done = Path.rename, []
        def die_later(self, target):
            if len(done) == moved: os._exit(9)
            done.append(rename(self, target))
        Path.rename = die_later
        save_model(tiny_llama(), tiny_tokenizer(), tmp_path / "out", {})
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == (9 if moved < len([*(tmp_path / "whole").iterdir()]) else 0)
    assert RECORD not in {o.name for o in (tmp_path / "out").iterdir()}
    save_model(tiny_llama(), tiny_tokenizer(), tmp_path / "out", {})
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_a_list_of_moved_files_names_only_files_of_the_folder(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "mine.txt").write_text("mine")
    (tmp_path / "out" / PART).write_text(json.dumps(["../mine.txt", 5, ".."]))
    save_model(tiny_llama(), tiny_tokenizer(), tmp_path / "out", {})
    assert (tmp_path / "mine.txt").read_text() == "mine" and PART not in {o.name for o in (tmp_path / "out").iterdir()}


def test_a_hidden_folder_of_the_users_is_left_alone(tmp_path):
    (tmp_path / ".out.part").mkdir()
    (tmp_path / ".out.part" / "a.txt").write_text("mine")
    with pytest.raises(CalibPruneError, match=".out.part is in the way"): save_model(tiny_llama(), tiny_tokenizer(), tmp_path / "out", {})
    assert (tmp_path / ".out.part" / "a.txt").read_text() == "mine" and not (tmp_path / "out").exists()


@pytest.mark.parametrize("mask, wanted", [(0o022, 0o644), (0o077, 0o600), (0o027, 0o640)])
def test_files_are_readable_as_the_umask_says(tmp_path, mask, wanted):
    before = os.umask(mask)
    try: save_model(tiny_llama(), tiny_tokenizer(), tmp_path / "out", {})
    finally: os.umask(before)
    assert {stat.S_IMODE(o.stat().st_mode) for o in (tmp_path / "out").iterdir()} == {wanted}


# --- two at once

def test_a_lock_ends_with_its_process(tmp_path):
    code = f"from pathlib import Path; from calib_prune.core import only_run\nwith only_run(Path({str(tmp_path / 'lock')!r}), 'x'):\n" \
           "    print('held', flush=True); import time; time.sleep(60)"
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "held\n"
    with pytest.raises(Busy, match="Another run is working on here"):
        with only_run(tmp_path / "lock", "here"): pass
    process.kill()
    process.wait()
    with only_run(tmp_path / "lock", "here"): pass
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("seed", range(2))
def test_two_runs_to_one_place(inputs, tmp_path, seed):
    "One does the work, the other ends at once and says why; what is there is of one run, and nothing is left beside it."
    rng = random.Random(seed)
    for command, name, options in (("prune", "out", []), ("prune", "out2", ["--checkpoint", tmp_path / "cp"]), ("generate", "own.jsonl", [])):
        both = []
        for _ in range(2):
            both.append(start(inputs, command, "--output", tmp_path / name, *options, "--seed", "1"))
            time.sleep(rng.uniform(0, 0.3))
        said = [o.communicate(timeout=120)[1] for o in both]
        assert not any("Traceback" in o for o in said), said
        assert sorted(o.returncode for o in both) == [0, 1], said
        assert any("Another run is working on" in o or "exists" in o for o in said)
    assert {o.name for o in tmp_path.iterdir()} == {"out", "out2", "own.jsonl", "own.report.json"}


def test_two_runs_with_one_checkpoint(inputs, tmp_path):
    both = [start(inputs, "prune", "--output", tmp_path / f"out{i}", "--checkpoint", tmp_path / "cp") for i in range(2)]
    said = [o.communicate(timeout=120)[1] for o in both]
    assert not any("Traceback" in o for o in said) and 0 in {o.returncode for o in both}, said
    code, _, err = run(inputs, "prune", "--output", tmp_path / "out3", "--checkpoint", tmp_path / "cp")
    assert code == 0, err
    done = [o for o in tmp_path.iterdir() if (o / RECORD).is_file()]
    assert len({contents(o)["model.safetensors"] for o in done}) == 1 and not (tmp_path / "cp").exists()


# --- killed at any moment

@pytest.mark.parametrize("command, name, kills", [("prune", "out", 12), ("generate", "own.jsonl", 8)])
def test_killed_at_random_the_same_command_ends_with_the_same_bytes(inputs, tmp_path, command, name, kills):
    options = ["--checkpoint", tmp_path / "cp"] if command == "prune" else []
    began = time.monotonic()
    assert run(inputs, command, "--output", tmp_path / "whole" / name, *(options and ["--checkpoint", tmp_path / "cp0"]))[0] == 0
    whole, rng = time.monotonic() - began, random.Random(0)
    target = tmp_path / "cut" / name
    for _ in range(kills):
        process = start(inputs, command, "--output", target, *options)
        time.sleep(rng.uniform(0.3 * whole, whole))
        process.send_signal(signal.SIGKILL)
        _, err = process.communicate()
        assert "Traceback" not in err, err
        if process.returncode == 0: break
    code, _, err = run(inputs, command, "--output", target, *options)
    assert code == 0 or "exists" in err, err
    assert {o.name for o in target.parent.iterdir()} == {o.name for o in (tmp_path / "whole").iterdir()}
    if command == "prune":
        mine, other = contents(target), contents(tmp_path / "whole" / name)
        assert mine.pop("model.safetensors") == other.pop("model.safetensors") and mine.keys() == other.keys() and not (tmp_path / "cp").exists()
    else: assert target.read_bytes() == (tmp_path / "whole" / name).read_bytes()


# --- journals and reports

SAMPLE = Sample("a", (1, 2, 3), 1, 2.5, True)


def test_what_is_no_journal_of_ours_is_left_alone(inputs, tmp_path):
    for text in ("", "my notes", "my notes\nmore\n", "{}\n", '"0123"\n'):
        path = tmp_path / "own.jsonl.partial"
        path.write_text(text)
        with pytest.raises(CalibPruneError, match="is no journal of this program"): Journal(path, {})
        assert path.read_text() == text
    code, _, err = run(inputs, "generate", "--output", tmp_path / "own.jsonl")
    assert code == 1 and "no journal of this program" in err and path.read_text() == text and [o.name for o in tmp_path.iterdir()] == [path.name]


def test_a_report_that_is_there_is_left_alone(inputs, tmp_path):
    (tmp_path / "own.report.json").write_text("mine")
    code, _, err = run(inputs, "generate", "--output", tmp_path / "own.jsonl")
    assert code == 1 and "own.report.json exists" in err and [o.name for o in tmp_path.iterdir()] == ["own.report.json"]
    with pytest.raises(CalibPruneError, match="exists"): check_target(tmp_path / "own.jsonl")
    check_target(tmp_path / "own.jsonl", resumed=True)


def test_a_journal_is_made_with_its_first_text_and_cut_lines_are_written_again(tmp_path):
    path = tmp_path / "j"
    journal = Journal(path, dict(a=1))
    assert not path.exists()
    journal.add(SAMPLE)
    with open(path, "a") as f: f.write('{"key": "b", "tok')
    again = Journal(path, dict(a=1))
    assert again.samples == {"a": SAMPLE} and len(path.read_text().splitlines()) == 2


@pytest.mark.parametrize("line", ["garbage", "[]", "{}", '{"key": "b", "tokens": ["x"], "opening": 0, "nll": 1.0, "ended": true}',
                                  '{"key": "b", "tokens": [1], "opening": 0, "nll": NaN, "ended": true}', "[" * 30_000])
def test_a_damaged_line_of_a_journal_is_named(tmp_path, line):
    path = tmp_path / "j"
    Journal(path, {}).add(SAMPLE)
    with open(path, "a") as f: f.write(line + "\n")
    before = path.read_bytes()
    with pytest.raises(CalibPruneError, match="line 3 is no text"): Journal(path, {})
    assert path.read_bytes() == before


# --- output that nobody takes

@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full here")
@pytest.mark.parametrize("more", [[], ["--json"]])
def test_a_full_disk_behind_the_output_ends_quietly(more):
    with open("/dev/full", "w") as full:
        done = subprocess.run([sys.executable, "-c", "from calib_prune.cli.app import main; main()", "tasks", *more], stdout=full,
                              stderr=subprocess.PIPE, text=True)
    assert done.returncode == 1 and done.stderr == "Error: cannot write the output: No space left on device.\n"


def test_a_closed_pipe_ends_quietly():
    process = subprocess.Popen([sys.executable, "-c", "from calib_prune.cli.app import main; main()", "tasks"], stdout=subprocess.PIPE,
                               stderr=subprocess.PIPE, text=True)
    process.stdout.close()
    assert "Traceback" not in process.stderr.read() and process.wait() != 0


def test_usage_errors_are_json_too(tmp_path):
    for argv in (["prune"], ["prune", "--nonsense"], ["evaluate", "--model", "x", "--limit", "many"], ["nonsense"]):
        done = subprocess.run([sys.executable, "-c", "from calib_prune.cli.app import main; main()", *argv, "--json"], capture_output=True, text=True)
        assert done.returncode == 2 and set(json.loads(done.stdout)) == {"error"} and not done.stderr, done


def test_own_files_are_ours_alone(tmp_path):
    for name in ("run.json", "layer-0001.safetensors", ".run.json.0123abcd.part", ".layer-0001.safetensors.0123abcd.part", ".lock", "layer-1.safetensors",
                 "a.txt", ".run.json.part", "layer-0001.safetensors.bak"): (tmp_path / name).touch()
    assert {o.name for o in own_files(tmp_path)} == {"run.json", "layer-0001.safetensors", ".run.json.0123abcd.part",
                                                     ".layer-0001.safetensors.0123abcd.part", ".lock"}
    with pytest.raises(CalibPruneError, match="is damaged"): check_checkpoint(tmp_path)


def test_a_run_holds_its_output_from_the_start(tmp_path):
    with OutputFolder(tmp_path / "new" / "out"):
        with pytest.raises(Busy): save_model(tiny_llama(), tiny_tokenizer(), tmp_path / "new" / "out", {})
    check_output(tmp_path / "new" / "out")
    with Checkpoint(tmp_path / "cp", {}), pytest.raises(Busy):
        with Checkpoint(tmp_path / "cp", {}): pass
