"""Side-by-side measurements. `python -m bench.run all` runs every one that bench/results lacks,
each in its own process."""
import ast
import json
import os
import statistics
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Iterator
from unittest.mock import patch

import typer

import calib_prune  # noqa: F401  before torch: it sets how torch's threads wait
from bench.machine import describe, peak, reset_peak, resident, threads_environment

ROOT = Path(__file__).resolve().parent.parent
RESULTS, WORK, PEERS = (
    ROOT / "bench" / "results",
    ROOT / "build" / "bench",
    ROOT / "bench" / ".venv" / "bin" / "python",
)
WHO, METHODS, SPARSITY = ("ours", "plain", "llm-compressor"), ("sparsegpt", "wanda"), 0.6
BATCH_TOKENS, PEER_BATCH_TOKENS = 2048, 4096  # each is at its best so
def code_of(*packages: str, bench: tuple[str, ...]) -> tuple[str, ...]:
    "The files of some packages and of the benchmark, from the root on."
    mine = (o for name in packages for o in (ROOT / "calib_prune" / name).glob("*.py"))
    return (*sorted(str(o.relative_to(ROOT)) for o in mine), *(f"bench/{o}.py" for o in bench))


MEASURED = (*code_of("kernels",
                     "model",
                     "pruning",
                     "evaluation",
                     bench=("machine", "plain", "limit", "peer", "run", "start")),
            "calib_prune/study/engine.py", "calib_prune/study/runs.py")
STAGES = ("sparsegpt", "wanda", "scoring")
MODEL, SECOND = "smollm2-135m", "qwen2.5-coder-0.5b"
app = typer.Typer(
    no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, help=__doc__
)
Model = Annotated[str, typer.Option(help="as for `calib-prune prune`")]
Layers = Annotated[int, typer.Option(help="keep only so many of the model's first layers")]
Dtype = Annotated[str, typer.Option(help="as for `calib-prune prune`")]
Busy = Annotated[int, typer.Option(help="busy processes beside the measurement")]


# --- what every measurement starts from

def window_file(source: str, windows: int, length: int, model: str = MODEL) -> Path:
    "Where the tokens of a calibration set lie, for every implementation to read."
    return WORK / f"{source}-{windows}x{length}-{model}.npy"


def score_file(who: str) -> Path:
    "Where the scores of items lie, to be compared."
    return WORK / f"score-{who}.parquet"


def weight_file(method: str, who: str) -> Path:
    "Where the pruned weights of an implementation lie, for the common check."
    return WORK / f"{method}-{who}.safetensors"


def load(model: str, layers: int, dtype: str = "float32"):
    "The model, cut to its first layers, and its tokenizer."
    from calib_prune.model.loading import load_model
    loaded, tokenizer = load_model(model, dtype)
    loaded.model.layers = loaded.model.layers[:layers]
    loaded.config.num_hidden_layers = len(loaded.model.layers)
    return loaded, tokenizer


def load_tokens(path: Path):
    "Token windows, int64 [N, L]."
    import numpy as np
    import torch
    return torch.from_numpy(np.load(path))


def warm_up(method: str, **how) -> None:
    "Prune a tiny model, so that all that is loaded or compiled once is there."
    import torch

    from calib_prune.model.tiny import tiny_llama
    from calib_prune.pruning.walk import prune as our_prune
    our_prune(tiny_llama(), torch.ones(2, 16, dtype=torch.int64), method,
              **dict(sparsity=SPARSITY) | how)


@contextmanager
def busy_processes(n: int) -> Iterator[None]:
    "Inside, so many other processes would use a core each."
    others = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(n)]
    try: yield
    finally:
        for o in others: o.kill()
        for o in others: o.wait()


def put(row: dict | list[dict]) -> None:
    "Hand a child's result to its parent: the last line that it prints."
    print(json.dumps(row), flush=True)


@app.command()
def tokens(source: str, windows: int, length: int, model: Model = MODEL) -> None:
    "Write a calibration set's tokens to a file."
    import numpy as np

    from calib_prune.calibration.sets import build_calibration
    from calib_prune.model.loading import load_model
    path = window_file(source, windows, length, model)
    path.parent.mkdir(parents=True, exist_ok=True)
    np.save(path, build_calibration(source, load_model(model)[1], windows, length).tokens.numpy())
    put({})


