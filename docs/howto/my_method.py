"""A pruning method of your own, on the whole command line of calib-prune.

Copy this file, change `importance`, give the method a name, and run the file in place of
`calib-prune`:

    python my_method.py methods
    python my_method.py prune --model smollm2-135m --method ria --output pruned

The example is RIA, relative importance and activations (Zhang et al., ICLR 2024).
"""
import torch
from torch import Tensor

from calib_prune.cli.app import main
from calib_prune.core import share
from calib_prune.pruning.hessian import energy
from calib_prune.pruning.masks import (
    PrunedWeight,
    as_pattern,
    check_hessian,
    check_sparsity,
    check_weight,
    pruned_weight,
    smallest,
    smallest_of_groups,
)
from calib_prune.pruning.methods import METHODS, Method


def importance(weight: Tensor,   # [d_out, d_in] float32
               hessian: Tensor,  # [d_in, d_in] float32, second moment of the inputs, per token
               ) -> Tensor:      # [d_out, d_in]; the smallest are pruned
    """A weight's share of its row plus its share of its column, times the root of its input's norm
    (the exponent a = 0.5 of the paper)."""
    size = weight.abs()
    rows, columns = size.sum(1, keepdim=True), size.sum(0, keepdim=True)
    relative = size / rows.clamp_min(1e-30) + size / columns.clamp_min(1e-30)
    return relative * hessian.diagonal().sqrt().sqrt()


def prune_weight(weight: Tensor,   # [d_out, d_in], any float type; left as it is
                 hessian: Tensor,  # [d_in, d_in]
                 sparsity: float,  # share of each row to prune, in [0, 1)
                 pattern: str | tuple[int, int] | None,  # such as 2:4; then `sparsity` is not used
                 ) -> PrunedWeight:
    "Zero the least important weights of a linear map."
    check_weight(weight)
    d_in = weight.shape[1]
    sparsity, pattern = check_sparsity(sparsity), as_pattern(pattern, d_in)
    hessian = hessian.to(weight.device, torch.float32)
    dead = check_hessian(hessian, d_in)
    scores = importance(weight.float(), hessian)
    k = share(sparsity, d_in)
    mask = smallest_of_groups(scores, pattern) if pattern else smallest(scores, k)
    lost, dense = energy(weight.float() * mask, hessian), energy(weight.float(), hessian)
    error = max(lost, 0.0) / dense if dense > 0 else 0.0
    return pruned_weight(weight.masked_fill(mask, 0), error=error, dead=int(dead.sum()))


def solve(weights: list[Tensor],   # linear maps that share their input
          hessians: list[Tensor],  # one second moment; with `by_group`, one per group of windows
          sparsity: float, pattern, block: int, damping: float) -> list[PrunedWeight]:
    "The linear maps with one input, such as q, k and v. A method may share work between them."
    return [prune_weight(weight, hessians[0], sparsity, pattern) for weight in weights]


METHODS["ria"] = Method(
    name="ria",           # on the command line and in presets
    label="RIA",          # in tables and figures
    needs="input norms",  # of the calibration set, in words
    solve=solve,
    version=1,            # raise it when the pruned weights change: results are made again
    passes=2.0,           # time of a prune in forward passes of the calibration set
)

if __name__ == "__main__": main()
