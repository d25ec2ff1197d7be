"""Quantised models from the walk to the files: any family, resumed to the same bits, packed so that
plain transformers loads the same weights."""
import json
import math
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

from calib_prune.advice import report
from calib_prune.advice.pages import command_lines
from calib_prune.advice.report import check_report_files, report_title
from calib_prune.cli.advise import method_settings
from calib_prune.cli.app import app
from calib_prune.cli.compare import check_picture
from calib_prune.cli.reproduce import check_names
from calib_prune.core import CalibPruneError
from calib_prune.model.loading import load_model, save_model, weight_count
from calib_prune.model.stored_types import quantised_in_files, quantised_type, stored_types
from calib_prune.model.tiny import MIXTURES, TINY_FAMILIES, tiny_llama, tiny_model, tiny_tokenizer
from calib_prune.pipeline.again import prune_again
from calib_prune.pipeline.prune import PruneSettings, has_pruned_zeros, prune_model
from calib_prune.pipeline.recover import check_not_quantised, recover_model
from calib_prune.pruning import importance
from calib_prune.pruning.experts import one_by_one
from calib_prune.pruning.grids import Quantisation
from calib_prune.pruning.importance import (
    check_merged,
    importance_of,
    read_imatrix,
    write_imatrix,
)
from calib_prune.pruning.layers import (
    decoder_layers,
    detach_scales,
    get_weight,
    linear_names,
    prunable,
)
from calib_prune.pruning.walk import prune
from calib_prune.study.keys import cell_key
from calib_prune.study.presets import cells, load_preset
from tests.processes import finish, start
from tests.tiny_study import text_study

HOW = Quantisation(3, 16, fitted=True)
OWN = dict(windows=6, length=16, sparsity=0, quantise=HOW, dtype="float32")


def windows(n=7, length=24):
    return torch.randint(1, 264, (n, length), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    "A folder with a tiny model, and text to calibrate on."
    folder = tmp_path_factory.mktemp("dense")
    save_model(tiny_llama(num_hidden_layers=3), tiny_tokenizer(), folder / "model", {})
    text = folder / "own.txt"
    text.write_text("\n\n".join(f"The {n} boys walked across the river, and sat." * 4
                                for n in range(40)))
    return folder / "model", text


@pytest.mark.parametrize("method", ["rtn", "gptq", "imatrix"])
@pytest.mark.parametrize("family", [*TINY_FAMILIES, *MIXTURES])
def test_every_group_of_every_family_is_on_its_grid(family, method):
    model = tiny_model(family)
    report = prune(model, windows(), method, sparsity=0, quantise=Quantisation(2, 8))
    assert len(report) == len(linear_names(model)) and report["error"].between(0, 1).all()
    for layer in decoder_layers(model):
        with one_by_one(layer):  # experts as well
            for name, linear in prunable(layer).items():
                groups = get_weight(linear).reshape(-1, 8)
                assert max(len(group.unique()) for group in groups) <= 4, name


def test_a_resumed_run_has_the_same_weights_and_scales(tmp_path):
    def stop(stage, done, total):
        if done == 2: raise KeyboardInterrupt
    how = dict(method="gptq", sparsity=0, quantise=HOW)
    whole, halves = tiny_llama(num_hidden_layers=3), tiny_llama(num_hidden_layers=3)
    prune(whole, windows(), **how)
    with pytest.raises(KeyboardInterrupt):
        prune(tiny_llama(num_hidden_layers=3), windows(), checkpoint=tmp_path, progress=stop, **how)
    report = prune(halves, windows(), checkpoint=tmp_path, **how)
    assert report.attrs["restored_layers"] == 2
    ours, theirs = detach_scales(halves), detach_scales(whole)
    assert [*ours] == [*theirs] and len(ours) == 2 * 21
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    for mine, other in zip(halves.parameters(), whole.parameters(), strict=True):
        assert torch.equal(mine, other)
    with pytest.raises(CalibPruneError, match="quantise"):
        prune(tiny_llama(num_hidden_layers=3), windows(), checkpoint=tmp_path,
              **how | dict(quantise=Quantisation(4, 16)))


@pytest.mark.parametrize("sparsity", [0, "2:4"])
def test_a_packed_folder_holds_the_weights_of_the_dense_one(dense, tmp_path, sparsity):
    model, text = dense
    how = OWN | dict(calibration=str(text), method="gptq", sparsity=sparsity)
    made = prune_model(model, tmp_path / "packed", form="packed", save_dtype="bfloat16", **how)
    prune_model(model, tmp_path / "dense", save_dtype="bfloat16", **how)
    values, _ = load_model(str(tmp_path / "dense"))
    ours, _ = load_model(str(tmp_path / "packed"))
    for (name, mine), other in zip(ours.named_parameters(), values.parameters(), strict=True):
        assert torch.equal(mine, other), name
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "packed", dtype=torch.float32)
    ids = AutoTokenizer.from_pretrained(tmp_path / "packed")("The river", return_tensors="pt")
    with torch.no_grad():
        torch.testing.assert_close(plain(**ids).logits, values(**ids).logits, rtol=0.03, atol=0.03)

    size = (tmp_path / "packed/model.safetensors").stat().st_size
    assert made.record["bytes"]["packed"] < made.record["bytes"]["dense"]
    assert made.record["bytes"]["packed"] == pytest.approx(size, rel=0.2)  # and its header
    assert made.record["quantise"] == HOW.record


