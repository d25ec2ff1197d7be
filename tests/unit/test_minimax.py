"""Pruning for the worst part of a calibration set: never worse for it than equal weights, and a
plain method where there is one group."""
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from calib_prune.calibration.sets import build_calibration
from calib_prune.core import CalibPruneError
from calib_prune.model.tiny import tiny_llama, tiny_tokenizer
from calib_prune.pruning.methods import METHODS
from calib_prune.pruning.robust import group_errors, minimax, relative_moments
from calib_prune.pruning.sparsegpt import sparsegpt
from calib_prune.pruning.walk import prune, split


def moment(d, n, size, rng):
    x = size * torch.randn(n, d, generator=rng) @ torch.diag(torch.rand(d, generator=rng) + 0.1)
    return x.T @ x / n


@settings(max_examples=25)
@given(st.integers(1, 4), st.integers(1, 3), st.integers(0, 99))
def test_the_worst_part_never_fares_worse_than_with_equal_weights(groups, maps, seed):
    rng = torch.Generator().manual_seed(seed)
    weights = [torch.randn(8 + 4 * i, 24, generator=rng) for i in range(maps)]
    moments = [moment(24, 60, 10.0 ** i, rng) for i in range(groups)]
    kernel = lambda h: [sparsegpt(w, h, 0.5) for w in weights]
    equal, best = (minimax(weights, moments, kernel, rounds) for rounds in (1, 6))
    relative = relative_moments(weights, moments)
    assert best[0].error <= equal[0].error
    assert best[0].error == pytest.approx(
        group_errors(weights, best, relative).max().item(), rel=1e-6
    )
    assert all(o.sparsity == e.sparsity for o, e in zip(best, equal))


def test_more_rounds_are_estimated_to_take_longer():
    assert METHODS["minimax"].passes > METHODS["balanced"].passes


def test_the_loudness_of_a_part_does_not_matter():
    rng = torch.Generator().manual_seed(0)
    weight, a, b = torch.randn(16, 24, generator=rng), moment(24, 60, 1, rng), moment(
        24, 60, 1, rng)
    kernel = lambda h: [sparsegpt(weight, h, 0.5)]
    one, other = (minimax([weight], [a, s * b], kernel)[0].weight for s in (1, 1024))
    assert ((one == 0) == (other == 0)).float().mean() > 0.99


def test_a_part_without_output_is_named():
    with pytest.raises(CalibPruneError, match="group 1"):
        minimax([torch.ones(2, 3)], [torch.eye(3), torch.zeros(3, 3)], lambda h: [])


def test_windows_of_each_part_stay_together():
    tokens, groups = torch.arange(14).view(7, 2), ["a", "b", "a", "a", "b", "a", "a"]
    batches, where = split(tokens, 2, groups)
    assert where == {"a": [0, 1, 2], "b": [3]}
    assert [b[:, 0].tolist() for b in batches] == [[0, 4], [6, 10], [12], [2, 8]]


@pytest.mark.parametrize("method", [o.name for o in METHODS.values() if o.by_group])
def test_interrupted_and_resumed_with_parts(method, tmp_path):
    tokens, groups = (
        torch.randint(1, 264, (6, 16), generator=torch.Generator().manual_seed(0)),
        ["x", "y"] * 3,
    )
    def stop(stage, done, total):
        if done == 1: raise KeyboardInterrupt
    whole, resumed = tiny_llama(), tiny_llama()
    report = prune(whole, tokens, method, 0.5, groups=groups)
    with pytest.raises(KeyboardInterrupt):
        prune(tiny_llama(), tokens, method, 0.5, groups=groups, checkpoint=tmp_path, progress=stop)
    assert prune(resumed, tokens, method, 0.5, groups=groups, checkpoint=tmp_path).equals(report)
    assert all(
        torch.equal(p, q) for p, q in zip(whole.parameters(), resumed.parameters(), strict=True)
    )
    with pytest.raises(CalibPruneError, match="groups"):
        prune(tiny_llama(), tokens, method, 0.5, groups=groups[::-1], checkpoint=tmp_path)


@pytest.mark.parametrize("groups", [None, ["x"] * 6, ["x", ""] * 3, ["x", "y"]])
def test_parts_that_cannot_be_weighed(groups):
    with pytest.raises(CalibPruneError):
        prune(tiny_llama(), torch.ones(6, 16, dtype=torch.int64), "minimax", groups=groups)


def test_own_files_are_parts_of_their_own(tmp_path):
    names = [str(tmp_path / f"{o}.txt") for o in "ab"]
    for name in names: (tmp_path / name).write_text(f"A line of {name}.\n" * 400)
    cal = build_calibration(",".join(names), tiny_tokenizer(), 4, 32)
    assert cal.groups == [names[0]] * 2 + [names[1]] * 2
    assert len(prune(tiny_llama(), cal.tokens, "balanced", 0.5, groups=cal.groups)) == 14
