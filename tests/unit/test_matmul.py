"""Float32 products by oneDNN: the same numbers up to rounding, for every shape, and only where they
fit."""
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from calib_prune.kernels.matmul import (
    LaidOut,
    _ByOneDNN,
    fast_products,
    following,
    linear,
    multiplies_bfloat16,
)
from calib_prune.kernels.memory import reused_memory
from tests.torture.alone import resident_mb

pytestmark = pytest.mark.skipif(
    not torch.backends.mkldnn.is_available(), reason="this torch has no oneDNN"
)


def close(a, b): return a.shape == b.shape and torch.allclose(a, b, rtol=1e-5, atol=1e-4)


@settings(max_examples=60)
@given(st.lists(st.integers(0, 5), min_size=1, max_size=2), st.integers(0, 70), st.integers(0, 70),
       st.booleans(), st.integers(0, 9))
def test_it_is_the_linear_map(lead, d_in, d_out, bias, seed):
    rng = torch.Generator().manual_seed(seed)
    x, w = torch.randn(*lead, d_in, generator=rng), torch.randn(d_out, d_in, generator=rng)
    b = torch.randn(d_out, generator=rng) if bias else None
    assert close(linear(x, w, b), F.linear(x, w, b))


def test_strided_inputs():
    x, w = torch.randn(40, 30), torch.randn(50, 20)
    for view in (x[:, 5:25], x.T[:, :20].contiguous()[::2], x[:20].T):
        assert close(linear(view[..., :20], w), F.linear(view[..., :20], w))


def test_the_mode_leaves_alone_what_does_not_fit():
    layer, x = torch.nn.Linear(16, 8), torch.randn(3, 16)
    with _ByOneDNN():
        layer(x).sum().backward()  # gradients
        assert layer.weight.grad is not None
        with torch.no_grad():
            assert close(layer(x), F.linear(x, layer.weight, layer.bias))
            assert layer.double()(x.double()).dtype == torch.float64
            assert close(F.linear(x, weight=torch.eye(16)), x)  # keywords go their usual way


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bias", [True, False])
def test_gradients_are_those_of_the_linear_map(dtype, bias):
    if dtype == torch.bfloat16 and not multiplies_bfloat16():
        pytest.skip("this processor has no products of bfloat16")
    layer, x, slope = torch.nn.Linear(40, 24, bias=bias, dtype=dtype), torch.randn(
        2, 7, 40, dtype=dtype), torch.randn(2, 7, 24, dtype=dtype)
    exact = torch.nn.Linear(40, 24, bias=bias, dtype=torch.float64)
    exact.load_state_dict(layer.state_dict())
    inputs = []
    for module, mode in ((layer, _ByOneDNN((dtype,))), (exact, nullcontext())):
        inputs.append(x.detach().to(module.weight.dtype).requires_grad_())
        with mode: (module(inputs[-1]) * slope).sum().backward()
    found, expected = (
        [i.grad, *(p.grad for p in m.parameters())]
        for i, m in zip(inputs, (layer, exact), strict=True)
    )
    for a, b in zip(found, expected, strict=True):
        assert a.dtype == dtype and a.shape == b.shape
        # one rounding, of the sum
        torch.testing.assert_close(a.double(), b, rtol=torch.finfo(dtype).eps, atol=1e-5)


def test_gradients_of_what_is_needed_alone():
    layer, x = torch.nn.Linear(16, 8), torch.randn(3, 16)
    layer.weight.requires_grad_(False)
    with _ByOneDNN(): layer(x).sum().backward()
    assert layer.weight.grad is None and torch.equal(layer.bias.grad, torch.full((8,), 3.0))


def test_the_choice_holds_only_inside():
    plain = F.linear(x := torch.randn(64, 64), x)
    with torch.no_grad(), fast_products(): inside = F.linear(x, x)
    assert close(inside, plain) and torch.equal(F.linear(x, x), plain)