def test_a_packed_folder_is_a_model_for_every_command(dense, tmp_path):
    model, text = dense
    prune_model(model, tmp_path / "packed", form="packed", calibration=str(text), method="gptq",
                **OWN)
    prune_model(tmp_path / "packed", tmp_path / "again", calibration=str(text), method="wanda",
                windows=6, length=16)
    again, _ = load_model(str(tmp_path / "again"))
    assert "quantization_config" not in json.loads((tmp_path / "again/config.json").read_text())
    assert (again.model.layers[0].mlp.up_proj.weight == 0).float().mean() >= 0.5


def quantize(*args): return CliRunner().invoke(app, ["quantize", *map(str, args)])


def test_the_command_says_the_sizes(dense, tmp_path):
    model, text = dense
    given = ["--model", model, "--output", tmp_path / "q", "--calibration", text, "--windows", 6,
             "--length", 16, "--bits", 4, "--sparsity", "2:4"]
    shown = quantize(*given)
    assert shown.exit_code == 0 and "MB" in shown.output, shown.output
    record = json.loads((tmp_path / "q/calib_prune.json").read_text())
    assert record["quantise"]["group"] == 16, "128, 64 and 32 do not divide the 48 inputs of a map"
    assert record["achieved_sparsity"] >= 0.5 and record["quantise"]["bits"] == 4
    assert not Path(f"{tmp_path}/q.layers").exists()


@pytest.mark.parametrize("wrong, says", [
    (["--bits", 5], "5 bits cannot be packed"),
    (["--group", 10], "Groups of 10 do not divide 32 inputs"),
    (["--group", 24, "--format", "dense"], "do not divide"),
    (["--method", "sparsegpt"], "does not quantise"),
    (["--method", "rtn", "--sparsity", 0.5], "does not prune"),
    (["--asymmetric"], "--format dense"),
    (["--activation-order", "--sparsity", "2:4"], "neighbours"),
    (["--scales", "best"], "use fitted or range"),
    (["--format", "gguf"], "use dense or packed")])
def test_contradicting_settings_are_refused_and_nothing_is_written(dense, tmp_path, wrong, says):
    model, text = dense
    run = quantize("--model", model, "--output", tmp_path / "q", "--calibration", text, "--windows",
                   6, "--length", 16, *(["--group", 16] if "--group" not in wrong else []), *wrong)
    assert isinstance(run.exception, CalibPruneError) and says in str(run.exception)
    assert not (tmp_path / "q").exists()


def test_a_damaged_configuration_is_refused_before_its_layers_are_made(dense, tmp_path):
    copy = shutil.copytree(dense[0], tmp_path / "model")
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | dict(num_hidden_layers=10**12)))
    shown = quantize("--model", copy, "--output", tmp_path / "q")
    assert isinstance(shown.exception, CalibPruneError) and "num_hidden_layers" in str(
        shown.exception)


