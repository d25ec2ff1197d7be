"""A random model of LLaMA-3.1-8B's shape, pruned on the CPU in bounded memory, killed on the way
and resumed.

`python -m bench.large make build/large` writes the model (16 GB), `python -m bench.large prune
build/large` prunes it and writes
bench/results/large.json. As root the limit on memory is the kernel's (a control group, page cache
included); otherwise it is
only measured.
"""
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Callable, Iterator

import torch
import typer
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import AutoConfig, LlamaConfig, LlamaForCausalLM

from bench.machine import describe

ROOT = Path(__file__).resolve().parent.parent
RESULT = ROOT / "bench/results/large.json"
SHAPE = dict(
    hidden_size=4096,
    intermediate_size=14336,
    num_attention_heads=32,
    num_key_value_heads=8,
    vocab_size=128256,
    max_position_embeddings=131072,
    rope_theta=5e5,
    rms_norm_eps=1e-5,
    tie_word_embeddings=False,
)
# SCALE: standard deviation of the random weights, as models are initialised
LAYERS, SCALE = 32, 0.02
GROUPS = Path("/sys/fs/cgroup/memory")  # version 1
app = typer.Typer(
    no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, help=__doc__
)


# --- the model

def random_weights(names: dict[str, tuple[int, ...]], seed: int) -> dict[str, torch.Tensor]:
    "Normal matrices, and norms of one."
    rng = torch.Generator().manual_seed(seed)
    make = lambda shape: (
        torch.randn(shape, generator=rng).mul_(SCALE) if len(shape) > 1 else torch.ones(shape)
    )
    return {name: make(shape).bfloat16() for name, shape in names.items()}


def file_of(name: str) -> str:
    "The shard that holds a weight: one per layer, and one for what lies outside the layers."
    found = re.search(r"layers\.(\d+)\.", name)
    return f"layer-{int(found[1]):02d}.safetensors" if found else "ends.safetensors"


@app.command()
def make(
    folder: Path, layers: Annotated[int, typer.Option(help="decoder layers")] = LAYERS
) -> None:
    "Write a random model, shard by shard."
    from calib_prune.model.tiny import tiny_tokenizer
    folder.mkdir(parents=True)
    config = LlamaConfig(
        **SHAPE, num_hidden_layers=layers, dtype="bfloat16", architectures=["LlamaForCausalLM"]
    )
    with torch.device("meta"):
        shapes = {k: tuple(p.shape) for k, p in LlamaForCausalLM(config).named_parameters()}
    shards: dict[str, dict] = {}
    for name, shape in shapes.items(): shards.setdefault(file_of(name), {})[name] = shape
    for seed, (file, names) in enumerate(shards.items()):
        save_file(random_weights(names, seed), folder / file, {"format": "pt"})
    index = dict(metadata={}, weight_map={k: file_of(k) for k in shapes})
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    config.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    print(f"{sum(o.stat().st_size for o in folder.iterdir()) / 2**30:.1f} GiB in {folder}")


# --- a process and its memory

@contextmanager
def limited(gib: float) -> Iterator[Callable | None]:
    """A control group with so much memory; gives what a child calls to join it, or None where there
    are no such groups."""
    group = GROUPS / f"bench-large-{os.getpid()}"
    try:
        group.mkdir()
        (group / "memory.limit_in_bytes").write_text(str(int(gib * 2**30)))
    except OSError:
        yield None
        return
    try: yield lambda: (group / "cgroup.procs").write_text(str(os.getpid()))
    finally: group.rmdir()


def own_memory(pid: int) -> int:
    "Bytes that a process holds and that no file backs."
    try: found = re.search(r"RssAnon:\s+(\d+)", Path(f"/proc/{pid}/status").read_text())
    except OSError: return 0
    return 1024 * int(found[1]) if found else 0


def finished(checkpoint: Path) -> int: return len(list(checkpoint.glob("layer-*.safetensors")))


def watch(command: list, join: Callable | None, checkpoint: Path, stop_at: int, log: Path) -> dict:
    """Run a command; kill it when a checkpoint holds so many layers. When each layer was there, and
    the most memory of its own."""
    began, most, seen = time.perf_counter(), 0, {}
    with log.open("a") as out:
        process = subprocess.Popen(command, stdout=out, stderr=out, preexec_fn=join, cwd=ROOT)
        while process.poll() is None:
            most, there = max(most, own_memory(process.pid)), finished(checkpoint)
            seen.setdefault(there, round(time.perf_counter() - began, 1))
            if 0 < stop_at <= there: process.send_signal(signal.SIGKILL)
            time.sleep(0.1)
    return dict(
        code=process.returncode,
        seconds=round(time.perf_counter() - began, 1),
        most_gib=round(most / 2**30, 2),
        layers_at={str(k): v for k, v in seen.items() if k},
    )


# --- what came out

def zeros(folder: Path) -> dict[str, float]:
    "Shares of zeros in the layers' matrices: the lowest and the highest."
    shares = []
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, "pt") as weights:
            for name in weights.keys():
                if ".layers." in name and "proj" in name:
                    shares.append(float((weights.get_tensor(name) == 0).double().mean()))
    return dict(matrices=len(shares), lowest=min(shares), highest=max(shares))


@app.command()
def prune(
    folder: Path,
    gib: Annotated[float, typer.Option(help="limit on memory, page cache included")] = 8,
    windows: Annotated[int, typer.Option(help="calibration windows")] = 8,
    length: Annotated[int, typer.Option(help="tokens per window")] = 512,
    kill_at: Annotated[
        int, typer.Option(help="finished layers at which the first run is killed")
    ] = 3,
) -> None:
    "Prune it in bounded memory, killed once, and write down what that took."
    work = folder.parent / f"{folder.name}-work"
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir()
    (work / "text.txt").write_text(
        "".join(f"Line {i}: {i} times {i} is {i * i}.\n\n" for i in range(windows * length // 8))
    )
    checkpoint, pruned = work / "checkpoint", work / "pruned"
    command = [
        sys.executable, "-c", "from calib_prune.cli.app import main; main()", "prune", "--model",
        folder, "--calibration", work / "text.txt", "--method", "sparsegpt", "--sparsity", 0.5,
        "--windows", windows,
        "--length", length, "--dtype", "bfloat16", "--checkpoint", checkpoint, "--output", pruned,
        "--json"]
    runs = []
    with limited(gib) as join:
        for stop_at in (kill_at, 0):
            before = finished(checkpoint)
            runs.append(
                dict(layers_before=before)
                | watch([*map(str, command)], join, checkpoint, stop_at, work / "log")
            )
        if runs[-1]["code"]: raise SystemExit((work / "log").read_text()[-3000:])
    size = sum(o.stat().st_size for o in folder.glob("*.safetensors"))
    machine, layers = (
        describe(os.cpu_count() or 1) | dict(dtype="bfloat16"),
        AutoConfig.from_pretrained(folder).num_hidden_layers,
    )
    found = dict(
        machine=machine,
        layers=layers,
        windows=windows,
        length=length,
        model_gib=round(size / 2**30, 2),
        limit_gib=gib if join else None,
        runs=runs,
        zeros=zeros(pruned),
    )
    RESULT.write_text(json.dumps(found, indent=1) + "\n")
    print(RESULT.read_text())


if __name__ == "__main__": app()
