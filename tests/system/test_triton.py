"""The GPU kernels against their plain forms: on a GPU where there is one, else in Triton's
interpreter."""
import importlib.util
import json
from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from calib_prune.core import CalibPruneError
from calib_prune.pruning import sparsegpt as sparsegpt_module
from calib_prune.pruning.factor import factorise
from calib_prune.pruning.hessian import SecondMoment
from calib_prune.pruning.masks import smallest, smallest_of_groups
from calib_prune.pruning.sparsegpt import sparsegpt
from calib_prune.pruning.sweep import sweep_compiled, sweep_torch
from tests import ROOT
from tests.processes import run

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="Triton has no release for this platform"
)
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(scope="module")
def kernels():
    from calib_prune.pruning import triton_kernels
    assert triton_kernels.runs_on(
        DEVICE
    ), "set TRITON_INTERPRET=1 before the first test imports Triton"
    return triton_kernels


def problem(d_out, d_in, seed=0, dead=()):
    "A weight and the second moment of correlated inputs."
    rng = torch.Generator().manual_seed(seed)
    x = torch.randn(4 * d_in + 16, d_in, generator=rng) @ (
        torch.eye(d_in) + torch.randn(d_in, d_in, generator=rng) / d_in**0.5
    )
    x[:, list(dead)] = 0
    stats = SecondMoment(d_in)
    stats.update(x)
    return torch.randn(d_out, d_in, generator=rng), stats.matrix()


def both(kernels, weight, mask, upper, pattern=None):
    """Sweep copies with the plain form and with the kernel and compare everything that they leave
    behind."""
    plain, chosen = weight.clone(), mask.clone()
    squares = sweep_torch(plain, chosen, upper, pattern)
    ours, mine = weight.to(DEVICE), mask.to(DEVICE)
    ours, mine = (o if o is not given else o.clone() for o, given in ((ours, weight), (mine, mask)))
    found = kernels.sweep_triton(ours, mine, upper.to(DEVICE), pattern)
    assert isinstance(found, float) and found == pytest.approx(squares, rel=1e-5)
    assert torch.equal(mine.cpu(), chosen) and not ours.cpu()[chosen].any()
    torch.testing.assert_close(ours.cpu(), plain, rtol=1e-4, atol=1e-5 * weight.abs().max().item())
    return ours.cpu()


# --- the sweep

@pytest.mark.parametrize("d_out,columns,share", [(24, 64, 0.6), (40, 32, 0.6), (17, 7, 0.5),
                                                 (1, 1, 1.0), (33, 20, 0.0), (20, 20, 1.0),
                                                 (16, 128, 0.5), (3, 200, 0.6)])
def test_sweep_equals_plain_form(kernels, d_out, columns, share):
    """Tiles that are full, cut short in outputs and in columns, and wider than 128; nothing pruned,
    and everything."""
    W, H = problem(d_out, columns, seed=d_out)
    upper = factorise(H, block=columns).upper_blocks[0]
    block = W.T.contiguous()
    mask = smallest(
        (block.abs() / upper.diagonal()[:, None]).view(1, -1), int(share * W.numel())
    ).view(block.shape)
    result = both(kernels, block, mask, upper)
    if share == 0: assert torch.equal(result, block)
    if share == 1: assert not result.any()


@pytest.mark.parametrize("pattern", [(2, 4), (1, 4), (4, 8), (2, 3), (3, 5), (1, 2)])
def test_sweep_chooses_the_same_pattern(kernels, pattern):
    W, H = problem(18, 4 * pattern[1], seed=pattern[1])
    upper = factorise(H, block=4 * pattern[1]).upper_blocks[0]
    block = W.T.contiguous()
    result = both(kernels, block, torch.zeros_like(block, dtype=torch.bool), upper, pattern)
    assert (result.T.reshape(18, -1, pattern[1]).count_nonzero(-1) == pattern[0]).all()


def test_sweep_pattern_ties_go_to_the_lowest_index(kernels):
    block = torch.ones(8, 5)
    block[1::2] *= -1
    mask = torch.zeros(8, 5, dtype=torch.bool)
    result = both(kernels, block, mask, torch.eye(8), (2, 4))
    assert torch.equal(
        result == 0, torch.tensor([[True], [True], [False], [False]] * 2).expand(8, 5)
    )


@pytest.mark.parametrize("pattern", [None, (2, 4)])
def test_sweep_of_views(kernels, pattern):
    "Neither the weight, the mask nor the factor needs to be contiguous."
    W, H = problem(12, 16, seed=3)
    upper = factorise(H, block=16).upper_blocks[0].T.contiguous().T
    mask = torch.rand(12, 16, generator=torch.Generator().manual_seed(0)).lt(0.5)
    ours, mine = W.clone().to(DEVICE).T, mask.clone().to(DEVICE).T
    plain, chosen = W.T.contiguous(), mask.T.contiguous()
    squares = sweep_torch(plain, chosen, upper, pattern), kernels.sweep_triton(
        ours, mine, upper.to(DEVICE), pattern
    )
    assert squares[1] == pytest.approx(squares[0], rel=1e-5) and torch.equal(mine.cpu(), chosen)
    torch.testing.assert_close(ours.cpu(), plain, rtol=1e-4, atol=1e-5)


