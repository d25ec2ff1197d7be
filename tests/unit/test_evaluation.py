import json
import logging
import math
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lm_eval.api.instance import Instance
from scipy.stats import bootstrap
from transformers import AutoConfig, AutoModelForCausalLM

from calib_prune.advice.compare import Comparison
from calib_prune.core import CalibPruneError
from calib_prune.data.files import write_jsonl
from calib_prune.evaluation import sandbox, scoring, tasks
from calib_prune.evaluation.measures import PLAIN, prompt_gains
from calib_prune.evaluation.retention import (
    commonsense_accuracy,
    difference,
    discriminating_measure,
    floor_comparison,
    floor_notes,
    paired_values,
    retention,
)
from calib_prune.evaluation.scoring import evaluate, language_model, last_number, limit_of, scores
from calib_prune.evaluation.tasks import TASKS
from calib_prune.model.likelihood import batches, loglikelihoods, pack, tree_mask, unpackable
from calib_prune.model.loading import load_model
from calib_prune.model.perplexity import perplexity, text_windows
from calib_prune.model.tiny import TINY_FAMILIES, tiny_llama, tiny_model, tiny_tokenizer
from calib_prune.pipeline.evaluate import Evaluation
from calib_prune.resampling import draws, interval

TOKENIZER = tiny_tokenizer()
SEQUENCES = st.lists(st.lists(st.integers(1, 3), min_size=1, max_size=12), min_size=1, max_size=12)


def requests(seed=0, contexts=10, longest=40):
    rng = np.random.default_rng(seed)
    some = lambda high: rng.integers(1, 257, rng.integers(1, high)).tolist()
    found = [(context, some(25)) for context in (some(longest) for _ in range(contexts))
             for _ in range(rng.integers(1, 5))]
    # a continuation that extends another, a repeat
    return found + [(found[0][0], found[0][1] + [5, 6]), found[0]]


def one_by_one(model, asked):
    found = []
    for context, cont in asked:
        lp = model(torch.tensor([context + cont])).logits[0, len(context) - 1:-1].log_softmax(-1)
        found.append((lp[range(len(cont)), cont].sum().item(), lp.argmax(-1).tolist() == cont))
    return found


# --- packing


@given(SEQUENCES, st.integers(4, 40))
def test_a_tree_holds_every_sequence(sequences, row_tokens):
    rows = pack(sequences, row_tokens)
    assert sorted(i for o in rows for i in o.paths) == list(range(len(sequences)))
    for o in rows:
        assert len(o.tokens) <= max(row_tokens, max(map(len, sequences)))
        assert len(set(map(tuple, o.paths.values()))) == len({tuple(sequences[i]) for i in o.paths})
        for i, path in o.paths.items():
            assert [o.tokens[j] for j in path] == sequences[i] and [
                o.depth[j] for j in path
            ] == list(range(len(path)))
    assert sum(len(o.tokens) for o in rows) <= sum(map(len, sequences))


@given(SEQUENCES, st.integers(1, 8) | st.none())
def test_the_mask_shows_each_node_its_ancestors(sequences, window):
    for o in pack(sequences):
        length = len(o.tokens) + 2
        mask = tree_mask([o], length, window)[0, 0]
        for path in o.paths.values():
            for k, node in enumerate(path):
                seen = path[:k + 1] if window is None else path[max(0, k + 1 - window):k + 1]
                assert mask[node].nonzero().flatten().tolist() == sorted(seen)
        assert mask[-1].nonzero().flatten().tolist() == [length - 1]


@given(SEQUENCES, st.integers(1, 60))
def test_batches_keep_rows_and_budget(sequences, budget):
    rows = pack(sequences, 12)
    found = list(batches(rows, budget))
    assert sum(map(len, found)) == len(rows)
    for o in found: assert len(o) == 1 or len(o) * max(len(r.tokens) for r in o) <= budget


BOTH = dict(sliding_window=16, layer_types=["sliding_attention", "full_attention"])
MORE = {
    "gemma3_text": BOTH,
    "gemma2": BOTH,
    **dict.fromkeys(("qwen2", "qwen3"), BOTH | dict(use_sliding_window=True)),
}


@pytest.mark.parametrize("family", TINY_FAMILIES)
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_every_family_scores_as_lm_eval_does(family, attention):
    if family == "gemma2" and attention == "sdpa": attention = "eager"  # this family has no other
    model = tiny_model(family, **MORE.get(family, {}))
    model.set_attn_implementation(attention)
    model = model.double()
    assert unpackable(model) == ""
    asked = requests()
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    lm = language_model(model, TOKENIZER, stock=True)
    for max_length in (512, 37):  # the second cuts off the beginning of some
        lm._max_length = max_length
        stock = lm._loglikelihood_tokens([(None, *o) for o in asked], disable_tqdm=True)
        packed = loglikelihoods(model, asked, 256, max_length)
        # The eager path takes its softmax in float32 whatever the model's type.
        np.testing.assert_allclose([o for o, _ in packed], [o for o, _ in stock], rtol=0,
                                   atol=1e-10 if attention == "sdpa" else 1e-5)
        assert [o for _, o in packed] == [o for _, o in stock]


