"""The suite at the paper's scale without a hub: local folders that are laid out as its data sets
and models are there.

File names, formats and configurations are those of the data sets' pages, written down from memory;
records are made up.
"""
import gzip
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from calib_prune.calibration.sources import PAPER_SOURCES
from calib_prune.model.loading import save_model
from calib_prune.model.tiny import tiny_llama, tiny_tokenizer
from tests.processes import run

N = 12  # records in a file


def records(*columns):
    return [{k: f"The {k} number {i}." for k in columns} for i in range(N)]


HELLASWAG = [
    dict(ind=i,
         activity_label="Counting",
         ctx_a="",
         ctx_b="",
         ctx=f"Line {i} begins",
         endings=["badly", f"and ends {i} times", "x", "y"],
         source_id="a~1",
         split="train",
         split_type="indomain",
         label="1") for i in range(N)]
CSQA = [dict(id=str(i), question=f"What follows {i}?", question_concept="number", answerKey="B",
             choices=dict(label=["A", "B"], text=["a dog", str(i + 1)])) for i in range(N)]
SIQA = [
    dict(context=f"Ann counts to {i}.",
         question="Why?",
         answerA="b",
         answerB=f"for {i} sheep",
         answerC="c",
         label="2") for i in range(N)]
WINOGRANDE = [
    dict(sentence=f"Bob gave Tim {i} pens because _ had many.",
         option1="Tim",
         option2="Bob",
         answer="2") for i in range(N)]
GSM8K = [
    dict(question=f"What is {i} + 1?", answer=f"{i} + 1 = <<{i}+1={i + 1}>>{i + 1}\n#### {i + 1}")
    for i in range(N)
]

# source: configurations of its card (name: file pattern of the training split), a file of that
# split, its records, the first text
LAYOUTS = {
    "c4": ({"en": "en/c4-train.*.json.gz", "realnewslike": "realnewslike/c4-train.*.json.gz"
            }, "en/c4-train.00000-of-01024.json.gz", records(
                "text", "timestamp", "url"), "The text number 0."), "wikipedia": ({
                    "20231101.de": "20231101.de/train-*", "20231101.en": "20231101.en/train-*"
                }, "20231101.en/train-00000-of-00041.parquet", records(
                    "id", "url", "title", "text"), "The text number 0."), "fineweb-edu": ({
                        "default": "data/*/*", "sample-10BT": "sample/10BT/*"
                    }, "sample/10BT/000_00000.parquet", records("text", "id",
                                                                "url"), "The text number 0."),
    "news": ({"1.0.0": "1.0.0/train-*",
              "3.0.0": "3.0.0/train-*"}, "3.0.0/train-00000-of-00003.parquet",
             records("article", "highlights", "id"), "The article number 0."), "imdb": ({
                 "plain_text": "plain_text/train-*"
             }, "plain_text/train-00000-of-00001.parquet", records("text"), "The text number 0."),
    "hellaswag": ({
        "default": "data/train-*"
    }, "data/train-00000-of-00001.parquet", HELLASWAG, "Line 0 begins and ends 0 times"), "csqa": ({
        "default": "data/train-*"}, "data/train-00000-of-00001.parquet", CSQA, "What follows 0? 1"),
    "socialiqa": ({"default": "data/train-*"}, "data/train-00000-of-00001.parquet", SIQA,
                  "Ann counts to 0. Why? for 0 sheep"),
    "winogrande": ({
        "winogrande_xs": "winogrande_xs/train-*",
        "winogrande_xl": "winogrande_xl/train-*"}, "winogrande_xl/train-00000-of-00001.parquet",
                   WINOGRANDE, "Bob gave Tim 0 pens because Bob had many."),
    "codeparrot": ({}, "file-000000000001.json.gz",
                   records("repo_name", "path", "content", "license"), "The content number 0."),
    "oss-instruct": ({}, "data-oss_instruct-decontaminated.jsonl",
                     records("lang", "problem",
                             "solution"), "The problem number 0.\n\nThe solution number 0."),
    "codealpaca": ({}, "code_alpaca_20k.json", records(
        "instruction", "input",
        "output"), "The instruction number 0.\nThe input number 0.\n\nThe output number 0."),
    "metamath": ({}, "MetaMathQA-395K.json",
                 records("query", "response", "type", "original_question"),
                 "The query number 0.\nThe response number 0."), "gsm8k": ({
                     "main": "main/train-*", "socratic": "socratic/train-*"
                 }, "main/train-00000-of-00001.parquet", GSM8K, "What is 0 + 1?\n0 + 1 = 1"),
    "open-web-math": ({}, "data/train-00000-of-00114-3fe4d2fbc4fbb8d1.parquet",
                      records("url", "text", "date", "metadata"), "The text number 0.")}


