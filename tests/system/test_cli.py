"The command line as a user calls it: its output and its exit code, in a process or in this one."
import importlib.metadata
import json
import subprocess
import sys
from functools import partial

import pytest
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from calib_prune.calibration.sources import SOURCES
from calib_prune.cli.output import as_text, show_table
from calib_prune.cli.reproduce import preset_names
from calib_prune.core import CalibPruneError
from calib_prune.data.files import read_jsonl
from calib_prune.model.loading import RECORD_FILE, save_model
from calib_prune.model.tiny import tiny_llama, tiny_tokenizer
from tests import ROOT
from tests.processes import call, run


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return str(
        save_model(tiny_llama(max_position_embeddings=2048), tiny_tokenizer(),
                   tmp_path_factory.mktemp("models") / "tiny", {}))


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "notes.txt"
    path.write_text("".join(f"Line {i} says that {i} times {i} is {i * i}.\n" for i in range(400)))
    return str(path)


def strict(text):
    "JSON as other programs than Python read it: without NaN."
    return json.loads(text, parse_constant=pytest.fail)


def prune(model, text, output, *more, code=0, how=call):
    return how(
        "prune",
        "--model",
        model,
        "--calibration",
        text,
        "--windows",
        8,
        "--length",
        64,
        "--output",
        output,
        *more,
        code=code
    )


def test_prune_makes_a_folder_that_plain_transformers_loads(model, text, tmp_path):
    out = tmp_path / "pruned"
    done = prune(model, text, out, "--sparsity", "0.5", "--json", how=run)
    brief = json.loads(done.stdout)
    assert "pruning" not in done.stderr, "bars are for people"
    again = AutoModelForCausalLM.from_pretrained(out)
    zeros = [(m.weight == 0).float().mean().item() for n, m in again.named_modules()
             if n.endswith("_proj")]
    assert zeros == [0.5] * 14 and brief["sparsity"] == 0.5
    record = json.loads((out / RECORD_FILE).read_text())
    assert record["method"] == "admm" and record["calibration"]["windows"] == 8 and len(
        record["layers"]) == 14
    assert list(record["calibration"]["counts"].values()) == [8]


def test_the_same_command_gives_the_same_bytes(model, text, tmp_path):
    for name in ("a", "b"):
        prune(model, text, tmp_path / name, "--method", "wanda", "--sparsity", "2:4", how=run)
    a, b = ((tmp_path / n / "model.safetensors").read_bytes() for n in ("a", "b"))
    assert a == b
    assert all(
        ((w.reshape(len(w), -1, 4) == 0).sum(-1) == 2).all()
        for n, w in load_file(tmp_path / "a/model.safetensors").items()
        if n.endswith("_proj.weight")
    )


def test_people_get_bars_and_a_table_and_quiet_ones_the_table(model, text, tmp_path):
    done = prune(model, text, tmp_path / "out", how=run)
    assert "pruning 0/2" in done.stderr and "pruning 2/2" in done.stderr
    assert "mean_error" in done.stdout
    quiet = prune(model, text, tmp_path / "quiet", "--quiet", how=run)
    assert quiet.stderr == "" and "mean_error" in quiet.stdout


def test_the_version_is_printed(model):
    assert run("--version").stdout.strip() == importlib.metadata.version("calib-prune")


def test_standard_input_is_calibration_text(model, text, tmp_path):
    records = []
    for name, given in dict(piped="-", file=text).items():
        with open(text) as notes:
            prune(model, given, tmp_path / name, "--json", how=partial(run, stdin=notes))
        records.append(json.loads((tmp_path / name / RECORD_FILE).read_text())["calibration"])
    assert records[0]["content"] == records[1]["content"] and records[0]["counts"] == {"-": 8}


def test_a_recipe_is_a_mix_and_a_method_and_options_replace_its_parts(model, text, tmp_path):
    prune(model, text, tmp_path / "best", "--recipe", "best", "--json")
    record = json.loads((tmp_path / "best" / RECORD_FILE).read_text())
    assert (record["method"], record["reconstruct"]) == ("admm", 3)
    assert [*record["calibration"]["counts"]] == [text], "--calibration replaces the mix"
    done = prune(model, text, tmp_path / "none", "--recipe", "bets", code=1)
    assert "Did you mean 'best'?" in done.stderr and not (tmp_path / "none").exists()