@settings(max_examples=8)
@given(st.integers(0, 1000), st.sampled_from([64, 200, 5000]))
def test_scores_do_not_depend_on_the_batch(seed, batch_tokens):
    model, asked = tiny_llama().double(), requests(seed, 5)
    packed = loglikelihoods(model, asked, batch_tokens)
    np.testing.assert_allclose(
        [o for o, _ in packed], [o for o, _ in one_by_one(model, asked)], rtol=0, atol=1e-10
    )


def test_greedy_continuations_are_recognised():
    model = tiny_llama()
    context = [5, 6, 7]
    ids = list(context)
    for _ in range(4): ids.append(model(torch.tensor([ids])).logits[0, -1].argmax().item())
    found = loglikelihoods(model, [(context, ids[3:]), (context, ids[3:6] + [ids[6] % 256 + 1])])
    assert [o for _, o in found] == [True, False]


@pytest.mark.parametrize("request_", [([], [5, 6]), ([5, 6], [])])
def test_nothing_to_read_and_nothing_to_predict_are_refused(request_):
    with pytest.raises(CalibPruneError, match="at least one token of context"):
        loglikelihoods(tiny_llama(), [([5], [6]), request_])


def test_same_budget_same_bits():
    model, asked = tiny_llama(), requests()
    assert loglikelihoods(model, asked, 256) == loglikelihoods(model, asked, 256)


def test_progress_counts_tokens_from_none_to_all():
    seen = []
    loglikelihoods(tiny_llama(), requests(), 128, progress=lambda *o: seen.append(o))
    (_, first, total), (_, last, _) = seen[0], seen[-1]
    assert first == 0 and last == total and {o[::2] for o in seen} == {
        ("scoring", total)} and [o[1] for o in seen] == sorted({o[1] for o in seen})


def test_half_precision_is_normalised_in_float32():
    model, asked = tiny_llama().bfloat16(), requests()
    lm = language_model(model, TOKENIZER, stock=True)
    lm.softmax_dtype = torch.float32
    stock = [o for o, _ in lm._loglikelihood_tokens([(None, *o) for o in asked], disable_tqdm=True)]
    np.testing.assert_allclose([o for o, _ in loglikelihoods(model, asked)], stock, rtol=0.02)


# --- through lm-eval


@pytest.fixture
def benchmarks(tmp_path, monkeypatch):
    words = ["red", "blue", "grün", "a longer answer", "日本", "no"]
    rng = np.random.default_rng(0)
    pick = lambda n: [str(o) for o in rng.choice(words, n, replace=False)]
    records = {
        "sciq": [
            dict(question=f"Which {i}?", choices=pick(4), gold=int(rng.integers(4)))
            for i in range(20)], "hellaswag": [
                dict(query=f"He went {i}", choices=pick(3), gold=int(rng.integers(3)))
                for i in range(20)], "lambada": [
                    dict(context=f"Once {i} there was", continuation=f" {pick(1)[0]}")
                    for i in range(20)], "gsm8k": [
                        dict(question=f"{i} and 1?",
                             short_answer=str(i + 1),
                             solution=f"It is {i + 1}.") for i in range(20)], "humaneval": [
                                 dict(prompt=f"def f{i}(x):\n",
                                      canonical_solution=f"    return x + {i}\n",
                                      entry_point=f"f{i}",
                                      test=f"def check(c):\n    assert c(1) == {i + 1}")
                                 for i in range(6)]}
    for name, rows in records.items():
        write_jsonl(tmp_path / f"{name}.jsonl", [{"id": str(i)} | o for i, o in enumerate(rows)])
    monkeypatch.setattr(tasks, "cached", lambda kind, name: tmp_path / f"{name}.jsonl")
    monkeypatch.setenv("CALIB_PRUNE_CACHE", str(tmp_path / "cache"))
    return records


NAMES = ["sciq", "hellaswag", "lambada", "gsm8k"]


def test_evaluate_equals_lm_eval_item_by_item(benchmarks):
    model = tiny_llama(seed=1)
    items = evaluate(model, TOKENIZER, NAMES, limit=12)
    stock = evaluate(model, TOKENIZER, NAMES, limit=12, stock=True)
    assert items.attrs["scoring"] == "packed" and stock.attrs["scoring"] == "lm-eval (asked for)"
    pd.testing.assert_frame_equal(items, stock, rtol=1e-5, check_exact=False)
    assert list(items.columns) == [
        "task", "dimension", "item", "metric", "value", "bytes", "chance"]
    assert items.groupby(["task", "metric"]).size().to_dict() == {
        **{
            (task, metric): 12
            for task in ("sciq", "hellaswag")
            for metric in ("acc", "acc_norm", "bits")
        },
        ("lambada", "bits"): 12,
        ("gsm8k", "bits"): 12,
    }


