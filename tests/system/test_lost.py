"""Nothing of a user's is lost: folders that are not ours, locks, runs that are stopped. Kills at
any moment, and two runs at once: tests/torture."""
import hashlib
import json
import os
import shutil
import signal
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from calib_prune.core import Busy, CalibPruneError, only_run
from calib_prune.generation.sampling import Sample
from calib_prune.generation.writing import Journal, check_target
from calib_prune.model.loading import (
    PART,
    RECORD_FILE,
    OutputFolder,
    check_output,
    load_model,
    save_model,
)
from calib_prune.model.tiny import tiny_llama, tiny_model, tiny_tokenizer
from calib_prune.pruning.checkpoint import (
    MARKER,
    Checkpoint,
    check_checkpoint,
    differing_names,
    layers_in,
    model_fingerprint,
    own_files,
    remove_checkpoint,
    tensor_hash,
)
from calib_prune.pruning.walk import prune
from tests import processes
from tests.processes import start

TOKENS = torch.randint(1, 264, (4, 16), generator=torch.Generator().manual_seed(0))


def contents(folder):
    "Every file below a folder, with its bytes."
    return {
        str(o.relative_to(folder)): hashlib.sha256(o.read_bytes()).hexdigest()
        for o in sorted(Path(folder).rglob("*"))
        if o.is_file()
    }


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    root = tmp_path_factory.mktemp("inputs")
    save_model(tiny_llama(num_hidden_layers=4), tiny_tokenizer(), root / "model", {})
    (root / "text.txt").write_text(
        "".join(f"Line {i}: {i} times {i} is {i * i}.\n" for i in range(400))
    )
    return root


def usual(inputs, command, *more):
    "The arguments of the smallest run."
    model = inputs / "model"
    options = {
        "prune": [
            "--model", model, "--calibration", inputs / "text.txt", "--windows", "8", "--length",
            "32"], "generate": [
                "--model", model, "--protocol", "self-cal", "--windows", "8",
                "--length", "32", "--text-length", "24"], "evaluate": [
                    "--model", model, "--tasks", "sciq"], "reproduce": []}
    return [command, *map(str, [*options[command], *more])]


def call(inputs, command, *more):
    done = processes.call(*usual(inputs, command, *more), code=None)
    return done.returncode, done.stdout, done.stderr


def killed(act):
    """Do something in a fork that ends as if it were killed where it calls `die`; whether it came
    there."""
    if not (pid := os.fork()):
        try: act(lambda *_, **__: os._exit(9))
        finally: os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 9


@pytest.fixture
def no_model(monkeypatch):
    "What is refused has to be refused before a model is loaded."
    # in this order: importing the first reads the second
    for where in ("pipeline.prune", "model.loading"):
        monkeypatch.setattr(
            f"calib_prune.{where}.load_model", lambda *_: pytest.fail("a model is loaded")
        )


# --- folders that are not ours

def test_a_folder_of_the_users_is_no_checkpoint(inputs, tmp_path):
    mine = tmp_path / "thesis"
    (mine / "chapters").mkdir(parents=True)
    (mine / "a.txt").write_text("mine")
    (mine / "chapters" / "layer-0000.safetensors").write_text("mine too")
    before = contents(mine)
    code, _, err = call(inputs, "prune", "--output", tmp_path / "out", "--checkpoint", mine)
    assert code == 1 and "is not empty, and is no checkpoint: it holds a.txt" in err and contents(
        mine) == before
    with pytest.raises(CalibPruneError):
        prune(tiny_llama(), TOKENS, "wanda", checkpoint=mine)
    assert contents(mine) == before and not (tmp_path / "out").exists()


@pytest.mark.parametrize("option", ["--checkpoint", "--output"])
def test_an_empty_name_is_no_folder(inputs, tmp_path, option, monkeypatch):
    (tmp_path / "a.txt").write_text("mine")
    monkeypatch.chdir(tmp_path)
    more = ["--output", tmp_path / "out"] if option == "--checkpoint" else []
    code, _, err = call(inputs, "prune", *more, option, "")
    assert code == 1 and "the name is empty" in err and [o.name
                                                         for o in tmp_path.iterdir()] == ["a.txt"]


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
    with pytest.raises(CalibPruneError, match="run.json"):
        prune(tiny_llama(), TOKENS, "wanda", sparsity=0.7, checkpoint=tmp_path)


