"""The GPU kernels at the shapes of an 8B model: every result against the CPU's, and timings beside
plain torch.

python bench/gpu.py                                                                 # on a machine
with a CUDA GPU
TRITON_INTERPRET=1 python bench/gpu.py --device cpu --shapes 32x48 --block 16       # its logic,
without one
"""
import argparse
import json
import platform
import re
import statistics
import sys
import time
from functools import partial
from pathlib import Path
from unittest import mock

import torch

from calib_prune.core import share, write_atomic
from calib_prune.pruning import sparsegpt as sg
from calib_prune.pruning import triton_kernels as kernels
from calib_prune.pruning.factor import factorise
from calib_prune.pruning.hessian import SecondMoment
from calib_prune.pruning.masks import smallest, smallest_of_groups
from calib_prune.pruning.sparsegpt import sparsegpt
from calib_prune.pruning.sweep import sweep_compiled, sweep_torch

# d_out x d_in of LLaMA-3.1-8B: attention, gate and up, down
SHAPES = ("4096x4096", "14336x4096", "4096x14336")
SPARSITY, PATTERN = 0.6, (2, 4)
# largest difference of a weight, relative to the largest weight, and of an error, relative to
# itself
CLOSE = 1e-4
FLIPS = 1e-4  # share of masks that may differ over a whole matrix, where scores tie within rounding


def layer(d_out: int, d_in: int, device: str) -> tuple[torch.Tensor, torch.Tensor]:
    """A random weight [d_out, d_in] and the second moment of correlated inputs of unequal size, on
    the CPU."""
    rng = torch.Generator(device).manual_seed(d_out + d_in)
    draw = lambda *shape: torch.randn(*shape, generator=rng, device=device)
    mixing, sizes = torch.eye(d_in, device=device) + draw(d_in, d_in) / d_in**0.5, torch.exp(
        draw(d_in) / 2
    )
    stats = SecondMoment(d_in, device)
    for _ in range(4): stats.update(draw(d_in, d_in) @ mixing * sizes)
    return draw(d_out, d_in).cpu(), stats.matrix().cpu()


def milliseconds(run, device: str, repeats: int, prepare=lambda: ()) -> float:
    """Median time of `run(*prepare())` after one run that compiles; only `run` is timed, and the
    device has finished."""
    wait = torch.cuda.synchronize if device == "cuda" else lambda: None
    times = []
    for _ in range(repeats + 1):
        args = prepare()
        wait()
        start = time.perf_counter()
        run(*args)
        wait()
        times.append(1e3 * (time.perf_counter() - start))
    return round(statistics.median(times[1:]), 4)


def difference(a: torch.Tensor, b: torch.Tensor) -> float:
    "The largest difference, relative to the largest value of the second."
    return ((a.cpu() - b.cpu()).abs().max() / b.abs().max()).item()


def through(sweep):
    "Inside, `sparsegpt` sweeps blocks with this function, whatever the device."
    return mock.patch.object(
        sg, "_blocks_for", lambda device: partial(sg._sweep_blocks, sweep=sweep)
    )


def check_block(
    block: torch.Tensor, upper: torch.Tensor, device: str, pattern: tuple[int, int] | None
) -> dict:
    """One block through the kernel and through the CPU's sweep, from the same weights and, unless
    n:m, the same mask."""
    mask = torch.zeros_like(block, dtype=torch.bool)
    if not pattern:
        scores = block.abs() / upper.diagonal()[:, None]
        mask = smallest(scores.view(1, -1), share(SPARSITY, block.numel())).view(block.shape)
    ours, mine, cpu, chosen = block.to(device, copy=True), mask.to(
        device, copy=True), block.clone(), mask.clone()
    squares = kernels.sweep_triton(ours, mine, upper.to(device), pattern), sweep_compiled(
        cpu, chosen, upper, pattern
    )
    # a pattern that differs in one place moves the rest of that output
    same = (mine.cpu() == chosen).all(0)
    differ = (mine.cpu() != chosen).sum().item()
    found = dict(largest_difference=difference(ours.cpu()[:, same], cpu[:, same]),
                 error_difference=abs(squares[0] / squares[1] - 1))
    allowed = FLIPS * block.numel() if pattern else 0
    return found | {
        "masks_differ": differ,
        "passed": max(found.values()) < CLOSE and differ <= allowed,
    }


def check_matrix(
    W: torch.Tensor, H: torch.Tensor, device: str, block: int, pattern: tuple[int, int] | None
) -> dict:
    "A whole matrix, factored and pruned on each device."
    cpu = sparsegpt(W, H, SPARSITY, pattern, block)
    with through(kernels.sweep_triton):
        ours = sparsegpt(W.to(device), H.to(device), SPARSITY, pattern, block)
    differ = ((ours.weight.cpu() == 0) != (cpu.weight == 0)).sum().item()
    found = dict(
        masks_differ=differ, sparsity=[ours.sparsity, cpu.sparsity], error=[ours.error, cpu.error]
    )
    return found | {"passed": differ <= FLIPS * W.numel() and ours.sparsity == cpu.sparsity
                    and abs(ours.error / cpu.error - 1) < CLOSE}


def check_wanda(W: torch.Tensor, H: torch.Tensor, device: str) -> dict:
    "Wanda's masks are equal to the last bit: one correctly rounded product decides."
    norms, k = H.diagonal().sqrt(), share(SPARSITY, W.shape[1])
    scores, rows = W.abs() * norms, (W.to(device), norms.to(device))
    same = {
        "rows": torch.equal(kernels.wanda_mask_triton(*rows, k).cpu(), smallest(scores, k)),
        "groups": torch.equal(
            kernels.wanda_mask_triton(*rows, 0, PATTERN).cpu(), smallest_of_groups(scores, PATTERN)
        ),
    }
    return same | {"passed": all(same.values())}


