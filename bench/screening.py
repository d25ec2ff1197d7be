"""The retention that screening gives to the sources and the named mixes, to be compared with the
rows of properly pruned models (nbs/advice/05_halving).

python bench/screening.py                     # SmolLM2-135M, about 12 minutes on two cores
python bench/screening.py --sets codeio,c4    # some sets only, printed
"""
import argparse
from pathlib import Path

import pandas as pd

from calib_prune.advice.trials import FEWEST_OF_TASK, SCREEN_SEED, TUNING
from calib_prune.calibration.sets import build_calibration, parse_mix
from calib_prune.calibration.sources import SUITE
from calib_prune.core import write_atomic
from calib_prune.evaluation.measures import ANSWER_BITS
from calib_prune.evaluation.retention import retention
from calib_prune.evaluation.scoring import evaluate
from calib_prune.evaluation.tasks import get_tasks
from calib_prune.model.loading import load_model
from calib_prune.pruning.one_shot import input_squares, mixed_squares, prune_one_shot

MODEL, SPARSITY, WINDOWS, LENGTH = "smollm2-135m", 0.5, 8, 512
SETS = (*SUITE, "uniform", "uniform-dimensions", "half-code")
FILE = Path(__file__).parents[1] / f"results/advice/screening/{MODEL}.csv"


def scored(net, tokenizer) -> pd.DataFrame:
    "Answers to the first tuning items of all tasks."
    tasks = [task.name for task in get_tasks("default")]
    return evaluate(net, tokenizer, tasks, FEWEST_OF_TASK, skip=TUNING.skip)


def screened(sets: list[str]) -> pd.DataFrame:
    "Retention by dimension and in total, one row per set."
    net, tokenizer = load_model(MODEL, "float32", "cpu")
    sources = dict.fromkeys(source for name in sets for source in parse_mix(name))
    squares = {}
    for source in sources:
        drawn = build_calibration(source, tokenizer, WINDOWS, LENGTH, SCREEN_SEED)
        squares[source] = input_squares(net, drawn.tokens)

    dense, rows = scored(net, tokenizer), []
    for name in sets:
        net, tokenizer = load_model(MODEL, "float32", "cpu")
        prune_one_shot(net, mixed_squares(squares, parse_mix(name)), SPARSITY)
        table = retention(dense, scored(net, tokenizer), measure=ANSWER_BITS)
        kept = table[table["level"] != "task"].set_index("name")["retention"]
        rows.append(dict(set=name) | kept.round(4).to_dict())
    return pd.DataFrame(rows)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sets", help="names separated by commas; by default all, written to "
                        f"{FILE.name}")
    names = parser.parse_args().sets
    table = screened(names.split(",") if names else list(SETS))
    if names: print(table.to_string(index=False))
    else: write_atomic(FILE, table.to_csv(index=False))
