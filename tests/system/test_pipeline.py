"The command line, studies and user code share one pipeline, which knows no study."
import json
import shutil

import pytest
import torch

import calib_prune
from calib_prune.cli.prune import prune_command as command
from calib_prune.core import CalibPruneError
from calib_prune.model.loading import RECORD_FILE, load_model, load_tokenizer, save_model
from calib_prune.model.tiny import tiny_llama, tiny_tokenizer
from calib_prune.pipeline import evaluate
from tests.processes import run


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    "A tiny model and a text."
    folder = tmp_path_factory.mktemp("pipeline")
    save_model(tiny_llama(max_position_embeddings=2048), tiny_tokenizer(), folder / "model", {})
    (folder / "text.txt").write_text(
        "".join(f"Line {i} says that {i} times {i} is {i * i}.\n" for i in range(400))
    )
    return folder


SAME = dict(
    windows=4, length=64, method="wanda", sparsity="2:4", seed=3, refine=2, save_dtype="bfloat16"
)


def test_a_call_and_the_command_write_the_same_record_and_weights(inputs, tmp_path):
    settings = dict(SAME, calibration=str(inputs / "text.txt"))
    command(str(inputs / "model"), str(tmp_path / "a"), **settings)
    done = calib_prune.prune_model(
        inputs / "model", tmp_path / "b", checkpoint=tmp_path / "layers", **settings
    )
    read = lambda name: json.loads((tmp_path / name / RECORD_FILE).read_text())
    assert read("b") == done.record and read("a") | dict(checkpoint=None) == read("b") | dict(
        checkpoint=None
    )
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("a", "b")]
    assert weights[0] == weights[1] and not (tmp_path / "layers").exists()
    assert len(done.report) == 14 and not done.finished_before


def test_without_an_output_the_model_is_returned_and_nothing_is_written(
    inputs, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    small = dict(
        calibration=str(inputs / "text.txt"), windows=4, length=64, method="wanda", sparsity=0.5
    )
    done = calib_prune.prune_model(inputs / "model", **small)
    assert not [*tmp_path.iterdir()] and done.record["sparsity"] == "0.5"
    saved = calib_prune.prune_model(inputs / "model", "out", **small)
    assert saved.record == done.record
    for a, b in zip(done.model.parameters(), load_model("out")[0].parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("wrong, said", [(dict(sparcity=0.5), "Did you mean 'sparsity'"),
                                         (dict(sparsity=1.5), "outside"),
                                         (dict(method="wandda"), "Did you mean 'wanda'"),
                                         (dict(damping=-1), "amping")])
def test_wrong_settings_are_refused_before_the_model_is_looked_for(wrong, said):
    with pytest.raises(CalibPruneError, match=said):
        calib_prune.prune_model("no such model", **wrong)


def test_wrong_tasks_are_refused_before_the_model_is_looked_for():
    with pytest.raises(CalibPruneError, match="'piqa'"):
        calib_prune.evaluate_model("none", tasks="piqua")


def other_words(folder):
    "The tokenizer of a folder with two tokens in each other's place."
    path = folder / "tokenizer.json"
    words = json.loads(path.read_text())
    vocabulary = words["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    path.write_text(json.dumps(words))


@pytest.mark.parametrize("dense, said", [("other", "has another tokenizer than .*other"),
                                         ("missing/one", "Cannot load the tokenizer of 'missing")])
def test_a_dense_model_that_does_not_fit_is_refused_before_any_scoring(
    inputs, tmp_path, monkeypatch, dense, said
):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(inputs / "model", "other")
    other_words(tmp_path / "other")
    monkeypatch.setattr(evaluate, "score_model", lambda *_, **how: pytest.fail("too late"))
    with pytest.raises(CalibPruneError, match=said):
        calib_prune.evaluate_model(inputs / "model", dense, tasks="jeopardy", limit=2)


def test_a_longest_text_that_another_tool_stored_makes_no_other_tokenizer(inputs, tmp_path):
    shutil.copytree(inputs / "model", tmp_path / "cut")
    words = load_tokenizer(str(tmp_path / "cut")).backend_tokenizer
    words.enable_truncation(16)
    words.enable_padding()
    words.save(str(tmp_path / "cut" / "tokenizer.json"))
    evaluate.check_tokenizers(str(inputs / "model"), [str(tmp_path / "cut")])
    other_words(tmp_path / "cut")
    with pytest.raises(CalibPruneError, match="another tokenizer"):
        evaluate.check_tokenizers(str(inputs / "model"), [str(tmp_path / "cut")])


@pytest.mark.real
def test_scores_survive_where_retention_has_no_answer(inputs):
    found = calib_prune.evaluate_model(
        inputs / "model", inputs / "model", tasks="piqa", limit=8, measure="above-chance"
    )
    with pytest.raises(CalibPruneError, match="piqa"):
        _ = found.retention
    assert (
        found.scores["n"].tolist() == [8]
        and found.scores_record()["scores"] == found.scores_record()["dense_scores"]
    )
    alone = calib_prune.evaluate_model(inputs / "model", tasks="piqa", limit=8)
    assert alone.retention is alone.verdict is None and alone.record() == alone.scores_record()


def test_the_pipeline_and_its_commands_import_no_study():
    code = (
        "import sys, calib_prune.cli.prune, calib_prune.cli.evaluate, calib_prune.pipeline.prune,"
        " calib_prune.pipeline.evaluate\ntry: calib_prune.cli.prune.prune_command('no such model',"
        " 'out')\nexcept calib_prune.core.CalibPruneError: pass\nassert not [o for o in sys.modules"
        " if o.startswith(('calib_prune.study', 'calib_prune.questions'))]"
    )
    run(program=code)