def test_right_answers_after_the_prompt_of_another_item(benchmarks):
    model = tiny_llama(seed=1)
    own, both = evaluate(model, TOKENIZER, NAMES, limit=12), evaluate(
        model, TOKENIZER, NAMES, limit=12, swapped=5
    )
    assert both.attrs == own.attrs
    pd.testing.assert_frame_equal(both[both.metric != "swapped_bits"].reset_index(drop=True), own)
    other = both[both.metric == "swapped_bits"]
    assert other.groupby("task").size().to_dict() == dict.fromkeys(NAMES, 5)
    order = [int(o) for o in own.item[own.task == "lambada"]]
    for i, after in zip(order[:5], order[1:6]):
        ids = [
            TOKENIZER(o).input_ids for o in (benchmarks["lambada"][after]["context"],
                                             benchmarks["lambada"][i]["continuation"])]
        nats = one_by_one(model, [ids])[0][0]
        assert other.value[
            (other.task == "lambada") & (other.item == str(i))
        ].item() == pytest.approx(-nats / math.log(2), rel=1e-4)
    gains = prompt_gains(both)
    sums = both[(both.task == "gsm8k")
                & both.item.isin(other.item[other.task == "gsm8k"])].groupby("metric").value.sum()
    assert set(gains.index) == set(NAMES)
    assert gains["gsm8k"] == pytest.approx(1 - sums["bits"] / sums["swapped_bits"])
    alone = evaluate(model, TOKENIZER, ["lambada"], limit=1, swapped=5)
    assert set(alone.metric) == {"bits"}, "a single item has no other"
    first = evaluate(model, TOKENIZER, ["lambada"], limit=12, swapped=1)
    assert first[first.metric == "swapped_bits"].value.item() == pytest.approx(
        other.value[other.task == "lambada"].iloc[0], rel=1e-4
    )


def test_items_that_are_passed_over_are_not_scored(benchmarks):
    first, later = (
        evaluate(tiny_llama(seed=1), TOKENIZER, ["lambada", "sciq"], limit=6, **o)
        for o in ({}, dict(skip=6))
    )
    for _, both in pd.concat([first, later]).groupby(["task", "metric"]):
        assert both["item"].nunique() == len(both) == 12


def test_bits_and_accuracy_by_hand(benchmarks):
    model = tiny_llama(seed=1)
    items = evaluate(model, TOKENIZER, NAMES).set_index(["task", "metric", "item"])
    def nats(context, answer):
        a, b = TOKENIZER(context).input_ids, TOKENIZER(answer).input_ids
        return one_by_one(model, [(a, b)])[0][0]
    for i, o in enumerate(benchmarks["lambada"]):
        row = items.loc[("lambada", "bits", str(i))]
        assert row.value == pytest.approx(
            -nats(o["context"], o["continuation"]) / math.log(2), rel=1e-4
        )
        assert row.bytes == len(o["continuation"].encode())
    for i, o in enumerate(benchmarks["hellaswag"]):
        ll = np.array([nats(o["query"], " " + c) for c in o["choices"]])
        assert items.value["hellaswag", "acc", str(i)] == (ll.argmax() == o["gold"])
        assert items.value["hellaswag", "acc_norm", str(i)] == (
            (ll / [len(c) for c in o["choices"]]).argmax() == o["gold"]
        )
    row = scores(items.reset_index()).set_index("task").loc["lambada"]
    mine = items.sort_index().loc["lambada", "bits"]
    assert row.score == pytest.approx(
        mine.value.sum() / mine.bytes.sum()) and row.metric == "bits per byte" and row.n == 20


def test_a_model_without_finite_likelihoods_is_refused(benchmarks):
    model = tiny_llama(seed=1)
    with torch.no_grad(): model.lm_head.weight[0, 0] = math.nan
    for stock in (False, True):
        with pytest.raises(CalibPruneError, match="48 of 48"):
            evaluate(model, TOKENIZER, ["sciq"], limit=12, stock=stock)


def test_another_architecture_goes_through_lm_eval_and_says_so(benchmarks):
    config = AutoConfig.for_model(
        "gpt2", vocab_size=264, n_embd=32, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=0
    )
    model = AutoModelForCausalLM.from_config(config).eval()
    items = evaluate(model, TOKENIZER, "sciq", limit=3)
    assert items.attrs["scoring"].startswith("lm-eval (model type gpt2") and len(items) == 9