def test_a_marker_that_is_being_written_is_no_layer(tmp_path):
    # of a run that begins at the same moment, or was killed then
    (tmp_path / f".{MARKER}.0123abcd.part").write_text("{")
    assert len(prune(tiny_llama(), TOKENS, "wanda", sparsity=0.5, checkpoint=tmp_path)) > 0


@pytest.mark.parametrize("points", range(8))
def test_a_kill_while_a_checkpoint_is_removed_leaves_nothing_that_is_believed(
    tmp_path, monkeypatch, points
):
    "However many of its files are gone, another run starts from nothing, and the same one goes on."
    prune(
        tiny_llama(num_hidden_layers=3), TOKENS, "wanda", sparsity=0.5, checkpoint=tmp_path / "cp"
    )
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
    assert report.equals(wanted) and all(
        torch.equal(a, b) for a, b in zip(model.parameters(), alone.parameters(), strict=True)
    )


@pytest.mark.parametrize("at", [9, 60, 200, -1, -500])
def test_a_layer_whose_bytes_have_changed_is_refused(tmp_path, at):
    prune(tiny_llama(), TOKENS, "wanda", checkpoint=tmp_path)
    file = tmp_path / "layer-0001.safetensors"
    data = bytearray(file.read_bytes())
    data[at] ^= 1
    file.write_bytes(bytes(data))
    with pytest.raises(CalibPruneError, match="layer-0001.safetensors"):
        prune(tiny_llama(), TOKENS, "wanda", checkpoint=tmp_path)


def test_a_layer_of_another_run_is_refused(tmp_path):
    for sparsity, name in ((0.5, "a"), (0.7, "b")):
        prune(tiny_llama(), TOKENS, "wanda", sparsity=sparsity, checkpoint=tmp_path / name)
    (tmp_path / "a" / "layer-0000.safetensors").replace(tmp_path / "b" / "layer-0000.safetensors")
    with pytest.raises(CalibPruneError):
        prune(tiny_llama(), TOKENS, "wanda", sparsity=0.7, checkpoint=tmp_path / "b")


def test_a_checkpoint_of_another_version_is_refused(tmp_path, monkeypatch):
    from dataclasses import replace

    from calib_prune.pruning import walk
    prune(tiny_llama(), TOKENS, "wanda", checkpoint=tmp_path)
    monkeypatch.setattr(
        walk, "METHODS", walk.METHODS | {"wanda": replace(walk.METHODS["wanda"], version=99)}
    )
    with pytest.raises(CalibPruneError, match="version"):
        prune(tiny_llama(), TOKENS, "wanda", checkpoint=tmp_path)


# --- a checkpoint is of one model

def configured(name, value):
    def change(model): setattr(model.config, name, value)
    return change


def turned(model):
    weight = model.model.layers[0].mlp.up_proj.weight
    weight.data = weight.data.flip(0)


def other_rope(model):
    model.config.rope_parameters = model.config.rope_parameters | dict(rope_theta=5e5)


def other_buffer(name):
    def change(model): next(o for k, o in model.named_buffers() if k.endswith(name)).data.add_(0.5)
    return change


@pytest.mark.parametrize("family, change, said", [
    ("llama", other_rope, "configuration.rope_parameters.rope_theta"),
    ("llama", configured("hidden_act", "gelu"), "configuration.hidden_act"),
    ("llama", configured("rms_norm_eps", 1e-3), "configuration.rms_norm_eps"),
    ("llama", configured("num_attention_heads", 2), "configuration.num_attention_heads"),
    ("llama", configured("num_key_value_heads", 4), "configuration.num_key_value_heads"),
    ("mistral", configured("sliding_window", 4), "configuration.sliding_window"),
    ("llama", turned, "tensors.model.layers.0.mlp.up_proj.weight"),
    ("llama", other_buffer("inv_freq"), "tensors.model.rotary_emb.inv_freq"),
    ("deepseek_v3", other_buffer("e_score_correction_bias"), "gate.e_score_correction_bias"),
    ("llama", lambda m: m.half().float(), "and 14 more")])
