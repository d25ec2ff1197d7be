"""Attention from tiles against torch in float64, in texts and in trees, and the models that it
serves."""
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from calib_prune.core import CalibPruneError
from calib_prune.kernels.attention import attention, causal
from calib_prune.kernels.tiles import COLS
from calib_prune.model import attention as attention_module
from calib_prune.model import likelihood as likelihood_module
from calib_prune.model.attention import fast_attention, in_trees
from calib_prune.model.likelihood import (
    Row,
    batches,
    joins_rows,
    loglikelihoods,
    pack,
    score_batch,
    side_by_side,
    unpackable,
)
from calib_prune.model.tiny import TINY_FAMILIES, tiny_model

NAN, INF = float("nan"), float("inf")


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def problem(sets, kv_heads, group, tokens, width, seed=0):
    "Queries, keys and values as models hand them over: views of [B, T, H, D]."
    heads = kv_heads * group, kv_heads, kv_heads
    return [
        random(sets, tokens, h, width, seed=3 * seed + n).transpose(1, 2)
        for n, h in enumerate(heads)
    ]


def reference(q, k, v, scale, sees=None):
    "torch's attention in float64, or with an explicit mask (`sees`, bool [T, T]) a plain softmax."
    group = q.shape[1] // k.shape[1]
    q, k, v = q.double(), k.double().repeat_interleave(group, 1), v.double().repeat_interleave(
        group, 1)
    if sees is None:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale).transpose(1, 2)
    weights = (q @ k.transpose(2, 3) * scale).masked_fill(~sees, -INF).softmax(-1)
    return (weights @ v).transpose(1, 2)


def close(found, expected):
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=2e-5, equal_nan=True)


widths = st.sampled_from([COLS, 2 * COLS])
shapes = st.tuples(
    st.integers(1, 3), st.integers(1, 3), st.integers(1, 4), st.integers(1, 130), widths
)
forests = st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=60), min_size=1, max_size=12)


def forest(sequences):
    "Sequences as trees side by side, and an explicit mask: each token sees its own path so far."
    row = side_by_side(pack(sequences))
    sees = torch.zeros(len(row.tokens), len(row.tokens), dtype=torch.bool)
    for path in row.paths.values():
        for n, node in enumerate(path): sees[node, path[:n + 1]] = True
    return row, sees, torch.tensor([row.end], dtype=torch.int32)


# --- numbers

@settings(max_examples=80)
@given(shapes, st.sampled_from([None, 1.0, 0.05]), st.integers(0, 99))
def test_texts(shape, scale, seed):
    q, k, v = problem(*shape, seed=seed)
    kept = [o.clone() for o in (q, k, v)]
    scale = scale or shape[-1] ** -.5
    close(attention(q, k, v, causal(shape[0], shape[3]), scale), reference(q, k, v, scale))
    for before, now in zip(kept, (q, k, v)): assert torch.equal(before, now)


@settings(max_examples=80)
@given(forests, st.integers(1, 2), st.integers(1, 3), widths)
def test_trees(sequences, kv_heads, group, width):
    row, sees, lasts = forest(sequences)
    q, k, v = problem(1, kv_heads, group, len(row.tokens), width)
    close(attention(q, k, v, lasts, width ** -.5), reference(q, k, v, width ** -.5, sees))


def test_a_large_forest_and_a_batch_of_trees():
    """Stripes of keys that no query reads any more are skipped; each text of a batch may have its
    own tree."""
    rng = torch.Generator().manual_seed(0)
    draw = lambda n: torch.randint(0, 2, (n,), generator=rng).tolist()
    stems = [draw(n) for n in (90, 5, 70)]
    row, sees, lasts = forest([stem + draw(n) for stem in stems for n in (3, 17, 40, 64)])
    tokens = len(row.tokens)
    q, k, v = problem(2, 2, 2, tokens, COLS)
    found = attention(q, k, v, torch.cat([lasts, causal(1, tokens)]), .2)
    close(found[:1], reference(q[:1], k[:1], v[:1], .2, sees))
    close(found[1:], reference(q[1:], k[1:], v[1:], .2))


