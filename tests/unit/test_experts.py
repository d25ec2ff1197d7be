"""Mixtures of experts: as the same model with its experts apart, routers dense, neglected experts
handled, saved for transformers."""
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from calib_prune.model.loading import load_model, save_model
from calib_prune.model.tiny import MIXTURES, tiny_model, tiny_tokenizer
from calib_prune.pruning.experts import is_fused, one_by_one, routers
from calib_prune.pruning.layers import decoder_layers, prunable
from calib_prune.pruning.walk import prune

WINDOWS = torch.randint(1, 264, (32, 64), generator=torch.Generator().manual_seed(0))
FEW = WINDOWS[:8]


class PlainExpert(nn.Module):
    "Gate above up and no biases, as in most families."
    def __init__(self, fused, e):
        super().__init__()
        both, down, self.fused = fused.gate_up_proj[e], fused.down_proj[e], [fused]
        half = len(both) // 2
        self.gate_proj, self.up_proj, self.down_proj = (
            self.linear(o) for o in (both[:half], both[half:], down)
        )

    @staticmethod
    def linear(weight, bias=None):
        found = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None)
        found.weight = nn.Parameter(weight.detach().clone(), requires_grad=False)
        if bias is not None: found.bias = nn.Parameter(bias.detach().clone(), requires_grad=False)
        return found

    def forward(self, x):
        return self.down_proj(self.fused[0].act_fn(self.gate_proj(x)) * self.up_proj(x))


class PlainGptOss(PlainExpert):
    "Transposed, gate and up in turns, with biases, and a gate of its own."
    def __init__(self, fused, e):
        nn.Module.__init__(self)
        both, bias = fused.gate_up_proj[e].T, fused.gate_up_proj_bias[e]
        self.limit, self.alpha = fused.limit, fused.alpha
        self.gate_proj, self.up_proj = self.linear(both[::2], bias[::2]), self.linear(
            both[1::2], bias[1::2]
        )
        self.down_proj = self.linear(fused.down_proj[e].T, fused.down_proj_bias[e])

    def forward(self, x):
        gate, up = self.gate_proj(x).clamp(max=self.limit), self.up_proj(x).clamp(
            -self.limit, self.limit
        )
        return self.down_proj((up + 1) * gate * torch.sigmoid(gate * self.alpha))


class PlainExperts(nn.ModuleList):
    "Experts as models had them before transformers 5: a list of modules of their own."
    def forward(self, hidden, index, weights):
        out = torch.zeros_like(hidden)
        for e, expert in enumerate(self):
            token, place = torch.where(index == e)
            if len(token):
                out.index_add_(0, token, expert(hidden[token]) * weights[token, place, None])
        return out


def taken_apart(model):
    "The same model, its experts modules of their own for good."
    for parent in [*model.modules()]:
        for name, child in [*parent.named_children()]:
            if is_fused(child):
                kind = PlainGptOss if child.has_bias else PlainExpert
                setattr(
                    parent, name, PlainExperts(kind(child, e) for e in range(child.num_experts))
                )
    return model


@pytest.mark.parametrize("family, method", [
    *((o, "sparsegpt") for o in MIXTURES), ("mixtral", "wanda"), ("mixtral", "admm")])
def test_fused_experts_are_pruned_like_experts_apart(family, method):
    fused, apart = tiny_model(family), taken_apart(tiny_model(family))
    reports = [prune(m, WINDOWS, method, 0.5) for m in (fused, apart)]
    assert not reports[
        0
    ].all_tokens.any(), "every expert has seen enough tokens, so the comparison is of all"
    assert len(reports[0]) == len(reports[1]) and (reports[0].sparsity >= 0.49).all()
    for a, b in zip(decoder_layers(fused), decoder_layers(apart), strict=True):
        with one_by_one(a):
            ours, plain = prunable(a), prunable(b)
            assert ours.keys() == plain.keys()
            differ = sum(int(((ours[k].weight == 0) != (plain[k].weight == 0)).sum()) for k in ours)
            assert differ <= 1e-3 * sum(m.weight.numel() for m in ours.values())
            for k in ours:
                assert torch.norm(ours[k].weight - plain[k].weight) < 0.02 * torch.norm(
                    plain[k].weight
                ), k


@pytest.mark.parametrize("family", MIXTURES)
def test_all_matrices_but_routers_are_pruned(family):
    dense, model = tiny_model(family), tiny_model(family)
    prune(model, FEW, "sparsegpt", 0.5)
    left = {
        n for i, o in enumerate(model.model.layers) for at in routers(o)
        for n, _ in model.named_parameters() if n.startswith(f"model.layers.{i}.{at}.")}
    assert left and all(
        torch.equal(dict(model.named_parameters())[n], dict(dense.named_parameters())[n])
        for n in left
    )
    for name, p in model.named_parameters():
        if ".layers." in name and p.ndim > 1 and "bias" not in name and name not in left:
            assert abs((p == 0).float().mean() - 0.5) < 0.02, name


