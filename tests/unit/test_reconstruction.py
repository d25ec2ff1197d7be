"""Training a layer's kept weights: masks hold, errors fall, the same call gives the same bits, and
what can go wrong is said."""
import pytest
import torch

from calib_prune.core import CalibPruneError
from calib_prune.model.tiny import TINY_FAMILIES, tiny_llama, tiny_model
from calib_prune.pruning import reconstruction
from calib_prune.pruning.checkpoint import model_fingerprint
from calib_prune.pruning.layers import capture, decoder_layers, prunable
from calib_prune.pruning.reconstruction import layer_outputs, reconstruct
from calib_prune.pruning.walk import prune
from calib_prune.pruning.wanda import wanda

WINDOWS = torch.randint(1, 264, (16, 32), generator=torch.Generator().manual_seed(0))
FEW = WINDOWS[:8]  # two batches
SMALL = dict(batch_tokens=128)


def matrices(model):
    return {
        n: p.detach().clone() for n, p in model.named_parameters() if ".layers." in n and p.ndim > 1
    }


@pytest.mark.parametrize("family", [*TINY_FAMILIES, "mixtral", "gpt_oss"])
def test_masks_hold_and_only_kept_weights_move(family):
    plain, trained = tiny_model(family), tiny_model(family)
    before = {n: p.clone() for n, p in trained.named_parameters()}
    first = prune(plain, FEW, "wanda", 0.5, **SMALL)
    report = prune(trained, FEW, "wanda", 0.5, reconstruct=1, **SMALL)
    assert first.trained.isna().all() and report.trained.between(0, 1).all()
    assert report.sparsity.equals(first.sparsity)
    at = {"layers.0.", "h.0."}
    moved = 0
    for (n, a), b in zip(plain.named_parameters(), trained.parameters(), strict=True):
        # later layers get other inputs, and so other masks
        if any(o in n for o in at) and a.ndim > 1:
            assert torch.equal(a == 0, b == 0), n
            moved += not torch.equal(a, b)
        elif a.ndim == 1: assert torch.equal(b, before[n]), "norms and biases stay"
        assert b.requires_grad == a.requires_grad and b.grad is None and b.dtype == a.dtype
    assert moved


def layer_problem(model, sparsity=0.5):
    layer = decoder_layers(model)[0]
    with torch.no_grad():
        hidden, calls = capture(model, [*WINDOWS.split(4)])
        wanted = layer_outputs(layer, calls[0], hidden)
        for m in prunable(layer).values():
            m.weight.copy_(wanda(m.weight, torch.eye(m.weight.shape[1]), sparsity).weight)
    return layer, calls[0], hidden, wanted


def test_the_error_is_that_of_the_layers_output_and_falls():
    layer, calls, hidden, wanted = layer_problem(tiny_llama())
    def direct():
        with torch.no_grad(): found = layer_outputs(layer, calls, hidden)
        lost = sum((a - b).double().square().sum() for a, b in zip(found, wanted, strict=True))
        return float(
            lost / sum((a - b).double().square().sum() for a, b in zip(wanted, hidden, strict=True))
        )
    start = direct()
    done = reconstruct(layer, calls, hidden, wanted, passes=10)
    assert done.before == pytest.approx(start, rel=1e-5) and done.after == pytest.approx(
        direct(), rel=1e-5
    )
    assert done.after < 0.8 * done.before


def test_a_dense_layer_has_nothing_to_learn():
    layer, calls, hidden, wanted = layer_problem(tiny_llama(), sparsity=0.0)
    before = [m.weight.clone() for m in prunable(layer).values()]
    done = reconstruct(layer, calls, hidden, wanted)
    assert done.before == done.after == pytest.approx(0, abs=1e-10)
    assert all(
        torch.equal(m.weight, old) for m, old in zip(prunable(layer).values(), before, strict=True)
    ), "kept what it had"


def test_a_layer_that_adds_nothing_stays_as_it_is():
    model = tiny_llama()
    layer = decoder_layers(model)[0]
    for linear in (layer.self_attn.o_proj, layer.mlp.down_proj): linear.weight.data.zero_()
    layer, calls, hidden, wanted = layer_problem(model)
    before = [m.weight.clone() for m in prunable(layer).values()]
    done = reconstruct(layer, calls, hidden, wanted)
    assert done.before == done.after == 0
    assert all(map(torch.equal, before, [m.weight for m in prunable(layer).values()]))


@pytest.mark.parametrize("family", ["llama", "qwen3_moe"])
def test_the_same_call_gives_the_same_bits_also_after_a_kill(family, tmp_path):
    def stop(stage, done, total):
        if done == 2: raise KeyboardInterrupt
    how = dict(method="sparsegpt", sparsity=0.5, reconstruct=2, **SMALL)
    a, b, c = (tiny_model(family, num_hidden_layers=3) for _ in range(3))
    report = prune(a, FEW, **how)
    with pytest.raises(KeyboardInterrupt):
        prune(b, FEW, **how, checkpoint=tmp_path / "c", progress=stop)
    b = tiny_model(family, num_hidden_layers=3)
    assert prune(b, FEW, **how, checkpoint=tmp_path / "c").equals(report) and prune(
        c, FEW, **how
    ).equals(report)
    assert model_fingerprint(a) == model_fingerprint(b) == model_fingerprint(c)


