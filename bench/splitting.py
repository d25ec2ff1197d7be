"""What the tokenizer of SmolLM2's makers changes: the dense model and models pruned on four sets,
with the studies' tokenizer and with digits split off first. `python -m bench.splitting all`."""
from dataclasses import dataclass
from typing import Annotated, Iterator

import typer
import yaml

from bench.run import ROOT, Step, code_of, put, run_missing

NAME = "splitting"
MEASURED, STAGES = code_of("data", "model", "pruning", "evaluation", bench=(NAME,)), ("sparsegpt",)
app = typer.Typer(
    no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, help=__doc__
)


@dataclass(frozen=True)
class Plan:
    "What is pruned and scored."
    model: str = "smollm2-135m"
    calibrations: tuple[str, ...] = ("", "c4", "codeio", "math", "uniform")  # empty: dense
    method: str = "sparsegpt"
    sparsity: str = "0.5"
    seed: int = 0


@app.command()
def one(calibration: str = "", digits: bool = False) -> None:
    "The bits per byte of one model on each task, with the items of the studies."
    from calib_prune.data.gguf import digits_first
    from calib_prune.evaluation.scoring import evaluate, scores
    from calib_prune.model.loading import load_model
    from calib_prune.pipeline.prune import PruneSettings, draw_calibration, prune_loaded
    plan = Plan()
    asked = yaml.safe_load((ROOT / f"presets/base/{plan.model}.yaml").read_text())["scoring"]
    net, tokenizer = load_model(plan.model, "float32", "cpu")
    if digits: tokenizer.backend_tokenizer.pre_tokenizer = digits_first()
    if calibration:
        how = PruneSettings(calibration=calibration, method=plan.method, sparsity=plan.sparsity,
                            seed=plan.seed)
        prune_loaded(net, draw_calibration(tokenizer, how), how)
    table = scores(evaluate(net, tokenizer, asked["tasks"], asked["limit"], asked["batch_tokens"]))
    put(dict(dimensions=dict(zip(table["task"], table["dimension"])),
             bits=dict(zip(table["task"], table["bits_per_byte"]))))


def steps(plan: Plan) -> Iterator[Step]:
    "Every model with both tokenizers."
    for calibration in plan.calibrations:
        for digits in (False, True):
            about = dict(calibration=calibration, digits=digits)
            option = "--digits" if digits else "--no-digits"
            yield Step(NAME, about,
                       ["-m", "bench.splitting", "one", "--calibration", calibration, option])


@app.command(name="all")
def run_all(
    threads: Annotated[int, typer.Option(help="threads of each measurement")] = 1,
    fresh: Annotated[bool, typer.Option(help="forget the results that are there")] = False,
) -> None:
    "Run what is missing."
    run_missing(NAME, Plan(), steps(Plan()), MEASURED, STAGES, threads, fresh)


if __name__ == "__main__": app()
