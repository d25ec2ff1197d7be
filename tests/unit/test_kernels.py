"Pruning kernels against a plain implementation, brute force, their invariances and bad input."
import itertools
from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from calib_prune.core import CalibPruneError, share
from calib_prune.pruning import sparsegpt as sparsegpt_module
from calib_prune.pruning.factor import factorise
from calib_prune.pruning.hessian import SecondMoment, energy, exact_float32
from calib_prune.pruning.masks import block_counts, smallest
from calib_prune.pruning.sparsegpt import _sweep_blocks, sparsegpt
from calib_prune.pruning.sweep import sweep_compiled, sweep_torch
from calib_prune.pruning.wanda import magnitude, wanda

KERNELS = {"sparsegpt": sparsegpt, "wanda": wanda, "magnitude": magnitude}


def problem(d_out, d_in, tokens=None, seed=0, dead=()):
    "A weight, the inputs of its layer (correlated, of unequal size) and their second moment."
    rng = torch.Generator().manual_seed(seed)
    mixing = torch.eye(d_in) + torch.randn(d_in, d_in, generator=rng) / d_in ** .5
    x = torch.randn(tokens or 4 * d_in + 16, d_in, generator=rng) @ mixing
    x *= torch.exp(torch.randn(d_in, generator=rng) / 2)
    x[:, list(dead)] = 0
    stats = SecondMoment(d_in)
    stats.update(x)
    return torch.randn(d_out, d_in, generator=rng), x, stats.matrix()


def plain_sparsegpt(weight, hessian, sparsity=None, pattern=None, block=128, damping=0.01):
    """Algorithm 1 of arXiv 2301.00774 in float64, one column and one later column at a time, with
    an explicit inverse.

    Only the count of a block differs from the reference code, which keeps or prunes by `<=
    threshold`: here exactly
    floor(sparsity * weights up to the block's end) are pruned by the end of each block, and n:m
    keeps n of m.
    """
    W, H = weight.double().numpy().copy(), hessian.double().numpy().copy()
    d_out, d_in = W.shape
    for j in range(d_in):
        if H[j, j] == 0:
            H[j, j] = 1
            W[:, j] = 0
    H += damping * np.mean(np.diag(H)) * np.eye(d_in)
    U = np.linalg.cholesky(np.linalg.inv(H)).T
    pruned = np.zeros(W.shape, bool)
    for start in range(0, d_in, block):
        end = min(start + block, d_in)
        if pattern is None:
            cells = [(r, c) for c in range(start, end) for r in range(d_out)]
            cells.sort(key=lambda o: W[o] ** 2 / U[o[1], o[1]] ** 2)
            for cell in cells[: share(sparsity, d_out * end) - share(sparsity, d_out * start)]:
                pruned[cell] = True
        for c in range(start, end):
            if pattern and c % pattern[1] == 0:
                keep, m = pattern
                for r in range(d_out):
                    group = sorted(range(c, c + m), key=lambda k, r=r: W[r, k] ** 2 / U[k, k] ** 2)
                    pruned[r, group[:m - keep]] = True
            for r in np.flatnonzero(pruned[:, c]):
                error = W[r, c] / U[c, c]
                for k in range(c, d_in): W[r, k] -= error * U[c, k]
                W[r, c] = 0
    return W, pruned


def reference_error(weight, pruned, hessian):
    D, H, W = weight.double() - pruned.double(), hessian.double(), weight.double()
    return (torch.trace(D @ H @ D.T) / torch.trace(W @ H @ W.T)).item()


@pytest.fixture(params=["compiled", "torch"])
def sweep(request, monkeypatch):
    "Both forms of the sweep, the one for the CPU and the one for any device."
    through_torch = partial(sparsegpt_module._sweep_blocks, sweep=sweep_torch)
    if request.param == "torch":
        monkeypatch.setattr(sparsegpt_module, "_blocks_for", lambda device: through_torch)
    return request.param


# --- against the plain implementation

