"The walker against a slow walker that assumes nothing, and the promises it makes for every family."

import pandas as pd
import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from calib_prune.core import CalibPruneError
from calib_prune.model.tiny import TINY_FAMILIES, tiny_llama, tiny_model
from calib_prune.pruning.checkpoint import model_fingerprint
from calib_prune.pruning.grids import Quantisation
from calib_prune.pruning.layers import decoder_layers, prunable
from calib_prune.pruning.methods import METHODS
from calib_prune.pruning.sparsegpt import sparsegpt
from calib_prune.pruning.walk import prune
from calib_prune.pruning.wanda import wanda

KERNELS = {"sparsegpt": sparsegpt, "wanda": wanda}
PRUNERS = [name for name, method in METHODS.items() if not method.quantises]


GROUPS = ["one"] * 4 + ["other"] * 3  # of seven windows


def windows(n=7, length=24, seed=0):
    return torch.randint(1, 264, (n, length), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def slow_prune(model, tokens, kernel, sparsity):
    """Run the whole model anew for every layer, see every linear's inputs in float64, prune one by
    one."""
    for layer in decoder_layers(model):
        inputs = {}
        hooks = [
            m.register_forward_pre_hook(
                lambda _, args, name=name: inputs.setdefault(name, []).append(args[0])
            )
            for name, m in prunable(layer).items()
        ]
        model(tokens, use_cache=False)
        for h in hooks: h.remove()
        for name, linear in prunable(layer).items():
            x = torch.cat([o.flatten(0, -2) for o in inputs[name]]).double()
            linear.weight.copy_(
                kernel(linear.weight.data, (x.T @ x / len(x)).float(), sparsity).weight
            )
    return model


@pytest.mark.parametrize("family", TINY_FAMILIES)
@pytest.mark.parametrize("method", KERNELS)
def test_same_as_slow_walk(family, method):
    fast, slow = tiny_model(family), tiny_model(family)
    prune(fast, windows(), method, 0.5, batch_tokens=72)  # three windows a batch, and one left over
    slow_prune(slow, windows(), KERNELS[method], 0.5)
    for (name, a), b in zip(fast.named_parameters(), slow.parameters(), strict=True):
        # Batching moves sums in the last bits, which can swap two weights of nearly equal score.
        assert ((a == 0) == (b == 0)).float().mean() > 0.99, name
        assert torch.linalg.norm(a - b) <= 0.03 * torch.linalg.norm(b), name


@pytest.mark.parametrize("method", PRUNERS)
@pytest.mark.parametrize("pattern", [None, (2, 4)])
def test_conv1d_layers_are_pruned_along_their_input(method, pattern):
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        "gpt2",
        n_embd=32,
        n_layer=2,
        n_head=4,
        vocab_size=264,
        n_positions=64,
        initializer_range=0.2,
    )
    model = AutoModelForCausalLM.from_config(config).eval()
    report = prune(model, windows(), method, 0.5, pattern, groups=GROUPS)
    assert len(report) == 8 and (report["sparsity"] == 0.5).all()
    fc = model.transformer.h[0].mlp.c_fc
    # stored as [d_in, d_out]
    assert tuple(fc.weight.shape) == (32, 128) and (fc.weight == 0).float().mean() == 0.5
    if pattern: assert ((fc.weight.T.reshape(128, 8, 4) == 0).sum(-1) == 2).all()
    if method == "wanda": assert ((fc.weight == 0).sum(0) == 16).all()
    assert list(report.query("name == 'mlp.c_fc'")[["d_out", "d_in"]].iloc[0]) == [128, 32]


def test_matrices_that_are_not_linear_maps_are_refused_before_any_work():
    model = tiny_llama()
    model.model.layers[1].mlp.tables = torch.nn.Parameter(torch.ones(4, 96, 32))
    before = [p.clone() for p in model.parameters()]
    with pytest.raises(CalibPruneError, match=r"mlp\.tables \(4, 96, 32\)"):
        prune(model, torch.ones(2, 16, dtype=torch.int64))
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


