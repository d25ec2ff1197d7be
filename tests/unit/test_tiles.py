"""Products from tiles against float64: any shape, any layout, and not a number outside of what was
asked for."""
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from calib_prune.core import CalibPruneError
from calib_prune.kernels import tiles
from calib_prune.kernels.tiles import CACHED_ROWS, COLS, DEPTH, ROWS, STRIPES, add_product

CANARY = -12345.0
sizes = st.one_of(
    st.integers(1, 150),
    st.sampled_from(
        [ROWS, COLS, 2 * ROWS, 2 * COLS, CACHED_ROWS, CACHED_ROWS + ROWS, 3 * COLS, ROWS * COLS]
    ),
)
depths = st.one_of(st.integers(1, 40), st.sampled_from([
    DEPTH - 1, DEPTH, DEPTH + 1, 2 * DEPTH, 700]), st.integers(1, 700))
# down, across, offset, transposed?
steps = st.tuples(st.integers(1, 3), st.integers(1, 3), st.integers(0, 5), st.booleans())


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def laid(rows, cols, layout=(1, 1, 0, False), width=0, seed=0):
    "A matrix that is part of a larger one, and the larger one; `width`: of the larger one's rows."
    down, across, at, turned = layout
    if turned: rows, cols = cols, rows
    whole = random(at + rows * down, max(at + cols * across, width), seed=seed)
    part = whole[at:at + rows * down:down, at:at + cols * across:across]
    return (part.T if turned else part), whole


def check(total, a, b, others=(), lower=False, subtract=False):
    "Add a product to a part of a canvas, and look at every number that there is."
    kept = [o.clone() for o in (a, b, *others)]
    start, inputs = total.clone(), (a.double(), b.double())
    add_product(total, a, b, lower=lower, subtract=subtract)
    exact = start.double() + (-1 if subtract else 1) * inputs[0] @ inputs[1]
    room = 1e-6 * (start.double().abs() + inputs[0].abs() @ inputs[1].abs()) + 1e-30
    wrong = (total.double() - exact).abs() > room
    assert not (wrong.tril() if lower else wrong).any()
    for before, now in zip(kept, (a, b, *others)):
        assert torch.equal(before, now), "an input was changed"


@settings(max_examples=300)
@given(sizes, sizes, depths, steps, st.integers(1, 3), st.integers(0, 5), st.booleans(),
       st.booleans(), st.integers(0, 99))
@example(2 * ROWS, 2 * COLS, DEPTH + 3, (1, 1, 0, False), 1, 0, False, True, 0)  # whole tiles
@example(CACHED_ROWS + ROWS, 3 * COLS, 2 * DEPTH, (1, 1, 0, True), 1, 0, True, False, 1)
@example(150, 150, 700, (1, 1, 0, True), 1, 0, True, True, 2)
@example(1, 1, 1, (2, 3, 1, True), 2, 1, True, False, 3)
def test_it_is_the_product_and_nothing_else_changes(
    rows, cols, depth, layout, down, at, lower, subtract, seed
):
    a, whole_a = laid(rows, depth, layout, seed=seed)
    b, whole_b = laid(depth, cols, (down, 1, at, False), seed=seed + 1)
    canvas = torch.full((rows * down + 4, cols + at + 3), CANARY)
    total = canvas[2:2 + rows * down:down, at + 1:at + 1 + cols]
    total.copy_(random(rows, cols, seed=seed + 2))
    check(total, a, b, (whole_a, whole_b), lower, subtract)
    total.fill_(CANARY)
    assert (canvas == CANARY).all(), "something outside of the result was written"


@pytest.mark.parametrize("whole", [True, False])
@pytest.mark.parametrize("turned", [True, False])
@pytest.mark.parametrize(
    "width_a, width_b, width_c", [(1024, 0, 0), (0, 1024, 0), (0, 0, 1024), (2048, 1024, 3072)]
)
def test_steps_that_fall_on_the_same_cache_lines(whole, turned, width_a, width_b, width_c):
    rows, cols, depth = (5 * ROWS, 3 * COLS, DEPTH + 30) if whole else (77, 83, 301)
    a, whole_a = laid(rows, depth, (1, 1, 0, turned), width_a)
    b, whole_b = laid(depth, cols, width=width_b, seed=1)
    total, canvas = laid(rows, cols, width=width_c, seed=2)
    rest = canvas[:, cols:]
    for lower in (False, True): check(total, a, b, (whole_a, whole_b, rest), lower)