def test_a_machine_without_isolation_is_refused_before_generating(benchmarks, monkeypatch):
    monkeypatch.setattr(sandbox, "missing_layers", lambda: ["landlock"])
    monkeypatch.setattr(
        scoring, "language_model", lambda *_, **__: pytest.fail("started to generate")
    )
    with pytest.raises(CalibPruneError, match="landlock"):
        evaluate(tiny_llama(), TOKENIZER, "sciq,humaneval_generate", limit=2)


def test_generated_answers_are_checked(benchmarks, monkeypatch):
    model = tiny_llama()
    names = ["gsm8k_generate", "humaneval_generate"]
    for name in names:
        short = TASKS[name].__class__(
            **{**vars(TASKS[name]), "max_tokens": 4, "prompt": TASKS[name].prompt[-60:]}
        )
        monkeypatch.setitem(tasks.TASKS, name, short)
    seen = []
    items = evaluate(model, TOKENIZER, names, limit=3, progress=lambda *o: seen.append(o))
    scored = items[items.metric.isin(["exact_match", "pass@1"])]
    assert (
        scored.metric.tolist() == ["exact_match"] * 3 + ["pass@1"] * 3 and scored.value.eq(0).all()
    )
    assert (
        items[items.metric == "cut"].value.sum() >= 4
    ), "a random model seldom comes to an end in four tokens"
    assert "gsm8k_generate: 3 of 3 answers were cut at 4 tokens." in scoring.ending_notes(items)
    whole = evaluate(model, TOKENIZER, names, limit=3, stock=True)
    pd.testing.assert_frame_equal(whole, items[items.metric != "cut"].reset_index(drop=True))
    assert seen[-1] == ("generate", 6, 6)
    right = scoring.generated_rows(TASKS["humaneval_generate"], [
        dict(doc=tasks.fill_prompt(TASKS["humaneval_generate"], {"id": str(i)} | o),
             filtered_resps=[answer]) for i, o in enumerate(benchmarks["humaneval"][:2])
        for answer in (o["canonical_solution"], "    return 0\n", "    exit(0)\n")])
    assert [o["value"] for o in right if o["metric"] == "pass@1"] == [1, 0, 0] * 2
    assert [o["value"] for o in right if o["metric"] == "late"] == [0] * 6


def test_a_program_without_an_end_is_late():
    endless = [
        dict(doc=dict(id=o, program="\0", tests=""), filtered_resps=[o], arguments=[(o, {})])
        for o in ("while True: pass", "1 / 0")
    ]
    found = pd.DataFrame(
        scoring.generated_rows(TASKS["mbpp_generate"], endless, timeout=1, cut={"1 / 0"})
    )
    assert {m: o.value.tolist() for m, o in found.groupby("metric")} == {
        "pass@1": [0, 0], "cut": [0, 1], "late": [1, 0]}
    assert scoring.ending_notes(found) == [
        "mbpp_generate: 1 of 2 answers were cut at 512 tokens.",
        "mbpp_generate: 1 of 2 programs ran into the time limit.",
    ]


ASKED = [
    ("hello", ["q"], 12),
    ("ab cd", ["e", "l1"], 16),
    ("A longer context, of many words", ["\n\n"], 8),
    ("z", ["zz"], 14),
    # context, what ends the answer, tokens
    ("hello you", ["i"], 10),
    ("one more", [], 7),
    ("last", ["g"], 20),
]


def answers_to(model, stock, asked=ASKED):
    requests = [
        Instance("generate_until", {},
                 (context, dict(until=until, max_gen_toks=most, do_sample=False)), i)
        for i, (context, until, most) in enumerate(asked)]
    with scoring.quiet():
        return language_model(model, TOKENIZER, batch_size=3, stock=stock).generate_until(requests)


@pytest.mark.parametrize("family", TINY_FAMILIES)
def test_answers_are_those_of_lm_eval(family):
    model = tiny_model(family)
    assert answers_to(model, False) == answers_to(model, True)


def test_an_answer_stops_at_its_string_and_at_its_length():
    (whole,) = answers_to(tiny_llama(), False, [("hello", [], 20)])
    cut = whole[9]
    assert answers_to(tiny_llama(), False, [("hello", [cut], 20)]) == [whole.split(cut)[0]]
    with pytest.raises(CalibPruneError, match="5,000 tokens"):
        answers_to(tiny_llama(), False, [("hello", [], 5000)])


@pytest.mark.parametrize("text, number", [("#### 42", 42), ("1 2\n#### -1,234.5 apples 7", -1234.5),
                                          ("a 3 b 4.", 4), ("", None), ("#### $18.00", 18),
                                          ("####", None), ("so the answer is 1,000", 1000),
                                          ("#### 5\n\n#### 6", 5)])
def test_last_number(text, number): assert last_number(text) == number