@pytest.mark.parametrize("size", [1.0, 2.0 ** 6, 2.0 ** 20, 2.0 ** 40, 2.0 ** 90])
def test_large_scores(size):
    "Whole numbers times a power of two: every score is exact, so float32 has no excuse."
    whole = lambda seed: (3 * random(1, 2, 100, COLS, seed=seed)).round()
    q, k, v = whole(0), whole(1), random(1, 2, 100, COLS, seed=2)
    close(attention(q * size, k, v, causal(1, 100), 1.0), reference(q * size, k, v, 1.0))


@pytest.mark.parametrize("shift", [-2.0 ** 120, -2.0 ** 20, 2.0 ** 20, 2.0 ** 120])
def test_scores_that_all_lie_far_from_zero(shift):
    q, k, v = torch.zeros(1, 1, 70, COLS), torch.zeros(1, 1, 70, COLS), random(1, 1, 70, COLS)
    q[..., 0], k[..., 0] = 1, shift
    k[0, 0, ::3, 0] = 2 * shift
    close(attention(q, k, v, causal(1, 70), 1.0), reference(q, k, v, 1.0))


def test_weights_too_small_for_float32_are_zero():
    q, k, v = (torch.zeros(1, 1, 300, COLS) for _ in range(3))
    q[..., 0], k[..., 0], v[..., 0] = 1, -torch.arange(300.), 1
    found = attention(q, k, v, causal(1, 300), 1.0)
    close(found, reference(q, k, v, 1.0))
    v[0, 0, 110:, 0] = 1e30  # e^-110 is 0 in float32
    assert torch.equal(attention(q, k, v, causal(1, 300), 1.0)[0, :110], found[0, :110])
    assert (attention(q, k, v, causal(1, 300), 1.0)[0, 110:, 0, 0] < 2).all()


@settings(max_examples=40)
@given(forests, st.sampled_from([NAN, INF]), st.data())
def test_a_broken_key_reaches_only_those_who_see_it(sequences, bad, data):
    row, sees, lasts = forest(sequences)
    q, k, v = problem(1, 2, 1, len(row.tokens), COLS)
    whole = attention(q, k, v, lasts, .2)
    token = data.draw(st.integers(0, len(row.tokens) - 1))
    k[:, 0, token, data.draw(st.integers(0, COLS - 1))] = bad
    found = attention(q, k, v, lasts, .2)
    spared = ~sees[:, token]
    assert torch.equal(found[0, spared, 0], whole[0, spared, 0]) and torch.equal(
        found[0, :, 1], whole[0, :, 1])
    if bad == INF: close(found, reference(q, k, v, .2, sees))
    else: assert found[0, ~spared, 0].isnan().all()


# --- who gets it

@pytest.fixture
def calls(monkeypatch):
    "The shapes of the queries that came to our attention."
    seen, original = [], attention_module.attention
    monkeypatch.setattr(attention_module, "attention", lambda q, *rest:
                        (seen.append(tuple(q.shape)), original(q, *rest))[1])
    return seen


def test_the_registry_is_restored_even_after_an_error():
    before = ALL_ATTENTION_FUNCTIONS["sdpa"]
    with pytest.raises(ZeroDivisionError), fast_attention(), fast_attention(), in_trees(
        causal(1, 3)
    ):
        1 / 0  # noqa: B018
    assert ALL_ATTENTION_FUNCTIONS["sdpa"] is before and not attention_module._current
    with fast_attention(): assert ALL_ATTENTION_FUNCTIONS["sdpa"] is not before
    assert ALL_ATTENTION_FUNCTIONS["sdpa"] is before


def served(family, **more):
    "A tiny model whose heads are as wide as our attention needs."
    size = (
        dict(head_dim=COLS) if "head_dim" in TINY_FAMILIES[family] else dict(hidden_size=4 * COLS)
    )
    if family == "opt": size["word_embed_proj_dim"] = 4 * COLS
    return tiny_model(family, **(size | more))


WINDOWS = {
    "mistral": {}, "gemma2": {}, "gemma3_text": {}, "qwen2": dict(use_sliding_window=True,
                                                                  max_window_layers=1),
    "qwen3": dict(use_sliding_window=True, max_window_layers=1)}


