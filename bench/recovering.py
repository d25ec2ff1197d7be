"""Recovery training at equal tokens: types of products, low-rank changes, and llm-compressor's
form. `python -m bench.recovering all`."""
import math
import time
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Iterator

import typer

import calib_prune  # noqa: F401  before torch: it sets how torch's threads wait
from bench.machine import peak
from bench.run import (
    PEERS,
    WORK,
    Step,
    code_of,
    load_tokens,
    put,
    run_child,
    run_missing,
    weight_file,
)

MEASURED = code_of("kernels", "model", "pruning", bench=("machine", "recovering", "peer_recovery"))
NAME, STAGES = "recovering", ("sparsegpt", "recover", "scoring")
PEER, WINDOWS = "llm-compressor", WORK / "recovering.npy"
PRUNED = WORK / "recovering-16"  # saved in bfloat16, as `prune` does here
app = typer.Typer(
    no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, help=__doc__
)


@dataclass(frozen=True)
class Plan:
    "How much is measured."
    model: str = "smollm2-135m"
    calibration: str = "c4"
    text: str = "uniform-dimensions"
    windows: int = 40
    length: int = 512
    steps: int = 32
    batch: int = 2
    rate: float = 1e-4
    low_ranks: tuple[tuple[int, float], ...] = ((32, 1e-3), (32, 3e-3))  # rank, rate
    who: tuple[str, ...] = ("float32", "bfloat16", "bfloat16, weights as stored", "recomputed",
                            "bfloat16, rate 0.0003", "bfloat16, rate 0.001")
    items: tuple[int, int] = (24, 12)  # of each choice and bits task

    @property
    def names(self) -> list[str]:
        "All that are compared."
        return [*self.who, *(f"rank {rank}, rate {rate:g}" for rank, rate in self.low_ranks), PEER]


@app.command()
def prepare() -> None:
    "The pruned model, and the windows in the order in which training reads them."
    import numpy as np

    from calib_prune.calibration.sets import build_calibration
    from calib_prune.model.loading import load_tokenizer
    from calib_prune.pipeline.prune import prune_model
    from calib_prune.pipeline.recover import RecoverSettings, shuffled
    plan, seed = Plan(), RecoverSettings().seed
    WORK.mkdir(parents=True, exist_ok=True)
    if not PRUNED.exists():
        prune_model(plan.model, PRUNED, calibration=plan.calibration, method="sparsegpt",
                    save_dtype="bfloat16")
    text = build_calibration(plan.text, load_tokenizer(plan.model), plan.windows, plan.length, seed)
    np.save(WINDOWS, shuffled(text, seed).numpy())
    put({})


def low_rank(student, rank: int) -> dict:
    "Let each pruned map train a product of two narrow matrices, counted where the map is not 0."
    import torch
    from torch import nn
    from torch.nn.utils import parametrize

    from calib_prune.pruning.layers import decoder_layers, prunable

    class Narrow(nn.Module):
        "The weight and a product of two matrices, at the places that are not 0."
        def __init__(self, weight):
            super().__init__()
            rows, columns = weight.shape
            draw = torch.randn(rank, columns, generator=torch.Generator().manual_seed(rank))
            self.down = nn.Parameter(draw / math.sqrt(columns))
            self.up = nn.Parameter(torch.zeros(rows, rank))
            self.register_buffer("kept", weight != 0)

        def forward(self, weight):
            return weight + self.up @ self.down * self.kept

    for p in student.parameters(): p.requires_grad_(False)
    maps = [linear for layer in decoder_layers(student) for linear in prunable(layer).values()]
    for linear in maps:
        parametrize.register_parametrization(linear, "weight", Narrow(linear.weight.data))
    return {name: p for name, p in student.named_parameters() if p.requires_grad}


def trainer_of(who: str, plan: Plan):
    "The trainer of one competitor, and its model."
    from calib_prune.model.loading import load_model
    from calib_prune.pruning.recovery import Trainer, Training
    student, teacher = (load_model(str(m), "float32")[0] for m in (PRUNED, plan.model))
    kind, _, rate = who.partition(", rate ")
    rank = int(kind.removeprefix("rank ")) if kind.startswith("rank") else 0
    how = Training(plan.steps, float(rate or plan.rate), plan.batch,
                   dtype="bfloat16" if who.startswith("bfloat16") else "float32")
    stored = {name: p.detach().clone() for name, p in student.named_parameters()}
    trainer = Trainer(student, teacher, how)
    if who.endswith("as stored"):  # without `pruning.recovery.dithered`
        for name, p in trainer.parameters.items(): p.data.copy_(stored[name])
    if rank:
        trainer.masks, trainer.parameters = {}, low_rank(student, rank)
        trainer.begin()
    return trainer