@pytest.mark.parametrize("method", ["gptq", "rtn", "imatrix"])
def test_a_pruned_model_keeps_its_zeros(dense, tmp_path, method):
    model, text = dense
    small = dict(calibration=str(text), windows=6, length=16)
    prune_model(model, tmp_path / "pruned", method="sparsegpt", sparsity=0.5, **small)
    given = ["--model", tmp_path / "pruned", "--calibration", text, "--windows", 6, "--length", 16,
             "--method", method, "--format", "dense"]
    zeros = {}
    for name, more in (("kept", []), ("free", ["--no-keep-zeros"])):
        shown = quantize(*given, *more, "--output", tmp_path / name)
        assert shown.exit_code == 0, shown.output
        nets = [load_model(str(tmp_path / folder))[0] for folder in ("pruned", name)]
        before, after = ([get_weight(linear) for layer in decoder_layers(net)
                          for linear in prunable(layer).values()] for net in nets)
        same = [(new[old == 0] == 0).float().mean() for old, new in zip(before, after, strict=True)]
        zeros[name] = min(map(float, same))
    assert zeros["kept"] == 1 and (zeros["free"] < 1) == (method == "gptq")
    record = json.loads((tmp_path / "kept/calib_prune.json").read_text())
    assert record["quantise"]["keep_zeros"] and record["achieved_sparsity"] >= 0.5
    assert prune_again(tmp_path / "kept").same_weights
    assert [has_pruned_zeros(str(tmp_path / name)) for name in zeros] == [True, False]
    shown = quantize(*given, "--keep-zeros", "--sparsity", 0.5, "--output", tmp_path / "x")
    assert "--keep-zeros and a sparsity contradict" in str(shown.exception) or method != "gptq"


def test_codes_have_no_zeros_unless_asked_for(dense):
    model, text = dense
    small = dict(calibration=str(text), windows=6, length=16, quantise=Quantisation(8, 16))
    made = prune_model(model, method="gptq", **small)
    assert made.record["sparsity"] == "0" and made.record["achieved_sparsity"] < 0.2
    assert prune(tiny_llama(), windows(), "rtn", quantise=HOW)["sparsity"].mean() < 0.5


def test_a_quantised_model_is_not_trained_and_says_what_it_is(dense, tmp_path):
    model, text = dense
    made = prune_model(model, tmp_path / "q", form="packed", calibration=str(text), method="gptq",
                       **OWN)
    with pytest.raises(CalibPruneError, match="off the grid"):
        recover_model(tmp_path / "q", model, tmp_path / "r", text=str(text), tokens=64)
    assert quantised_type(str(tmp_path / "q")) == "3 bits, packed"
    count = weight_count(tmp_path / "q")
    assert count == pytest.approx(weight_count(model), rel=0.2), "not the words of a packed file"
    assert made.record["quantised_type"] is None
    assert stored_types(str(tmp_path / "q"))[0] in (torch.float32, torch.bfloat16)


@pytest.mark.parametrize("entry, bits", [
    (dict(quant_method="gptq", bits=4), None), ("packed", None), (None, None),
    (dict(quant_method="compressed-tensors", config_groups=[]), "some bits, packed")])
def test_quantised_files_of_other_tools_are_not_called_packed(tmp_path, entry, bits):
    (tmp_path / "config.json").write_text(json.dumps(dict(quantization_config=entry)))
    assert quantised_in_files(str(tmp_path)) == bits


def test_prune_points_to_quantize(dense, tmp_path):
    model, text = dense
    with pytest.raises(CalibPruneError, match="calib-prune quantize --method gptq"):
        prune_model(model, tmp_path / "p", method="gptq", calibration=str(text))


def test_fused_experts_cannot_be_packed_and_are_refused_before_any_work(dense, tmp_path):
    _, text = dense
    save_model(tiny_model("mixtral"), tiny_tokenizer(), tmp_path / "mixtral", {})
    with pytest.raises(CalibPruneError, match="--format dense"):
        prune_model(tmp_path / "mixtral", tmp_path / "p", form="packed", calibration=str(text),
                    method="rtn", **OWN | dict(quantise=Quantisation(4, 8)))
    assert not (tmp_path / "p").exists()


