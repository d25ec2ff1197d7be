"""Grids and GPTQ: values come from codes, scales and zeros; the sweep is the same whatever the
blocks, the order and the type."""
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from calib_prune.core import CalibPruneError
from calib_prune.pruning.gptq import gptq, sweep_order
from calib_prune.pruning.grids import BITS, Grid, imatrix, on_grid, rtn, scale_and_zero
from calib_prune.pruning.hessian import SecondMoment
from calib_prune.pruning.methods import check_quantisation, read_recipe


def layer(d_out=24, d_in=64, seed=0, dead=0):
    "A random layer and the second moment of correlated inputs."
    rng = torch.Generator().manual_seed(seed)
    inputs = torch.randn(1024, d_in, generator=rng) @ (
        torch.eye(d_in) + torch.randn(d_in, d_in, generator=rng) / d_in**0.5)
    inputs[:, :dead] = 0
    stats = SecondMoment(d_in)
    stats.update(inputs)
    return torch.randn(d_out, d_in, generator=rng), stats.matrix()


WEIGHT, HESSIAN = layer()
WAYS = {
    "rtn": rtn, "imatrix": imatrix, "gptq": gptq,
    "fitted": lambda *how: gptq(*how, fitted=True),
    "activation": lambda *how: gptq(*how, by_activation=True),
    "sparse": lambda *how: gptq(*how, pattern="2:4")}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("grid", [Grid(bits, group, symmetric) for bits in BITS
                                  for group in (0, 32) for symmetric in (True, False)], ids=str)
def test_values_are_codes_scales_and_zeros(way, grid):
    made = WAYS[way](WEIGHT, grid, HESSIAN)
    groups = made.codes.view(len(WEIGHT), made.scales.shape[1], -1).float()
    values = made.scales[..., None] * (groups - made.zeros[..., None].float())
    assert torch.equal(values.view_as(WEIGHT), made.weight)
    assert int(made.codes.max()) < grid.levels and 0 < made.error < 1
    assert made.scales.shape == (24, 64 // (grid.group or 64))


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10**6), st.sampled_from(BITS), st.booleans())
def test_rounding_to_nearest_is_nearest(seed, bits, symmetric):
    weight, _ = layer(4, 16, seed)
    grid = Grid(bits, 0, symmetric)
    scale, zero = scale_and_zero(weight, grid)
    near = rtn(weight, grid).weight
    for step in (-1, 1):
        other = on_grid(near + step * scale, scale, zero, grid.levels)
        assert ((near - weight).abs() <= (other - weight).abs() + 1e-6).all()


@pytest.mark.parametrize("block", [32, 64])
def test_activation_order_is_the_sweep_of_sorted_inputs(block):
    order = HESSIAN.diagonal().argsort(descending=True)
    sorted_first = gptq(WEIGHT[:, order], Grid(3, 0), HESSIAN[order][:, order], block=block)
    made = gptq(WEIGHT, Grid(3, 0), HESSIAN, by_activation=True, block=block)
    assert torch.equal(made.weight[:, order], sorted_first.weight)


@pytest.mark.parametrize("by_activation", [True, False])
def test_a_shared_order_gives_the_same_bits(by_activation):
    shared = sweep_order(HESSIAN, by_activation, block=32)
    alone = gptq(WEIGHT, Grid(4, 32), HESSIAN, by_activation, block=32)
    assert torch.equal(gptq(WEIGHT, Grid(4, 32), HESSIAN, order=shared).weight, alone.weight)
    with pytest.raises(CalibPruneError, match="does not fit"):
        gptq(WEIGHT, Grid(4, 32), HESSIAN, order=sweep_order(layer(d_in=32)[1]))


def test_two_of_four_stay():
    made = gptq(WEIGHT, Grid(4, 32), HESSIAN, pattern="2:4")
    assert int((made.weight != 0).view(24, -1, 4).sum(-1).max()) == 2