@pytest.mark.parametrize("shares", [1, 2, 3])
def test_wide_results_in_several_threads(shares, monkeypatch):
    "More columns than one copy of B holds, in stripes that end within a tile."
    monkeypatch.setattr(tiles, "SMALL", 0)
    monkeypatch.setattr("calib_prune.kernels.compiled.threads", lambda: shares)
    for cols in (2 * COLS + 1, COLS * STRIPES + 5, 2 * COLS * STRIPES * shares - 1,
                 COLS * STRIPES * shares):
        for lower in (False, True):
            check(random(30, cols), random(30, 20, seed=1), random(20, cols, seed=2), lower=lower)
    for lower in (False, True):
        check(random(300, 280), random(300, 20, seed=1), random(20, 280, seed=2), lower=lower)


@settings(max_examples=150)
@given(sizes, sizes, st.integers(1, 300), st.data())
def test_nan_and_infinity_reach_what_reads_them_and_no_more(rows, cols, depth, data):
    at = lambda n: data.draw(st.integers(0, n - 1))
    a, b, total = random(rows, depth), random(depth, cols, seed=1), random(rows, cols, seed=2)
    for matrix in (a, b, total):
        bad = data.draw(st.sampled_from([None, float("nan"), float("inf"), -float("inf")]))
        if bad is not None: matrix[at(matrix.shape[0]), at(matrix.shape[1])] = bad
    if data.draw(st.booleans()): b[at(depth), at(cols)] = 0  # 0·inf is NaN
    lower = data.draw(st.booleans())
    exact = total.double() + a.double() @ b.double()
    add_product(total, a, b, lower=lower)
    wanted = torch.ones(rows, cols, dtype=torch.bool)
    if lower: wanted = wanted.tril()
    torch.testing.assert_close(
        total.double()[wanted], exact[wanted], rtol=1e-4, atol=1e-4, equal_nan=True
    )


@pytest.fixture
def no_tiles(monkeypatch):
    def refuse(*_): raise AssertionError("this was to go to torch")
    monkeypatch.setattr(tiles, "in_threads", refuse)


@pytest.mark.parametrize("subtract", [True, False])
@pytest.mark.parametrize("make", [
    lambda t, a, b: (t.double(), a.double(), b.double()), lambda t, a, b:
    (t, a, b.T.contiguous().T), lambda t, a, b: (t.T.contiguous().T, a, b), lambda t, a, b:
    (t, a, torch.cat([b, b], 1)[:, ::2]), lambda t, a, b:
    (t, a[:1].expand(40, -1), b), lambda t, a, b: (t, a, b[:1].expand(50, -1)), lambda t, a, b:
    (t, a, b[:, :1].expand(-1, 33)), lambda t, a, b: (t, a[:, :0], b[:0]), lambda t, a, b:
    (t[:0], a[:0], b), lambda t, a, b: (t[:, :0], a, b[:, :0])])
def test_what_does_not_fit_goes_to_torch(make, subtract, no_tiles):
    check(*make(random(40, 33), random(40, 50, seed=1), random(50, 33, seed=2)), subtract=subtract)


def test_half_precision_goes_to_torch(no_tiles):
    total, a, b = random(40, 33).bfloat16(), random(40, 50, seed=1).bfloat16(), random(
        50, 33, seed=2).bfloat16()
    expected = total.addmm(a, b)
    add_product(total, a, b)
    assert torch.equal(total, expected)


# misfits that stay in bounds
@pytest.mark.parametrize("total, b", [((3, 6), (5, 6)), ((4, 6), (4, 6)), ((3, 7), (4, 6))])
def test_shapes_that_do_not_fit_together_are_refused(total, b):
    with pytest.raises(CalibPruneError):
        add_product(random(*total), random(3, 4), random(*b))


@settings(max_examples=40)
@given(st.integers(1, 200), st.integers(1, 70), st.booleans())
def test_both_factors_may_be_one_matrix(tokens, width, strided):
    x = random(tokens, width * (2 if strided else 1))[:, ::2 if strided else 1]
    check(torch.zeros(width, width), x.T, x.contiguous() if strided else x, lower=True)


@settings(max_examples=40)
@given(st.integers(1, 90), st.integers(0, 90), st.integers(1, 90))
def test_all_three_may_be_parts_of_one_matrix(before, size, after):
    "As in a Cholesky factorisation, where rows lose a product of later rows."
    i, j, d = before, before + max(size, 1), before + max(size, 1) + after
    matrix = random(d, d)
    start, exact = matrix.clone(), matrix.double()
    exact[i:j, :j] -= exact[j:, i:j].T @ exact[j:, :j]
    add_product(matrix[i:j, :j], matrix[j:, i:j].T, matrix[j:, :j], subtract=True)
    torch.testing.assert_close(matrix.double(), exact, rtol=1e-4, atol=1e-4)
    changed = matrix != start
    changed[i:j, :j] = False
    assert not changed.any()