def test_a_tilde_is_the_home_folder_everywhere(tmp_path, monkeypatch):
    "As bash leaves it in --model=~/q."
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "q").mkdir()
    (tmp_path / "q/config.json").write_text(json.dumps(dict(
        quantization_config=dict(quant_method="compressed-tensors"))))
    assert quantised_in_files("~/q") == "some bits, packed"
    with pytest.raises(CalibPruneError, match="is quantised"): check_not_quantised("~/q")
    (tmp_path / "q/report.md").touch()
    with pytest.raises(CalibPruneError, match="report.md is not from"): check_report_files("~/q")
    assert check_picture("~/a.svg") == tmp_path / "a.svg"
    written = []
    for name in ("report_page", "_layers_drawn", "as_html", "report_title", "model_card"):
        monkeypatch.setattr(report, name, lambda *_: "")
    monkeypatch.setattr(report, "write_atomic", lambda path, _: written.append(path) or path)
    report.save_report(SimpleNamespace(record={}, as_record=dict), "~/q")
    assert len(written) == 5 and {path.parent for path in written} == {tmp_path / "q"}


def test_a_record_tells_a_quantised_model_behind_a_tilde(tmp_path, monkeypatch):
    record = dict(run="1", quantise=dict(bits=3))
    save_model(tiny_llama(0), tiny_tokenizer(), tmp_path / "q", record)
    monkeypatch.setenv("HOME", str(tmp_path))
    with pytest.raises(CalibPruneError, match="is quantised"): check_not_quantised("~/q")


def imatrix(*args): return CliRunner().invoke(app, ["imatrix", *map(str, args)])


def test_an_importance_matrix_serves_many_settings(dense, tmp_path):
    model, text = dense
    small = ["--windows", 6, "--length", 16]
    files = [tmp_path / f"{n}.imatrix.gguf" for n in range(2)]
    for seed, file in enumerate(files):
        more = ["--merge", files[0]] if seed else []
        made = imatrix("--model", model, "--calibration", text, "--output", file, "--seed", seed,
                       *small, *more)
        assert made.exit_code == 0 and "llama-quantize" in made.output, made.output
    assert set(read_imatrix(files[1]).counts.values()) == {2 * 6 * 16}
    for bits in (2, 4):
        shown = quantize("--model", model, "--output", tmp_path / f"q{bits}", "--bits", bits,
                         "--method", "imatrix", "--group", 16, "--statistics", files[1])
        assert shown.exit_code == 0, shown.output
        record = json.loads((tmp_path / f"q{bits}/calib_prune.json").read_text())
        assert record["calibration"]["statistics"] and record["bytes"]["packed"]
        load_model(str(tmp_path / f"q{bits}"))


def test_merged_windows_are_counted_in_one_length(dense):
    model, _ = load_model(str(dense[0]))
    short, long = (importance_of(model, windows(6, length), "own") for length in (8, 24))
    merged = short.plus(long)
    assert merged.windows * merged.length == 6 * 8 + 6 * 24
    assert set(merged.counts.values()) == {float(6 * 8 + 6 * 24)}


def test_statistics_of_another_model_are_refused(dense, tmp_path, monkeypatch):
    model, text = dense
    save_model(tiny_llama(seed=5, num_hidden_layers=3), tiny_tokenizer(), tmp_path / "other", {})
    file = tmp_path / "x.imatrix.gguf"
    given = ["--calibration", text, "--windows", 6, "--length", 16]
    assert imatrix("--model", model, "--output", file, *given).exit_code == 0
    again = imatrix("--model", model, "--output", file, *given)
    assert "exists" in str(again.exception)
    monkeypatch.setattr(importance, "input_squares", pytest.fail)  # refused before the pass
    merged = imatrix("--model", tmp_path / "other", "--output", tmp_path / "y.gguf", "--merge",
                     file, *given)
    assert "another model" in str(merged.exception) and not (tmp_path / "y.gguf").exists()
    for how, says in ((["--method", "imatrix"], "another model"), ([], "use imatrix"),
                      (["--windows", 9, "--seed", 0], "leave out --windows, --seed")):
        run = quantize("--model", tmp_path / "other", "--output", tmp_path / "q", "--group", 16,
                       "--statistics", file, *how)
        assert says in str(run.exception) and not (tmp_path / "q").exists()