def test_a_checkpoint_without_reconstruction_is_another_run(tmp_path):
    def stop(stage, done, total):
        if done == 1: raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt):
        prune(tiny_llama(), FEW, checkpoint=tmp_path / "c", progress=stop)
    with pytest.raises(CalibPruneError, match="reconstruct"):
        prune(tiny_llama(), FEW, checkpoint=tmp_path / "c", reconstruct=1)


@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_bfloat16_models_are_trained_in_float32_and_stay_bfloat16(family):
    plain, trained = tiny_model(family).bfloat16(), tiny_model(family).bfloat16()
    prune(plain, FEW, "wanda", 0.5, **SMALL)
    prune(trained, FEW, "wanda", 0.5, reconstruct=1, **SMALL)
    assert all(o.dtype == torch.bfloat16 for o in trained.parameters())
    first = [k for k in matrices(plain) if "layers.0." in k]
    assert any(not torch.equal(matrices(plain)[k], matrices(trained)[k]) for k in first)
    assert all(torch.equal(matrices(plain)[k] == 0, matrices(trained)[k] == 0) for k in first)


def test_more_passes_leave_less_error_and_offload_changes_nothing():
    errors = [
        prune(tiny_llama(), FEW, "wanda", 0.5, reconstruct=n, **SMALL).trained.mean()
        for n in (1, 4, 16)
    ]
    assert errors[2] < 0.9 * errors[1] < 0.9 * errors[0]
    again = prune(
        tiny_llama(), FEW, "wanda", 0.5, reconstruct=4, offload=True, allocation="owl", **SMALL
    )
    assert again.equals(
        prune(tiny_llama(), FEW, "wanda", 0.5, reconstruct=4, allocation="owl", **SMALL)
    )


def test_what_float16_cannot_hold_does_not_come_back(monkeypatch):
    "Steps that lead beyond the type are taken back, and the next are smaller."
    model, train, tried = tiny_llama(), reconstruction._train, []
    layer, calls, hidden, wanted = layer_problem(model)
    layer.half()
    def far(layer, weights, *rest):
        tried.append(rest[-1])
        if len(tried) == 1: weights[2].data[weights[2] != 0] = 1e6
        else: train(layer, weights, *rest)
        return True
    monkeypatch.setattr(reconstruction, "_train", far)
    done = reconstruct(layer, calls, hidden, wanted, rate=0.02)
    assert tried == [0.02, 0.01] and done.after < done.before
    assert all(
        m.weight.dtype == torch.float16 and m.weight.isfinite().all()
        for m in prunable(layer).values()
    )


def test_a_step_that_goes_astray_is_made_smaller(monkeypatch):
    layer, calls, hidden, wanted = layer_problem(tiny_llama())
    train, tried = reconstruction._train, []
    def failing_twice(layer, weights, *rest):
        tried.append(rest[-1])
        if len(tried) < 3:
            weights[0].data[0, 0] = float("inf")
            return False
        return train(layer, weights, *rest)
    monkeypatch.setattr(reconstruction, "_train", failing_twice)
    done = reconstruct(layer, calls, hidden, wanted, rate=0.02)
    assert tried == [0.02, 0.01, 0.005] and done.rate == 0.005 and done.after < done.before


def test_numbers_that_are_not_finite_end_it_with_the_layers_name_and_the_layer_as_it_was():
    layer, calls, hidden, wanted = layer_problem(tiny_llama())
    before = [m.weight.clone() for m in prunable(layer).values()]
    with pytest.raises(CalibPruneError, match="Layer 7"):
        reconstruct(layer, calls, hidden, [o * float("inf") for o in wanted], name="Layer 7")
    assert all(
        torch.equal(m.weight, old) for m, old in zip(prunable(layer).values(), before, strict=True)
    )
    assert all(p.grad is None for p in layer.parameters())


def test_too_little_memory_is_said_before_training(monkeypatch):
    monkeypatch.setattr(reconstruction, "_free", lambda device: 10_000)
    model = tiny_llama()
    with pytest.raises(CalibPruneError, match=r"\d+\.\d GB"):
        prune(model, WINDOWS, reconstruct=1)
    monkeypatch.setattr(reconstruction, "_free", lambda device: None)
    prune(model, WINDOWS, reconstruct=1)


@pytest.mark.parametrize("passes", [-1, 1.5, True])
def test_passes_are_a_whole_number(passes):
    with pytest.raises(CalibPruneError, match="reconstruct"):
        prune(tiny_llama(), WINDOWS, reconstruct=passes)
