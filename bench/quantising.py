"""Speed of GPTQ: ours compared with our SparseGPT and llm-compressor's GPTQ, with their errors.
`python -m bench.quantising all`."""
import statistics
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Iterator

import typer

from bench.machine import peak
from bench.run import (
    BATCH_TOKENS,
    PEER_BATCH_TOKENS,
    PEERS,
    Step,
    code_of,
    dense_moments,
    load,
    load_tokens,
    own,
    put,
    relative_errors,
    run_child,
    run_missing,
    warm_up,
    weight_file,
    window_file,
)

MEASURED, STAGES = code_of("kernels", "model", "pruning",
                           bench=("machine", "peer", "quantising", "run")), ("gptq", "sparsegpt")
WHO, NAME = ("SparseGPT", "GPTQ", "GPTQ fitted", "llm-compressor"), "quantising"
app = typer.Typer(
    no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, help=__doc__
)


@dataclass(frozen=True)
class Plan:
    "How much is measured."
    source: str = "c4"
    windows: int = 32
    length: int = 512
    layers: int = 30
    bits: int = 4
    group: int = 64   # the largest usual one that divides the widths of the model
    rounds: int = 3
    model: str = "smollm2-135m"

    @property
    def tokens(self) -> Path:
        return window_file(self.source, self.windows, self.length, self.model)


def settings(who: str, plan: Plan) -> dict:
    "What `pruning.walk.prune` is asked for."
    from calib_prune.pruning.grids import Quantisation
    if who == "SparseGPT": return dict(method="sparsegpt", sparsity=0.5)
    how = Quantisation(plan.bits, plan.group, fitted=who == "GPTQ fitted")
    return dict(method="gptq", quantise=how)


@app.command()
def one(who: str) -> None:
    "Our SparseGPT or GPTQ, once."
    from safetensors.torch import save_file

    from calib_prune.pruning.layers import detach_scales
    from calib_prune.pruning.walk import prune
    plan = Plan()
    asked = settings(who, plan)
    tiny = dict(quantise=replace(asked["quantise"], group=16)) if "quantise" in asked else {}
    warm_up(**dict(sparsity=0) | asked | tiny)
    loaded, _ = load(plan.model, plan.layers)
    start = time.perf_counter()
    prune(loaded, load_tokens(plan.tokens), batch_tokens=BATCH_TOKENS, **asked)
    seconds = time.perf_counter() - start
    detach_scales(loaded)
    weights = {k: v for k, v in loaded.state_dict().items() if ".layers." in k and v.ndim == 2}
    save_file(weights, weight_file(NAME, who))
    put(dict(seconds=seconds, peak_bytes=peak()))


@app.command()
def errors() -> None:
    "Reconstruction error of each result with the dense model's inputs: one check for all."
    from safetensors.torch import load_file
    plan = Plan()
    loaded, _ = load(plan.model, plan.layers)
    linears, hessians = dense_moments(loaded, load_tokens(plan.tokens))
    put([dict(who=who, turn=0, mean=statistics.mean(
        relative_errors(linears, hessians, load_file(weight_file(NAME, who))))) for who in WHO])


def steps(plan: Plan) -> Iterator[Step]:
    "Every measurement, rounds interleaved."
    from calib_prune.core import cache_dir
    arguments = [cache_dir() / "models" / plan.model, plan.tokens, f"gptq-{plan.bits}-{plan.group}",
                 0, PEER_BATCH_TOKENS // plan.length, plan.layers, weight_file(NAME, WHO[-1])]
    for turn in range(1, plan.rounds + 1):
        for who in WHO:
            about = dict(who=who, turn=turn)
            if who == WHO[-1]:
                yield Step(NAME, about, ["-m", "bench.peer", *map(str, arguments)], PEERS)
            else: yield Step(NAME, about, ["-m", "bench.quantising", "one", who])
    yield Step(NAME, dict(turn=0), ["-m", "bench.quantising", "errors"])


@app.command(name="all")
def run_all(
    threads: Annotated[int, typer.Option(help="threads of each measurement")] = 2,
    fresh: Annotated[bool, typer.Option(help="forget the results that are there")] = False,
) -> None:
    "Run what is missing."
    plan = Plan()
    if not plan.tokens.is_file():
        run_child(own("", {}, "tokens", plan.source, plan.windows, plan.length, "--model",
                      plan.model), threads)
    run_missing(NAME, plan, steps(plan), MEASURED, STAGES, threads, fresh)


if __name__ == "__main__": app()