def test_a_foreign_matrix_of_another_shape_is_refused_before_the_pass(dense):
    "As llama.cpp writes it: the file does not say of which model it is."
    model, other = load_model(str(dense[0]))[0], tiny_llama(num_hidden_layers=2)
    matrix = importance_of(other, windows(2, 8), "own")
    check_merged(importance_of(model, windows(2, 8), "own"), model, "")
    with pytest.raises(CalibPruneError, match="cannot be merged"): check_merged(matrix, model, "")


@pytest.mark.parametrize("change, says", [
    (lambda row, count: (row.fill_(math.nan), count), "are not sums of squares"),
    (lambda row, count: (row.sub_(1e9), count), "are not sums of squares"),
    (lambda row, count: (row, 0.0), "are not sums of squares")])
def test_statistics_that_are_no_sums_of_squares_are_refused(dense, tmp_path, change, says):
    matrix = importance_of(load_model(str(dense[0]))[0], windows(2, 8), "own")
    name = [*matrix.sums][1]
    row, matrix.counts[name] = change(matrix.sums[name].clone(), matrix.counts[name])
    file = write_imatrix(replace(matrix, sums=matrix.sums | {name: row}), tmp_path / "x.gguf")
    run = quantize("--model", dense[0], "--output", tmp_path / "q", "--method", "imatrix",
                   "--group", 16, "--statistics", file)
    assert f"{name} {says}" in str(run.exception) and not (tmp_path / "q").exists()


def test_statistics_of_another_kind_of_file_are_refused(dense, tmp_path):
    (words := tmp_path / "words.gguf").write_text("no GGUF file at all")
    for file in (words, tmp_path / "missing.gguf"):
        run = quantize("--model", dense[0], "--output", tmp_path / "q", "--method", "imatrix",
                       "--group", 16, "--statistics", file)
        assert run.exit_code and isinstance(run.exception, CalibPruneError)
        assert file.name in str(run.exception) and not (tmp_path / "q").exists()


def test_an_architecture_without_gguf_names_is_named(tmp_path):
    save_model(tiny_model("opt"), tiny_tokenizer(), tmp_path / "opt", {})
    (tmp_path / "notes.txt").write_text(" ".join(f"word {i}" for i in range(900)))
    run = imatrix("--model", tmp_path / "opt", "--calibration", tmp_path / "notes.txt",
                  "--windows", 2, "--length", 16, "--output", tmp_path / "x.gguf")
    assert "GGUF names of the architecture opt are not known" in str(run.exception)


@pytest.mark.parametrize("more, says", [
    (["--length", 100_000], "longer than the model's context"),
    (["--batch-tokens", 0], "--batch-tokens is 0, but must be"),
    (["--output", "{}/file/x.gguf"], "file is not a folder that can be written"),
    (["--output", "x" * 250], "its name is too long")])
def test_an_importance_matrix_that_cannot_be_made_is_refused_at_once(
        dense, tmp_path, monkeypatch, more, says):
    model, text = dense
    (tmp_path / "file").touch()
    (long := tmp_path / "long.txt").write_text(text.read_text() * 200)
    monkeypatch.setattr(importance, "input_squares", pytest.fail)
    made = imatrix("--model", model, "--calibration", long, "--windows", 1, "--output",
                   tmp_path / "x.gguf", *(str(word).format(tmp_path) for word in more))
    assert says in str(made.exception)


def test_tokens_beyond_the_vocabulary_have_no_importance(dense):
    model, _ = load_model(str(dense[0]))
    for tokens, how, says in ((windows(2, 8) + 10 ** 6, {}, "vocabulary has"),
                              (windows(2, 8), dict(batch_tokens=-1), "--batch-tokens is -1")):
        with pytest.raises(CalibPruneError, match=says): importance_of(model, tokens, "own", **how)


