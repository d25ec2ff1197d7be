"""The paper's preset end to end on a tiny random model and local data in the hub's layout: only the
weights are missing."""
import json
import math
import re
import shutil
from dataclasses import asdict, replace

import pandas as pd
import pytest
import yaml

from calib_prune.calibration.sources import PAPER_SOURCES
from calib_prune.generation.igsp import journal_name
from calib_prune.model.loading import save_model
from calib_prune.model.tiny import tiny_llama, tiny_tokenizer
from calib_prune.questions.claims import claim_levels, study_evidence, study_ledger
from calib_prune.questions.estimates import CHECKS, MORE_SOURCES, PRESET
from calib_prune.statistics.examples import example_study
from calib_prune.statistics.selection import bootstrap_study
from calib_prune.study.presets import Cell, cells, grid_cells, load_preset, protocol_of
from tests import ROOT, processes

COLUMNS = {  # of the data sets that are not a plain column of text
    "paper:hellaswag": lambda i: dict(
        ctx=f"Line {i} begins", endings=[f"and ends {i} times", "badly"], label="0"),
    "paper:csqa": lambda i: dict(question=f"What follows {i}?",
                                 choices=dict(label=["A", "B"], text=[str(i + 1), "a dog"]),
                                 answerKey="A"),
    "paper:socialiqa": lambda i: dict(context=f"Ann counts to {i}.",
                                      question="Why?",
                                      answerA=f"for {i} sheep",
                                      answerB="b",
                                      answerC="c",
                                      label="1"),
    "paper:winogrande": lambda i: dict(sentence=f"Bob gave Tim {i} pens because _ had many.",
                                       option1="Bob",
                                       option2="Tim",
                                       answer="1"),
    "paper:gsm8k": lambda i: dict(question=f"What is {i} + 1?",
                                  answer=f"{i} + 1 = <<{i}+1={i + 1}>>{i + 1}\n#### {i + 1}")}


def record(source, i):
    "A made-up record with the columns that a data set of the hub has."
    if source.name in COLUMNS: return COLUMNS[source.name](i)
    fields = re.findall(r"\{(\w+)\}", source.text) if "{" in source.text else [source.text]
    return {
        o: f"The {o} number {i} of {source.name} tells how {i} times {i} makes {i * i}."
        for o in fields
    }


def hub_folder(root, source):
    "A data set in the hub's layout, where the hub's name for it leads."
    folder = root / source.path
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "train.jsonl").write_text(
        "".join(json.dumps(record(source, i)) + "\n" for i in range(120))
    )
    (folder / "README.md").write_text(
        f"---\nconfigs:\n- config_name: {source.config or 'default'}\n  data_files:\n"
        "  - split: train\n    path: train.jsonl\n---\n"
    )


def run(root, *words):
    # one thread, as in test_workflow.py
    how = dict(cwd=root, PYTHONPATH=str(root), COLUMNS="120")
    return processes.run("reproduce", "--jobs", "1", *words, code=None, **how)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("paper")
    for name in ("nbs/paper", "calib_prune", "presets"):
        shutil.copytree(ROOT / name, root / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "Snakefile", root)
    return root


@pytest.mark.real
def test_it_lists_its_cells_and_hours_without_a_hub(root):
    done = run(root, "--preset", "claims/llama-3.1-8b", "--dry-run", "--verbose")
    preset = load_preset(root / "presets/claims/llama-3.1-8b.yaml")
    assert done.returncode == 0, done.stderr
    listed = set(re.findall(r"^cell_\w+", done.stdout, re.M))
    assert len(listed) == len(cells(preset, ablations=True)) > 100
    assert re.search(r"sparsegpt\s+128\s+\d+\s+\d", done.stdout)
    written = {(c.strategy, c.seed) for c in grid_cells(preset, ablations=True)
               if protocol_of(preset["strategies"][c.strategy])}
    assert len(set(re.findall(r"^generate_\w+", done.stdout, re.M))) == len(written) > 9
    assert re.search(
        r"writing\s+128\s+9\s+\d", done.stdout
    ), "nine texts: the ablations only choose"


@pytest.mark.parametrize("name, lacks", [("llama-3.1-8b", set()), ("smollm2-135m", set()),
                                         ("qwen-0.5b", {"C9 low", "C9 step"})])
