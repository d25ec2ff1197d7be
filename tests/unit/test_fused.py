"""Fewer passes through a decoder layer: the same numbers, in the models whose code is known, and
nowhere else."""
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRMSNorm

from calib_prune.kernels.matmul import _ByOneDNN, fast_products
from calib_prune.model import fused
from calib_prune.model.fused import decoder_layer, fused_layers, rms_norm
from calib_prune.model.tiny import TINY_FAMILIES, tiny_llama, tiny_model

IDS = torch.arange(1, 41)[None] % 7
needs_onednn = pytest.mark.skipif(
    not torch.backends.mkldnn.is_available(), reason="this torch has no oneDNN"
)


@settings(max_examples=60)
@given(st.lists(st.integers(1, 5), min_size=0, max_size=2), st.integers(1, 200), st.integers(0, 99))
def test_norms(lead, width, seed):
    rng, norm = torch.Generator().manual_seed(seed), LlamaRMSNorm(width)
    x = torch.randn(*lead, width, generator=rng) * 10 ** torch.randn(1, generator=rng)
    with torch.no_grad():
        norm.weight.copy_(torch.randn(width, generator=rng))
        torch.testing.assert_close(rms_norm(norm, x), norm(x), rtol=1e-5, atol=1e-6)
        half = norm.bfloat16()
        torch.testing.assert_close(
            rms_norm(half, x.bfloat16()), half(x.bfloat16()), rtol=0.02, atol=1e-3
        )


def test_norms_of_views_gradients_other_types_and_broken_numbers():
    norm, x = LlamaRMSNorm(40), torch.randn(6, 80)
    rms_norm(norm, x[:, :40]).sum().backward()
    assert norm.weight.grad is not None
    with torch.no_grad():
        torch.testing.assert_close(rms_norm(norm, x[:, 40:]), norm(x[:, 40:]))
        assert rms_norm(norm.double(), x[:, :40].double()).dtype == torch.float64
        norm.float()
        x[2, 3], x[4, 5] = float("nan"), float("inf")
        assert torch.equal(rms_norm(norm, x[:, :40]).isnan(), norm(x[:, :40]).isnan())
        assert rms_norm(norm, x[:0, :40]).shape == (0, 40)


@pytest.mark.parametrize("family", TINY_FAMILIES)
def test_every_family_gives_the_same_numbers(family):
    model = tiny_model(family)
    with torch.no_grad():
        want = model(IDS).logits
        with fast_products(), fused_layers(model):
            torch.testing.assert_close(model(IDS).logits, want, rtol=1e-4, atol=1e-5)
        assert torch.equal(model(IDS).logits, want), "outside, everything is as it was"


@pytest.mark.parametrize("family", TINY_FAMILIES)
def test_bfloat16_is_no_further_from_the_truth(family):
    model = tiny_model(family).bfloat16()
    with torch.no_grad():
        plain = model(IDS).logits
        with fast_products(), fused_layers(model): found = model(IDS).logits
        exact = model.double()(IDS).logits  # the same rounded weights
    assert found.dtype == torch.bfloat16 and (found - exact).norm() < 1.2 * (plain - exact).norm()


@needs_onednn
def test_residuals_are_added_within_the_products(monkeypatch):
    seen, linear = [], __import__("calib_prune.kernels.matmul").kernels.matmul.linear
    monkeypatch.setattr(
        "calib_prune.kernels.matmul.linear", lambda *o: seen.append(o[3:4]) or linear(*o)
    )
    model = tiny_llama()
    with torch.no_grad(), _ByOneDNN(), fused_layers(model): model(IDS)
    assert seen[:7] == [(), (), (), ("add",), ("swish",), ("mul",), ("add",)]


@needs_onednn
def test_who_watches_a_linear_map_sees_its_own_output():
    model, seen = tiny_llama(), []
    layer = model.model.layers[0]
    layer.self_attn.o_proj.register_forward_hook(
        lambda module, args, out: seen.append((args[0], out))
    )
    with torch.no_grad(), _ByOneDNN():
        want = model(IDS).logits
        with fused_layers(model):
            torch.testing.assert_close(model(IDS).logits, want, rtol=1e-4, atol=1e-5)
    (x, out), (_, within) = seen
    torch.testing.assert_close(within, x @ layer.self_attn.o_proj.weight.T, rtol=1e-4, atol=1e-5)


def test_a_module_that_does_more_after_its_last_map_is_left_alone():
    class Doubled(type(tiny_llama().model.layers[0].mlp)):

        def forward(self, x):
            return 2 * self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))

    model = tiny_llama()
    model.model.layers[0].mlp.__class__ = Doubled
    with torch.no_grad(), _ByOneDNN():
        want = model(IDS).logits
        with fused_layers(model):
            torch.testing.assert_close(model(IDS).logits, want, rtol=1e-4, atol=1e-5)


def test_what_is_replaced_comes_back_after_an_error():
    before = LlamaDecoderLayer.forward, LlamaRMSNorm.forward
    with pytest.raises(ZeroDivisionError), fused_layers(tiny_llama()):
        assert LlamaDecoderLayer.forward is decoder_layer and LlamaRMSNorm.forward is fused.rms_norm
        raise ZeroDivisionError
    assert (LlamaDecoderLayer.forward, LlamaRMSNorm.forward) == before