def test_limits():
    assert (
        limit_of(TASKS["piqa"], {"choice": 5, "piqa": 2}) == 2
        and limit_of(TASKS["piqa"], None) is None
    )
    with pytest.raises(CalibPruneError, match="'chioce'.*'choice'"):
        limit_of(TASKS["piqa"], {"chioce": 2})
    with pytest.raises(CalibPruneError, match="nothing"):
        evaluate(tiny_llama(), TOKENIZER, "nothing")


# --- scores and retention


def items_of(task, values, sizes=None):
    n = len(values)
    return pd.DataFrame(
        dict(task=task,
             dimension=TASKS[task].dimension,
             item=[str(i) for i in range(n)],
             metric=TASKS[task].metric,
             value=np.asarray(values, float),
             bytes=sizes if sizes is not None else [0] * n))


def study(seed=0, n=60, lost=0.4):
    "Items of a dense and a pruned model on one task of each dimension."
    rng = np.random.default_rng(seed)
    dense, pruned = [], []
    for task in ("sciq", "piqa", "mbpp", "gsm8k"):
        if TASKS[task].kind == "choice":
            a = (rng.random(n) < 0.7).astype(float)
            b = a * (rng.random(n) > lost) + (1 - a) * (rng.random(n) < 0.1)
        else: b = (a := rng.gamma(5, 10, n)) * rng.uniform(1, 1 + 2 * lost, n)
        sizes = rng.integers(5, 50, n)
        dense.append(items_of(task, a, sizes))
        pruned.append(items_of(task, b, sizes))
    return pd.concat(dense), pd.concat(pruned)


def test_scores_in_closed_form():
    frame = scores(
        pd.concat([items_of("mbpp", [8, 4], [4, 1]), items_of("piqa", [1, 0, 1, 1])])
    ).set_index("task")
    assert frame.score.to_dict() == {"piqa": 0.75, "mbpp": 2.4} and list(frame.index) == [
        "piqa",
        "mbpp",
    ]
    assert frame.standard_error["piqa"] == pytest.approx(np.std([1, 0, 1, 1], ddof=1) / 2)
    assert frame.standard_error["mbpp"] == pytest.approx(
        math.sqrt(2 * ((8 - 9.6) ** 2 + (4 - 2.4) ** 2)) / 5
    )


def test_standard_error_of_bits_per_byte_matches_resampling():
    rng = np.random.default_rng(0)
    sizes = rng.integers(5, 100, 200)
    bits = sizes * rng.gamma(4, 0.25, 200)
    i = rng.integers(0, 200, (4000, 200))
    resampled = (bits[i].sum(1) / sizes[i].sum(1)).std()
    assert scores(items_of("mbpp", bits, sizes)).standard_error[0] == pytest.approx(
        resampled, rel=0.05
    )


def test_a_model_keeps_all_of_itself():
    dense, _ = study()
    frame = retention(dense, dense.sample(frac=1, random_state=0))
    assert (frame[["retention", "ci_low", "ci_high"]] == 1).all(axis=None) and len(frame) == 9
    assert (difference(dense, dense, dense)[["difference", "ci_low", "ci_high"]] == 0).all(
        axis=None
    )


def test_retention_in_closed_form():
    dense, pruned = study()
    frame = retention(dense, pruned, n_boot=50).set_index(["level", "name"]).retention
    mean = lambda d, t: d.value[d.task == t].mean()
    for t in ("sciq", "piqa"):
        assert frame["task", t] == pytest.approx(mean(pruned, t) / mean(dense, t))
    for t in ("mbpp", "gsm8k"):
        assert frame["task", t] == pytest.approx(mean(dense, t) / mean(pruned, t))
    assert frame["total", "total"] == pytest.approx(frame.loc["dimension"].mean())
    two = lambda o: pd.concat([o, items_of("hellaswag", [1.0, 1, 0, 1])])
    more = retention(two(dense), two(pruned), n_boot=50).set_index(["level", "name"]).retention
    assert more["dimension", "Commonsense"] == pytest.approx((frame["task", "piqa"] + 1) / 2)


def test_total_needs_all_four_dimensions():
    dense, pruned = (o[o.task != "gsm8k"] for o in study())
    frame = retention(dense, pruned).set_index("level").loc["total"]
    assert frame[["retention", "ci_low", "ci_high"]].isna().all()


@pytest.mark.parametrize("task", ["sciq", "mbpp"])
def test_interval_agrees_with_scipy(task):
    dense, pruned = (o[o.task == task] for o in study(3, n=80))
    ratio = lambda x, y, axis=-1: (
        y.mean(axis) / x.mean(axis) if task == "sciq" else x.mean(axis) / y.mean(axis)
    )
    both, ways = (dense.value.to_numpy(), pruned.value.to_numpy()), dict(
        vectorized=True, method="percentile"
    )
    reference = bootstrap(
        both, ratio, paired=True, n_resamples=20000, rng=np.random.default_rng(0), **ways
    ).confidence_interval
    ours = retention(dense, pruned, n_boot=20000).set_index("level").loc["task"]
    assert (ours.ci_low, ours.ci_high) == pytest.approx(tuple(reference), abs=0.006)
    width = ours.ci_high - ours.ci_low
    apart = bootstrap(
        both, ratio, paired=False, n_resamples=5000, rng=np.random.default_rng(0), **ways
    ).confidence_interval
    assert width < 0.9 * (apart.high - apart.low)  # pairing is what makes it narrow


