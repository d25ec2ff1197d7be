"""Golden numbers: a few numbers of every stage that makes numbers, and what they were when they
were last looked at.

When numbers of a stage move, raise its version beside its code (nbs/study/05_keys says when), then
`python -m tests.golden --renew`.
What another kind of processor makes of them is seen with fewer instructions, too:
ATEN_CPU_CAPABILITY=avx2 MKL_CBWR=AVX2 ONEDNN_MAX_CPU_ISA=AVX2 NUMBA_CPU_NAME=haswell python -m
tests.golden --renew
"""
import json
import math
import sys
from collections.abc import Callable
from copy import deepcopy
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch

from calib_prune.calibration.oit import measure
from calib_prune.calibration.sets import allocate, build_calibration, named_mixes
from calib_prune.calibration.sources import HELDOUT
from calib_prune.core import content_hash, load_json, write_atomic
from calib_prune.data.fetch import cached
from calib_prune.data.files import read_jsonl
from calib_prune.evaluation.contamination import audit
from calib_prune.evaluation.scoring import evaluate, generated_rows
from calib_prune.evaluation.tasks import TASKS, benchmark_tokens
from calib_prune.generation.igsp import PROTOCOLS
from calib_prune.model.loading import load_model
from calib_prune.model.perplexity import perplexity
from calib_prune.model.tiny import tiny_llama, tiny_tokenizer
from calib_prune.pipeline.records import environment, versions
from calib_prune.pruning.grids import Quantisation
from calib_prune.pruning.methods import METHODS
from calib_prune.pruning.recovery import Trainer, Training, train
from calib_prune.pruning.walk import prune

FILE = Path(__file__).with_name("golden.json")
Numbers = dict[str, Any]  # real numbers are compared within a tolerance, all else exactly
# Relative, at least ten times what kinds of processor and numbers of threads were seen to differ in
# (`seen` in golden.json). Of pruned
# weights some are on the edge, and rounding decides; a damping changed by a hundredth moves them
# four hundred times as far.
# A step of Adam has the same size for a gradient of any size, and ALPS runs for a hundred rounds:
# both carry rounding further.
TOLERANCE = dict.fromkeys([*METHODS, "refine", "allocation", "recover"], 1e-3) | dict(
    alps=2e-2, reconstruct=2e-2, gptq=5e-3
)
ELSEWHERE = 2e-5
PROSE = [
    "The river was low that summer, and the boys walked across it.",
    "One and one is two. Two and two is four, said Ann.",
    "def area(w, h):\n    return w * h\n",
    "It rained. She took her coat, her hat and the red umbrella, and left.",
] * 4


class Prose:
    "A source with a few documents of its own."
    name, revision = "prose", "1"
    def documents(self): return [f"{i}: {o}" for i, o in enumerate(PROSE)]


@cache
def real_tokenizer(): return load_model("smollm2-135m")[1]

def first_layers(model, layers: int):
    model.model.layers, model.config.num_hidden_layers = model.model.layers[:layers], layers
    return model

@cache
def four_layers(): return first_layers(load_model("smollm2-135m")[0], 4)

def real_model(layers: int):
    "The first layers of the default model, at most four: a copy, for stages change it."
    return first_layers(deepcopy(four_layers()), layers)


def shuffled_prose(n: int) -> list[str]:
    "Documents of the words of the prose, each in another order: enough to choose from."
    words, rng = " ".join(PROSE).split(), np.random.default_rng(0)
    return [" ".join(rng.permutation(words)[:rng.integers(8, 40)]) for _ in range(n)]


# --- one function a stage and size

def tiny_sets() -> Numbers:
    found = {
        f"draw {s}": build_calibration(Prose(), tiny_tokenizer(), 6, 32, s).content for s in (0, 1)
    }
    return found | {k: allocate(named_mixes()[k], 32) for k in ("uniform", "uniform-dimensions")}