@pytest.mark.parametrize("d_out,d_in,block,how", [(24, 40, 16, 0.6), (7, 33, 8, 0.5),
                                                  (70, 48, 128, 0.35), (1, 20, 128, 0.5),
                                                  (5, 130, 128, 0.6), (130, 17, 4, 0.9),
                                                  (24, 40, 16, (2, 4)), (66, 32, 8, (4, 8)),
                                                  (9, 24, 128, (1, 4)), (5, 136, 128, (2, 4)),
                                                  (3, 12, 6, (2, 3))])
def test_equals_plain_implementation(d_out, d_in, block, how, sweep):
    W, _, H = problem(d_out, d_in, seed=d_out)
    kind = {"pattern": how} if isinstance(how, tuple) else {"sparsity": how}
    expected, pruned = plain_sparsegpt(W, H, block=block, **kind)
    result = sparsegpt(W, H, block=block, **kind)
    assert np.array_equal((result.weight == 0).numpy(), pruned)
    assert np.abs(result.weight.numpy() - expected).max() < 1e-4 * np.abs(expected).max()
    assert result.error == pytest.approx(
        reference_error(W, torch.from_numpy(expected), H), rel=1e-3
    )
    assert result.sparsity == pruned.mean() and result.damping == 0.01 and result.dead == 0


@pytest.mark.parametrize("kind", [{"sparsity": 0.6}, {"pattern": (2, 4)}])
def test_equals_plain_with_dead_inputs_and_few_tokens(kind, sweep):
    W, _, H = problem(16, 48, tokens=20, seed=3, dead=(0, 7, 30))
    expected, _ = plain_sparsegpt(W, H, block=16, **kind)
    result = sparsegpt(W, H, block=16, **kind)
    assert result.dead == 3 and not result.weight[:, [0, 7, 30]].any()
    assert np.array_equal(result.weight.numpy() == 0, expected == 0)
    assert np.abs(result.weight.numpy() - expected).max() < 1e-4 * np.abs(expected).max()
    assert result.error == pytest.approx(reference_error(W, result.weight, H), rel=1e-2)


@pytest.mark.parametrize("pattern", [None, (2, 4)])
def test_compiled_and_torch_sweeps_agree(pattern):
    W, _, H = problem(150, 64, seed=5)
    a, b = W.T.contiguous(), W.T.contiguous()
    masks = [smallest(a.abs(), 90).clone() for _ in range(2)]
    upper = factorise(H, block=64).upper_blocks[0]
    squares = sweep_compiled(a, masks[0], upper, pattern), sweep_torch(
        b, masks[1], upper, pattern
    )
    assert torch.equal(*masks)
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    assert squares[0] == pytest.approx(squares[1], rel=1e-5)