@pytest.mark.parametrize("way", ["imatrix", "fitted"])
def test_importance_lowers_the_error_where_it_is_large(way):
    scales = torch.ones(64)
    scales[::8] = 8  # an eighth of the inputs, some in every group
    hessian = HESSIAN * scales * scales[:, None]
    made, plain = (WAYS[way](WEIGHT, Grid(2, 32), moment) for moment in (
        hessian, torch.eye(64)))
    def error(values): return (values - WEIGHT)[:, ::8].square().sum()
    assert error(made.weight) < 0.8 * error(plain.weight)


def test_dead_inputs_do_not_stretch_the_scales():
    weight, hessian = layer(dead=1)
    weight[:, 0] = 50
    for way in ("imatrix", "gptq", "fitted", "activation"):
        for group in (0, 32):
            assert WAYS[way](weight, Grid(3, group), hessian).error < 0.2


def test_a_scale_is_held_in_16_bits_and_may_be_negative():
    weight = torch.zeros(1, 32)
    weight[0, 3], weight[0, 9] = 1.0, 0.5  # above 0, where codes are one step short
    made = rtn(weight, Grid(2, 0), fitted=True)
    assert made.scales.item() < 0 and torch.equal(made.weight, weight)
    assert torch.equal(made.scales, made.scales.bfloat16().float())


def test_a_zero_point_fits_into_its_byte():
    weight = torch.tensor([[-255.99, -1.0, -3.0, 0.0]])
    made = rtn(weight, Grid(8, 0, symmetric=False))
    assert made.zeros.item() == 255 and (made.weight - weight).abs().max() < 1


@pytest.mark.parametrize("method", ["rtn", "imatrix"])
def test_a_pattern_is_refused_where_nothing_is_pruned(method):
    with pytest.raises(CalibPruneError, match="use gptq, or no pattern"):
        check_quantisation(read_recipe(f"{method}+bits=3"), 0.0, (2, 4))


def test_dead_inputs_become_zero_and_pruned_weights_stay_zero():
    weight, hessian = layer(dead=3)
    made = gptq(weight, Grid(4, 32, symmetric=False), hessian, sparsity=0.5)
    assert made.dead == 3 and not made.weight[:, :3].any()
    assert (made.weight == 0).float().mean() >= 0.5


@pytest.mark.parametrize("way", WAYS)
def test_half_precision_comes_back_in_its_own_type(way):
    made = WAYS[way](WEIGHT.bfloat16(), Grid(4, 32), HESSIAN)
    assert made.weight.dtype == torch.bfloat16 and made.scales.dtype == torch.float32
    with pytest.raises(CalibPruneError, match="overflow torch.float16"):
        WAYS[way]((1e5 * WEIGHT).clamp(-65000, 65000).half() * 1.0, Grid(2, 32), HESSIAN)


@pytest.mark.parametrize("wrong, says", [
    (lambda: rtn(WEIGHT, Grid(5)), "5 bits cannot be packed"),
    (lambda: rtn(WEIGHT, Grid(4, 48)), "Groups of 48 do not divide 64 inputs: use 64"),
    (lambda: gptq(WEIGHT, Grid(4, 32), HESSIAN, block=48), "splits a group of 32"),
    (lambda: gptq(WEIGHT, Grid(4, 32), HESSIAN, pattern="2:4", by_activation=True), "neighbours"),
    (lambda: gptq(WEIGHT, Grid(4, 32), HESSIAN, pattern="2:4", sparsity=0.9), "contradict"),
    (lambda: imatrix(WEIGHT, Grid(4, 32), HESSIAN * float("nan")), "NaN"),
    (lambda: gptq(WEIGHT * float("inf"), Grid(4, 32), HESSIAN), "NaN or infinite")])
def test_wrong_requests_are_refused(wrong, says):
    with pytest.raises(CalibPruneError, match=says): wrong()