def real_sets() -> Numbers:
    # without stdlib, which each Python has its own of
    mixes = "c4", "c4=0.5,math=0.5", "wikipedia,codeio,csqa"
    return {o: build_calibration(o, real_tokenizer(), 8, 128, seed=1).content for o in mixes}

def tiny_text(protocol: str) -> Numbers:
    with TemporaryDirectory() as folder:
        texts = shuffled_prose(80) if protocol == "third" else Prose().documents()
        prose, sampling = (
            dict(source=str(write_atomic(f"{folder}/p.txt", "\f".join(texts)))),
            PROTOCOLS[protocol].sampling,
        )
        more = dict(igsp=dict(bins=2, choice=1.5), sgs=prose, third=prose)
        made = PROTOCOLS[protocol].run(
            tiny_llama(),
            tiny_tokenizer(),
            budget=1024,
            length=64,
            seed=0,
            **(dict(sampling=sampling, batch=8) if sampling else {}),
            **more.get(protocol, {}),
        )
    return dict(
        texts=content_hash(made.documents()),
        perplexity=made.report["perplexity"],
        repeated=made.report.get("repeated_4grams"),
    )

def real_text(protocol: str) -> Numbers:
    more = dict(igsp=dict(bins=1, choice=1.5, pool=2.0), third=dict(source="codeio")).get(
        protocol, {}
    )
    sampling = PROTOCOLS[protocol].sampling
    made = PROTOCOLS[protocol].run(real_model(4), real_tokenizer(), budget=120, length=24, seed=0,
                                   **(dict(sampling=sampling, batch=8) if sampling else {}), **more)
    return dict(texts=content_hash(made.documents()), perplexity=made.report["perplexity"])

def pruned(model, tokens, method: str, **how) -> Numbers:
    "Zeros and errors of a prune, and each weight's share in a sum with random signs."
    half = len(tokens) // 2
    report = prune(model, tokens, method, groups=["a"] * half + ["b"] * (len(tokens) - half), **how)
    signs = torch.Generator().manual_seed(0)
    weights = [p for k, p in model.named_parameters() if p.ndim == 2 and ".layers." in k]
    sums = [
        float((p.detach().double() * (torch.rand(p.shape, generator=signs) - 0.5)).sum() /
              p.detach().double().norm()) for p in weights]
    found = dict(errors=report["error"].tolist(), sums=sums)
    # of a grid's values, rounding decides which are 0
    if not METHODS[method].quantises: found["zeros"] = [int((p == 0).sum()) for p in weights]
    return found | (
        dict(trained=report["trained"].tolist()) if report["trained"].notna().any() else {}
    )

QUANTISED = [  # bits, symmetric, fitted
    dict(sparsity=0, quantise=Quantisation(bits, 16, symmetric, fitted))
    for bits, symmetric, fitted in ((3, True, True), (4, False, False))
]

def ways(method: str) -> list[dict[str, Any]]:
    "Arguments of prunes that show what a method does."
    if not METHODS[method].quantises: return [dict(sparsity=0.6, block=16), dict(pattern=(2, 4))]
    if method == "imatrix": return [dict(sparsity=0, quantise=Quantisation(3, 16))]
    return QUANTISED

def tiny_pruning(method: str) -> Numbers:
    tokens = torch.randint(1, 264, (8, 32), generator=torch.Generator().manual_seed(0))
    return {str(how): pruned(tiny_llama(), tokens, method, **how) for how in ways(method)}

def real_pruning(method: str) -> Numbers:
    tokens = build_calibration("c4,codeio", real_tokenizer(), 64, 128).tokens
    how = dict(sparsity=0, quantise=Quantisation(3, 64)) if METHODS[method].quantises else dict(
        sparsity=0.6)
    found = pruned(real_model(1), tokens, method, **how)
    # of millions of weights, some are on the edge: the sums move with rounding
    return {k: found[k] for k in ("zeros", "errors") if k in found}

STEPS = dict(
    refine=dict(refine=4), reconstruct=dict(reconstruct=2), allocation=dict(allocation="owl")
)

