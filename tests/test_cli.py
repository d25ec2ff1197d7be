"The command line as a user calls it: a process, its output, its exit code."
import json
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from calib_prune.models import RECORD, save_model, tiny_llama, tiny_tokenizer


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return str(save_model(tiny_llama(max_position_embeddings=2048), tiny_tokenizer(), tmp_path_factory.mktemp("models") / "tiny", {}))


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "notes.txt"
    path.write_text("".join(f"Line {i} says that {i} times {i} is {i * i}.\n" for i in range(400)))
    return str(path)


def run(*args, code=0):
    done = subprocess.run([sys.executable, "-c", "from calib_prune.cli import main; main()", *map(str, args)],
                          capture_output=True, text=True, stdin=subprocess.DEVNULL)
    assert done.returncode == code, done.stdout + done.stderr
    assert "Traceback" not in done.stderr, done.stderr
    return done


def prune(model, text, output, *more, code=0):
    return run("prune", "--model", model, "--calibration", text, "--windows", 8, "--length", 64, "--output", output, *more, code=code)


def test_prune_makes_a_folder_that_plain_transformers_loads(model, text, tmp_path):
    out = tmp_path / "pruned"
    brief = json.loads(prune(model, text, out, "--sparsity", "0.5", "--json").stdout)
    again = AutoModelForCausalLM.from_pretrained(out)
    zeros = [(m.weight == 0).float().mean().item() for n, m in again.named_modules() if n.endswith("_proj")]
    assert zeros == [0.5] * 14 and brief["sparsity"] == 0.5
    record = json.loads((out / RECORD).read_text())
    assert record["method"] == "sparsegpt" and record["calibration"]["windows"] == 8 and len(record["layers"]) == 14
    assert list(record["calibration"]["counts"].values()) == [8]


def test_the_same_command_gives_the_same_bytes(model, text, tmp_path):
    for name in ("a", "b"): prune(model, text, tmp_path / name, "--method", "wanda", "--sparsity", "2:4")
    a, b = ((tmp_path / n / "model.safetensors").read_bytes() for n in ("a", "b"))
    assert a == b
    assert all(((w.reshape(len(w), -1, 4) == 0).sum(-1) == 2).all() for n, w in load_file(tmp_path / "a/model.safetensors").items()
               if n.endswith("_proj.weight"))


def test_people_get_bars_and_a_table(model, text, tmp_path):
    done = prune(model, text, tmp_path / "out")
    assert "2/2" in done.stderr and "mean_error" in done.stdout


@pytest.mark.real
def test_evaluate_reports_scores_and_retention(model, text, tmp_path):
    prune(model, text, tmp_path / "out", "--sparsity", "0.9")
    tasks = "jeopardy,piqa,mbpp,gsm8k"
    out = json.loads(run("evaluate", "--model", tmp_path / "out", "--dense", model, "--tasks", tasks, "--limit", 8, "--json").stdout)
    assert [r["n"] for r in out["scores"]] == [8] * 4
    assert {r["name"] for r in out["retention"] if r["level"] == "dimension"} == {"General", "Commonsense", "Code", "Math"}
    assert all(r["ci_low"] <= r["retention"] <= r["ci_high"] for r in out["retention"] if r["level"] == "total")


@pytest.mark.parametrize("change, message", [
    (["--calibration", "wikipeda"], "Did you mean 'wikipedia'"),
    (["--model", "smollm2-153m"], "Did you mean 'smollm2-135m'"),
    (["--method", "sparsegtp"], "Did you mean 'sparsegpt'"),
    (["--sparsity", "1"], "outside [0, 1)"),
    (["--sparsity", "2:5"], "does not divide"),
    (["--sparsity", "half"], "neither a number"),
    (["--dtype", "float23"], "Did you mean 'float32'"),
    (["--length", "100000"], "need 800,000"),
])
def test_wrong_input_is_one_readable_error(model, text, tmp_path, change, message):
    done = prune(model, text, tmp_path / "out", *change, "--json", code=1)
    assert message in json.loads(done.stdout)["error"]
    assert not (tmp_path / "out").exists()


def test_errors_for_people_go_to_standard_error(model, tmp_path):
    done = run("prune", "--model", model, "--calibration", tmp_path / "no.txt", "--output", tmp_path / "out", code=1)
    assert done.stdout == "" and done.stderr.startswith("Error: ") and "no.txt" in done.stderr


def test_an_occupied_output_is_refused_before_the_work(model, text, tmp_path):
    (tmp_path / "thesis.txt").write_text("mine")
    done = prune(model, text, tmp_path, code=1)
    assert "not empty" in done.stderr and [o.name for o in tmp_path.iterdir()] == ["thesis.txt"]


def test_unknown_task_is_refused_before_the_model_is_loaded(tmp_path):
    done = run("evaluate", "--model", tmp_path / "none", "--tasks", "helaswag", "--json", code=1)
    assert "Did you mean 'hellaswag'" in json.loads(done.stdout)["error"]


def test_listings_for_programs():
    assert len(json.loads(run("sources", "--json").stdout)["sources"]) == 15
    assert len(json.loads(run("sources", "--suite", "paper", "--json").stdout)["sources"]) == 15
    assert "hellaswag" in json.loads(run("tasks", "--json").stdout)["sets"]["default"]


@pytest.mark.parametrize("command", ["fetch", "sources", "tasks", "prune", "evaluate", "reproduce"])
def test_every_command_explains_itself(command):
    assert len(run(command, "--help").stdout) > 200


def test_fetch_does_nothing_the_second_time():
    run("fetch")
    assert json.loads(run("fetch", "--json").stdout)["made"] == {}


def test_reproduce_outside_a_checkout_says_where_to_go(tmp_path, monkeypatch):
    from calib_prune import cli
    from calib_prune.core import CalibPruneError
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(cli, "__file__", str(tmp_path / "site-packages" / "calib_prune" / "cli.py"))
    with pytest.raises(CalibPruneError, match="call it in a checkout"): cli.repository()
    monkeypatch.chdir(Path(__file__).resolve().parent.parent)
    assert (cli.repository() / "Snakefile").is_file()