def timings(W: torch.Tensor, H: torch.Tensor, device: str, block: int, repeats: int) -> dict:
    """Milliseconds: each kernel beside the plain torch operations that it replaces, on the same
    device."""
    W, H = W.to(device), H.to(device)
    factor, norms, k = factorise(H, block=block), H.diagonal().sqrt(), share(SPARSITY, W.shape[1])
    upper, first = factor.upper_blocks[0], W.T[:block].contiguous()
    scores = (first.abs() / upper.diagonal()[:, None]).view(1, -1)
    count = share(SPARSITY, first.numel())
    mask = smallest(scores, count).view(first.shape)
    clock = lambda run, prepare=lambda: (): milliseconds(run, device, repeats, prepare)
    found = {
        "factorise": clock(lambda: factorise(H, block=block)),
        # of the last, longest block
        "carry_product": clock(lambda: torch.mm(factor.carry[-block:], W.T)),
        "select_block_kthvalue": clock(lambda: scores.kthvalue(count, dim=1)),
        "select_block_topk": clock(
            lambda: scores.topk(count, dim=1, largest=False, sorted=False).values.amax(1)
        ),
        "wanda_rows_triton": clock(lambda: kernels.wanda_mask_triton(W, norms, k)),
        "wanda_rows_torch": clock(lambda: smallest(W.abs() * norms, k)),
        "wanda_groups_triton": clock(lambda: kernels.wanda_mask_triton(W, norms, 0, PATTERN)),
        "wanda_groups_torch": clock(lambda: smallest_of_groups(W.abs() * norms, PATTERN)),
    }
    for name, sweep in (("triton", kernels.sweep_triton), ("torch", sweep_torch)):
        for kind, pattern in (("block", None), ("block_2:4", PATTERN)):
            found[f"sweep_{kind}_{name}"] = clock(
                lambda w, m, s=sweep, p=pattern: s(w, m, upper, p),
                lambda: (first.clone(), mask.clone()),
            )
        with through(sweep):
            found[f"sparsegpt_{name}"] = clock(
                lambda: sparsegpt(W, H, SPARSITY, block=block, factor=factor)
            )
    return found


def measure(shape: str, device: str, block: int, repeats: int) -> dict:
    "Checks and timings for one shape."
    d_out, d_in = map(int, shape.split("x"))
    W, H = layer(d_out, d_in, device)
    upper, first = factorise(H, block=block).upper_blocks[0], W.T[:block].contiguous()
    checks = {
        "sweep": check_block(first, upper, device, None),
        "sweep_2:4": check_block(first, upper, device, PATTERN),
        "sparsegpt": check_matrix(W, H, device, block, None),
        "sparsegpt_2:4": check_matrix(W, H, device, block, PATTERN),
        "wanda": check_wanda(W, H, device),
    }
    return {"shape": shape, "checks": checks, "milliseconds": timings(W, H, device, block, repeats)}


def show(result: dict) -> None:
    "A table a person can read."
    for row in result["shapes"]:
        print(f"\n{row['shape']}")
        for name, check in row["checks"].items():
            print(f"  {'ok    ' if check['passed'] else 'FAILED'} {name}: {check}")
        for name, ms in row["milliseconds"].items(): print(f"  {ms:12.3f} ms  {name}")


def main(argv: list[str] | None = None) -> int:
    "Measure, print, write; 1 if a check failed."
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--shapes",
        nargs="+",
        default=SHAPES,
        help="d_out x d_in, d_in a multiple of 4, such as 4096x14336",
    )
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--block", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument(
        "--out", type=Path, help="default: bench/results/gpu-<name of the device>.json"
    )
    args = parser.parse_args(argv)
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error(
            "this machine has no CUDA GPU that torch can see, and the kernels are measured on one."
            " To try the logic of this script without: TRITON_INTERPRET=1 python bench/gpu.py"
            " --device cpu --shapes 32x48 --block 16"
        )
    if not kernels.runs_on(args.device):
        parser.error("Triton is not installed, or on the CPU, TRITON_INTERPRET=1 is not set")
    wrong = [
        o
        for o in args.shapes
        if not re.fullmatch(r"[1-9]\d*x[1-9]\d*", o) or int(o.split("x")[1]) % PATTERN[1]
    ]
    if wrong:
        parser.error(
            f"shape {wrong[0]!r} is not d_out x d_in with d_in a multiple of {PATTERN[1]}, such as"
            " 4096x14336"
        )
    on_cpu = f"{platform.machine()} interpreter"
    name = torch.cuda.get_device_name() if args.device == "cuda" else on_cpu
    rows = [measure(shape, args.device, args.block, args.repeats) for shape in args.shapes]
    result = {
        "device": name, "torch": torch.__version__.split("+")[0],
        "triton": kernels.triton.__version__, "block": args.block, "sparsity": SPARSITY,
        "pattern": "{}:{}".format(*PATTERN), "repeats": args.repeats,
        "passed": all(c["passed"] for row in rows for c in row["checks"].values()),
        "shapes": rows}
    file = f"gpu-{re.sub(r'[^a-z0-9]+', '-', name.lower()).strip('-')}.json"
    out = args.out or Path(__file__).parent / "results" / file
    write_atomic(out, json.dumps(result, indent=1) + "\n")
    show(result)
    print(f"\n{'All checks passed.' if result['passed'] else 'A check FAILED.'} Written to {out}")
    return 0 if result["passed"] else 1


if __name__ == "__main__": sys.exit(main())