def test_intervals_cover():
    "Of 2000 studies whose true retention is known, about 95% of the intervals hold it."
    truth, weights, inside = (0.7 * 0.6 + 0.3 * 0.1) / 0.7, draws(150, 400, 0, "sciq"), 0
    for seed in range(2000):
        rng = np.random.default_rng(seed)
        dense = (rng.random(150) < 0.7).astype(float)
        pruned = dense * (rng.random(150) > 0.4) + (1 - dense) * (rng.random(150) < 0.1)
        low, high = interval(PLAIN.retention("sciq", weights @ dense, weights @ pruned)[1:])
        inside += low <= truth <= high
    assert 0.93 < inside / 2000 < 0.97


def test_draws_belong_to_the_task_and_the_seed():
    dense, pruned = study()
    alone = retention(dense[dense.task == "piqa"], pruned[pruned.task == "piqa"],
                      500).set_index("name").loc["piqa"]
    among = retention(dense, pruned, 500).set_index("name").loc["piqa"]
    pd.testing.assert_series_equal(alone, among)
    assert among.ci_low != retention(dense, pruned, 500, seed=1).set_index("name").ci_low["piqa"]


def test_difference_of_two_pruned_models():
    dense, a = study()
    _, b = study(lost=0.6)
    ab, ba = difference(dense, a, b), difference(dense, b, a)
    np.testing.assert_allclose(ab.difference, -ba.difference)
    np.testing.assert_allclose(ab.ci_low, -ba.ci_high)
    x, y = retention(dense, a), retention(dense, b)
    np.testing.assert_allclose(ab.difference, x.retention - y.retention)
    total = ab.set_index("level").loc["total"]
    assert total.ci_low > 0


def test_bad_pairs_are_refused():
    dense, pruned = study()
    with pytest.raises(CalibPruneError, match="'gsm8k' has 60 .* 0 "):
        retention(dense, pruned[pruned.task != "gsm8k"])
    other = pruned.assign(item=pruned.item.where(pruned.task != "sciq", "x" + pruned.item))
    with pytest.raises(CalibPruneError, match="'sciq' has 60 .* 60 .* 0 "):
        retention(dense, other)
    with pytest.raises(CalibPruneError, match="zero .*'piqa'"):
        retention(dense.assign(value=dense.value.where(dense.task != "piqa", 0.0)), pruned)
    with pytest.raises(CalibPruneError, match="'sciq'.*twice"):
        retention(pd.concat([dense, dense]), pd.concat([pruned, pruned]))


def test_interval_without_values():
    assert interval(np.arange(101.0)) == pytest.approx((2.5, 97.5))
    assert interval(np.r_[np.nan, np.arange(1000.0)])[0] == pytest.approx(24.975)
    assert all(map(math.isnan, interval(np.r_[[np.nan] * 5, np.arange(100.0)])))


def test_commonsense_accuracy():
    frame = pd.concat(
        [items_of("piqa", [1, 0]), items_of("hellaswag", [1, 1, 1, 0]), items_of("sciq", [0, 0])]
    )
    assert commonsense_accuracy(frame) == 0.625 and math.isnan(
        commonsense_accuracy(items_of("sciq", [1]))
    )


# --- perplexity

TEXTS = ["The cat sat on the mat, and then it slept.", "Größe 日本 " * 8, "x"]


@given(st.lists(st.integers(1, 9), max_size=30), st.integers(1, 12))
def test_windows_predict_every_token_once(ids, window):
    found = text_windows(ids, 0, window)
    assert [t for _, targets in found for t in targets] == ids
    assert [c for context, _ in found
            for c in context] == [0, *ids][:-1][::window] if ids else found == []


@pytest.mark.parametrize("model_type", ["llama", "gpt2", "phi"])
def test_perplexity_by_hand(model_type):
    config = AutoConfig.for_model(
        model_type,
        vocab_size=264,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=48,
        max_position_embeddings=10,
        initializer_range=0.2,
    )
    model = AutoModelForCausalLM.from_config(config).eval()
    assert bool(unpackable(model)) == (model_type != "llama")
    nll, n = 0.0, 0
    for text in TEXTS:
        ids = [0, *TOKENIZER(text).input_ids]
        for i in range(0, len(ids) - 1, 10):
            part = torch.tensor(ids[i:i + 11])
            nll += torch.nn.functional.cross_entropy(
                model(part[None, :-1]).logits[0], part[1:], reduction="sum"
            ).item()
            n += len(part) - 1
    found = perplexity(model, TOKENIZER, TEXTS, window=10)
    assert found.per("token") == pytest.approx(
        math.exp(nll / n), rel=1e-5
    ) and found.tokens == n == len("".join(TEXTS).encode())
    with pytest.raises(CalibPruneError, match=" 11 .* 10"):
        perplexity(model, TOKENIZER, TEXTS, window=11)