def test_a_shared_expert_as_wide_as_there_are_experts_is_no_router():
    model = tiny_model("qwen2_moe", shared_expert_intermediate_size=4)
    report = prune(model, FEW, "wanda", 0.5)
    assert {f"mlp.shared_expert.{o}_proj" for o in ("gate", "up", "down")} <= set(report.name)
    assert [*routers(model.model.layers[0])] == ["mlp.gate", "mlp.shared_expert_gate"]


@pytest.mark.parametrize("family", MIXTURES)
def test_a_pruned_mixture_loads_in_plain_transformers(family, tmp_path):
    model = tiny_model(family)
    prune(model, FEW, "wanda", 0.5)
    folder = save_model(model, tiny_tokenizer(), tmp_path / "out", {})
    with torch.no_grad():
        want = model(FEW[:2]).logits
        plain = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)(
            FEW[:2]
        ).logits
        again = load_model(str(folder))[0](FEW[:2]).logits
    assert torch.allclose(plain, want, atol=1e-5) and torch.allclose(again, want, atol=1e-5)


@pytest.mark.parametrize(
    "family, method", [("mixtral", "sparsegpt"), ("qwen3_moe", "wanda"), ("deepseek_v3", "admm")]
)
def test_an_expert_without_tokens_is_measured_on_all_of_them_and_the_report_says_so(family, method):
    model = tiny_model(family)
    layer = decoder_layers(model)[1]
    router = layer.mlp.gate
    with torch.no_grad():
        def shunned(module, args, out):  # nothing is routed to expert 2
            logits, weights, index = out
            return logits, weights, torch.where(index == 2, 3, index)
        router.register_forward_hook(shunned)
        report = prune(model, FEW, method, 0.5).set_index(["layer", "name"])
    few = report[report.all_tokens]
    assert {o for _, o in few.index} == {f"mlp.experts.2.{o}_proj" for o in ("gate", "up", "down")}
    assert {o for o, _ in few.index} == {1} and (few.tokens == FEW.numel()).all()
    assert (few.sparsity >= 0.49).all() and few.error.between(0, 1).all()


def test_a_killed_prune_of_a_mixture_goes_on(tmp_path):
    def stop(stage, done, total):
        if done == 1: raise KeyboardInterrupt
    model, again = tiny_model("qwen3_moe", num_hidden_layers=3), tiny_model(
        "qwen3_moe", num_hidden_layers=3
    )
    with pytest.raises(KeyboardInterrupt):
        prune(again, FEW, "sparsegpt", 0.5, checkpoint=tmp_path / "c", progress=stop)
    assert not any(
        isinstance(o, nn.ModuleList) and len(o) == 8 for o in again.modules()
    ), "fused again after the interruption"
    again = tiny_model("qwen3_moe", num_hidden_layers=3)
    assert prune(again, FEW, "sparsegpt", 0.5, checkpoint=tmp_path / "c").equals(
        prune(model, FEW, "sparsegpt", 0.5)
    )
    assert all(
        torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True)
    )


def test_experts_without_a_gate_compute_the_same_apart():
    family = pytest.importorskip("transformers.models.nemotron_h.modeling_nemotron_h")
    layer, rng = nn.Module(), torch.Generator().manual_seed(0)
    layer.experts = family.NemotronHExperts(
        SimpleNamespace(n_routed_experts=4,
                        hidden_size=12,
                        moe_intermediate_size=20,
                        moe_latent_size=None,
                        mlp_hidden_act="relu2",
                        _experts_implementation="eager"))
    for o in layer.experts.parameters(): o.data = torch.randn(o.shape, generator=rng)
    hidden, weights = torch.randn(30, 12, generator=rng), torch.rand(30, 2, generator=rng)
    index = torch.stack(
        [torch.randint(0, 2, (30,), generator=rng), torch.randint(2, 4, (30,), generator=rng)], -1
    )
    with torch.no_grad():
        fused = layer.experts(hidden, index, weights)
        with one_by_one(layer):
            assert [*prunable(layer)] == [
                f"experts.{e}.{name}" for e in range(4) for name in ("up_proj", "down_proj")
            ]
            torch.testing.assert_close(layer.experts(hidden, index, weights), fused)
            layer.experts[1].up_proj.weight.zero_()
    assert not layer.experts.up_proj[1].any() and layer.experts.up_proj[0].any()