# --- measurements

def wishart(d: int, seed: int):
    """A second moment like a layer's: correlated inputs of unequal size, its spectrum falling as
    1/k."""
    import torch
    rng = torch.Generator().manual_seed(seed)
    x = torch.randn(2 * d, d, generator=rng) / torch.arange(1, d + 1) ** 0.5
    x = x @ torch.randn(d, d, generator=rng) * torch.exp(torch.randn(d, generator=rng) / 2)
    return x.T @ x / len(x)


def groups(hidden: int, intermediate: int, kv: int, square: int, seed: int = 0) -> list[tuple]:
    "Weights by the Hessian that they share: those of one decoder layer, or one square matrix."
    import torch
    rng = torch.Generator().manual_seed(seed)
    shapes = [(square, [square])] if square else [(hidden, [hidden, kv, kv]), (hidden, [hidden]),
                                                  (hidden, [intermediate, intermediate]),
                                                  (intermediate, [hidden])]
    return [(wishart(d_in, seed + n), [torch.randn(d_out, d_in, generator=rng) for d_out in outs])
            for n, (d_in, outs) in enumerate(shapes)]


def distance(a: list, b: list) -> dict:
    """The share of weights that only one of two solutions prunes, and the largest relative
    difference of a matrix."""
    import torch
    pairs = [pair for A, B in zip(a, b, strict=True) for pair in zip(A, B, strict=True)]
    differ = sum(int(((x == 0) != (y == 0)).sum()) for x, y in pairs)
    return dict(masks=differ / sum(x.numel() for x, _ in pairs),
                weights=max(float(torch.norm(x - y) / torch.norm(y)) for x, y in pairs))


def mean_error(problem: list[tuple], solution: list) -> float:
    "The mean reconstruction error of a solution."
    from calib_prune.pruning.hessian import energy
    return statistics.mean(
        energy(w - new, h) / energy(w, h)
        for (h, ws), news in zip(problem, solution, strict=True)
        for w, new in zip(ws, news, strict=True)
    )


@app.command()
def kernel(
    hidden: int = 576,
    intermediate: int = 1536,
    kv: int = 192,
    square: int = 0,
    rounds: int = 5,
    plain: bool = True,
) -> None:
    "Solve all linears of one decoder layer with SparseGPT, ours and plain in turn."
    import torch

    from bench.plain import plain_sparsegpt
    from calib_prune.kernels.memory import reused_memory
    from calib_prune.pruning.methods import solve_all
    problem = groups(hidden, intermediate, kv, square)
    def ours(problem: list[tuple]) -> list[list]:
        asked = {str(n): (ws, lambda h=h: [h]) for n, (h, ws) in enumerate(problem)}
        solved = solve_all("sparsegpt", asked, SPARSITY, None, 128, 0.01)
        return [[o.weight for o in solved[name]] for name in asked]
    solve = dict(ours=ours)
    if plain:
        solve["plain"] = lambda problem: [
            [plain_sparsegpt(w, h, SPARSITY) for w in ws] for h, ws in problem
        ]
    seconds, found = {who: [] for who in solve}, {}
    with torch.no_grad(), reused_memory():  # as in a prune; it helps both
        for f in solve.values(): f(groups(128, 128, 128, 0))  # compiled and warm
        for _ in range(rounds):
            for who, f in solve.items():
                start = time.perf_counter()
                found[who] = f(problem)
                seconds[who].append(time.perf_counter() - start)
    row = dict(
        shape=f"{square}×{square}" if square else f"layer {hidden}/{intermediate}/{kv}",
        width=square or hidden,
        seconds=seconds,
    )
    row |= dict(error={who: mean_error(problem, o) for who, o in found.items()})
    if plain: row |= dict(ours_from_plain=distance(found["ours"], found["plain"]))
    if plain and not square:  # who is nearer to the algorithm in float64?
        exact = [
            [plain_sparsegpt(w.double(), h.double(), SPARSITY).float() for w in ws]
            for h, ws in problem
        ]
        row |= {f"{who}_from_exact": distance(o, exact) for who, o in found.items()}
    put(row)