def test_units_share_one_likelihood():
    found = perplexity(tiny_llama(), TOKENIZER, [*TEXTS, ""])
    assert found.words == 10 + 16 + 1
    for unit in ("token", "word", "byte"):
        assert math.log(found.per(unit)) * found.count(unit) == pytest.approx(found.nll)
    # this tokenizer has one token a byte
    assert found.per("token") == pytest.approx(found.per("byte"))
    with pytest.raises(CalibPruneError, match="'wrod'.*'word'"):
        found.per("wrod")
    with pytest.raises(CalibPruneError):
        perplexity(tiny_llama(), TOKENIZER, ["", ""])


def test_perplexity_equals_lm_evals_rolling_likelihood():
    from lm_eval.api.instance import Instance
    model = tiny_llama()
    lm = language_model(model, TOKENIZER, stock=True)
    lm._max_length = 12
    # Of lengths that the window divides: a shorter last window is given more context by lm-eval,
    # and none here.
    texts = ["The cat sat.", "The cat sat on the mat, ", "Größe 日本 Größe 日本 Größ"]
    asked = [Instance("loglikelihood_rolling", {}, (o,), i) for i, o in enumerate(texts)]
    for text, value in zip(texts, lm.loglikelihood_rolling(asked, disable_tqdm=True), strict=True):
        assert len(text.encode()) % 12 == 0
        assert -value == pytest.approx(
            perplexity(model, TOKENIZER, [text], window=12).nll, rel=1e-5
        )


@pytest.mark.real
@pytest.mark.parametrize("name", ["gsm8k_generate", "humaneval_generate", "mbpp_generate"])
def test_reference_solutions_pass(name):
    task = TASKS[name]
    docs = [
        tasks.fill_prompt(task, o)
        for o in tasks.choose(tasks.read_jsonl(tasks.cached("benchmarks", task.benchmark)), 60)
    ]
    found = scoring.generated_rows(task, [dict(doc=o, filtered_resps=[o["target"]]) for o in docs])
    assert len([o for o in found if o["metric"] == task.metric]) == 60 and all(
        o["value"] == (o["metric"] != "late") for o in found
    )


@pytest.mark.real
def test_the_real_model_scores_as_lm_eval_does():
    model, tokenizer = load_model("smollm2-135m")
    names, limit = ["sciq", "piqa", "lambada", "basic_skills_arithmetic", "gsm8k"], 3
    items, stock = (evaluate(model, tokenizer, names, limit, stock=o) for o in (False, True))
    pd.testing.assert_frame_equal(items, stock, rtol=1e-4, check_exact=False)
    assert items.attrs["scoring"] == "packed"


def coded(bits, task="mbpp", n=50):
    value = bits * np.random.default_rng(len(task)).gamma(20, 1 / 20, n)
    rows = dict(task=task, dimension=TASKS[task].dimension, metric="bits", value=value, bytes=8)
    return pd.DataFrame(rows | dict(item=[*map(str, range(n))], chance=np.nan))


def test_a_model_at_the_floor_is_named_and_one_above_is_not():
    dense, floor = coded(10), coded(18)
    for bits, at_floor in ((18, True), (12, False)):
        table = retention(dense, coded(bits), measure="answer-bits")
        compared = floor_comparison(dense, coded(bits), floor, measure="answer-bits")
        notes = floor_notes(table, compared)
        assert [note.split(":")[0] for note in notes] == ["Code"] * at_floor
        assert np.allclose(compared.floor[:2], 10 / 18)


def test_tasks_without_a_floor_do_not_count_in_it():
    written = coded(1, "mbpp_generate").assign(metric="pass@1", value=1.0)
    both = [pd.concat([coded(bits), written]) for bits in (10, 12)]
    compared = floor_comparison(*both, coded(18))
    assert set(compared.name) == {"mbpp", "Code", "total"} and compared.above[0]
    # the retention of Code is about written answers as well
    assert compared[compared["name"] == "Code"][["floor", "above"]].isna().all(axis=None)
    assert floor_notes(retention(*both), compared) == [
        "No floor for Code: tasks that have none count in the retention, too."]
    assert floor_comparison(*both, coded(18), measure="answer-bits").floor.notna()[1]