@app.command()
def one(who: str) -> None:
    "Train once, and save the weights of the layers."
    import torch
    from safetensors.torch import save_file
    from torch.nn.utils import parametrize

    from calib_prune.pruning.layers import decoder_layers
    from calib_prune.pruning.recovery import recomputed_layers, train
    plan = Plan()
    trainer, clock = trainer_of(who, plan), time.process_time()
    with TemporaryDirectory() as place, recomputed_layers(trainer.student, who == "recomputed"):
        whole = train(trainer, load_tokens(WINDOWS), Path(place), who)
    seconds = time.process_time() - clock
    for module in [*trainer.student.modules()]:
        if parametrize.is_parametrized(module):
            parametrize.remove_parametrizations(module, "weight")
    inside = {id(p) for layer in decoder_layers(trainer.student) for p in layer.parameters()}
    weights = {name: p.detach().to(torch.bfloat16).contiguous()
               for name, p in trainer.student.named_parameters() if id(p) in inside}
    save_file(weights, weight_file(NAME, who))
    put(dict(processor_seconds=seconds, peak_bytes=peak(), whole=whole,
             trained=sum(p.numel() for p in trainer.parameters.values()), losses=trainer.losses))


@app.command()
def scores() -> None:
    "Divergence from the dense model on held-out text, and retention, of each result."
    from safetensors.torch import load_file

    from calib_prune.calibration.sets import build_calibration
    from calib_prune.evaluation.measures import ANSWER_BITS
    from calib_prune.evaluation.retention import retention
    from calib_prune.evaluation.scoring import evaluate
    from calib_prune.model.divergence import divergence
    from calib_prune.model.loading import load_model
    plan, rows = Plan(), []
    dense, tokenizer = load_model(plan.model, "float32")
    legal = build_calibration("multilexsum", tokenizer, 16, plan.length).tokens
    limit = dict(zip(("choice", "bpb"), plan.items))
    of_dense = evaluate(dense, tokenizer, "default", limit=limit)
    student = load_model(str(PRUNED), "float32")[0]
    zeros = {name: p.data == 0 for name, p in student.named_parameters() if p.dim() == 2}
    for who in ("pruned", *plan.names):  # the peer last: it trains embeddings too
        if who != "pruned":
            odd = student.load_state_dict(load_file(weight_file(NAME, who)), strict=False)
            assert not odd.unexpected_keys and not any(".layers." in k for k in odd.missing_keys)
        lost = sum(int((p.data[zeros[name]] != 0).sum())
                   for name, p in student.named_parameters() if name in zeros)
        kept = retention(of_dense, evaluate(student, tokenizer, "default", limit=limit),
                         measure=ANSWER_BITS)
        total = kept[kept.level == "total"].iloc[0]
        rows.append(dict(who=who, of="scores", zeros_lost=lost,
                         divergence=divergence(dense, student, legal).bits,
                         total=float(total.retention), ci=[float(total.ci_low),
                                                           float(total.ci_high)]))
    put(rows)


def steps(plan: Plan) -> Iterator[Step]:
    "Every measurement."
    for who in plan.names:
        command = ["-m", "bench.recovering", "one", who]
        if who == PEER:
            command = ["-m", "bench.peer_recovery", PRUNED, WINDOWS, plan.steps, plan.batch,
                       plan.rate, weight_file(NAME, who)]
        yield Step(NAME, dict(who=who, of="training"), [*map(str, command)],
                   *([PEERS] if who == PEER else []))
    yield Step(NAME, dict(of="scores"), ["-m", "bench.recovering", "scores"])


@app.command(name="all")
def run_all(
    threads: Annotated[int, typer.Option(help="threads of each measurement")] = 1,
    fresh: Annotated[bool, typer.Option(help="forget the results that are there")] = False,
) -> None:
    "Run what is missing."
    if not (WINDOWS.is_file() and PRUNED.exists()):
        run_child(Step("", {}, ["-m", "bench.recovering", "prepare"]), threads)
    run_missing(NAME, Plan(), steps(Plan()), MEASURED, STAGES, threads, fresh)


if __name__ == "__main__": app()