def test_a_study_plans_what_every_claim_needs(name, lacks):
    preset = load_preset(ROOT / f"presets/claims/{name}.yaml")
    any_cell = list(example_study({"c4": (0.5,) * 4}, n=10).values())
    planned = [Cell("dense"), *grid_cells(preset)]
    study = {c.name: replace(any_cell[bool(c.method)], record=asdict(c)) for c in planned}
    read = pd.DataFrame([
        dict(strategy=o, seed=0, metric="distortion", value=math.exp(i))
        for i, o in enumerate(preset["strategies"])])
    evidence = study_evidence(bootstrap_study(preset, study, 50), read, n_perm=99)
    found = study_ledger(evidence)
    assert set(found["claim"]) == {*(f"C{i}" for i in range(1, 10)), "O1", "O2", "O3"}
    # thirty sources are another study's, which a preset names
    cannot = found.set_index(pd.Index(CHECKS))["verdict"].drop(list(MORE_SOURCES)) == PRESET
    assert set(cannot.index[cannot]) == lacks
    at = claim_levels(preset).at
    drawn = {
        (c.strategy, c.seed) for c in cells(preset) if (c.method, c.sparsity) == ("sparsegpt", at)
    }
    assert drawn >= {(o, seed) for o in ("self-cal", "sgs", "igsp") for seed in range(3)}


def test_its_ablations_choose_from_the_texts_that_are_written_anyway():
    preset = load_preset(ROOT / "presets/claims/llama-3.1-8b.yaml")
    journals = lambda found: {
        journal_name(*own, c.seed)
        for c in found
        if (own := protocol_of(preset["strategies"].get(c.strategy, "")))
    }
    assert journals(cells(preset, ablations=True)) == journals(cells(preset))


@pytest.mark.real  # scores on the fetched benchmarks
def test_it_runs_to_its_tables(root):
    for source in PAPER_SOURCES.values(): hub_folder(root, source)
    save_model(tiny_llama(max_position_embeddings=4096), tiny_tokenizer(), root / "tiny", {})
    preset = yaml.safe_load((root / "presets/claims/llama-3.1-8b.yaml").read_text())
    few = ["c4", "hellaswag", "gsm8k", "codealpaca", "metamath", "uniform"]
    own = {
        k: re.sub(r"length=\d+", "length=64", preset["strategies"][k])
        for k in ("self-cal", "sgs", "igsp", "igsp-mean")
    }
    for k in ("igsp", "igsp-mean"): own[k] += " bins=2 choice=1.5"
    usual = dict(sparsities=[0.6], seeds=[0], windows=["default"])
    preset |= dict(
        name="paper-tiny",
        resamples=200,
        model=str(root / "tiny"),
        revision=None,
        dtype="float32",
        device="cpu",
        calibration=dict(windows=15, length=64),
        heldout=preset["heldout"] | dict(documents=1, window=64),
        scoring=preset["scoring"]
        | dict(limit=dict(choice=8, bpb=8, generate=2), batch_tokens=1024),
        strategies={k: preset["strategies"][k] for k in few} | own,
        grid=[
            usual | dict(strategies=few, methods=["wanda"]),
            usual | dict(strategies=["c4", "self-cal", "sgs", "igsp"], methods=["sparsegpt"])],
        ablations=[
            usual | dict(strategies=["igsp-mean"], methods=["sparsegpt"]),
            usual | dict(strategies=["uniform"], methods=["minimax"])])
    (root / "tiny.yaml").write_text(yaml.safe_dump(preset))
    done = run(root, "--preset", "tiny.yaml")
    assert done.returncode == 0, done.stdout + done.stderr
    rows = {
        p.stem: json.loads(p.read_text())["rows"]
        for p in (root / "results/paper-tiny").glob("*-s0.json")
    }
    assert len(rows) == 12 and all(
        any(r["task"] == "gsm8k_generate" for r in o) for o in rows.values()
    )
    figures = root / "figures/paper-tiny"
    assert len(list(figures.glob("*.csv"))) >= 11 and len(list(figures.glob("*.png"))) >= 8
    assert set(pd.read_csv(figures / "T8-self-generated.csv")["strategy"]) == {
        "c4", "self-cal", "sgs", "igsp", "uniform, minimax"}
    assert set(pd.read_csv(figures / "T9-ablations.csv")["strategy"]) == {
        "self-cal", "sgs", "igsp", "igsp-mean"}
    gains = pd.read_csv(figures / "T11-prompt-gain.csv")
    assert {"dense", "c4", "igsp"} <= set(gains["strategy"]) and gains["value"].notna().any()
    verdicts = pd.read_csv(figures / "T7-claims.csv")
    assert set(verdicts["claim"]) == {*(f"C{i}" for i in range(1, 10)), "O1", "O2", "O3"}
    assert PRESET not in set(verdicts.query("claim == 'C7'")["verdict"])

    preset["strategies"]["igsp"] += " temperature=0.9"
    (root / "tiny.yaml").write_text(yaml.safe_dump(preset))
    listed = set(
        re.findall(r"^\w+_igsp_\w+",
                   run(root, "--preset", "tiny.yaml", "--dry-run", "--verbose").stdout, re.M)
    )
    assert listed == {
        "generate_igsp_s0",
        "cell_igsp_sparsegpt_0_6_n15_s0",
    }, "another text: it is written, and its cell is run again"