def test_factor_is_the_published_one():
    _, _, H = problem(1, 50, seed=1)
    factor = factorise(H, damping=0.02, block=16)
    damped = H.double() + 0.02 * H.double().diagonal().mean() * torch.eye(50)
    U = torch.linalg.cholesky(torch.linalg.inv(damped), upper=True)
    R = torch.linalg.inv(U)
    for n, i in enumerate(range(0, 50, 16)):
        b = slice(i, min(i + 16, 50))
        torch.testing.assert_close(factor.upper_blocks[n].double(), U[b, b], rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(
            factor.carry[b, :i].T.double(), R[:i, b] @ U[b, b], rtol=1e-3, atol=1e-4
        )
    assert factor.ridge == pytest.approx(0.02 * H.diagonal().mean().item())


def test_plain_wanda_and_magnitude():
    W, x, H = problem(9, 20, seed=2)
    expected = W.clone()
    for r in range(9):
        order = sorted(range(20), key=lambda c, r=r: abs(W[r, c].item()) * x[:, c].norm().item())
        expected[r, order[:12]] = 0
    result = wanda(W, H, 0.6)
    assert torch.equal(result.weight, expected)
    assert result.error == pytest.approx(reference_error(W, expected, H), rel=1e-4)
    flat = sorted(range(180), key=lambda i: abs(W.flatten()[i].item()))
    expected = W.clone()
    expected.view(-1)[flat[:99]] = 0
    assert torch.equal(magnitude(W, sparsity=0.55).weight, expected)


# --- against brute force: for a fixed mask the best update is a least-squares problem

def least_squares(w, x, kept):
    "The weights on `kept` whose output is nearest to that of `w`, in float64."
    best = np.zeros(len(w))
    best[kept] = np.linalg.lstsq(x[:, kept], x @ w, rcond=None)[0]
    return best


@pytest.mark.parametrize("seed", range(4))
def test_never_better_than_least_squares_and_optimal_to_the_right(seed, sweep):
    """Refitting all kept weights bounds the error from below; those right of the last pruned one
    are such a refit.

    The error of a row may exceed that of zeroing without any update: a compensation can land on a
    weight that is
    pruned later. So no upper bound is asserted here.
    """
    W, x, H = problem(12, 8, tokens=200, seed=seed)
    result = sparsegpt(W, H, 0.4, damping=0, block=4)
    x = x.double().numpy()
    for w, pruned in zip(W.double().numpy(), result.weight.double().numpy(), strict=True):
        best = least_squares(w, x, np.flatnonzero(pruned))
        assert ((x @ (w - best)) ** 2).sum() * (1 - 1e-4) <= ((x @ (w - pruned)) ** 2).sum()
        last = max(np.flatnonzero(pruned == 0), default=-1) + 1
        refit = np.linalg.lstsq(x[:, last:], x @ w - x[:, :last] @ pruned[:last], rcond=None)[0]
        np.testing.assert_allclose(pruned[last:], refit, rtol=1e-3, atol=1e-4)


def test_compensation_pays_over_a_layer():
    W, _, H = problem(64, 64, seed=8)
    result = sparsegpt(W, H, 0.6)
    assert result.error < 0.9 * energy(W * (result.weight == 0), H) / energy(W, H)


@pytest.mark.parametrize("pruned_first", [1, 2, 4, 7])
def test_equals_least_squares_when_the_pruned_come_first(pruned_first, sweep):
    """Only columns to the right make up for a loss, so with all pruned columns first nothing is out
    of reach."""
    W, x, H = problem(1, 8, tokens=200, seed=11)
    W[:, :pruned_first] *= 1e-3
    result = sparsegpt(W, H, pruned_first / 8, damping=0)
    assert not result.weight[0, :pruned_first].any() and result.weight[0, pruned_first:].all()
    expected = least_squares(W[0].double().numpy(), x.double().numpy(), np.arange(pruned_first, 8))
    np.testing.assert_allclose(result.weight[0].numpy(), expected, rtol=1e-4, atol=1e-5)


def test_single_pruned_weight_is_the_cheapest_of_all():
    """With one weight to prune, the score is the exact cost of pruning it and refitting those to
    its right."""
    W, x, H = problem(1, 6, tokens=100, seed=4)
    w, x = W[0].double().numpy(), x.double().numpy()
    costs = []
    for j in range(6):
        target = x[:, j] * w[j]
        refit = x[:, j + 1:] @ np.linalg.lstsq(x[:, j + 1:], target, rcond=None)[0] if j < 5 else 0
        costs.append(((target - refit) ** 2).mean())
    result = sparsegpt(W, H, 1 / 6 + 1e-6, damping=0)
    assert (result.weight == 0).nonzero().tolist() == [[0, int(np.argmin(costs))]]
    assert result.error * energy(W, H) == pytest.approx(min(costs), rel=1e-3)


def test_wanda_is_the_best_mask_for_uncorrelated_inputs():
    W, _, H = problem(1, 8, seed=6)
    H = torch.diag(H.diagonal())
    best = min((energy(W * (1 - m), H) for keep in itertools.combinations(range(8), 4)
                for m in [torch.zeros(8).index_fill(0, torch.tensor(keep), 1)]))
    assert wanda(W, H, 0.5).error * energy(W, H) == pytest.approx(best, rel=1e-5)


# --- properties

shapes = st.tuples(st.integers(1, 12), st.integers(1, 40), st.integers(0, 1000))
sparsities = st.one_of(st.sampled_from([0.0, 0.29, 0.5, 0.57, 0.6, 0.999]), st.floats(0, 0.99))


@settings(max_examples=80)
@given(shapes, sparsities, st.sampled_from([1, 3, 16, 128]))
def test_exact_sparsity(shape, sparsity, block):
    W, _, H = problem(*shape[:2], seed=shape[2])
    W[W == 0] = 1
    assert (sparsegpt(W, H, sparsity, block=block).weight == 0).sum() == share(sparsity, W.numel())
    assert (magnitude(W, H, sparsity).weight == 0).sum() == share(sparsity, W.numel())
    result = wanda(W, H, sparsity)
    assert ((result.weight == 0).sum(1) == share(sparsity, W.shape[1])).all()
    assert result.sparsity == pytest.approx(share(sparsity, W.shape[1]) / W.shape[1])


@settings(max_examples=30)
@given(shapes, sparsities, st.integers(1, 50))
def test_block_counts_add_up(shape, sparsity, block):
    d_out, d_in, _ = shape
    counts = block_counts(sparsity, d_out, d_in, block)
    assert sum(counts) == share(sparsity, d_out * d_in) and len(counts) == -(-d_in // block)
    assert all(0 <= c <= d_out * min(block, d_in - n * block) for n, c in enumerate(counts))


@settings(max_examples=60)
@given(
    st.lists(st.lists(st.integers(0, 3), min_size=7, max_size=7), min_size=1, max_size=5),
    st.integers(0, 7),
)
def test_smallest_breaks_ties_by_index(rows, k):
    mask = smallest(torch.tensor(rows, dtype=torch.float32), k)
    for row, marked in zip(rows, mask.tolist(), strict=True):
        assert [i for i, m in enumerate(marked) if m] == sorted(
            sorted(range(7), key=lambda i: (row[i], i))[:k]
        )


@settings(max_examples=80)
@given(st.integers(1, 3000), st.floats(0, 1), st.sampled_from(["spread", "ties", "odd"]),
       st.integers(0, 99))
def test_smallest_of_one_row_agrees_with_a_sort(n, part, kind, seed):
    "One long row takes another way than several short ones."
    rng = torch.Generator().manual_seed(seed)
    scores = torch.randn(n, generator=rng) * torch.exp(4 * torch.randn(n, generator=rng))
    if kind == "ties": scores = scores.round()
    if kind == "odd":
        scores[torch.randint(n, (4,), generator=rng)] = torch.tensor(
            [float("inf"), float("-inf"), 0.0, -0.0]
        )
    want = torch.zeros(n, dtype=torch.bool)
    want[scores.sort(stable=True).indices[:int(part * n)]] = True
    assert torch.equal(smallest(scores[None], int(part * n))[0], want)
    assert torch.equal(
        smallest(torch.stack([scores, scores]), int(part * n)), torch.stack([want, want])
    )


@pytest.mark.parametrize("name", KERNELS)
@settings(max_examples=25)
@given(shape=shapes, how=st.sampled_from([0.3, 0.6, "2:4", "1:4"]))
def test_pruning_again_changes_nothing(name, shape, how):
    d_out, d_in, seed = shape
    kind = {"sparsity": how} if isinstance(how, float) else {"pattern": how}
    W, _, H = problem(d_out, d_in if isinstance(how, float) else 4 * d_in, seed=seed)
    once = KERNELS[name](W, H, **kind)
    twice = KERNELS[name](once.weight, H, **kind)
    assert torch.equal(once.weight, twice.weight) and twice.error == 0


@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize("kind", [{"sparsity": 0.6}, {"pattern": (2, 4)}])
@pytest.mark.parametrize("seed", range(3))
def test_invariances(name, kind, seed):
    kernel = KERNELS[name]
    W, _, H = problem(20, 64, seed=seed)
    base = kernel(W, H, **kind)
    close = lambda a, b: (
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5),
        torch.equal(a == 0, b == 0),
    )[1]
    order = torch.randperm(20, generator=torch.Generator().manual_seed(seed))
    assert close(kernel(W[order], H, **kind).weight, base.weight[order])
    scaled = kernel(W * 4, H * 0.125, **kind)
    assert close(scaled.weight / 4, base.weight) and scaled.error == pytest.approx(
        base.error, rel=1e-4
    )
    assert close(kernel(-W, H, **kind).weight, -base.weight)


@pytest.mark.parametrize("kind", [{"sparsity": 0.6}, {"pattern": (2, 4)}])
def test_scaling_inputs_scales_weights(kind):
    """W/s on inputs s·x is the same layer; damping alone knows the difference, and magnitude never
    does."""
    W, _, H = problem(20, 64, seed=9)
    s = torch.exp(torch.randn(64, generator=torch.Generator().manual_seed(9)))
    scaled = H * s * s[:, None]
    for kernel in (wanda, lambda *a, **k: sparsegpt(*a, damping=0, **k)):
        base, other = kernel(W, H, **kind), kernel(W / s, scaled, **kind)
        assert torch.equal(base.weight == 0, other.weight == 0)
        torch.testing.assert_close(other.weight * s, base.weight, rtol=1e-3, atol=1e-4)
    assert not torch.equal(magnitude(W, **kind).weight == 0, magnitude(W / s, **kind).weight == 0)


@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_type_is_kept_and_input_untouched(name, dtype):
    W, _, H = problem(12, 32, seed=1)
    W = torch.nn.Parameter(W.to(dtype))
    before = W.detach().clone()
    result = KERNELS[name](W, H, 0.5)
    assert result.weight.dtype == dtype and result.weight.is_contiguous(
    ) and not result.weight.requires_grad
    assert torch.equal(W, before) and result.sparsity == 0.5
    if name != "sparsegpt": assert torch.equal(result.weight, before * (result.weight != 0))


@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize("kind", [{"sparsity": 0.5}, {"pattern": (2, 4)}])
def test_a_transposed_view_is_pruned_like_its_copy(name, kind):
    W, _, H = problem(12, 32, seed=1)
    assert torch.equal(
        KERNELS[name](W.T.contiguous().T, H, **kind).weight, KERNELS[name](W, H, **kind).weight
    )


@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize("n,m", [(2, 4), (4, 8), (1, 2), (3, 4)])
def test_pattern_holds_in_every_group(name, n, m):
    W, _, H = problem(10, 48, seed=n)
    result = KERNELS[name](W, H, pattern=f"{n}:{m}")
    assert (
        result.weight.view(10, -1, m).count_nonzero(-1) == n
    ).all() and result.sparsity == 1 - n / m


@pytest.mark.parametrize("name", KERNELS)
def test_zero_sparsity_is_the_identity(name):
    W, _, H = problem(5, 16, dead=(3,))
    result = KERNELS[name](W, H, 0)
    assert torch.equal(result.weight,
                       W) and result.weight is not W and result.error == 0 and result.sparsity == 0


def test_no_correlation_no_update():
    W, _, H = problem(30, 40)
    result = sparsegpt(W, torch.diag(H.diagonal()), 0.5, block=16)
    kept = result.weight != 0
    assert torch.equal(result.weight[kept], W[kept])


def test_more_dead_inputs_than_asked_for():
    W, _, H = problem(6, 10, dead=range(2, 10))
    result = sparsegpt(W, H, 0.5)
    assert result.dead == 8 and result.sparsity == pytest.approx(
        0.8) and not result.weight[:, 2:].any()
    assert result.error == 0 and torch.equal(result.weight[:, :2], W[:, :2])


def test_equal_weights_are_counted_exactly():
    W, H = torch.ones(8, 16), torch.eye(16)
    for kernel in KERNELS.values(): assert kernel(W, H, 0.25).sparsity == 0.25


def test_shared_factor_changes_nothing():
    W, _, H = problem(10, 40)
    factor = factorise(H)
    for kind in ({}, {"pattern": "2:4"}):
        assert torch.equal(
            sparsegpt(W, H, factor=factor, **kind).weight, sparsegpt(W, H, **kind).weight
        )


def test_zero_layer():
    result = sparsegpt(torch.zeros(3, 8), problem(1, 8)[2], 0.5)
    assert result.error == 0 and result.sparsity == 1


# --- damping

def test_few_tokens_need_no_more_than_the_default_damping():
    W, _, H = problem(20, 96, tokens=5)
    assert torch.linalg.matrix_rank(H.double(), rtol=1e-5) == 5
    result = sparsegpt(W, H, 0.6)
    assert result.damping == 0.01 and result.weight.isfinite().all()
    assert result.error == pytest.approx(reference_error(W, result.weight, H), rel=0.05)


@pytest.mark.parametrize(
    "start,lowest,used",
    [(0.01, -0.05, 0.1), (0.01, -0.5, 1.0), (0.0, -5e-4, 1e-3), (0.3, -0.5, 1.0)],
)
def test_damping_is_raised_and_recorded(start, lowest, used):
    H = torch.ones(2, 2) - lowest * torch.tensor([[0., 1.], [1., 0.]])
    assert torch.linalg.eigvalsh(H)[0] == pytest.approx(lowest, abs=1e-5)
    assert sparsegpt(torch.ones(4, 2), H, 0.5, damping=start).damping == used


def test_hopeless_hessian_is_refused():
    with pytest.raises(CalibPruneError, match="damping 1 "):
        sparsegpt(torch.ones(4, 2), torch.tensor([[1., 3.], [3., 1.]]))


# --- bad input

def swapped(H, i, j, value):
    H = H.clone()
    H[i, j] = value
    return H


W8, _, H8 = problem(4, 8)


@pytest.mark.parametrize("name", ["sparsegpt", "wanda"])
@pytest.mark.parametrize("args,message",
                         [((W8, H8, 1.0), "outside"), ((W8, H8, -0.1), "outside"),
                          ((W8, H8, float("nan")), "outside"), ((W8, H8, "x"), "outside"),
                          ((W8, H8, True), "outside"), ((W8[0], H8), "float matrix"),
                          ((W8.int(), H8), "float matrix"), ((W8[:, :0], H8), "float matrix"),
                          ((W8 * float("inf"), H8), "NaN or infinite"),
                          ((W8, H8[:4, :4]), r"\[8, 8\] is needed|do not fit"),
                          ((W8, H8[0]), "is needed"),
                          ((W8, swapped(H8, 2, 5, float("nan"))), "NaN or infinite"),
                          ((W8, swapped(H8, 1, 1, -1.)), "negative"),
                          ((W8, H8 * 0), "never activates"),
                          ((W8, H8, 0.5, "3:5"), "not a multiple of 5"),
                          ((W8, H8, 0.5, (4, 4)), "0 < n < m"), ((W8, H8, 0.5, "2-4"), "0 < n < m"),
                          ((W8, H8, 0.5, (0, 4)), "0 < n < m")])
def test_bad_input(name, args, message):
    with pytest.raises(CalibPruneError, match=message): KERNELS[name](*args)


def test_bad_sparsegpt_settings():
    for wrong in ({"damping": -1}, {"damping": float("nan")}, {"block": 0}, {
            "pattern": "2:4", "block": 6}, {"factor": factorise(H8[:4, :4])}, {
                "factor": factorise(H8), "block": 64}):
        with pytest.raises(CalibPruneError): sparsegpt(W8, H8, **wrong)


def test_overflow_of_half_precision_is_an_error():
    W = torch.tensor([[60000., 60000.]], dtype=torch.float16)
    with pytest.raises(CalibPruneError):
        sparsegpt(W, torch.tensor([[1.0, 1.0], [1.0, 1.1]]), 0.5, damping=0.001)


# --- statistics

def test_second_moment_averages_tokens_not_sequences():
    x = torch.randn(6, 50, 20, generator=torch.Generator().manual_seed(0))
    expected = torch.einsum("btd,bte->de", x.double(), x.double()) / 300
    results = []
    for pieces in ([x], x.unbind(0), x.view(300, 20).split(7), x.view(2, 3, 5, 10, 20).unbind(0)):
        stats = SecondMoment(20, panel=8)
        for piece in pieces: stats.update(piece)
        assert stats.n_tokens == 300
        results.append(stats.matrix())
    for H in results:
        assert torch.equal(H, H.T)
        torch.testing.assert_close(H.double(), expected, rtol=1e-5, atol=1e-6)


@settings(max_examples=25)
@given(st.integers(1, 70), st.integers(1, 80), st.integers(1, 60),
       st.sampled_from([torch.float32, torch.bfloat16, torch.float16]))
def test_second_moment_any_shape(d, tokens, panel, dtype):
    x = torch.randn(tokens, d, generator=torch.Generator().manual_seed(d)).to(dtype)
    stats = SecondMoment(d, panel=panel)
    stats.update(x[: tokens // 2])
    stats.update(x[tokens // 2:])
    torch.testing.assert_close(
        stats.matrix().double(), x.double().T @ x.double() / tokens, rtol=1e-5, atol=1e-5
    )
    W = torch.randn(3, d)
    expected = ((W.double() @ x.double().T) ** 2).sum().item() / tokens
    assert energy(W, stats.matrix(), panel) == pytest.approx(expected, rel=1e-4, abs=1e-5)


@pytest.mark.parametrize("d_out, d_in", [(1, 600), (100, 300), (40, 1024), (16, 64), (300, 257)])
def test_energy_of_whole_and_of_broken_tiles(d_out, d_in):
    W, x = torch.randn(d_out, d_in), torch.randn(d_in + 5, d_in)
    H = x.T @ x / len(x)
    H = (H + H.T) / 2
    exact = ((W.double() @ H.double()) * W.double()).sum().item()
    for weight in (W, torch.randn(d_in, d_out).T.copy_(W)):  # as it lies in memory, and transposed
        assert energy(weight, H) == pytest.approx(exact, rel=1e-5)
    assert energy(W.double(), H.double()) == pytest.approx(exact, rel=1e-10), "other types by torch"


def test_second_moment_of_many_single_tokens():
    x = torch.randn(2000, 16, generator=torch.Generator().manual_seed(1)) * torch.logspace(
        -3, 3, 16
    )
    stats = SecondMoment(16)
    for token in x: stats.update(token)
    exact = x.double().T @ x.double() / 2000
    size = exact.diagonal().sqrt()
    assert ((stats.matrix() - exact) / size / size[:, None]).abs().max() < 1e-5


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_second_moment_names_the_broken_input(bad):
    stats = SecondMoment(6)
    stats.update(torch.ones(3, 6))
    stats.update(torch.tensor([1., 2., 3., bad, 5., 6.]))
    with pytest.raises(CalibPruneError, match="input 3"): stats.matrix()


def test_second_moment_refuses_misfits():
    stats = SecondMoment(6)
    for x in (torch.ones(3, 5), torch.ones(()), torch.ones(2, 6).long()):
        with pytest.raises(CalibPruneError): stats.update(x)
    stats.update(torch.ones(0, 6))
    with pytest.raises(CalibPruneError): stats.matrix()
    with pytest.raises(CalibPruneError): SecondMoment(0)


def test_low_precision_products_are_switched_off_and_on_again():
    W, x, H = problem(40, 256)
    expected = sparsegpt(W, H, 0.6).weight
    torch.set_float32_matmul_precision("medium")
    try:
        assert torch.equal(sparsegpt(W, H, 0.6).weight, expected)
        stats = SecondMoment(256)
        stats.update(x)
        torch.testing.assert_close(stats.matrix(), H)
        with pytest.raises(ZeroDivisionError), exact_float32(): 1 / 0  # noqa: B018
        assert torch.get_float32_matmul_precision() == "medium"
    finally: torch.set_float32_matmul_precision("highest")


def test_rows_that_would_start_in_the_same_lines_of_the_cache_are_spaced():
    W, _, H = problem(40, 1024, seed=3)
    factor = factorise(H)
    assert factor.carry.stride(0) > 1024 and factorise(H[:1000, :1000]).carry.is_contiguous()
    counts = block_counts(0.6, *W.shape, 128)
    plain, _, _ = _sweep_blocks(W, factor, counts, None, sweep_torch)
    found = sparsegpt(W, H, 0.6, factor=factor).weight
    assert ((found == 0) != (plain == 0)).double().mean() < 1e-4
    assert (found - plain).norm() < 1e-2 * plain.norm()