def test_a_checkpoint_of_another_model_is_refused(tmp_path, family, change, said):
    prune(tiny_model(family), TOKENS, "wanda", checkpoint=tmp_path / "cp")
    change(other := tiny_model(family))
    with pytest.raises(CalibPruneError) as refused:
        prune(other, TOKENS, "wanda", checkpoint=tmp_path / "cp")
    assert said in str(refused.value)


@pytest.mark.parametrize("name, value", [("_name_or_path", "elsewhere"),
                                         ("transformers_version", "0.1"),
                                         ("architectures", ["Other"]), ("use_cache", False)])
def test_a_model_that_was_moved_is_the_same_model(tmp_path, name, value):
    prune(tiny_llama(), TOKENS, "wanda", checkpoint=tmp_path / "cp")
    configured(name, value)(same := tiny_llama())
    assert prune(same, TOKENS, "wanda", checkpoint=tmp_path / "cp").attrs["restored_layers"] == 2


def test_a_checkpoint_of_an_older_layout_is_refused(tmp_path):
    prune(tiny_llama(), TOKENS, "wanda", checkpoint=tmp_path)
    said = json.loads((tmp_path / MARKER).read_text())
    said["checkpoint"] = said["checkpoint"] | dict(layout=2, model="0123456789abcdef")
    (tmp_path / MARKER).write_text(json.dumps(said))
    for refuse in (check_checkpoint, lambda o: prune(tiny_llama(), TOKENS, "wanda", checkpoint=o)):
        with pytest.raises(CalibPruneError, match=r"layout 2, not 3"):
            refuse(tmp_path)


def test_what_only_the_other_run_says_differs_too():
    assert differing_names(dict(a=1, b=dict(c=2)), dict(a=1, b=dict(c=2, d=None))) == [
        "b.d"
    ] and differing_names(dict(a=[1]), {}) == ["a"]


@pytest.mark.parametrize(
    "dtype",
    [torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.bool, torch.float8_e4m3fn],
)
def test_a_hash_is_of_bytes_in_their_order(dtype, monkeypatch):
    tensor = torch.arange(24).reshape(
        4, 6).to(dtype) if dtype != torch.bool else torch.arange(24).reshape(4, 6) > 3
    whole = tensor_hash(tensor)
    assert tensor_hash(tensor.clone()) == whole != tensor_hash(
        tensor.reshape(6, 4)
    ) and whole != tensor_hash(tensor[[1, 0, 2, 3]])
    assert tensor_hash(tensor.T) == tensor_hash(tensor.T.contiguous()), "strides are not content"
    monkeypatch.setattr("calib_prune.pruning.checkpoint.PART_SIZE", 5)
    assert (
        tensor_hash(tensor) == whole
        and len({tensor_hash(tensor[0, 0]), tensor_hash(tensor[:0])}) == 2
    )


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_a_model_is_the_same_on_a_gpu():
    assert (
        model_fingerprint(tiny_llama())["tensors"]
        == model_fingerprint(tiny_llama().cuda())["tensors"]
    )


# --- outputs

@pytest.mark.parametrize("option", ["--output", "--checkpoint"])
@pytest.mark.parametrize("below", ["", "below"])
def test_a_link_that_leads_nowhere_is_refused_at_the_start(
    inputs, tmp_path, no_model, option, below
):
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    given = {"--output": tmp_path / "out", "--checkpoint": tmp_path / "cp"} | {
        option: tmp_path / "link" / below
    }
    code, _, err = call(inputs, "prune", *(o for pair in given.items() for o in pair))
    assert code == 1 and f"is a link to {tmp_path}/nowhere, which does not exist" in err and [
        o.name for o in tmp_path.iterdir()] == ["link"]


@pytest.mark.parametrize("output, checkpoint", [("a", "a/cp"), ("a/out", "a"), ("a", "a"),
                                                ("a", ".a.part"), ("a", ".a.part/cp"),
                                                ("a", "link/a/cp")])
def test_output_and_checkpoint_lie_apart(inputs, tmp_path, no_model, output, checkpoint):
    (tmp_path / "link").symlink_to(tmp_path)
    code, _, err = call(
        inputs, "prune", "--output", tmp_path / output, "--checkpoint", tmp_path / checkpoint
    )
    assert code == 1 and "overlap" in err and [o.name for o in tmp_path.iterdir()] == ["link"]