def test_a_sparsity_of_one_is_refused_before_any_work(monkeypatch):
    monkeypatch.setattr("calib_prune.pruning.walk._first_windows", None)
    with pytest.raises(CalibPruneError, match=r"outside \[0, 1\)"):
        prune(tiny_llama(), windows(), sparsity=1.0)


def test_windows_longer_than_the_context_are_refused():
    model = tiny_llama(max_position_embeddings=20)
    with pytest.raises(CalibPruneError, match=" 24 .* 20"):
        prune(model, windows())
    assert len(prune(model, windows(length=20))) == 14


@pytest.mark.parametrize("device", ["cuda", torch.device("cuda:0")])
def test_a_missing_device_is_a_clear_error(device, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with pytest.raises(CalibPruneError, match="'cuda"):
        prune(tiny_llama(), windows(), device=device)
    assert len(prune(tiny_llama(), windows(), device=torch.device("cpu"))) == 14


def test_embeddings_head_and_norms_are_never_touched():
    model, dense = tiny_llama(), tiny_llama()
    prune(model, windows(), sparsity=0.9)
    linears = {
        f"model.layers.{i}.{n}.weight"
        for i, layer in enumerate(decoder_layers(model))
        for n in prunable(layer)
    }
    for (name, a), b in zip(model.named_parameters(), dense.parameters(), strict=True):
        assert torch.equal(a, b) == (name not in linears), name


@pytest.mark.parametrize("method", PRUNERS)
def test_pattern_holds_in_every_linear(method):
    model = tiny_llama()
    prune(model, windows(), method, pattern=(2, 4), groups=GROUPS)
    for layer in decoder_layers(model):
        for m in prunable(layer).values():
            assert ((m.weight.reshape(m.weight.shape[0], -1, 4) == 0).sum(-1) == 2).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_models_stay_low_precision(dtype):
    model = tiny_llama().to(dtype)
    report = prune(model, windows(), sparsity=0.6)
    assert {p.dtype for p in model.parameters()} == {dtype}
    assert (report["sparsity"] >= 0.6 - 1 / 48 ** 2).all() and report["error"].between(0, 1).all()


def test_same_result_again_and_offloaded():
    a, b = tiny_llama(), tiny_llama()
    reports = [prune(a, windows()), prune(b, windows(), offload=True, device="cpu")]
    assert reports[0].equals(reports[1])
    assert all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))


@pytest.mark.parametrize("method", METHODS)
def test_inputs_solved_side_by_side_give_the_same(method, monkeypatch):
    models, reports, before, set_threads = [
        tiny_llama(), tiny_llama()], [], torch.get_num_threads(), torch.set_num_threads
    how = dict(sparsity=0, quantise=Quantisation(4, 16)) if METHODS[method].quantises else {}
    # products round by the number of torch's threads, and ALPS takes another path from another
    # rounding
    set_threads(1)
    monkeypatch.setattr(torch, "set_num_threads", lambda n: None)
    try:
        for n, model in enumerate(models, 1):
            monkeypatch.setattr("calib_prune.kernels.compiled.threads", lambda n=n: n)
            reports.append(prune(model, windows(), method, groups=GROUPS, **how))
    finally: set_threads(before)
    pd.testing.assert_frame_equal(*reports, rtol=1e-5)
    for p, q in zip(*(o.parameters() for o in models), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)
    assert all(p.is_leaf and p.grad_fn is None
               for p in models[1].parameters()), "no thread keeps gradients"


def test_magnitude_ignores_the_calibration_data():
    a, b = tiny_llama(), tiny_llama()
    prune(a, windows(seed=0), "magnitude"), prune(b, windows(seed=1), "magnitude")
    assert all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))


def test_fewer_tokens_than_dimensions():
    report = prune(tiny_llama(), windows(1, 4))
    assert (report["tokens"] == 4).all() and report["error"].between(0, 1).all()