def test_laid_out_weights_give_the_same_bits():
    x, w, other = torch.randn(50, 24), torch.randn(12, 24), torch.randn(12, 24)
    with torch.no_grad(), _ByOneDNN(laid_out=(kept := LaidOut())):
        for weight in (w, other, w):  # each is found again by its own address
            assert torch.equal(F.linear(x, weight), linear(x, weight))
    assert len(kept.weights) == 2
    with torch.no_grad(), _ByOneDNN(laid_out=(full := LaidOut(room=w.numel() * 4))):
        for weight in (w, other): assert torch.equal(F.linear(x, weight), linear(x, weight))
    assert len(full.weights) == 1, "what does not fit is left as it is"


def test_memory_of_many_laid_out_weights_is_returned():
    weights, laid_out = [torch.ones(1024, 4096) for _ in range(12)], LaidOut()
    with reused_memory():  # as in scoring: here freed memory stays in the process
        before = resident_mb()
        for w in weights: laid_out.of(w, 64)
        inside = resident_mb()
        laid_out.forget(returned=0)
        assert not laid_out.weights and resident_mb() < before + 40 < inside - 100


def test_only_the_types_that_were_asked_for(monkeypatch):
    seen = []
    monkeypatch.setattr(
        "calib_prune.kernels.matmul.linear",
        lambda x, *rest: seen.append(x.dtype) or F.linear(x, *rest[:2]),
    )
    with torch.no_grad():
        for types in ((torch.float32,), (torch.bfloat16,), (torch.float32, torch.bfloat16)):
            with _ByOneDNN(types):
                for dtype in (torch.float32, torch.bfloat16, torch.float16):
                    F.linear(*torch.ones(2, 3, 3, dtype=dtype))
    assert seen == [torch.float32, torch.bfloat16, torch.float32, torch.bfloat16]


@pytest.mark.skipif(not multiplies_bfloat16(), reason="this processor has no products of bfloat16")
def test_bfloat16_products_are_summed_in_float32():
    x, w = torch.randn(40, 3000).bfloat16(), torch.randn(20, 3000).bfloat16()
    exact = x.double() @ w.double().T
    with torch.no_grad(), fast_products(same_weights=True): found = F.linear(x, w)
    assert found.dtype == torch.bfloat16
    assert (
        (found - exact).abs() <= exact.abs() * 2**-8 + 1e-2
    ).all(), "one rounding, of the result"


@pytest.mark.parametrize("then", ["swish", "mul", "add"])
def test_what_follows_a_product_follows_that_product_only(then):
    a, b = torch.nn.Linear(24, 12), torch.nn.Linear(24, 12)
    x, other = torch.randn(9, 24), None if then == "swish" else torch.randn(9, 12)
    with torch.no_grad():
        first, second = a(x), b(x)
        want = dict(swish=F.silu, mul=lambda o: o * other, add=lambda o: o + other)[then](second)
        for mode in (True, False):
            with _ByOneDNN() if mode else torch.no_grad(), following(
                b.weight, then, other
            ) as finish:
                assert close(a(x), first) and close(finish(b(x)), want)
                assert close(b(x), second), "once"
        with _ByOneDNN():
            with pytest.raises(ZeroDivisionError), following(b.weight, then, other):
                raise ZeroDivisionError
            assert close(b(x), second), "nothing is left of a step that failed"


def test_what_follows_is_known_to_its_own_thread_only():
    layer, x, other = torch.nn.Linear(24, 12), torch.randn(9, 24), torch.randn(9, 12)
    def elsewhere():
        with torch.no_grad(), _ByOneDNN(): return layer(x)
    with torch.no_grad(), _ByOneDNN(), following(
        layer.weight, "add", other
    ) as finish, ThreadPoolExecutor(1) as pool:
        plain = pool.submit(elsewhere).result()
        assert close(finish(layer(x)), plain + other)