def test_names_that_leave_no_room_are_refused_at_the_start(inputs, tmp_path, no_model):
    deep = tmp_path / "/".join(["d" * 200] * 19)
    for name in (tmp_path / ("n" * 250), deep / ("x" * (4000 - len(str(deep))))):
        code, _, err = call(inputs, "prune", "--output", name)
        assert code == 1 and "its name is too long" in err and not [*tmp_path.iterdir()]
    for n in (246, 233):
        code, _, err = call(inputs, "generate", "--output", tmp_path / ("g" * (n - 6) + ".jsonl"))
        assert (
            code == 1 and f"would be {n - 232} bytes too long" in err and not [*tmp_path.iterdir()]
        )


def test_the_longest_name_for_text_can_be_written(inputs, tmp_path):
    name = "g" * 226 + ".jsonl"
    code, _, err = call(inputs, "generate", "--output", tmp_path / name)
    assert code == 0 and name in {o.name for o in tmp_path.iterdir()}, err


@pytest.mark.parametrize("name", ["own.jsonl", "own.report.json", "own.jsonl.partial"])
def test_a_link_of_the_users_is_not_replaced_by_text(inputs, tmp_path, no_model, name):
    (tmp_path / name).symlink_to("nowhere")
    code, _, err = call(inputs, "generate", "--output", tmp_path / "own.jsonl")
    assert code == 1 and "is a link to nowhere, which does not exist" in err and (
        tmp_path / name).is_symlink()


def altered(inputs, folder, file, **changes):
    "The model with changes in one of its JSON files."
    shutil.copytree(inputs / "model", folder)
    (folder / file).write_text(json.dumps(json.loads((folder / file).read_text()) | changes))
    return folder


@pytest.mark.parametrize("name", ["../x", "a/b", "a\0b", "x" * 300, "", "\ud800"])
def test_a_chat_template_that_cannot_be_saved_is_refused_before_the_work(
    inputs, tmp_path, monkeypatch, name
):
    monkeypatch.setattr(
        "calib_prune.pipeline.prune.prune", lambda *_, **__: pytest.fail("the model is pruned")
    )
    templates = [dict(name="default", template="a"), dict(name=name, template="b")]
    model = altered(inputs, tmp_path / "model", "tokenizer_config.json", chat_template=templates)
    code, _, err = call(inputs, "prune", "--output", tmp_path / "out", "--model", model)
    assert code == 1 and "cannot be saved: a file cannot have this name" in err and [
        o.name for o in tmp_path.iterdir()] == ["model"]


def test_chat_templates_are_saved(inputs, tmp_path):
    templates = [dict(name="default", template="a"), dict(name="tool use", template="b")]
    model = altered(inputs, tmp_path / "model", "tokenizer_config.json", chat_template=templates)
    assert call(inputs, "prune", "--output", tmp_path / "out", "--model", model)[0] == 0
    assert load_model(str(tmp_path / "out"))[1].chat_template == {"default": "a", "tool use": "b"}


def test_what_cannot_be_saved_is_noticed_before_the_work(inputs, tmp_path, monkeypatch):
    monkeypatch.setattr(
        "calib_prune.pipeline.prune.prune", lambda *_, **__: pytest.fail("the model is pruned")
    )
    def broken(*_, **__): raise ValueError("broken")
    monkeypatch.setattr("transformers.GenerationConfig.save_pretrained", broken)
    code, _, err = call(inputs, "prune", "--output", tmp_path / "out")
    assert code == 1 and "could not be saved after the work: broken" in err and not [
        *tmp_path.iterdir()]


# --- finished, and killed before all was tidied up

def half_tidied(inputs, tmp_path, monkeypatch, left):
    "Prune with a checkpoint, killed when `left` of its files are still to be removed."
    monkeypatch.undo()
    unlink = Path.unlink
    def act(die):
        def dying(self, **how):
            saved = (tmp_path / "out" / RECORD_FILE).is_file()
            if saved and self.parent == tmp_path / "cp" and len(own_files(self.parent)) <= left:
                die()
            unlink(self, **how)
        Path.unlink = dying
        call(inputs, "prune", "--output", tmp_path / "out", "--checkpoint", tmp_path / "cp")
    assert killed(act) and (tmp_path / "out" / RECORD_FILE).is_file() and (tmp_path / "cp").is_dir()