def tiny_step(step: str) -> Numbers:
    tokens = torch.randint(1, 264, (8, 32), generator=torch.Generator().manual_seed(0))
    return pruned(tiny_llama(), tokens, "wanda", sparsity=0.6, batch_tokens=64, **STEPS[step])

def real_step(step: str) -> Numbers:
    tokens = build_calibration("c4,codeio", real_tokenizer(), 16, 128).tokens
    found = pruned(real_model(2), tokens, "wanda", sparsity=0.6, batch_tokens=512, **STEPS[step])
    return {k: o for k, o in found.items() if k != "sums"}

def recovered(dense, tokens, steps: int) -> Numbers:
    "The loss of each step of training after a prune."
    student = deepcopy(dense)
    prune(student, tokens, "wanda", sparsity=0.6)
    trainer = Trainer(student, dense, Training(steps, batch=2, rate=1e-3))
    with TemporaryDirectory() as folder: assert train(trainer, tokens, Path(folder), "golden")
    return dict(losses=trainer.losses)

def tiny_recovery() -> Numbers:
    tokens = torch.randint(1, 264, (8, 32), generator=torch.Generator().manual_seed(0))
    return recovered(tiny_llama(), tokens, 8)

def real_recovery() -> Numbers:
    tokens = build_calibration("c4,codeio", real_tokenizer(), 4, 64).tokens
    return recovered(real_model(2), tokens, 3)

def tiny_scoring() -> Numbers:
    answers = ["#### 12", "The answer is 7, or 1,200.", "none"]
    docs = [
        dict(filtered_resps=[a], doc=dict(id=str(i), target="1,200")) for i, a in enumerate(answers)
    ]
    programs = [
        dict(filtered_resps=[a], doc=dict(id=a, program="\0", tests="assert _answer('f')(2) == 4"))
        for a in ("def f(x): return 2 * x", "f = 1")
    ]
    rows = [
        *generated_rows(TASKS["gsm8k_generate"], docs),
        *generated_rows(TASKS["mbpp_generate"], programs),
    ]
    found = perplexity(tiny_llama(), tiny_tokenizer(), PROSE[:3], 32)
    return dict(
        right=[o["value"] for o in rows if o["metric"] != "late"],
        perplexity=[found.per(o) for o in ("token", "word", "byte")],
    )

def real_scoring() -> Numbers:
    model = real_model(4)
    items = evaluate(model, real_tokenizer(), "default,boolq", limit=2)
    by = {m: o for m, o in items.groupby("metric")}
    text = HELDOUT["coqa"].documents()[:1]
    return dict(
        items=content_hash(items[["task", "item", "metric", "bytes"]].astype(str).values.tolist()),
        bits=by["bits"]["value"].tolist(),
        right=[by[o]["value"].tolist() for o in ("acc", "acc_norm")],
        perplexity=perplexity(model, real_tokenizer(), text, 128).per("byte"),
    )

def values_of(table) -> Numbers:
    "The metrics of a set that have a value."
    return {
        o.metric: [v for v in (o.value, o.ci_low, o.ci_high) if v == v]
        for o in table.itertuples()
        if not math.isnan(o.value)
    }

def tiny_metrics() -> Numbers:
    cal = build_calibration(Prose(), tiny_tokenizer(), 6, 32)
    return values_of(measure(cal, tiny_tokenizer(), tiny_llama(), {"letters": np.arange(40, 80)}))

def real_metrics() -> Numbers:
    cal = build_calibration("c4,codeio", real_tokenizer(), 4, 128)
    return values_of(
        measure(cal, real_tokenizer(), real_model(4), benchmark_tokens(real_tokenizer(), limit=3))
    )