def test_layers_and_maps_that_are_left_out_stay_dense(model, text, tmp_path):
    prune(model, text, tmp_path / "out", "--layers", "1", "--exclude", "*.down_proj", "--json")
    folders = model, tmp_path / "out"
    before, after = (load_file(f"{folder}/model.safetensors") for folder in folders)
    same = {name for name in before if bool((before[name] == after[name]).all())}
    assert {name for name in before if "layers.0" in name or "down_proj" in name} <= same
    assert "model.layers.1.mlp.up_proj.weight" not in same
    record = json.loads((tmp_path / "out" / RECORD_FILE).read_text())
    assert record["scope"] == dict(layers="1", exclude="*.down_proj")
    assert record["achieved_sparsity"] < 0.25 and record["sparsity_in_scope"] == 0.5
    assert record["mean_error"] == pytest.approx(
        sum(row["error"] for row in record["layers"] if row["sparsity"]) / 6)
    done = prune(model, text, tmp_path / "none", "--layers", "9", code=1)
    assert "There is no layer 9: the model has 2 layers" in done.stderr


def test_a_prune_that_was_cut_off_goes_on_without_having_been_asked_to(model, text, tmp_path):
    folder, layers = tmp_path / "out", tmp_path / "out.layers"
    def cut_off(*args, **kwargs): raise KeyboardInterrupt
    with pytest.MonkeyPatch.context() as here:
        here.setattr("calib_prune.pipeline.prune.as_stored", cut_off)
        done = prune(model, text, folder, code=130)
    assert f"{layers} holds 2 finished layers; the same command continues" in done.stderr
    prune(model, text, folder, "--json")
    assert (folder / RECORD_FILE).is_file() and not layers.exists()
    other = prune(model, text, tmp_path / "other", "--json", how=run)
    assert other.returncode == 0
    weights = [(path / "model.safetensors").read_bytes() for path in (folder, tmp_path / "other")]
    assert weights[0] == weights[1]


@pytest.mark.real
def test_evaluate_reports_scores_and_retention(model, text, tmp_path):
    prune(model, text, tmp_path / "out", "--sparsity", "0.9")
    tasks = "jeopardy,piqa,mbpp,gsm8k"
    out = strict(
        call("evaluate", "--model", tmp_path / "out", "--dense", model, "--tasks", tasks, "--limit",
            8, "--measure", "plain", "--json").stdout)
    assert [r["n"] for r in out["scores"]] == [8] * 4
    assert {r["name"] for r in out["retention"] if r["level"] == "dimension"} == {
        "General", "Commonsense", "Code", "Math"}
    assert all(r["ci_low"] <= r["retention"] <= r["ci_high"] for r in out["retention"] if r["n"])
    assert {r["name"]: r["n"] for r in out["retention"] if r["level"] != "task"} == dict(
        General=8, Commonsense=0, Code=8, Math=8, total=0
    )
    assert (
        "Commonsense has no retention" in out["reasons"]["total"]
        and "Code cannot be judged: fewer than 10 items" in out["verdict"]
    )
    assert out["measure"] == "plain" and {"accuracy", "chance", "bits_per_byte"} <= set(
        out["scores"][0]
    )
    asked = ("evaluate", "--model", tmp_path / "out", "--dense", model, "--tasks", "piqa,mbpp",
             "--limit", 8)
    bits = json.loads(call(*asked, "--json").stdout)
    assert {row["name"] for row in bits["floor"]} >= {"piqa", "mbpp", "Code"}
    assert set(bits["other_measures"]) == {"plain"}, "the model is at chance in piqa"
    at = lambda o, name: next(r["retention"] for r in o["retention"] if r["name"] == name)
    assert bits["measure"] == "answer-bits" and at(bits, "mbpp") == at(out, "mbpp")
    assert at(bits, "piqa") > 0 and "piqa" not in {
        r["name"] for r in out["retention"]
    }, "bits count where accuracies are at chance"
    guessing = call(*asked, "--measure", "above-chance", code=1)
    assert (
        "bits per byte" in guessing.stdout
        and "pruned" in guessing.stdout
        and "not clearly above chance in piqa" in " ".join(guessing.stderr.split())
    ), "the scores are shown all the same"
    refused = json.loads(call(*asked, "--measure", "above-chance", "--json", code=1).stdout)
    assert "not clearly above chance in piqa" in refused["error"] and [
        o["n"] for o in refused["scores"]
    ] == [8, 8], "so they are for programs"
    assert (
        out["at_chance"] == out["left_aside"] == ["piqa"]
        and out["not_scored"] == out["endings"] == []
    )
    assert [r["task"] for r in out["dense_scores"]] == [r["task"] for r in out["scores"]] and out[
        "dense_scores"
    ] != out["scores"]
    plain = " ".join(call(*asked, "--measure", "plain", "--no-floor").stdout.split())
    assert "floor" not in plain
    assert (
        "Left out: piqa: the dense model has" in plain
        and "of 8 answers right, not clearly more than guessing (50 %)." in plain
    )
    assert (
        "total: not given" in plain
        and "Verdict: Commonsense cannot be judged: no task counts (piqa)." in plain
    )


