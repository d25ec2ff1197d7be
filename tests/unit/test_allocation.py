"""A sparsity divided among the layers: as many weights go as without, layers with outliers keep
more, bad requests are refused."""
import pytest
import torch

from calib_prune.core import CalibPruneError
from calib_prune.model.tiny import tiny_llama, tiny_model
from calib_prune.pruning.allocation import spread_out
from calib_prune.pruning.walk import prune

WINDOWS = torch.randint(1, 264, (16, 32), generator=torch.Generator().manual_seed(0))


def model_with_outliers():
    model = tiny_llama(num_hidden_layers=4)
    with torch.no_grad(): model.model.layers[1].mlp.up_proj.weight[:4] *= 30
    return model


# Wanda rounds per row
@pytest.mark.parametrize(
    "method, most", [("sparsegpt", 1), ("admm", 1), ("magnitude", 1), ("wanda", 48)]
)
def test_as_many_weights_go_and_the_layer_with_outliers_keeps_more(method, most):
    reports = {
        o: prune(model_with_outliers(), WINDOWS, method, 0.6, allocation=o)
        for o in ("uniform", "owl")
    }
    gone = {k: round(float((o.sparsity * o.d_out * o.d_in).sum())) for k, o in reports.items()}
    assert abs(gone["owl"] - gone["uniform"]) <= most * len(reports["owl"])
    by_layer = reports["owl"].groupby("layer").sparsity.mean()
    assert by_layer.idxmin() == 1 and by_layer.max() - by_layer.min() == pytest.approx(
        0.16, abs=0.02
    )


def test_layers_of_unequal_size_are_weighed():
    found = spread_out(0.5, [0.0, 0.01, 0.02], [100, 1000, 10])
    assert sum(s * n for s, n in zip(found, [100, 1000, 10], strict=True)) == pytest.approx(
        0.5 * 1110
    )
    assert found[0] > found[1] > found[2] and spread_out(0.5, [0.01, 0.01], [1, 2]) == [0.5, 0.5]


def test_experts_count_too():
    report = prune(tiny_model("qwen3_moe"), WINDOWS, "sparsegpt", 0.6, allocation="owl")
    weights = report.d_out * report.d_in
    assert float((report.sparsity * weights).sum() / weights.sum()) == pytest.approx(0.6, abs=2e-3)


@pytest.mark.parametrize("how, says", [(dict(sparsity=0.97), r"layer . for a sparsity of 1\.0"),
                                       (dict(pattern=(2, 4)), "Pattern 2:4"),
                                       (dict(sparsity=0.01), "sparsity of -0"),
                                       (dict(allocation="even"), "allocation")])
def test_what_cannot_be_is_refused_with_the_model_as_it_was(how, says):
    model = model_with_outliers()
    with pytest.raises(CalibPruneError, match=says):
        prune(model, WINDOWS, "magnitude", **(dict(allocation="owl") | how))
    assert all(
        torch.equal(a, b)
        for a, b in zip(model.parameters(), model_with_outliers().parameters(), strict=True)
    )