def test_an_input_that_is_always_zero_is_dead():
    model = tiny_llama()
    with torch.no_grad(): decoder_layers(model)[0].input_layernorm.weight[3] = 0
    report = prune(model, windows()).set_index(["layer", "name"])
    assert (
        report.loc[(0, "self_attn.q_proj"), "dead"] == 1
        and report.loc[(0, "mlp.up_proj"), "dead"] == 0
    )
    assert (decoder_layers(model)[0].self_attn.q_proj.weight[:, 3] == 0).all()


def test_not_a_number_names_the_layer():
    model = tiny_llama()
    with torch.no_grad(): decoder_layers(model)[1].mlp.up_proj.weight[0, 0] = float("nan")
    with pytest.raises(CalibPruneError, match="Layer 1, mlp"): prune(model, windows())


def test_progress_is_reported_to_the_end():
    seen = []
    prune(tiny_llama(num_hidden_layers=3), windows(), progress=lambda *state: seen.append(state))
    assert seen == [("pruning", i, 3) for i in range(4)]


def test_layers_work_again_after_an_error():
    model = tiny_llama()
    with pytest.raises(CalibPruneError): prune(model, windows(), sparsity=1.5)
    assert torch.isfinite(model(windows()).logits).all()
    assert not any(m._forward_pre_hooks for m in model.modules() if isinstance(m, nn.Linear))


class Stop(Exception): pass


def stopping(at):
    "A progress function that stops the work before layer `at`."
    def show(stage, done, total):
        if done == at: raise Stop
    return show


@pytest.mark.parametrize("method,family,at", [("sparsegpt", "llama", 0), ("sparsegpt", "llama", 2),
                                              ("wanda", "gpt_neox", 1), ("sparsegpt", "qwen2", 1)])
def test_interrupted_prune_resumes_to_the_same_bits(tmp_path, method, family, at):
    make = lambda: tiny_model(family, num_hidden_layers=3)
    tokens = torch.randint(1, 200, (6, 20), generator=torch.Generator().manual_seed(1))
    whole = make()
    expected = prune(whole, tokens, method, 0.5, batch_tokens=40)
    with pytest.raises(Stop):
        prune(
            make(), tokens, method, 0.5, batch_tokens=40, checkpoint=tmp_path, progress=stopping(at)
        )
    assert len(list(tmp_path.glob("*.safetensors"))) == at
    resumed = make()
    found = prune(resumed, tokens, method, 0.5, batch_tokens=40, checkpoint=tmp_path)
    pd.testing.assert_frame_equal(found, expected)
    assert model_fingerprint(resumed) == model_fingerprint(whole)
    assert all(
        torch.equal(a, b) for a, b in zip(resumed.parameters(), whole.parameters(), strict=True)
    )


def test_a_checkpoint_serves_its_own_run_only(tmp_path):
    tokens = torch.randint(1, 200, (4, 20), generator=torch.Generator().manual_seed(1))
    run = dict(sparsity=0.5, checkpoint=tmp_path)
    with pytest.raises(Stop): prune(tiny_llama(), tokens, progress=stopping(1), **run)
    for other, named in ((dict(sparsity=0.6), "sparsity"), (dict(method="wanda"), "method"),
                         (dict(damping=0.1), "damping")):
        with pytest.raises(CalibPruneError, match=named):
            prune(tiny_llama(), tokens, **(run | other))
    with pytest.raises(CalibPruneError, match="tokens"):
        prune(tiny_llama(), tokens + 1, **run)
    with pytest.raises(CalibPruneError, match="model"):
        prune(tiny_llama(seed=5), tokens, **run)
    file = next(tmp_path.glob("*.safetensors"))
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(CalibPruneError):
        prune(tiny_llama(), tokens, **run)
    file.unlink()
    prune(tiny_llama(), tokens, **run)