@pytest.mark.real
def test_a_model_has_the_retention_100_of_itself(model):
    asked = (
        "evaluate",
        "--model",
        model,
        "--dense",
        model,
        "--tasks",
        "jeopardy,triviaqa",
        "--limit",
    )
    out = strict(call(*asked, 10, "--json").stdout)
    dimension = next(row for row in out["retention"] if row["level"] == "dimension")
    assert (dimension["retention"], dimension["ci_low"], dimension["ci_high"],
            dimension["n"]) == (1, 1, 1, 20)
    assert out["scores"] == out["dense_scores"] and out["verdict"].startswith(
        "No judged dimension has a significant loss."
    )
    one = strict(call(*asked, 1, "--json").stdout)
    assert {row["ci_low"] for row in one["retention"]} == {None} and "single item" in one[
        "reasons"
    ]["General"]
    said = call(*asked, 1).stdout
    assert "nan" not in said and "cannot be judged: fewer than 10 items" in said


@pytest.mark.parametrize("given", [
    ["prune", "--model", "smolm2", "--output", "x"], ["report", "x", "--dense", "smolm2"],
    ["compare", "smollm2-135m", "smolm2", "--dense", "smollm2-135m"], ["fetch", "smolm2"]])
def test_a_wrong_name_of_a_model_takes_no_import_of_torch(given):
    code = f"""
import os, sys
os.environ.pop("TQDM_DISABLE", None)
sys.argv = ["calib-prune", *{given}]
from calib_prune.cli.app import main
try: main()
finally: print("torch" in sys.modules, os.environ["TQDM_DISABLE"])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 1 and done.stdout.split() == ["False", "1"]
    assert "Unknown model 'smolm2'" in done.stderr
    assert ("local folder" in done.stderr) == (given[0] != "fetch")


def test_an_unknown_measure_is_refused_before_the_model_is_loaded(tmp_path):
    done = call(
        "evaluate", "--model", "owner/none", "--measure", "answer-bit", "--json", code=1
    )
    assert "Did you mean 'answer-bits'" in json.loads(done.stdout)["error"]
    done = call(
        "evaluate",
        "--model",
        "owner/none",
        "--dense",
        "owner/no",
        "--measure",
        "above-chance",
        "--tasks",
        "mbpp",
        "--json",
        code=1,
    )
    assert "cannot score any of these tasks: mbpp" in json.loads(done.stdout)["error"]


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
    done = call(
        "prune",
        "--model",
        model,
        "--calibration",
        tmp_path / "no.txt",
        "--output",
        tmp_path / "out",
        code=1,
    )
    assert done.stdout == "" and done.stderr.startswith("Error: ") and "no.txt" in done.stderr


@pytest.mark.real
def test_compare_and_report_on_pruned_models(model, text, tmp_path):
    """Two pruned models: differences, answers that turned, a figure; a page, a card, a record. A
    README that somebody wrote stays."""
    for name, sparsity in (("half", "0.5"), ("most", "0.9")):
        prune(model, text, tmp_path / name, "--sparsity", sparsity)
    few = ("--dense", model, "--tasks", "piqa,jeopardy", "--limit", 12, "--json")
    out = strict(call("compare", tmp_path / "half", tmp_path / "most", *few, "--figure",
                      tmp_path / "seen.svg").stdout)
    assert {row["first"] for row in out["differences"]} == {"half"}
    assert {row["n"] for row in out["flips"]} == {12} and (tmp_path / "seen.svg").stat().st_size
    assert {row["model"] for row in out["floor"]} == {"half", "most"}

    (tmp_path / "half" / "README.md").write_text("mine")
    for name in ("half", "most"):
        said = strict(call("report", tmp_path / name, *few).stdout)
        assert said["report"] == 1 and said["model"]["sparsity"] in ("0.5", "0.9")
        page = (tmp_path / name / "report.html").read_text()
        assert "<svg" in page and "Answers that turned" in page
        assert said["divergence"]["bits"] > 0 and len(said["answers"]) == 4
    assert (tmp_path / "half" / "README.md").read_text() == "mine"
    assert (tmp_path / "most" / "README.md").read_text().startswith("---\nlibrary_name:")
    AutoModelForCausalLM.from_pretrained(tmp_path / "most")
    record = tmp_path / "most" / RECORD_FILE
    record.write_text(record.read_text().replace('"method": "admm"', '"method": "my-own"'))
    said = call("report", tmp_path / "most", "--dense", model, code=1)
    assert "my-own" in said.stderr and "scoring" not in said.stderr, "refused before scoring"


@pytest.mark.real
def test_advice_without_pruning_takes_own_text(text, tmp_path):
    prompts = tmp_path / "mine.jsonl"
    prompts.write_text("".join(json.dumps(dict(prompt=f"def add_{i}(a, b):")) + "\n"
                               for i in range(12)))
    asked = ("advise", "--model", "smollm2-135m", "--minutes", 0, "--json")
    for need in ("code", prompts):
        out = strict(call(*asked, "--need", need, "--source", text).stdout)
        assert out["advice"] == 1 and str(text) in {row["source"] for row in out["distances"]}
    assert out["regrets"] == [] and out["weights"] == {"own": 1.0}
    far = tmp_path / "far.txt"
    far.write_text("zzzz qqqq xxxx " * 3000)
    said = call(*asked[:-1], "--need", "code", "--source", far).stdout
    table, command = said.split("Take ")[0], said.split("To choose by pruning:")[1]
    assert "far.txt" in "".join(table.split()), "the user's own, although 15 are nearer"
    assert f"--source {far}" in " ".join(command.split())
    done = call(*asked, "--need", "cod", code=1)
    assert "Unknown need 'cod'" in json.loads(done.stdout)["error"]


def test_the_demo_of_advice_needs_no_model(monkeypatch, tmp_path):
    monkeypatch.setenv("CALIB_PRUNE_CACHE", str(tmp_path / "empty"))
    assert "Calibration data for smollm2-135m" in call("advise", "--demo").stdout
    assert strict(call("advise", "--demo", "--json").stdout)["advice"] == 1
    assert "For which model?" in call("advise", "--need", "code", code=1).stderr


def test_an_occupied_output_is_refused_before_the_work(model, text, tmp_path):
    (tmp_path / "thesis.txt").write_text("mine")
    done = prune(model, text, tmp_path, code=1)
    assert "not empty" in done.stderr and [o.name for o in tmp_path.iterdir()] == ["thesis.txt"]


def test_unknown_task_is_refused_before_the_model_is_loaded(tmp_path):
    done = call("evaluate", "--model", "owner/none", "--tasks", "helaswag", "--json", code=1)
    assert "Did you mean 'hellaswag'" in json.loads(done.stdout)["error"]


def test_listings_for_programs():
    assert len(json.loads(call("sources", "--json").stdout)["sources"]) == len(SOURCES)
    assert len(json.loads(call("sources", "--suite", "paper", "--json").stdout)["sources"]) == 15
    assert "hellaswag" in json.loads(call("tasks", "--json").stdout)["sets"]["default"]


COMMANDS = ("fetch", "sources", "tasks", "prune", "evaluate", "compare", "report", "advise",
            "measure", "generate", "reproduce")


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_explains_itself(name):
    assert len(call(name, "--help").stdout) > 200


def test_the_list_of_commands_is_whole():
    said = run("--help").stdout
    for name in COMMANDS: assert f" {name} " in said


def test_reproduce_names_every_preset():
    said = call("reproduce", "--help").stdout
    for name in preset_names(ROOT):
        for part in name.split("/"): assert part in said


SMALL = "--windows", 4, "--length", 32
WRITE = *SMALL, "--text-length", 48


@pytest.mark.parametrize("protocol", ["self-cal", "sgs", "igsp"])
def test_what_a_model_wrote_calibrates_it(model, text, tmp_path, protocol):
    own = tmp_path / "own.jsonl"
    found = strict(
        call("generate", "--model", model, "--output", own, "--protocol", protocol, *WRITE,
                "--source", text, "--json").stdout)
    rows = read_jsonl(own)
    assert found["protocol"] == protocol and found["tokens"] >= 4 * 32 and found[
        "tokens_per_second"] > 0
    assert len(rows) == found["documents"] and {r["protocol"] for r in rows} == {protocol}
    assert strict(own.with_name("own.report.json").read_text()) | {"output": str(own)} == found
    assert sorted(o.name for o in tmp_path.iterdir()) == [
        "own.jsonl",
        "own.report.json",
    ], "the journal is gone"
    pruned = strict(
        call("prune", "--model", model, "--calibration", own, *SMALL, "--output",
                tmp_path / "out", "--json").stdout)
    assert pruned["calibration"]["counts"] == {str(own): 4} and pruned["sparsity"] == pytest.approx(
        0.5, abs=0.01
    )


def test_column_names_are_printed_as_they_are(capsys):
    "A mix of a user's files is a column of the table of advice."
    show_table([{"data/[old]/notes.txt": "1", "[/x].txt": 2}])
    shown = capsys.readouterr().out
    assert "data/[old]/notes.txt" in shown and "[/x].txt" in shown


def test_people_see_how_fast_a_model_writes(model, tmp_path):
    done = run("generate", "--model", model, "--output", tmp_path / "own.jsonl", "--protocol",
               "self-cal", *WRITE)
    assert "writing tokens" in done.stderr and " tokens/s" in done.stderr
    head, row = done.stdout.splitlines()[0].split(), done.stdout.splitlines()[1].split()
    report = json.loads((tmp_path / "own.report.json").read_text())
    assert head[-1] == "tokens/s" and row[-1] == as_text(report["tokens_per_second"])


def test_texts_from_the_journal_have_no_speed(model, tmp_path, monkeypatch):
    how = (
        "generate",
        "--model",
        model,
        "--output",
        tmp_path / "own.jsonl",
        "--protocol",
        "self-cal",
        *WRITE,
    )
    def full(*_): raise CalibPruneError("The disk is full.")
    with monkeypatch.context() as m:
        m.setattr("calib_prune.generation.writing.write", full)
        assert "The disk is full" in call(*how, code=1).stderr
    assert [o.name for o in tmp_path.iterdir()] == ["own.jsonl.partial"], "the texts are kept"
    assert call(*how).stdout.splitlines()[1].split()[-1] == "–"
    assert json.loads((tmp_path / "own.report.json").read_text())["written_tokens"] == 0


@pytest.mark.parametrize("change, message", [
    (["--protocol", "self-call"], "Did you mean 'self-cal'"),
    (["--balance", "means"], "Did you mean 'mean'"),
    (["--windows", 0], "windows is 0, but must be"),
    (["--temperature", 0], "temperature is 0"),
    (["--text-length", 8], "nothing would be left to write"),
    (["--output", "own.txt"], "must end in .jsonl"),
    (["--model", "smollm2-153m"], "Did you mean 'smollm2-135m'"),
])
def test_what_cannot_be_written_leaves_no_file(
    model, tmp_path, monkeypatch, change, message
):
    # Nor a journal: it would refuse the same command with better settings.
    monkeypatch.chdir(tmp_path)
    done = call(
        "generate", "--model", model, "--output", "own.jsonl", *WRITE, "--json", *change, code=1
    )
    assert message in json.loads(done.stdout)["error"] and list(tmp_path.iterdir()) == []


def test_written_text_is_never_overwritten(tmp_path):
    own = tmp_path / "own.jsonl"
    own.write_text("mine")
    done = call("generate", "--model", "owner/none", "--output", own, *WRITE, code=1)
    assert (
        "exists: choose another name" in done.stderr.replace("\n", " ")
        and own.read_text() == "mine"
    )


def metrics(done):
    return {r["metric"]: r for r in strict(done.stdout)["metrics"]}


def test_measure_with_a_model_and_without(model, text):
    how = "measure", "--calibration", text, *SMALL, "--prompts", 0, "--json"
    full, bare = metrics(call(*how, "--model", model)), metrics(
        call(*how, "--tokenizer", model)
    )
    assert len({r["oit"] for r in full.values()}) == 11 and full["volume_tokens"]["value"] == 128
    assert 1 < full["distortion"]["ci_low"] <= full["distortion"]["value"] <= full["distortion"][
        "ci_high"]
    assert (
        bare["distortion"]["value"] is None
        and "needs the dense model" in bare["distortion"]["note"]
    )
    assert full | {"distortion": None} == bare | {"distortion": None}


def test_people_get_a_table_of_metrics(model, text):
    done = call("measure", "--calibration", text, *SMALL, "--prompts", 0, "--model", model)
    rows = {o.split()[0]: o.split() for o in done.stdout.splitlines() if o}
    assert (
        rows["volume_tokens"] == ["volume_tokens", "128", "tokens", "–", "–"]
        and "–" not in rows["distortion"]
    )
    assert "perplexity" in done.stderr and "delay: A finished text has no clock" in done.stdout


def test_mismatch_to_what_the_model_wrote(model, text, tmp_path):
    other = tmp_path / "other.txt"
    other.write_text("QQQQQQ")
    mismatch = lambda own: metrics(
        call("measure", "--calibration", text, *SMALL, "--prompts", 0, "--tokenizer", model,
                "--json", "--own-text", own))
    assert mismatch(other)["mismatch:model"]["value"] == pytest.approx(1), "no token in common"
    same = mismatch(text)
    assert 0 < same["mismatch:model"]["value"] < 0.5 and "mismatch" not in same
    gone = call(
        "measure",
        "--calibration",
        text,
        "--model",
        "owner/none",
        "--own-text",
        tmp_path / "gone.txt",
        code=1,
    )
    assert "gone.txt" in gone.stderr


@pytest.mark.real
def test_measure_compares_with_the_benchmarks(model, text):
    found = metrics(
        call(
            "measure", "--calibration", text, *SMALL, "--prompts", 2, "--tokenizer", model, "--json"
        )
    )
    for dimension in ("General", "Commonsense", "Code", "Math"):
        assert 0 < found[f"mismatch:{dimension}"]["value"] < 1


@pytest.mark.parametrize("value, said", [(None, "–"), (float("nan"), "–"),
                                         (0, "0"), ("[b]", r"\[b]"), (0.051234, "0.05123"),
                                         (790.04, "790"), (10752.0, "10,752"), (1e15, "1e+15"),
                                         (float("inf"), "inf")])
def test_how_a_table_shows_a_value(value, said):
    assert as_text(value) == said


def test_fetch_does_nothing_the_second_time():
    call("fetch")
    assert json.loads(call("fetch", "--json").stdout)["made"] == {}


def test_reproduce_outside_a_checkout_says_where_to_go(tmp_path, monkeypatch):
    from calib_prune.cli import reproduce as cli
    from calib_prune.core import CalibPruneError
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(
        cli, "__file__", str(tmp_path / "site-packages" / "calib_prune" / "cli" / "reproduce.py")
    )
    with pytest.raises(CalibPruneError, match="`calib-prune init my-study`"):
        cli.repository()
    monkeypatch.chdir(ROOT)
    assert (cli.repository() / "Snakefile").is_file()


@pytest.mark.parametrize("left", [["Snakefile"], ["Snakefile", "presets/smoke.yaml"], []])
def test_what_a_killed_init_began_is_finished_by_the_next(tmp_path, left):
    from calib_prune.cli.init import lay_out
    names = lay_out(tmp_path / "study")
    whole = {o: (tmp_path / "study" / o).read_bytes() for o in names}
    for o in left: (tmp_path / "study" / o).unlink()
    if left: (tmp_path / "study" / ".Snakefile.0123abcd.part").write_bytes(b"half")
    else:
        with pytest.raises(CalibPruneError): lay_out(tmp_path / "study")
    if left: assert lay_out(tmp_path / "study") == names
    assert {
        str(o.relative_to(tmp_path / "study")): o.read_bytes()
        for o in (tmp_path / "study").rglob("*") if o.is_file()} == whole


@pytest.mark.parametrize(
    "mine", ["notes.txt", "presets/smoke.yaml", "nbs/notes.txt", ".Snakefile.mine.part"]
)
def test_init_leaves_a_users_folder_alone(tmp_path, mine):
    from calib_prune.cli.init import lay_out
    (tmp_path / mine).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / mine).write_text("mine")
    with pytest.raises(CalibPruneError): lay_out(tmp_path)
    assert [str(o.relative_to(tmp_path)) for o in tmp_path.rglob("*") if o.is_file()] == [
        mine
    ] and (tmp_path / mine).read_text() == "mine"


@pytest.mark.parametrize("sparsity", ["[", "{", "&a", "*a", "!!python/name:os.system", "a: b", ""])
def test_a_sparsity_that_is_no_number_is_refused(tmp_path, sparsity):
    from calib_prune.cli.init import new_study
    with pytest.raises(CalibPruneError, match="parsity|attern"):
        new_study(str(tmp_path / "study"), sparsity=[sparsity])


def test_a_profile_that_is_too_deep_is_refused(tmp_path):
    from calib_prune.cli.reproduce import check_profile
    (tmp_path / "config.yaml").write_text("[" * 50_000)
    with pytest.raises(CalibPruneError):
        check_profile(str(tmp_path), tmp_path)