@app.command()
def prune(
    who: str,
    method: str,
    source: str = "c4",
    windows: int = 32,
    length: int = 512,
    layers: Layers = 30,
    model: Model = MODEL,
    dtype: Dtype = "float32",
    save: bool = False,
    busy: Busy = 0,
    warm: Annotated[bool, typer.Option(help="compile before the clock starts")] = False,
) -> None:
    "Prune the model with ours or the plain walk."
    from safetensors.torch import save_file

    from bench.plain import plain_prune
    from calib_prune.pruning.walk import prune as our_prune
    if warm: warm_up(method)
    loaded, _ = load(model, layers, dtype)
    ids = load_tokens(window_file(source, windows, length, model))
    run = dict(ours=our_prune, plain=plain_prune)[who]
    with busy_processes(busy):
        start = time.perf_counter()
        run(loaded, ids, method, SPARSITY, batch_tokens=BATCH_TOKENS)
        seconds = time.perf_counter() - start
    weights = {k: v for k, v in loaded.state_dict().items() if ".layers." in k and v.ndim == 2}
    if save: save_file(weights, weight_file(method, who))
    put(dict(seconds=seconds, peak_bytes=peak()))


def dense_moments(loaded, ids) -> tuple[dict, dict]:
    "The linear maps of a dense model's layers, and the second moments of their inputs, by name."
    import torch

    from calib_prune.pruning.hessian import SecondMoment
    linears = {
        f"{k}.weight": m
        for k, m in loaded.named_modules()
        if isinstance(m, torch.nn.Linear) and ".layers." in k
    }
    moments = {k: SecondMoment(m.weight.shape[1]) for k, m in linears.items()}
    for k, m in linears.items():
        m.register_forward_pre_hook(lambda _, args, k=k: moments[k].update(args[0]))
    with torch.no_grad():
        for batch in ids.split(max(1, BATCH_TOKENS // ids.shape[1])):
            loaded.model(batch, use_cache=False)
    return linears, {k: o.matrix() for k, o in moments.items()}


def relative_errors(linears: dict, hessians: dict, new: dict) -> list[float]:
    "‖(W−W′)X‖² / ‖WX‖² of new weights, for each linear map."
    from calib_prune.pruning.hessian import energy
    return [
        energy(m.weight.data - new[k].float(), hessians[k]) / energy(m.weight.data, hessians[k])
        for k, m in linears.items()
    ]


@app.command()
def errors(
    source: str = "c4",
    windows: int = 32,
    length: int = 512,
    layers: Layers = 30,
    model: Model = MODEL,
) -> None:
    """Reconstruction error of every saved result with the dense model's inputs: one check for
    all."""
    from safetensors.torch import load_file
    loaded, _ = load(model, layers)
    linears, hessians = dense_moments(loaded, load_tokens(window_file(source, windows, length)))
    rows = []
    for method in METHODS:
        for who in WHO:
            new = load_file(weight_file(method, who))
            found = relative_errors(linears, hessians, new)
            zeros = sum(int((new[k] == 0).sum()) for k in linears) / sum(
                m.weight.numel() for m in linears.values()
            )
            rows.append(
                dict(who=who,
                     method=method,
                     sparsity=zeros,
                     linears=len(found),
                     mean=statistics.mean(found),
                     median=statistics.median(found),
                     largest=max(found)))
    put(rows)


@app.command()
def ability(choice: int, bpb: int, layers: Layers = 30, model: Model = MODEL) -> None:
    "What every saved result keeps, in answer bits, by dimension and in total."
    from safetensors.torch import load_file

    from calib_prune.evaluation.measures import ANSWER_BITS
    from calib_prune.evaluation.retention import retention
    from calib_prune.evaluation.scoring import evaluate
    loaded, tokenizer = load(model, layers)
    def scored(): return evaluate(loaded, tokenizer, "default", limit=dict(choice=choice, bpb=bpb))
    dense, rows = scored(), []
    for method in METHODS:
        for who in WHO:
            odd = loaded.load_state_dict(load_file(weight_file(method, who)), strict=False)
            lost = [k for k in odd.missing_keys if ".layers." in k and k.endswith("proj.weight")]
            assert not odd.unexpected_keys and not lost, odd
            kept = retention(dense, scored(), measure=ANSWER_BITS)
            rows += [
                dict(who=who,
                     method=method,
                     part=o.name,
                     value=o.retention,
                     ci_low=o.ci_low,
                     ci_high=o.ci_high) for o in kept[kept.level != "task"].itertuples()]
    put(rows)


@contextmanager
def recorded_requests() -> Iterator[list]:
    "Inside, what our scoring is asked to compute is noted."
    from calib_prune.evaluation import scoring
    before, requests = scoring.loglikelihoods, []
    def noting(model, asked, *rest, **more):
        requests.extend(asked)
        return before(model, asked, *rest, **more)
    with patch.object(scoring, "loglikelihoods", noting): yield requests


@app.command()
def score(
    who: str,
    choice: int = 12,
    bpb: int = 6,
    model: Model = MODEL,
    dtype: Dtype = "float32",
    layers: Layers = 10**6,
    busy: Busy = 0,
) -> None:
    "Score the default task set, ours or by lm-eval's own path (\"lm-eval\")."
    from bench.limit import Shape, score_flops
    from calib_prune.evaluation.scoring import evaluate
    loaded, tokenizer = load(model, layers, dtype)
    stock = dict(ours=False, **{"lm-eval": True})[who]
    # imports and first-use costs that no study repeats
    evaluate(loaded, tokenizer, "sciq", limit=2, stock=stock)
    with busy_processes(busy), recorded_requests() as requests:
        start = time.perf_counter()
        items = evaluate(
            loaded, tokenizer, "default", limit=dict(choice=choice, bpb=bpb), stock=stock
        )
        seconds = time.perf_counter() - start
    WORK.mkdir(parents=True, exist_ok=True)
    items.to_parquet(score_file(who if dtype == "float32" else dtype))
    config = loaded.config
    row = dict(
        seconds=seconds, peak_bytes=peak(), items=len(items[["task", "item"]].drop_duplicates())
    )
    if not stock:
        row["flops"] = score_flops(
            Shape.of(config), config.num_hidden_layers, config.vocab_size, requests
        )
    put(row)


@app.command()
def agree(
    a: Annotated[str, typer.Argument()] = "ours", b: Annotated[str, typer.Argument()] = "lm-eval"
) -> None:
    "Compare two files of item scores."
    import math

    import pandas as pd
    a, b = (
        pd.read_parquet(score_file(who)).set_index(["task", "item", "metric"]).value
        for who in (a, b)
    )
    gap = (a - b.loc[a.index]).abs()
    bits = gap.index.get_level_values("metric") == "bits"
    put(
        dict(values=len(gap),
             same_items=sorted(a.index) == sorted(b.index),
             accuracies=int((~bits).sum()),
             accuracies_that_differ=int((gap[~bits] != 0).sum()),
             accuracy=[float(o[~bits].mean()) for o in (a, b.loc[a.index])],
             bits=[float(o[bits].sum()) for o in (a, b.loc[a.index])],
             largest_gap_nats=float(gap[bits].max() * math.log(2)),
             largest_relative_gap=float((gap / a.abs())[bits].max())))


@app.command()
def cell(
    windows: int = 32, length: int = 512, layers: Layers = 30, choice: int = 12, bpb: int = 6
) -> None:
    "What a cell of the study does: load, prune, score."
    from calib_prune.evaluation.scoring import evaluate
    from calib_prune.pruning.walk import prune as our_prune
    loaded, tokenizer = load(MODEL, layers)
    our_prune(
        loaded,
        load_tokens(window_file("c4", windows, length)),
        "sparsegpt",
        SPARSITY,
        batch_tokens=BATCH_TOKENS,
    )
    evaluate(loaded, tokenizer, "default", limit=dict(choice=choice, bpb=bpb))
    put({})


@app.command()
def cells(
    how: Annotated[
        str, typer.Argument(help="\"in turn\", each on all cores, or \"side by side\", each on one")
    ],
    windows: int = 32,
    length: int = 512,
    layers: Layers = 30,
    choice: int = 12,
    bpb: int = 6,
) -> None:
    "The time of as many cells as there are cores."
    step = own("", {}, "cell", "--windows", windows, "--length", length, "--layers", layers,
               "--choice", choice, "--bpb", bpb)
    count = len(os.sched_getaffinity(0))
    together, threads = dict(
        zip(("in turn", "side by side"), ((1, count), (count, 1)), strict=True)
    )[how]
    start = time.perf_counter()
    with ThreadPoolExecutor(together) as pool:
        [*pool.map(lambda _: run_child(step, threads), range(count))]
    put(dict(seconds=time.perf_counter() - start, cells=count))


@app.command()
def limit(windows: int = 32, length: int = 512, layers: Layers = 30, model: Model = MODEL) -> None:
    """This machine's rate of matrix products, and the seconds that a prune's unavoidable work takes
    at it."""
    from bench.limit import Shape, product_rate, prune_flops
    shape, rates = Shape.of(load(model, layers)[0].config), product_rate()
    rate = max(rates.values())
    flops = {
        o: prune_flops(shape, layers, windows * length, length, moments=o == "sparsegpt")
        for o in METHODS
    }
    put(dict(rates=rates, rate=rate, flops=flops, seconds={k: v / rate for k, v in flops.items()}))


@app.command()
def memory(
    source: str = "papers",
    windows: int = 32,
    length: int = 512,
    layers: Layers = 30,
    model: Model = MODEL,
    method: str = "sparsegpt",
) -> None:
    """Peak memory of our prune above that of the interpreter and its libraries, beside what a prune
    has to hold."""
    from bench.limit import Shape, prune_bytes
    from calib_prune.pruning.walk import prune as our_prune
    ids = load_tokens(window_file(source, windows, length))
    warm_up(method)
    before = resident()
    loaded = load(model, layers)[0]
    start = time.perf_counter()
    reset_peak()  # what loading took beside the model is free by now
    our_prune(loaded, ids, method, SPARSITY, batch_tokens=BATCH_TOKENS)
    parts = prune_bytes(Shape.of(loaded.config), sum(p.numel() for p in loaded.parameters()),
                        ids.numel(), max(BATCH_TOKENS, length))
    put(
        dict(windows=windows,
             length=length,
             seconds=time.perf_counter() - start,
             interpreter_bytes=before,
             peak_bytes=peak() - before,
             parts=parts,
             needed_bytes=sum(parts.values()),
             ratio=(peak() - before) / sum(parts.values())))


# --- the whole

@dataclass(frozen=True)
class Plan:
    "How much is measured."
    layers: int = 30
    windows: int = 32
    length: int = 512
    rounds: int = 3
    peer_rounds: int = 2      # of the slow peer
    plain_rounds: int = 1     # of the plain walk, and of everybody's Wanda
    squares: tuple[int, ...] = (4096,)
    items: tuple[int, int] = (12, 6)  # of each choice and bpb task
    part_layers: int = 8              # of a model, where the whole would take too long
    part_items: tuple[int, int] = (4, 2)
    growth_windows: tuple[int, ...] = (4, 8, 16, 32, 64)
    growth_layers: int = 6            # while windows grow
    growth_depths: tuple[int, ...] = (2, 4, 8, 15, 30)
    growth_depth_windows: int = 4
    growth_widths: tuple[int, ...] = (256, 512, 1024, 2048)
    memories: tuple[tuple[int, int], ...] = ((32, 512), (8, 2048))


QUICK = Plan(
    layers=2,
    windows=2,
    length=64,
    rounds=1,
    peer_rounds=1,
    squares=(256,),
    items=(1, 1),
    part_layers=2,
    part_items=(1, 1),
    growth_windows=(1, 2),
    growth_layers=2,
    growth_depths=(1, 2),
    growth_depth_windows=1,
    growth_widths=(64, 128),
    memories=((2, 64),),
)


@dataclass(frozen=True)
class Step:
    "One measurement: where its row goes, what tells it apart there, and the command."
    file: str
    about: dict = field(hash=False)
    command: list[str]
    python: Path = Path(sys.executable)


def own(file: str, about: dict, *command) -> Step:
    "A step that is a command of this file."
    return Step(file, about, ["-m", "bench.run", *map(str, command)])


def prune_step(
    plan: Plan,
    file: str,
    about: dict,
    who: str,
    method: str,
    layers: int,
    model: str = MODEL,
    *more: str,
) -> Step:
    "A prune of a model by any of the implementations."
    if who != "llm-compressor":
        return own(file, about, "prune", who, method, "--windows", plan.windows, "--length",
                   plan.length, "--layers", layers, "--model", model, *more)
    from calib_prune.core import cache_dir
    # `make bench` fetches both; a plan can be read without them
    folder = cache_dir() / "models" / model
    pruned = weight_file(method, who if model == MODEL else f"{who}-{model}")
    arguments = (folder, window_file("c4", plan.windows, plan.length, model), method, SPARSITY,
                 max(1, PEER_BATCH_TOKENS // plan.length), layers, pruned)
    return Step(file, about, ["-m", "bench.peer", *map(str, arguments)], PEERS)


def score_step(file: str, about: dict, who: str, items: tuple[int, int], *more) -> Step:
    "A scoring of a model, ours or lm-eval's."
    return own(file, about, "score", who, "--choice", items[0], "--bpb", items[1], *more)


def whole_steps(plan: Plan) -> Iterator[Step]:
    "Prunes of the whole model and scorings by everyone, in turn."
    for method in METHODS:
        for turn in range(1, plan.rounds + 1):
            for who in WHO:
                rounds = (
                    plan.plain_rounds if method == "wanda" or who == "plain" else plan.peer_rounds
                )
                if turn > (plan.rounds if method == "sparsegpt" and who == "ours" else rounds):
                    continue
                about = dict(who=who, method=method, turn=turn)
                yield prune_step(plan, "prune", about, who, method, plan.layers, MODEL, "--save")
    for turn in range(1, plan.rounds + 1):
        for who in ("ours", "lm-eval")[:2 if turn <= plan.peer_rounds else 1]:
            yield score_step("score", dict(who=who, turn=turn), who, plan.items)


def second_steps(plan: Plan) -> Iterator[Step]:
    "The second model's first layers pruned, and scored."
    size = ["--windows", plan.windows, "--length", plan.length, "--layers", plan.part_layers]
    yield own("second", dict(what="limit", who="limit"), "limit", *size, "--model", SECOND)
    for who in ("ours", "llm-compressor"):
        yield prune_step(
            plan, "second", dict(what="prune", who=who), who, "sparsegpt", plan.part_layers, SECOND
        )
    for who in ("ours", "lm-eval"):
        yield score_step("second", dict(what="score", who=who), who, plan.part_items, "--model",
                         SECOND, "--layers", plan.part_layers)


def busy_steps(plan: Plan) -> Iterator[Step]:
    """The same quiet and with a busy process per core; and as many cells as cores, in turn and side
    by side."""
    count = len(os.sched_getaffinity(0))
    for turn in range(1, plan.peer_rounds + 1):
        for busy in (0, count):
            about = dict(busy=busy, turn=turn)
            yield prune_step(plan, "busy",
                             dict(what="prune") | about, "ours", "sparsegpt", plan.part_layers,
                             MODEL, "--busy", str(busy), "--warm")
            yield score_step("busy", dict(what="score") | about, "ours", plan.items, "--busy", busy)
        for how in ("in turn", "side by side"):
            yield own("busy", dict(what="cells", how=how, turn=turn), "cells", how, "--windows",
                      plan.windows, "--length", plan.length, "--layers", plan.part_layers,
                      "--choice", plan.items[0], "--bpb", plan.items[1])


def bfloat16_steps(plan: Plan) -> Iterator[Step]:
    "The same in float32 and in bfloat16, and what that does to the scores."
    from calib_prune.kernels.matmul import multiplies_bfloat16
    if not multiplies_bfloat16(): return
    for turn in range(1, plan.peer_rounds + 1):
        for dtype in ("float32", "bfloat16"):
            about = dict(dtype=dtype, turn=turn)
            yield prune_step(plan, "bfloat16",
                             dict(what="prune") | about, "ours", "sparsegpt", plan.part_layers,
                             MODEL, "--dtype", dtype, "--warm")
            yield score_step(
                "bfloat16", dict(what="score") | about, "ours", plan.items, "--dtype", dtype
            )
    yield own("bfloat16", dict(what="agreement"), "agree", "ours", "bfloat16")


def steps(plan: Plan) -> Iterator[Step]:
    "Every measurement, rounds interleaved: A B C A B C."
    size = ["--windows", plan.windows, "--length", plan.length, "--layers", plan.layers]
    yield own("limit", dict(turn=1), "limit", *size)
    yield own("kernel", dict(what="layer"), "kernel")
    for d in plan.squares:
        yield own(
            "kernel", dict(what=f"square {d}"), "kernel", "--square", d, "--rounds", plan.rounds
        )
    yield from whole_steps(plan)
    yield own("errors", dict(what="saved results"), "errors", *size)
    yield own("ability", dict(what="saved results"), "ability", *(4 * o for o in plan.items),
              "--layers", plan.layers)
    yield own("score", dict(who="agreement", turn=0), "agree")
    for more in (busy_steps, bfloat16_steps, second_steps): yield from more(plan)
    yield Step("start", dict(what="a cell before its work"), ["-m", "bench.start"])
    for n, length in plan.memories:
        yield own("memory", dict(what=f"{n}×{length}"), "memory", "--windows", n, "--length",
                  length, "--layers", plan.layers)
    for n in plan.growth_windows:
        yield own("growth", dict(axis="tokens", value=n * plan.length), "prune", "ours",
                  "sparsegpt", "--source", "papers", "--windows", n, "--length", plan.length,
                  "--layers", plan.growth_layers, "--warm")
    for layers in plan.growth_depths:
        yield own("growth", dict(axis="layers", value=layers), "prune", "ours", "sparsegpt",
                  "--source", "papers", "--windows", plan.growth_depth_windows, "--length",
                  plan.length, "--layers", layers, "--warm")
    for d in plan.growth_widths:
        yield own("growth", dict(axis="width", value=d), "kernel", "--hidden", d, "--intermediate",
                  8 * d // 3, "--kv", d, "--rounds", plan.rounds, "--no-plain")
    yield own("limit", dict(turn=2), "limit", *size)  # the machine is still the one it was


def token_sets(plan: Plan) -> set[tuple[str, int, int, str]]:
    "The calibration sets that the steps read."
    papers = {(n, plan.length) for n in (*plan.growth_windows, plan.growth_depth_windows)} | set(
        plan.memories
    )
    return {("c4", plan.windows, plan.length, o) for o in (MODEL, SECOND)} | {
        ("papers", *o, MODEL) for o in papers
    }


def state_of(files: tuple[str, ...], stages: tuple[str, ...]) -> dict:
    "The code that is measured: the versions of its stages, and a hash of what it does."
    from calib_prune.core import content_hash
    from calib_prune.pipeline.records import versions
    # without comments, and so without paths of notebooks
    syntax = [ast.dump(ast.parse((ROOT / o).read_text())) for o in files]
    return dict(code=content_hash(syntax), versions={o: versions()[o] for o in stages})


def read(path: Path,
         head: dict,         # machine and plan; rows of others are refused
         state: dict,        # from `state_of`; rows of others are kept, with a warning
         fresh: bool = False # forget what is there
        ) -> dict:           # machine, plan, states, rows
    "A file of results, or an empty one."
    head = json.loads(json.dumps(head))
    file = json.loads(path.read_text()) if path.is_file() and not fresh else dict(rows=[])
    if not file["rows"]: return head | dict(states=[], rows=[])
    if any(file[k] != o for k, o in head.items()):
        sys.exit(
            f"{path} was measured on another machine or by another plan: results of one table must"
            " come from one state. Start anew with --fresh (make bench FRESH=--fresh)."
        )
    for then in file["states"]:
        if then["code"] == state["code"]: continue
        told = [
            f"{k} {o}" if (o := then["versions"].get(k)) == v else f"{k} {o}, now {v}"
            for k, v in state["versions"].items()
        ]
        print(
            f"{path}: the code has changed since some rows were measured (versions:"
            f" {', '.join(told)}). They are kept; --fresh measures anew.",
            file=sys.stderr,
            flush=True,
        )
    return file


def add(path: Path, file: dict, state: dict, rows: list[dict]) -> None:
    "Add rows to a file of results, with the state of the code that they measure."
    from calib_prune.core import write_atomic
    file["rows"] += rows
    if state not in file["states"]: file["states"].append(state)
    write_atomic(path, json.dumps(file, indent=1, ensure_ascii=False) + "\n")


def run_child(step: Step, threads: int) -> dict | list[dict]:
    "Run a measurement in its own process."
    quiet = dict(HF_HUB_OFFLINE="1", TQDM_DISABLE="1", LLM_COMPRESSOR_LOG_LEVEL="WARNING")
    env = os.environ | threads_environment(threads) | quiet
    start = time.perf_counter()
    done = subprocess.run(
        [step.python, *step.command], cwd=ROOT, env=env, capture_output=True, text=True
    )
    seconds = time.perf_counter() - start
    if done.returncode: sys.exit(f"{' '.join(step.command)} failed:\n{done.stderr[-3000:]}")
    row = json.loads(done.stdout.splitlines()[-1])
    return row if isinstance(row, list) else row | dict(process_seconds=seconds)


def run_missing(name: str, plan, todo: Iterator[Step], measured: tuple[str, ...],
                stages: tuple[str, ...], threads: int, fresh: bool) -> None:
    "Run what a file of results lacks, one step after another; what is finished stays."
    path, state = RESULTS / f"{name}.json", state_of(measured, stages)
    file = read(path, dict(machine=describe(threads), plan=asdict(plan)), state, fresh)
    for step in todo:
        if any(step.about.items() <= o.items() for o in file["rows"]): continue
        print(f"{name} {step.about}", file=sys.stderr, flush=True)
        found = run_child(step, threads)
        add(path, file, state, found if isinstance(found, list) else [step.about | found])


@app.command(name="all")
def run_all(
    threads: Annotated[int, typer.Option(help="threads of each measurement")] = 2,
    results: Annotated[Path, typer.Option(help="folder of the JSON files")] = RESULTS,
    fresh: Annotated[bool, typer.Option(help="forget the results that are there")] = False,
    quick: Annotated[
        bool, typer.Option(help="a tiny plan that checks the benchmark, not the speed")
    ] = False,
) -> None:
    "Run what is missing. Stop it at any time: what is finished stays, and the next call goes on."
    plan = QUICK if quick else Plan()
    head, state, todo = dict(machine=describe(threads), plan=asdict(plan)), state_of(
        MEASURED, STAGES), list(steps(plan))
    files = {
        name: read(results / f"{name}.json", head, state, fresh)
        for name in dict.fromkeys(o.file for o in todo)
    }
    if not PEERS.is_file(): sys.exit(f"{PEERS} is missing: run bash bench/setup_peers.sh first.")
    started = time.perf_counter()
    for wanted in sorted(token_sets(plan)):
        if not window_file(*wanted).is_file():
            run_child(own("", {}, "tokens", *wanted[:3], "--model", wanted[3]), threads)
    for n, step in enumerate(todo, 1):
        file = files[step.file]
        if any(step.about.items() <= o.items() for o in file["rows"]): continue
        minutes = (time.perf_counter() - started) / 60
        print(
            f"[{n}/{len(todo)}, {minutes:.1f} min] {step.file} {step.about}",
            file=sys.stderr,
            flush=True,
        )
        found = run_child(step, threads)
        add(results / f"{step.file}.json", file, state,
            [step.about | o for o in (found if isinstance(found, list) else [found])])


if __name__ == "__main__": app()