def write(path: Path, rows: list[dict]) -> None:
    """In the format that a name ends with: parquet, one object per line (packed or not), or one
    list."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = "".join(json.dumps(o) + "\n" for o in rows)
    if path.suffix == ".parquet": pq.write_table(pa.Table.from_pylist(rows), path)
    elif path.suffix == ".gz": path.write_bytes(gzip.compress(lines.encode()))
    else: path.write_text(lines if path.suffix == ".jsonl" else json.dumps(rows))


def lay_out(root: Path, name: str) -> None:
    """A data set of the suite, below the hub's name for it; files of its other configurations hold
    something else."""
    cards, file, rows, _ = LAYOUTS[name]
    folder = (
        root / PAPER_SOURCES[f"paper:{name}" if f"paper:{name}" in PAPER_SOURCES else name].path
    )
    write(folder / file, rows)
    listed = "".join(
        f"- config_name: {k}\n  data_files:\n  - split: train\n    path: {v}\n"
        for k, v in cards.items()
    )
    for pattern in cards.values():
        other = folder / pattern.replace("*/*", "a/b.parquet").replace(
            "train.*", "train.00000-of-00001"
        ).replace("-*", "-00000-of-00001.parquet")
        other = other.with_name("0.parquet") if other.name == "*" else other
        if not Path(file).match(pattern):
            write(other, [{k: "of another configuration" for k in rows[0]}])
    (folder / "README.md").write_text(
        f"---\nlicense: mit\n{'configs:' if listed else ''}\n{listed}---\n# A data set\n"
    )


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_source_of_the_suite_is_read_in_its_layout(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    lay_out(tmp_path, name)
    source = next(o for o in PAPER_SOURCES.values() if o.name == f"paper:{name}")
    texts = source.documents()
    assert len(texts) == N and texts[0] == LAYOUTS[name][-1] and not any(
        "another configuration" in o for o in texts)


def test_every_source_of_the_suite_has_its_layout():
    assert {f"paper:{o}" for o in LAYOUTS} == {o.name for o in PAPER_SOURCES.values()}


COMMIT = "0123456789abcdef0123456789abcdef01234567"
LOADED = """
import json, sys
from calib_prune.model.loading import load_model, model_revision
from calib_prune.model.stored_types import stored_types
model, tokenizer = load_model("some/model", "float32")
most, others = stored_types("some/model")
print(json.dumps(dict(revision=model_revision("some/model"), most=str(most), others=len(others), kind=str(model.dtype))))
"""  # noqa: E501


@pytest.fixture
def hub(tmp_path):
    "A model in the layout of the hub's cache: a commit's snapshot, and the branch that names it."
    home = tmp_path / "hub/models--some--model"
    save_model(
        tiny_llama(max_position_embeddings=512).bfloat16(), tiny_tokenizer(),
        home / "snapshots" / COMMIT, {})
    (home / "refs").mkdir()
    (home / "refs/main").write_text(COMMIT)
    return dict(HF_HUB_CACHE=str(tmp_path / "hub"), HF_HUB_OFFLINE="1")


def test_a_model_of_the_hub_is_loaded_by_its_id(hub):
    done = run(program=LOADED, **hub)
    assert json.loads(done.stdout.splitlines()[-1]) == dict(
        revision=f"commit:{COMMIT}", most="torch.bfloat16", others=0, kind="torch.float32"
    )


def test_a_model_of_the_hub_is_pruned_and_saved_in_its_type(hub, tmp_path):
    (tmp_path / "text.txt").write_text("The quick brown fox jumps over the lazy dog. " * 400)
    run("prune", "--json", "--model", "some/model", "--calibration", tmp_path / "text.txt",
        "--output", tmp_path / "out", "--windows", 2, "--length", 64, **hub)
    record = json.loads((tmp_path / "out/calib_prune.json").read_text())
    assert record["model_revision"] == f"commit:{COMMIT}" and record["saved_dtype"] == "bfloat16"
    wrong = run("prune", "--json", "--model", "some/other", "--output", tmp_path / "out2", code=1,
                **hub)
    assert "some/other" in wrong.stdout and not (tmp_path / "out2").exists()