def real_audit() -> Numbers:
    gsm, mbpp = (read_jsonl(cached("benchmarks", o)) for o in ("gsm8k", "mbpp"))
    texts = [
        *PROSE, f"So: {gsm[3]['question']} {gsm[4]['question'].lower()}", mbpp[7]["code"],
        gsm[9]["question"].replace("1", "77")]
    found = audit(texts, "gsm8k,mbpp,sciq", name="made up")
    overlaps = found.overlaps[["task", "item", "document", "match"]].astype(str).values.tolist()
    return dict(
        overlaps=content_hash(overlaps),
        covered=found.overlaps["covered"].tolist(),
        checked=int(found.items["checked"].sum()),
    )


STAGES: dict[str, list[Callable[[], Numbers]]] = {
    "calibration set": [tiny_sets, real_sets], "scoring": [tiny_scoring, real_scoring], "metrics": [
        tiny_metrics, real_metrics], "audit": [real_audit]}
STAGES |= {k: [lambda k=k: tiny_text(k), lambda k=k: real_text(k)] for k in PROTOCOLS}
STAGES |= {k: [lambda k=k: tiny_pruning(k), lambda k=k: real_pruning(k)] for k in METHODS}
STAGES |= {k: [lambda k=k: tiny_step(k), lambda k=k: real_step(k)] for k in STEPS}
STAGES["recover"] = [tiny_recovery, real_recovery]


# --- comparing

def leaves(value: Any, name: str = "") -> dict[str, Any]:
    "The single values of nested dictionaries and lists, by their path."
    if isinstance(value, dict): pairs = value.items()
    elif isinstance(value, list): pairs = enumerate(value)
    else: return {name: value}
    return {k: v for key, o in pairs for k, v in leaves(o, f"{name}/{key}").items()}

def tolerance(stage: str) -> float: return TOLERANCE.get(stage, ELSEWHERE)

def deviations(now: Numbers, then: Numbers) -> dict[str, float]:
    """By how much each number moved, relative to its size or to 0.02; infinite where something else
    than a real number changed."""
    new, old = leaves(now), leaves(then)

    def one(a, b):
        return abs(a - b) / max(abs(b), 0.02) if isinstance(a, float) and isinstance(
            b, float) else 0.0 if a == b else math.inf
    return {
        k: one(new[k], old[k]) if k in new and k in old else math.inf
        for k in new.keys() | old.keys()
    }

def compute(stage: str, sizes: slice = slice(None)) -> Numbers:
    "The numbers of a stage as JSON holds them."
    return json.loads(json.dumps({str(i): f() for i, f in enumerate(STAGES[stage][sizes])}))

def renew(stages: list[str]) -> None:
    "Write down the numbers of these stages, and how far this machine is from what others found."
    file = load_json(FILE) if FILE.is_file() else dict(stages={}, seen=[])
    about, largest = environment(), {}
    for stage in stages:
        now, then, version = compute(stage), file["stages"].get(stage), versions()[stage]
        found = deviations(now, then["numbers"]) if then else {}
        worst = max(found, key=found.get, default=None)
        moved = worst is not None and found[worst] > tolerance(stage)
        if moved and then["version"] == version:
            sys.exit(
                f"{stage}: {worst} moved by {found[worst]:.2g} under version {version}: raise the"
                " version first (nbs/study/05_keys)."
            )
        anew = not then or then["version"] != version
        if anew: file["stages"][stage] = dict(version=version, numbers=now)
        else: largest[stage] = found[worst]
        print(
            f"{stage}: version {version}, {'written down' if anew else 'held'}"
            + (f", moved by {found[worst]:.2g}" if then else ""),
            flush=True,
        )
    machine = {k: about[k] for k in ("processor", "instructions", "threads", "torch")}
    before = next((o["largest"] for o in file["seen"] if o["machine"] == machine), {})
    largest = before | {k: float(f"{v:.2g}") for k, v in largest.items()}
    file["seen"] = [
        *(o for o in file["seen"] if o["machine"] != machine),
        dict(machine=machine, largest=dict(sorted(largest.items()))),
    ]
    write_atomic(FILE, json.dumps(file, indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    if sys.argv[1:2] != ["--renew"]: sys.exit(__doc__)
    renew(sys.argv[2:] or [*STAGES])