@pytest.mark.parametrize("left", [6, 4, 2, 1])  # 4 layers, marker, lock
def test_a_finished_output_of_the_same_run_is_recognised(inputs, tmp_path, monkeypatch, left):
    half_tidied(inputs, tmp_path, monkeypatch, left)
    before = contents(tmp_path / "out")
    monkeypatch.setattr(
        "calib_prune.pipeline.prune.prune",
        lambda *_, **__: pytest.fail("the model is pruned again"),
    )
    code, out, err = call(
        inputs, "prune", "--output", tmp_path / "out", "--checkpoint", tmp_path / "cp", "--json"
    )
    assert code == 0 and json.loads(out)["finished_before"] and json.loads(
        out)["sparsity"] == pytest.approx(.5, abs=.01), err
    assert contents(tmp_path / "out") == before and [o.name for o in tmp_path.iterdir()] == ["out"]
    assert (
        call(inputs, "prune", "--output", tmp_path / "out", "--checkpoint", tmp_path / "cp")[0] == 1
    ), "as without a checkpoint"


@pytest.mark.parametrize(
    "change",
    [["--seed", 1], ["--sparsity", .7], ["--method", "wanda"], ["--save-dtype", "bfloat16"],
     ["--windows", 7], "text", "model", "record", "weights", "marker"])
def test_an_output_of_another_run_is_refused(inputs, tmp_path, monkeypatch, change):
    half_tidied(inputs, tmp_path, monkeypatch, 6)
    if change == "marker":
        (tmp_path / "cp" / MARKER).write_text(
            json.dumps(dict(checkpoint=dict(layout=3), finished=True))
        )
    if change == "record": (tmp_path / "out" / RECORD_FILE).write_text("{}")
    if change == "weights": (tmp_path / "out" / "model.safetensors").unlink()
    more = change if isinstance(change, list) else []
    if change == "text":
        (tmp_path / "text.txt").write_text((inputs / "text.txt").read_text().replace("times", "by"))
        more = ["--calibration", tmp_path / "text.txt"]
    if change == "model":
        more = ["--model", altered(inputs, tmp_path / "model", "config.json", rms_norm_eps=1e-3)]
    kept = lambda: {k: o for k, o in contents(tmp_path).items() if not k.endswith(".lock")}
    before = kept()
    code, _, err = call(
        inputs, "prune", "--output", tmp_path / "out", "--checkpoint", tmp_path / "cp", *more
    )
    assert code == 1 and "exists and is not empty" in err and kept() == before


def test_a_finished_text_of_the_same_run_is_recognised(inputs, tmp_path):
    unlink = Path.unlink
    def act(die):
        Path.unlink = lambda self, **how: (
            die() if self.suffix == ".partial" else unlink(self, **how)
        )
        call(inputs, "generate", "--output", tmp_path / "own.jsonl")
    assert killed(act) and (tmp_path / "own.jsonl.partial").is_file()
    before, journal = contents(tmp_path), (tmp_path / "own.jsonl.partial").read_bytes()
    code, out, err = call(inputs, "generate", "--output", tmp_path / "own.jsonl")
    assert code == 0 and "was finished already" in out and contents(tmp_path) == {
        k: before[k] for k in ("own.jsonl", "own.report.json")}, err
    (tmp_path / "own.jsonl.partial").write_bytes(journal)
    (tmp_path / "own.jsonl").write_text('{"text": "mine"}\n')
    code, _, err = call(inputs, "generate", "--output", tmp_path / "own.jsonl")
    assert code == 1 and "exists: choose another name" in err and (
        tmp_path / "own.jsonl").read_text() == '{"text": "mine"}\n'


# --- interrupted

def interrupted(monkeypatch, where, layers=None):
    "A function that is interrupted, at once or after some layers."
    def stop(*_, **__): raise KeyboardInterrupt
    if layers is None: return monkeypatch.setattr(where, stop)
    save = Checkpoint.save
    monkeypatch.setattr(
        Checkpoint, "save", lambda self, i, *rest: stop() if i == layers else save(self, i, *rest)
    )


