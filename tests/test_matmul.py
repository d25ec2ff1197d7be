"Float32 products by oneDNN: the same numbers up to rounding, for every shape, and only where they fit."
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from calib_prune.model.matmul import LaidOut, _ByOneDNN, fast_products, linear

pytestmark = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="this torch has no oneDNN")


def close(a, b): return a.shape == b.shape and torch.allclose(a, b, rtol=1e-5, atol=1e-4)


@settings(deadline=None, max_examples=60)
@given(st.lists(st.integers(0, 5), min_size=1, max_size=2), st.integers(0, 70), st.integers(0, 70), st.booleans(), st.integers(0, 9))
def test_it_is_the_linear_map(lead, d_in, d_out, bias, seed):
    rng = torch.Generator().manual_seed(seed)
    x, w = torch.randn(*lead, d_in, generator=rng), torch.randn(d_out, d_in, generator=rng)
    b = torch.randn(d_out, generator=rng) if bias else None
    assert close(linear(x, w, b), F.linear(x, w, b))


def test_strided_inputs():
    x, w = torch.randn(40, 30), torch.randn(50, 20)
    for view in (x[:, 5:25], x.T[:, :20].contiguous()[::2], x[:20].T): assert close(linear(view[..., :20], w), F.linear(view[..., :20], w))


def test_the_mode_leaves_alone_what_does_not_fit():
    layer, x = torch.nn.Linear(16, 8), torch.randn(3, 16)
    with _ByOneDNN():
        layer(x).sum().backward()  # gradients
        assert layer.weight.grad is not None
        with torch.no_grad():
            assert close(layer(x), F.linear(x, layer.weight, layer.bias))
            assert layer.double()(x.double()).dtype == torch.float64
            assert close(F.linear(x, weight=torch.eye(16)), x)  # keywords go their usual way


def test_the_choice_holds_only_inside():
    plain = F.linear(x := torch.randn(64, 64), x)
    with torch.no_grad(), fast_products(): inside = F.linear(x, x)
    assert close(inside, plain) and torch.equal(F.linear(x, x), plain)


def test_laid_out_weights_give_the_same_bits():
    x, w, other = torch.randn(50, 24), torch.randn(12, 24), torch.randn(12, 24)
    with torch.no_grad(), _ByOneDNN(kept := LaidOut()):
        for weight in (w, other, w):  # each is found again by its own address
            assert torch.equal(F.linear(x, weight), linear(x, weight))
    assert len(kept.weights) == 2
    with torch.no_grad(), _ByOneDNN(full := LaidOut(room=w.numel() * 4)):
        for weight in (w, other): assert torch.equal(F.linear(x, weight), linear(x, weight))
    assert len(full.weights) == 1, "what does not fit is left as it is"