def test_sweep_touches_nothing_else(kernels):
    "Outputs and columns next to the block keep their values."
    W, H = problem(20, 12, seed=4)
    around = torch.full((14, 20), 7., device=DEVICE)
    around[1:13] = W.T.to(DEVICE)
    upper = factorise(H, block=12).upper_blocks[0].to(DEVICE)
    kernels.sweep_triton(around[1:13], around[1:13] > 0, upper)
    assert (around[[0, 13]] == 7).all() and not (around[1:13] == 7).any()


@pytest.mark.parametrize("d_out,d_in,block,how", [(24, 64, 32, {"sparsity": 0.6}),
                                                  (20, 200, 128, {"sparsity": 0.6}),
                                                  (10, 72, 32, {"pattern": "2:4"}),
                                                  (6, 30, 12, {"pattern": (2, 3)}),
                                                  (9, 40, 32, {"sparsity": 0.97}),
                                                  (9, 40, 32, {"sparsity": 0})])
def test_whole_matrix(kernels, monkeypatch, d_out, d_in, block, how):
    "SparseGPT through the kernel is SparseGPT, dead inputs and a narrow last block included."
    W, H = problem(d_out, d_in, seed=d_in, dead=(1, d_in - 1))
    expected = sparsegpt(W, H, block=block, **how)
    calls = []
    def through_kernel(*args): calls.append(kernels.sweep_triton(*args)); return calls[-1]
    blocks = partial(sparsegpt_module._sweep_blocks, sweep=through_kernel)
    monkeypatch.setattr(sparsegpt_module, "_blocks_for", lambda device: blocks)
    result = sparsegpt(W, H, block=block, **how)
    assert len(calls) == (-(-d_in // block) if how != {"sparsity": 0} else 0)
    assert (
        torch.equal(result.weight == 0, expected.weight == 0)
        and result.sparsity == expected.sparsity
    )
    torch.testing.assert_close(result.weight, expected.weight, rtol=1e-4, atol=1e-5)
    assert result.error == pytest.approx(expected.error, rel=1e-4) and result.dead == 2


def test_kernel_and_compiled_sweep_agree(kernels):
    W, H = problem(30, 24, seed=8)
    upper, compiled = factorise(H, block=24).upper_blocks[0], W.T.contiguous()
    mask = smallest(compiled.abs().view(1, -1), 400).view(compiled.shape)
    ours = compiled.clone().to(DEVICE)
    squares = sweep_compiled(compiled, mask, upper), kernels.sweep_triton(
        ours, mask.to(DEVICE), upper.to(DEVICE)
    )
    torch.testing.assert_close(ours.cpu(), compiled, rtol=1e-4, atol=1e-5)
    assert squares[1] == pytest.approx(squares[0], rel=1e-5)


# --- Wanda's choice

few_values = st.lists(
    st.sampled_from([0.0, -0.0, 1e-42, 1e-3, 1.0, 1.0000001, 2.0, 65504.0]), min_size=1, max_size=37
)


@settings(max_examples=60)
@given(few_values, st.data())
def test_choice_with_ties(kernels, row, data):
    """Exactly k, the smallest, and of equal scores those with the lowest index: against Python's
    stable sort."""
    k = data.draw(st.integers(0, len(row)))
    weight = torch.tensor([row, row[::-1]]) * torch.tensor(data.draw(st.sampled_from([1., -1.])))
    mask = kernels.wanda_mask_triton(
        weight.to(DEVICE), torch.ones(len(row), device=DEVICE), k
    ).cpu()
    for values, marked in zip(weight.abs().tolist(), mask.tolist(), strict=True):
        assert np.flatnonzero(marked).tolist() == sorted(
            sorted(range(len(values)), key=values.__getitem__)[:k]
        )


@settings(max_examples=40)
@given(st.integers(1, 4), st.integers(1, 90), st.integers(0, 99),
       st.sampled_from([torch.float32, torch.bfloat16, torch.float16]), st.booleans())
def test_choice_equals_plain_form(kernels, d_out, d_in, seed, dtype, transposed):
    "Any width and type; norms that span many orders, and dead inputs."
    rng = torch.Generator().manual_seed(seed)
    weight = torch.randn(d_out, d_in, generator=rng).to(dtype)
    norms = torch.exp(4 * torch.randn(d_in, generator=rng)) * (
        torch.rand(d_in, generator=rng) > 0.1
    )
    k = seed * d_in // 99
    given_weight = (weight.T.contiguous().T if transposed else weight).to(DEVICE)
    mask = kernels.wanda_mask_triton(given_weight, norms.to(DEVICE), k)
    assert mask.dtype == torch.bool and torch.equal(
        mask.cpu(), smallest(weight.abs().float() * norms, k)
    )


@settings(max_examples=25)
@given(st.integers(1, 5), st.integers(1, 9),
       st.sampled_from([(2, 4), (1, 2), (4, 8), (3, 5), (1, 3)]), st.integers(0, 99))
def test_choice_in_groups(kernels, d_out, groups, pattern, seed):
    rng = torch.Generator().manual_seed(seed)
    # ties are common
    weight = torch.randn(d_out, groups * pattern[1], generator=rng).round(decimals=1)
    norms = torch.rand(weight.shape[1], generator=rng).round(decimals=1)
    mask = kernels.wanda_mask_triton(weight.to(DEVICE), norms.to(DEVICE), 0, pattern)
    assert torch.equal(mask.cpu(), smallest_of_groups(weight.abs() * norms, pattern))


# --- without a GPU, and where the kernels cannot run

def test_clear_error_where_they_cannot_run(kernels):
    with pytest.raises(CalibPruneError, match=" meta "):
        kernels.sweep_triton(torch.empty(4, 4, device="meta"), None, None)
    code = (
        "import torch; from calib_prune.pruning.triton_kernels import runs_on, wanda_mask_triton as"
        " f; from calib_prune.core import *\nprint(runs_on('cpu'), runs_on('cuda'))\ntry:"
        " f(torch.ones(2, 2), torch.ones(2), 1)\nexcept CalibPruneError as e: print(e)"
    )
    out = run(program=code, TRITON_INTERPRET=None)
    assert (
        out.stdout.splitlines()[0] == "False True"
        and "cannot run on cpu here" in out.stdout
        and "TRITON_INTERPRET=1" in out.stdout
    )


def test_module_imports_without_triton():
    code = (
        "import sys; sys.modules['triton'] = None; import calib_prune.pruning.triton_kernels as t; "
        "print(t.runs_on('cuda'), t.runs_on('cpu'))"
    )
    out = run(program=code)
    assert out.stdout.strip() == "False False", out.stderr


COMPILE = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from calib_prune.pruning import triton_kernels as t
def build(name, weight, warps, capability, **fixed):
    f = getattr(t, name)
    types = {"weight": weight, "mask": "*u8", "upper": "*fp32", "squares": "*fp32", "norms": "*fp32"}
    source = ASTSource(f, {n: "constexpr" if n in fixed else types.get(n, "i32") for n in f.arg_names}, fixed)
    k = triton.compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": warps, **t.FUSE})
    assert k.asm["cubin"] and "tf32" not in k.asm["ptx"] and ".local" not in k.asm["ptx"]
    print(name, capability, "div.rn" in k.asm["ptx"])
build("_sweep", "*fp32", 1, 90, N=0, M=0, STEP=1, GROUP=1, COLUMNS=128, ROWS=16)
build("_sweep", "*fp32", 1, 80, N=2, M=4, STEP=4, GROUP=4, COLUMNS=128, ROWS=16)
build("_smallest_of_row", "*bf16", 4, 90, COLUMNS=4096)
build("_smallest_of_groups", "*bf16", 4, 80, N=2, M=4, GROUP=4, TILE=256)
"""  # noqa: E501


def test_kernels_compile_for_gpus(tmp_path):
    """Down to machine code of two generations, without a GPU: no reduced-precision products, no
    local memory."""
    out = run(program=COMPILE, TRITON_INTERPRET=None, TRITON_CACHE_DIR=str(tmp_path))
    assert out.stdout.splitlines() == [
        "_sweep 90 True", "_sweep 80 True", "_smallest_of_row 90 False",
        "_smallest_of_groups 80 False"], out.stderr


# --- the measurement script

def bench():
    spec = importlib.util.spec_from_file_location("bench_gpu", ROOT / "bench" / "gpu.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_measurement_script(kernels, tmp_path):
    out = tmp_path / "gpu-tiny.json"
    assert bench().main([
        "--shapes", "16x40", "--device", DEVICE, "--repeats", "1", "--block", "16", "--out",
        str(out)]) == 0
    result = json.loads(out.read_text())
    assert result["passed"] and [row["shape"] for row in result["shapes"]] == ["16x40"]
    assert result["shapes"][0]["checks"]["sweep"]["largest_difference"] < 1e-4


def test_measurement_script_asks_for_a_gpu(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit): bench().main([])
    assert "no CUDA GPU" in capsys.readouterr().err