def test_tasks_at_chance_have_no_floor():
    """The dense model guesses in the only task with a floor; written answers are judged."""
    written = coded(1, "gsm8k_cot").assign(metric="exact_match", value=1.0, chance=0.0)
    guessed = coded(1, "arc_challenge").assign(metric="acc_norm", value=0.0, chance=0.25)
    dense = pd.concat([written, guessed])
    found = [Evaluation(dense, dense, guessed, PLAIN),
             Comparison(dense, dict(a=dense, b=dense), guessed, PLAIN, 50)]
    for one in found:
        assert one.floor is None and "No floor" in one.floor_notes[0] and one.record()


def test_models_with_their_own_tasks_in_another_order_are_paired_by_item(monkeypatch):
    own = {name: replace(TASKS["mbpp"], name=name, dimension=name) for name in ("first", "second")}
    for name, task in own.items(): monkeypatch.setitem(tasks.TASKS, name, task)
    parts = [coded(bits).assign(task=name, dimension=name) for name, bits in zip(own, (10, 20))]
    pairs = paired_values(pd.concat(parts), pd.concat(parts[::-1]))
    assert all((a == b).all() for a, b in pairs.values())


@pytest.mark.parametrize("floor", [18, None])
def test_bits_alone_are_judged_by_bits(floor):
    floor = None if floor is None else coded(floor)
    assert discriminating_measure(coded(10), [coded(12)], floor).name == "answer-bits"


def chosen(right, bits, seed):
    "Four hundred choices, some right, whose right answers have bits that scatter widely."
    about = coded(1, "piqa", 400)
    noisy = about.assign(value=bits * np.random.default_rng(seed).lognormal(0, 2.5, 400))
    answers = about.assign(metric="acc_norm", value=np.float64(np.arange(400) < right), chance=0.5)
    return pd.concat([noisy, answers])


def test_accuracies_discriminate_where_bits_scatter():
    found = discriminating_measure(chosen(395, 10, 0), [chosen(300, 12, 1)],
                                   chosen(200, 11, 2))
    assert found.name in ("above-chance", "plain")  # one is a stretched copy of the other


def test_the_order_of_the_models_chooses_no_measure():
    def tight(right, bits):  # bits that hardly scatter
        items = chosen(right, bits, 0)
        low = np.where(items.metric == "bits", bits + np.arange(len(items)) % 3, items.value)
        return items.assign(value=low)
    dense, floor, models = tight(395, 10), tight(200, 18), [chosen(300, 12, 1), tight(300, 12)]
    alone = [discriminating_measure(dense, [model], floor) for model in models]
    found = {discriminating_measure(dense, mine, floor) for mine in (models, models[::-1])}
    assert len(set(alone)) == 2 and len(found) == 1
    same = dense, models[0]  # a copy of the dense model has no interval, and decides nothing
    assert discriminating_measure(dense, same, floor) == alone[0]


def test_written_answers_alone_are_judged_by_their_own_score():
    written = coded(1, "mbpp_generate").assign(metric="pass@1", value=1.0)
    assert discriminating_measure(written, [written], None).name == "plain"


def test_tasks_of_ones_own_make_dimensions_of_their_own(tmp_path):
    """A file of answers and a file of choices: each is scored, retained, and part of the total; the
    four dimensions are not asked for."""
    before = set(tasks.TASKS)
    answers = [dict(prompt=f"{i} and one is", answer=str(i + 1)) for i in range(12)]
    choices = [dict(prompt=f"Is {i} even?", choices=["yes", "no"], answer=i % 2) for i in range(12)]
    for name, items in (("sums", answers), ("parity", choices)):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(o) + "\n" for o in items))
    asked = [f"Numbers={tmp_path / 'sums.jsonl'}", str(tmp_path / "parity.jsonl")]
    try:
        models = [tiny_llama(seed, max_position_embeddings=256) for seed in (0, 1)]
        dense, pruned = (evaluate(model, TOKENIZER, asked) for model in models)
        table = retention(dense, pruned, 200, measure="answer-bits")
        names = table.loc[table["level"] == "dimension", "name"].tolist()
        by_name = table.set_index(["level", "name"])["retention"]
        assert names == ["Numbers", "parity"]
        assert by_name["total", "total"] == by_name["dimension"].mean()
        with pytest.raises(CalibPruneError, match="Task 'sums' is asked for with two dimensions"):
            evaluate(models[0], TOKENIZER, [*asked, str(tmp_path / "sums.jsonl")])
        assert tasks.get_tasks(str(tmp_path / "sums.jsonl"))[0].dimension == "sums", "asked anew"
        mixed = [*asked, "sciq"]
        assert tasks.task_dimensions(tasks.get_tasks(mixed)) == ["General", "Numbers", "parity"]
    finally:
        for name in set(tasks.TASKS) - before: del tasks.TASKS[name]