@pytest.mark.parametrize("as_json", [[], ["--json"]])
@pytest.mark.parametrize("command, where, more, said", [
    ("prune", "calib_prune.pruning.walk.prune_layer", ["--output", "out"],
     "Nothing was written, as no layer was finished; run the same command again."),
    ("prune", "calib_prune.pruning.walk.prune_layer", ["--output", "out", "--checkpoint", "cp"],
     "no layer was finished; run the same command again"),
    ("prune", 2, ["--output", "out", "--checkpoint", "cp"
                  ], "cp holds 2 finished layers; the same command continues at layer 2."),
    ("generate", "calib_prune.generation.writing.decode", [
        "--output", "own.jsonl"], "Nothing was written, as no text was finished"),
    ("generate", "calib_prune.generation.writing.write", ["--output", "own.jsonl"],
     "finished texts are in own.jsonl.partial; the same command continues with the next text."),
    ("evaluate", "calib_prune.pipeline.evaluate.load_model", [],
     "No scores were kept; run the same command again."),
    ("reproduce", "calib_prune.cli.reproduce._study_of", [],
     "Finished models are not made again; run the same command again."),
    ("reproduce", "calib_prune.pipeline.again.prune_again", ["--from", "out"],
     "Nothing was written; run the same command again.")])
def test_an_interrupted_command_says_what_it_leaves(
    inputs, tmp_path, monkeypatch, command, where, more, said, as_json
):
    if command == "reproduce" and as_json: pytest.skip("it has no --json")
    monkeypatch.chdir(tmp_path)
    interrupted(monkeypatch, where, where if isinstance(where, int) else None)
    code, out, err = call(inputs, command, *more, *as_json)
    assert code == 130 and "Traceback" not in err
    if as_json:
        assert json.loads(out)["error"].startswith("Interrupted: ") and said in json.loads(
            out)["error"]
    else: assert not out.strip() and said in err and "Error" not in err
    assert not (tmp_path / "out").exists() and layers_in("cp") == (where
                                                                   if isinstance(where, int) else 0)


@pytest.mark.parametrize("presses", [1, 2, 3])
def test_further_presses_give_no_traceback(presses):
    code = (
        "import os, signal, sys, time, calib_prune.cli.app as a\ndef press(): os.kill(os.getpid(),"
        " signal.SIGINT); time.sleep(.05)\ndef evaluate():\n    try: time.sleep(1); press()\n   "
        " finally:\n        for _ in range(PRESSES - 1): press()\na._run_app = lambda as_json:"
        " a.stoppable(evaluate)()\na.main()".replace("PRESSES", str(presses))
    )
    done = processes.run(program=code, code=130 if presses < 3 else -signal.SIGINT)
    assert presses == 3 or "Interrupted: No scores were kept" in done.stderr


def test_a_press_while_python_ends_is_no_traceback():
    code = (
        "import atexit, os, signal, sys, calib_prune.cli.app as a\natexit.register(os.kill,"
        " os.getpid(), signal.SIGINT)\nsys.argv = ['x', 'tasks', '--json']\na.main()"
    )
    done = processes.run(program=code)
    assert not done.stderr and json.loads(done.stdout)


def test_a_press_while_commands_are_imported_is_no_traceback():
    code = (
        "import builtins, os, signal\nload = builtins.__import__\ndef press(name, *rest):\n    if"
        " name == 'typer': os.kill(os.getpid(), signal.SIGINT)\n    return load(name,"
        " *rest)\nbuiltins.__import__ = press\nimport calib_prune.cli.app"
    )
    assert not processes.run(program=code, code=-signal.SIGINT).stderr


# --- outputs on disks and folders

def test_an_output_on_a_disk_of_its_own_is_filled(tmp_path, monkeypatch):
    "An empty folder may be a volume: nothing can be moved into it in one step from beside it."
    out, rename = tmp_path / "volume", Path.rename
    out.mkdir()
    def across(self, target):
        if (out in self.parents) != (out in Path(target).parents):
            raise OSError(18, "Invalid cross-device link")
        return rename(self, target)
    monkeypatch.setattr(Path, "rename", across)
    save_model(tiny_llama(), tiny_tokenizer(), out, {})
    assert load_model(str(out))[0].num_parameters() and not [o for o in tmp_path.rglob(".*")]