@torch.inference_mode()
def agree(model, ids):
    plain = model(ids).logits
    with fast_attention(): fast = model(ids).logits
    torch.testing.assert_close(fast, plain, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", TINY_FAMILIES)
def test_models_say_the_same(family, calls):
    model, ids = served(family), torch.randint(
        1, 250, (2, 40), generator=torch.Generator().manual_seed(0)
    )
    agree(model, ids)
    expected = (
        model.config._attn_implementation == "sdpa"
        and getattr(model.config, "sliding_window", None) != 16
    )
    assert len(calls) == (2 if expected else 0)


@pytest.mark.parametrize("family", WINDOWS)
def test_windows_are_kept_whether_shorter_or_longer_than_the_text(family, calls):
    model = served(family, sliding_window=16, **WINDOWS[family])
    for tokens in (1, 2, 15, 16, 17, 33): agree(model, torch.arange(1, tokens + 1)[None])
    assert model.config._attn_implementation == "eager" or any(o[2] == 15 for o in calls)
    # in qwen's one layer without a window
    assert len([o for o in calls if o[2] > 16]) == (2 if family.startswith("qwen") else 0)


@pytest.mark.filterwarnings("ignore:`past_key_values`:FutureWarning")
@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_left_padding_and_a_cache_are_left_to_torch(family, calls):
    model, ids = served(family, sliding_window=None), torch.arange(1, 21).view(2, 10)
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    with torch.inference_mode():
        plain = model(ids, attention_mask=mask).logits
        with fast_attention():
            assert torch.equal(model(ids, attention_mask=mask).logits, plain) and not calls
            past = model(ids[:, :6], use_cache=True).past_key_values
            assert len(calls) == 2
            more = model(ids[:, 6:], past_key_values=past).logits
        torch.testing.assert_close(more, model(ids).logits[:, 6:], rtol=1e-4, atol=1e-4)
        assert len(calls) == 2


@pytest.mark.parametrize("change", [
    lambda model: model.double(), lambda model: model.half(),
    lambda model: model.set_attn_implementation("eager")])
def test_other_number_formats_and_other_attention_are_left_alone(change, calls):
    model, ids = served("llama"), torch.arange(1, 21)[None]
    change(model)
    with torch.inference_mode():
        plain = model(ids).logits
        with fast_attention(): assert torch.equal(model(ids).logits, plain) and not calls


def test_bfloat16_goes_through_float32(calls):
    """Attention itself loses nothing; a model's numbers are rounded between its steps, as they are
    elsewhere."""
    q, k, v = (o.bfloat16() for o in problem(2, 2, 3, 40, COLS))
    found = attention(q, k, v, causal(2, 40), 0.1)
    assert found.dtype == torch.bfloat16
    assert torch.equal(
        found, attention(q.float(), k.float(), v.float(), causal(2, 40), 0.1).bfloat16()
    )
    model, ids = served("llama").bfloat16(), torch.arange(1, 21)[None]
    with torch.inference_mode():
        plain = model(ids).logits
        with fast_attention():
            torch.testing.assert_close(model(ids).logits, plain, rtol=0.1, atol=0.02)
    assert len(calls) == 2


def test_narrow_heads_are_left_to_torch(calls):
    agree(tiny_model("llama", head_dim=COLS // 2), torch.arange(1, 21)[None])
    assert not calls


def test_gradients_are_left_to_torch(calls):
    model, ids = served("llama"), torch.arange(1, 21)[None]
    grads = []
    for inside in (False, True):
        model.zero_grad()
        if inside:
            with fast_attention(): loss = model(ids, labels=ids).loss
        else: loss = model(ids, labels=ids).loss
        loss.backward()
        grads.append(model.model.layers[0].self_attn.q_proj.weight.grad.clone())
    assert not calls and torch.equal(*grads) and grads[0].abs().max() > 0


@pytest.mark.parametrize("more", [
    dict(is_causal=False),
    dict(dropout=.1),
    dict(sliding_window=9),
    dict(softcap=5.0),
    dict(s_aux=torch.zeros(2)),
    dict(position_bias=torch.zeros(1, 2, 10, 10))])
def test_what_our_attention_does_not_know_is_left_to_torch(more, calls, monkeypatch):
    monkeypatch.setitem(
        ALL_ATTENTION_FUNCTIONS._global_mapping, "sdpa", lambda *a, **k: ("torch", None)
    )
    module = SimpleNamespace(is_causal=True)
    with fast_attention(), torch.inference_mode():
        forward = ALL_ATTENTION_FUNCTIONS["sdpa"]
        assert (
            forward(module, *problem(1, 2, 1, 10, COLS), None, scaling=1.0, **more)[0] == "torch"
            and not calls
        )
        assert (
            forward(SimpleNamespace(is_causal=False), *problem(1, 2, 1, 10, COLS), None)[0]
            == "torch"
        )
        q, k, v = problem(1, 2, 1, 10, COLS)
        assert forward(module, q, k, v[..., :8], None)[0] == "torch"
        assert forward(module, q[:, :, :1], k, v, None)[0] == "torch"
        assert (
            forward(module, q, k, v, None, sliding_window=10)[0].shape == (1, 10, 2, COLS)
            and len(calls) == 1
        )


# --- trees in models

def tree_logits(model, mask):
    _, _, lasts = forest([[1, 2, 3, 4], [1, 2, 5, 6, 7], [8, 9]])
    row = side_by_side(pack([[1, 2, 3, 4], [1, 2, 5, 6, 7], [8, 9]]))
    ids, depth = torch.tensor([row.tokens]), torch.tensor([row.depth])
    with torch.inference_mode(), fast_attention(), in_trees(lasts) as stand_in:
        return (
            model(ids, position_ids=depth, attention_mask=mask(stand_in), use_cache=False).logits,
            row,
        )


def test_a_tree_gives_what_each_path_gives_alone():
    model = served("llama")
    logits, row = tree_logits(model, lambda o: o)
    for path in row.paths.values():
        with torch.inference_mode():
            alone = model(torch.tensor([[row.tokens[o] for o in path]])).logits
        torch.testing.assert_close(logits[:, path], alone, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("mask", [
    lambda o: o.clone(), lambda o: o + 0.0, lambda o: o[..., :], lambda o: None])
def test_a_model_that_changes_or_ignores_the_mask_of_a_tree_does_not_go_unnoticed(mask):
    try: logits, _ = tree_logits(served("llama"), mask)
    except Exception: return
    assert logits.isnan().any()


def test_the_mask_of_a_tree_means_nothing_outside():
    model, ids = served("llama"), torch.arange(1, 11)[None]
    with torch.inference_mode(), fast_attention():
        with in_trees(causal(1, 10)) as old: pass
        assert model(ids, attention_mask=old).logits.isnan().any()
        with in_trees(causal(1, 10)), pytest.raises(CalibPruneError):
            model(ids, attention_mask=old)


# --- scores

def requests_of(seed=0, longest=60):
    "Contexts that share beginnings, with several continuations each; some come twice."
    rng = torch.Generator().manual_seed(seed)
    draw = lambda low, high: torch.randint(
        1, 250, (int(torch.randint(low, high, (), generator=rng)),), generator=rng
    ).tolist()
    contexts = [draw(1, longest - 10) for _ in range(6)]
    contexts += [contexts[0] + draw(2, 5), contexts[1][:1]]
    found = [(context, draw(1, 9)) for context in contexts for _ in range(3)]
    return [*found, found[4], ([0], draw(1, 3))]


@torch.inference_mode()
def one_by_one(model, requests):
    "Each request by a plain run of the model."
    found = []
    for context, cont in requests:
        logits = model(torch.tensor([(context + cont)[:-1]])).logits[0, -len(cont):].double()
        chosen = logits.log_softmax(-1)[range(len(cont)), cont]
        found.append((chosen.sum().item(), logits.argmax(-1).tolist() == cont))
    return found


def check_scores(found, expected):
    assert [o for o, _ in found] == pytest.approx([o for o, _ in expected], rel=1e-5, abs=1e-3)
    assert [o for _, o in found] == [o for _, o in expected]


@pytest.fixture
def joined(monkeypatch):
    "How many rows stood side by side, batch by batch."
    seen, original = [], likelihood_module.side_by_side
    monkeypatch.setattr(
        likelihood_module, "side_by_side", lambda rows: (seen.append(len(rows)), original(rows))[1]
    )
    return seen


@pytest.mark.parametrize("family, budget", [
    ("llama", 64), ("llama", 200), ("llama", 1024), ("qwen2", 200), ("mistral", 200)])
def test_joined_rows_score_like_one_by_one_and_like_padded_rows(
    family, budget, joined, calls, monkeypatch
):
    model, requests = (
        served(family, **(dict(sliding_window=4096) if family == "mistral" else {})),
        requests_of(),
    )
    found = loglikelihoods(model, requests, budget)
    assert max(joined) > 1 and len(calls) == 2 * len(joined), "each layer, once per batch"
    check_scores(found, one_by_one(model, requests))
    check_scores(found[::5], [loglikelihoods(model, [o])[0] for o in requests[::5]])
    monkeypatch.setattr(likelihood_module, "joins_rows", lambda *_: False)
    check_scores(found, loglikelihoods(model, requests, budget))


@pytest.mark.parametrize(
    "family", [o for o in TINY_FAMILIES if o not in ("llama", "qwen2", "mistral")]
)
def test_every_other_family_scores_like_one_by_one(family, joined):
    model, requests = served(family), requests_of(1)
    check_scores(loglikelihoods(model, requests, 300), one_by_one(model, requests))
    assert bool(joined) == (model.config._attn_implementation == "sdpa")


@pytest.mark.parametrize("family", WINDOWS)
@pytest.mark.parametrize("window, longest", [(8, 30), (40, 30), (40, 60)])
def test_a_window_cuts_no_row_that_stands_beside_others(family, window, longest, joined):
    "Rows shorter than the window are joined even if together they are longer; longer rows are not."
    model, requests = served(family, sliding_window=window, **WINDOWS[family]), requests_of(
        2, longest
    )
    check_scores(loglikelihoods(model, requests, 100), one_by_one(model, requests))


def test_a_token_that_breaks_the_model_spoils_only_its_own_requests():
    model = served("llama")
    with torch.no_grad(): model.get_input_embeddings().weight[7] = NAN
    good, bad = ([10, 11, 12], [13]), ([20, 7, 21], [22])
    (a, _), (b, _) = loglikelihoods(model, [good, bad])
    assert b != b and a == pytest.approx(loglikelihoods(model, [good])[0][0], rel=1e-5)


def test_who_may_stand_side_by_side():
    short, long = Row(tokens=[1] * 10), Row(tokens=[1] * 50)
    assert joins_rows(served("llama"), [short, long])
    assert not joins_rows(tiny_model("llama"), [short]), "narrow heads"
    assert not joins_rows(served("llama").double(), [short]) and not joins_rows(
        served("llama").half(), [short]
    )
    assert joins_rows(served("llama").bfloat16(), [short])
    windowed = served("mistral", sliding_window=50)
    assert joins_rows(windowed, [short, long]) and not joins_rows(
        served("mistral", sliding_window=49), [short, long]
    )
    eager = served("llama")
    eager.set_attn_implementation("eager")
    assert not unpackable(eager) and not joins_rows(eager, [short])


@settings(max_examples=100)
@given(st.lists(st.integers(1, 60), max_size=20), st.integers(1, 100), st.booleans())
def test_batches_fill_the_budget_and_lose_nothing(lengths, budget, side):
    rows = [Row(tokens=[n] * size) for n, size in enumerate(lengths)]
    made = list(batches(rows, budget, side))
    size = lambda batch: sum(len(o.tokens) for o in batch) if side else len(batch) * max(
        len(o.tokens) for o in batch)
    assert all(len(o) == 1 or size(o) <= budget for o in made)
    assert sorted(o.tokens[0] for batch in made for o in batch) == list(range(len(rows)))
    for batch, following in zip(made, made[1:]):
        assert size([*batch, following[0]]) > budget, "a batch ended too early"


@settings(max_examples=60)
@given(forests)
def test_rows_side_by_side_are_the_same_trees(sequences):
    row, sees, lasts = forest(sequences)
    at = torch.arange(len(row.tokens))
    assert torch.equal(
        sees, (at <= at[:, None]) & (at[:, None] <= lasts[0])
    ), "`end` says who sees whom"
    for i, sequence in enumerate(sequences):
        assert [row.tokens[o] for o in row.paths[i]] == sequence
        assert [row.depth[o] for o in row.paths[i]] == list(range(len(sequence)))


def test_scoring_a_batch_without_the_fast_paths_around_it_is_the_same():
    model, requests = served("llama"), requests_of(4)
    rows = pack([(context + cont)[:-1] for context, cont in requests])
    found = score_batch(model, rows, requests)
    check_scores([found[i] for i in range(len(requests))], one_by_one(model, requests))