METHOD = "gptq+bits=3+group=16+fitted"


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    root = text_study(tmp_path_factory.mktemp("checkout"), [METHOD], tables=["quantisation"])
    preset = yaml.safe_load((root / "tiny.yaml").read_text())
    preset["grid"][0]["sparsities"], preset["heldout"]["divergence"] = ["0"], True
    (root / "tiny.yaml").write_text(yaml.safe_dump(preset))
    return root


@pytest.mark.real
def test_a_study_quantises_and_measures_the_divergence(checkout):
    finish(start("reproduce", "--preset", "tiny.yaml", "--jobs", "1", cwd=checkout, session=True,
                 PYTHONPATH=str(checkout)), 0)
    made = json.loads((checkout / f"results/tiny/own-{METHOD}-0-n4-s0.json").read_text())
    scores = {row["metric"]: row["score"] for row in made["rows"]}
    assert scores["KL divergence, bits per token"] > 0
    key = made["record"]["key"]
    assert key["pruning"]["quantise"] == HOW.record and key["versions"]["gptq"] == 1
    assert key["heldout"]["divergence"] is True
    table = (checkout / "figures/tiny/T21-quantisation.md").read_text()
    assert "GPTQ, 3 bits, groups of 16, fitted" in table and "KL, bits per token" in table
    assert (checkout / "figures/tiny/F17-quantisation.png").is_file()


def test_keys_hold_bits_and_groups(checkout):
    preset = load_preset(checkout / "tiny.yaml")
    (cell,) = [cell for cell in cells(preset) if cell.method]
    keys = [cell_key(preset, replace(cell, method=f"gptq+bits={bits}+group=16"))["pruning"]
            for bits in (2, 3)]
    assert keys[0] != keys[1] and keys[0]["quantise"]["bits"] == 2
    with pytest.raises(CalibPruneError, match="does not prune"):
        check_names(preset | dict(grid=[preset["grid"][0] | dict(
            methods=["rtn+bits=3"], sparsities=[0.5])]))


@pytest.mark.parametrize("method, bits, lines", [
    ("gptq", 3, ["quantize --model m --calibration codeio --method gptq --bits 3 --group 64"
                 " --windows 16 --output quantised"]),
    ("imatrix", 3, ["quantize --model m --calibration codeio --method imatrix --bits 3 --group 64"
                    " --windows 16 --output quantised",
                    "imatrix --model m --calibration codeio --windows 16"
                    " --output own.imatrix.gguf"]),
    ("admm", None, ["prune --model m --calibration codeio --method admm --sparsity 0.5"
                    " --windows 16 --output pruned"])])
def test_advice_ends_in_the_commands_of_its_method(method, bits, lines):
    group = 64 if bits else None
    settings = PruneSettings(**method_settings("m", method, None, bits, group), windows=16)
    settings.check()
    assert command_lines("m", "codeio", settings) == [f"calib-prune {line}" for line in lines]
    with pytest.raises(CalibPruneError, match="quantize --method gptq"):
        PruneSettings(**method_settings("m", "gptq", None, None, 64)).check()
    with pytest.raises(CalibPruneError, match="--group is for methods that quantise; admm"):
        method_settings("m", "admm", None, None, 64)


def test_a_record_makes_the_quantised_model_again(dense, tmp_path):
    model, text = dense
    prune_model(model, tmp_path / "q", form="packed", calibration=str(text), method="gptq", **OWN)
    again = prune_again(tmp_path / "q", tmp_path / "again")
    assert again.after["run"] == again.before["run"] and quantised_in_files(str(tmp_path / "again"))
    assert again.same_weights and again.after["quantise"] == HOW.record
    assert report_title(again.after) == f"{model}: GPTQ, 3 bits, groups of 16, fitted"


def test_a_dense_model_that_is_elsewhere_is_named(dense, tmp_path, monkeypatch):
    model, text = dense
    monkeypatch.chdir(Path(model).parent)
    prune_model(Path(model).name, tmp_path / "q", calibration=str(text), method="gptq", **OWN)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CalibPruneError, match=f"{Path(model).name} of the record is not in"):
        prune_again(tmp_path / "q")