@pytest.mark.skipif(
    os.getuid() != 0
    or bool(subprocess.run(["unshare", "-m", "true"], capture_output=True).returncode),
    reason="cannot mount",
)
def test_an_output_that_is_a_mount_point(inputs, tmp_path):
    (tmp_path / "volume").mkdir()
    code = (
        "from calib_prune.model.loading import *; from calib_prune.model.tiny import *;"
        f" save_model(tiny_llama(), tiny_tokenizer(), {str(tmp_path / 'volume')!r}, {{}});"
        f" print(load_model({str(tmp_path / 'volume')!r})[0].num_parameters())"
    )
    done = subprocess.run([
        "unshare", "-m", "sh", "-c",
        f"mount -t tmpfs none {tmp_path}/volume && exec {sys.executable} -c \"$0\"", code],
                          capture_output=True,
                          text=True)
    if "mount:" in done.stderr: pytest.skip(done.stderr)
    assert done.returncode == 0 and int(done.stdout) > 0, done.stderr


def test_what_a_killed_run_left_is_removed_by_the_next(tmp_path):
    part = tmp_path / ".out.part"
    part.mkdir()
    (part / PART).touch()
    (part / "model.safetensors").write_bytes(b"half")
    save_model(tiny_llama(), tiny_tokenizer(), tmp_path / "out", {})
    assert [o.name for o in tmp_path.iterdir()] == ["out"] and RECORD_FILE in {
        o.name for o in (tmp_path / "out").iterdir()
    }


@pytest.mark.parametrize("removed", range(4))
def test_a_kill_while_a_part_folder_is_removed(tmp_path, removed):
    "What is left of it is still known as ours."
    from calib_prune.model.loading import _clear
    (part := tmp_path / ".out.part").mkdir()
    for name in (PART, "a", "z", "~"): (part / name).touch()
    unlink, done = Path.unlink, []
    def act(die):
        def dying(self, **how):
            if len(done) == removed: die()
            done.append(unlink(self, **how))
        Path.unlink = dying
        _clear(part)
    assert killed(act) and len([*part.iterdir()]) == 4 - removed and (part / PART).is_file()
    save_model(tiny_llama(), tiny_tokenizer(), tmp_path / "out", {})
    assert [o.name for o in tmp_path.iterdir()] == ["out"]


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
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == (
        9 if moved < len([*(tmp_path / "whole").iterdir()]) else 0
    )
    assert RECORD_FILE not in {o.name for o in (tmp_path / "out").iterdir()}
    save_model(tiny_llama(), tiny_tokenizer(), tmp_path / "out", {})
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_a_list_of_moved_files_names_only_files_of_the_folder(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "mine.txt").write_text("mine")
    (tmp_path / "out" / PART).write_text(json.dumps(["../mine.txt", 5, ".."]))
    save_model(tiny_llama(), tiny_tokenizer(), tmp_path / "out", {})
    assert (tmp_path / "mine.txt").read_text() == "mine" and PART not in {
        o.name for o in (tmp_path / "out").iterdir()
    }


def test_a_hidden_folder_of_the_users_is_left_alone(tmp_path):
    (tmp_path / ".out.part").mkdir()
    (tmp_path / ".out.part" / "a.txt").write_text("mine")
    with pytest.raises(CalibPruneError, match=".out.part"):
        save_model(tiny_llama(), tiny_tokenizer(), tmp_path / "out", {})
    assert (tmp_path / ".out.part" / "a.txt").read_text() == "mine" and not (
        tmp_path / "out"
    ).exists()


@pytest.mark.parametrize("mask, wanted", [(0o022, 0o644), (0o077, 0o600), (0o027, 0o640)])
def test_files_are_readable_as_the_umask_says(tmp_path, mask, wanted):
    before = os.umask(mask)
    try: save_model(tiny_llama(), tiny_tokenizer(), tmp_path / "out", {})
    finally: os.umask(before)
    assert {stat.S_IMODE(o.stat().st_mode) for o in (tmp_path / "out").iterdir()} == {wanted}


# --- locks

def test_a_lock_ends_with_its_process(tmp_path):
    code = (
        "from pathlib import Path; from calib_prune.core import only_run\nwith"
        f" only_run(Path({str(tmp_path / 'lock')!r}), 'x'):\n    print('held', flush=True); import"
        " time; time.sleep(60)"
    )
    process = start(program=code)
    assert process.stdout.readline() == "held\n"
    with pytest.raises(Busy, match="here"):
        with only_run(tmp_path / "lock", "here"): pass
    process.kill()
    process.wait()
    with only_run(tmp_path / "lock", "here"): pass
    assert list(tmp_path.iterdir()) == []


# --- journals and reports

SAMPLE = Sample("a", (1, 2, 3), 1, 2.5, True)


def test_what_is_no_journal_of_ours_is_left_alone(inputs, tmp_path):
    for text in ("", "my notes", "my notes\nmore\n", "{}\n", '"0123"\n'):
        path = tmp_path / "own.jsonl.partial"
        path.write_text(text)
        with pytest.raises(CalibPruneError, match=path.name):
            Journal(path, {})
        assert path.read_text() == text
    code, _, err = call(inputs, "generate", "--output", tmp_path / "own.jsonl")
    assert code == 1 and "no journal of this program" in err and path.read_text() == text and [
        o.name for o in tmp_path.iterdir()] == [path.name]


def test_a_report_that_is_there_is_left_alone(inputs, tmp_path):
    (tmp_path / "own.report.json").write_text("mine")
    code, _, err = call(inputs, "generate", "--output", tmp_path / "own.jsonl")
    assert code == 1 and "own.report.json exists" in err and [o.name for o in tmp_path.iterdir()
                                                              ] == ["own.report.json"]
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


@pytest.mark.parametrize("line", [
    "garbage", "[]", "{}", '{"key": "b", "tokens": ["x"], "opening": 0, "nll": 1.0, "ended": true}',
    '{"key": "b", "tokens": [1], "opening": 0, "nll": NaN, "ended": true}', "[" * 30_000])
def test_a_damaged_line_of_a_journal_is_named(tmp_path, line):
    path = tmp_path / "j"
    Journal(path, {}).add(SAMPLE)
    with open(path, "a") as f: f.write(line + "\n")
    before = path.read_bytes()
    with pytest.raises(CalibPruneError, match="line 3"): Journal(path, {})
    assert path.read_bytes() == before


# --- output that nobody takes

@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full here")
@pytest.mark.parametrize("more", [[], ["--json"]])
def test_a_full_disk_behind_the_output_ends_quietly(more):
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-c", processes.COMMAND, "tasks", *more],
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
        )
    assert (
        done.returncode == 1
        and done.stderr == "Error: cannot write the output: No space left on device.\n"
    )


def test_a_closed_pipe_ends_quietly():
    process = start("tasks")
    process.stdout.close()
    assert "Traceback" not in process.stderr.read() and process.wait() != 0


def test_usage_errors_are_json_too(tmp_path):
    for argv in (["prune"], ["prune", "--nonsense"], [
            "evaluate", "--model", "x", "--limit", "many"], ["nonsense"]):
        done = processes.call(*argv, "--json", code=2)
        assert set(json.loads(done.stdout)) == {"error"} and not done.stderr, done


def test_own_files_are_ours_alone(tmp_path):
    for name in ("run.json", "layer-0001.safetensors", ".run.json.0123abcd.part",
                 ".layer-0001.safetensors.0123abcd.part", ".lock", "layer-1.safetensors", "a.txt",
                 ".run.json.part", "layer-0001.safetensors.bak"):        (tmp_path / name).touch()
    assert {o.name for o in own_files(tmp_path)} == {
        "run.json", "layer-0001.safetensors", ".run.json.0123abcd.part",
        ".layer-0001.safetensors.0123abcd.part", ".lock"}
    with pytest.raises(CalibPruneError): check_checkpoint(tmp_path)


def test_a_run_holds_its_output_from_the_start(tmp_path):
    with OutputFolder(tmp_path / "new" / "out"):
        with pytest.raises(Busy):
            save_model(tiny_llama(), tiny_tokenizer(), tmp_path / "new" / "out", {})
    check_output(tmp_path / "new" / "out")
    with Checkpoint(tmp_path / "cp", {}), pytest.raises(Busy):
        with Checkpoint(tmp_path / "cp", {}): pass
