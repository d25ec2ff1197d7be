"""The benchmark: its counting by hand, its plain implementation against ours, its plan and the
results it left."""
import json

import pandas as pd
import pytest
import torch

from bench import limit, recovering, run, writing
from bench.plain import plain_prune, plain_sparsegpt
from bench.report import (
    FILES,
    WRITING,
    growth_table,
    load_results,
    measure_table,
    prune_message,
    target_table,
)
from calib_prune.generation.writing import start_token
from calib_prune.model.tiny import tiny_llama, tiny_tokenizer
from calib_prune.pruning.layers import decoder_layers, prunable
from calib_prune.pruning.sparsegpt import sparsegpt
from calib_prune.pruning.walk import prune
from tests import ROOT

RESULTS = ROOT / "bench" / "results"
TINY = limit.Shape(hidden=4, intermediate=6, heads=2, kv_heads=1, head_dim=2)


def test_pass_is_counted_by_hand():
    # q 4·4, k and v 2·4 each, o 4·4, gate and up 6·4 each, down 4·6 weights; windows of 3 tokens:
    # queries see 1, 2 and 3 keys
    linears, attention = 16 + 8 + 8 + 16 + 24 + 24, 2 * 2 * 4 * (1 + 2 + 3)
    assert limit.pass_flops(TINY, tokens=3, length=3, down=False) == 2 * 3 * linears + attention
    assert limit.pass_flops(TINY, tokens=6, length=3) == 2 * (2 * 3 * (linears + 24) + attention)


def test_second_moments_are_counted_by_hand():
    pairs = 10 + 10 + 10 + 21  # i ≤ j among 4, 4, 4 and 6 inputs
    assert limit.moment_flops(TINY, tokens=5) == 2 * 5 * pairs


def test_prune_counts_two_passes_less_what_nobody_reads():
    first, second = limit.pass_flops(TINY, 6, 3, down=False), limit.pass_flops(TINY, 6, 3)
    assert limit.prune_flops(TINY, 3, 6, 3, moments=False) == 3 * first + 2 * second
    assert (
        limit.prune_flops(TINY, 3, 6, 3) == 3 * (first + limit.moment_flops(TINY, 6)) + 2 * second
    )


def test_pass_is_what_torch_counts():
    from torch.utils.flop_counter import FlopCounterMode
    model = tiny_llama()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model.model(torch.ones(2, 8, dtype=torch.int64))
    linears = sum(
        counter.get_flop_counts()["Global"][o]
        for o in (torch.ops.aten.mm, torch.ops.aten.addmm)
        if o in counter.get_flop_counts()["Global"]
    )
    shape = limit.Shape.of(model.config)
    attention = 2 * 16 * shape.heads * shape.head_dim * (8 + 1)
    assert 2 * (limit.pass_flops(shape, 16, 8) - attention) == linears


def test_scoring_counts_what_texts_share_once():
    requests = [([1, 2], [3, 4]), ([1, 2], [3, 5]), ([1, 2], [6]), ([7], [8, 9])]
    # read: 1, 2, 3 for the first two, 1, 2 for the third, and 7, 8; they see 1 + 2 + 3 and 1 + 2
    # tokens
    assert limit.shared_tokens([(a + b)[:-1] for a, b in requests]) == (3 + 2, 6 + 3)
    # after 1 2, after 1 2 3, after 7, after 7 8
    weights, predicted = 16 + 8 + 8 + 16 + 24 + 24 + 24, 4
    assert (
        limit.score_flops(TINY, 3, 100, requests)
        == 3 * (2 * 5 * weights + 4 * 9 * 4) + 2 * predicted * 100 * 4
    )


def test_bytes_are_counted_by_hand():
    parts = limit.prune_bytes(TINY, parameters=100, tokens=10, batch_tokens=5)
    assert parts == dict(
        model=400, statistics=4 * (16 + 16 + 16 + 36), windows=160, batch=4 * 5 * (8 + 18)
    )


@pytest.mark.parametrize("method", ["sparsegpt", "wanda"])
def test_plain_walk_prunes_as_ours(method):
    ours, plain = tiny_llama(num_hidden_layers=3), tiny_llama(num_hidden_layers=3)
    tokens = torch.randint(1, 264, (7, 24), generator=torch.Generator().manual_seed(1))
    prune(ours, tokens, method, 0.6, batch_tokens=72)
    plain_prune(plain, tokens, method, 0.6, batch_tokens=72)
    for a, b in zip(decoder_layers(ours), decoder_layers(plain), strict=True):
        for name, m in prunable(a).items():
            other = prunable(b)[name].weight
            assert torch.equal(m.weight == 0, other == 0)
            torch.testing.assert_close(m.weight, other, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("d_out,d_in", [(24, 300), (3, 40)])
def test_plain_kernel_prunes_as_ours(d_out, d_in):
    hessian, weight = run.wishart(d_in, 0), torch.randn(
        d_out, d_in, generator=torch.Generator().manual_seed(0)
    )
    a, b = sparsegpt(weight, hessian, 0.6).weight, plain_sparsegpt(weight, hessian, 0.6)
    assert torch.equal(a == 0, b == 0)
    torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3)


def test_distance_sees_one_weight():
    problem = run.groups(32, 48, 16, 0)
    ours = [[sparsegpt(w, h, 0.6).weight for w in ws] for h, ws in problem]
    other = [[o.clone() for o in ws] for ws in ours]
    assert run.distance(ours, other) == dict(masks=0, weights=0)
    row, column = (ours[0][0] != 0).nonzero()[0].tolist()
    other[0][0][row, column] = 0
    found = run.distance(ours, other)
    assert (
        found["masks"] == 1 / sum(w.numel() for _, ws in problem for w in ws)
        and found["weights"] > 0
    )
    assert run.mean_error(problem, other) != run.mean_error(problem, ours) == pytest.approx(
        sum(sparsegpt(w, h, 0.6).error for h, ws in problem for w in ws) / 7, rel=1e-2)


@pytest.mark.real
def test_plan_interleaves_and_reads_what_it_wrote():
    plan = run.Plan()
    todo = list(run.steps(plan))
    turns = [
        (o.about["who"], o.about["turn"]) for o in todo if o.about.get("method") == "sparsegpt"
    ]
    assert turns[:5] == [("ours", 1), ("plain", 1), ("llm-compressor", 1), ("ours", 2),
                         ("llm-compressor", 2)]
    told_apart = [(o.file, *o.about.items()) for o in todo]
    assert len(set(told_apart)) == len(told_apart)
    files = {run.window_file(*o) for o in run.token_sets(plan)}
    options = [
        dict(zip(o.command[::1], o.command[1:]))
        for o in todo
        if "--windows" in o.command and "limit" not in o.command
    ]
    assert all(
        any(f"-{o['--windows']}x{o['--length']}-" in f.name for f in files)
        for o in options
        if "--length" in o
    )


def result_files():
    return [o for o in sorted(RESULTS.glob("*.json")) if o.stem in (*FILES, WRITING)]

@pytest.mark.parametrize("path", result_files(), ids=lambda p: p.stem)
def test_results_say_what_and_where(path):
    found = json.loads(path.read_text())
    assert set(found) == {"machine", "plan", "states", "rows"} and found["rows"] and found["states"]
    assert {"cpu", "cores", "memory_gib", "torch", "threads"} <= set(found["machine"])
    assert "+" not in found["machine"]["torch"]
    if path.stem in ("prune", "score"):
        assert all(
            {"who", "turn"} <= set(o)
            and (o["who"] == "agreement" or 0 < o["seconds"] <= o["process_seconds"])
            for o in found["rows"]
        )


def test_rows_of_other_code_are_kept_with_a_warning_and_those_of_another_machine_refused(
    tmp_path, capsys
):
    path, head, then = tmp_path / "prune.json", dict(
        machine=dict(cpu="a"), plan=dict(rounds=3)), dict(code="1", versions=dict(wanda=1))
    run.add(path, run.read(path, head, then), then, [dict(who="ours")])
    assert run.read(path, head, then)["rows"] == [dict(who="ours")] and not capsys.readouterr().err
    now = dict(code="2", versions=dict(wanda=2))
    kept = run.read(path, head, now)
    assert (
        "the code has changed" in (said := capsys.readouterr().err)
        and "wanda 1, now 2" in said
        and kept["rows"] == [dict(who="ours")]
    )
    run.add(path, kept, now, [dict(who="plain")])
    assert [o["code"] for o in json.loads(path.read_text())["states"]] == ["1", "2"]
    with pytest.raises(SystemExit):
        run.read(path, head | dict(machine=dict(cpu="b")), now)
    assert not run.read(path, head, now, fresh=True)["rows"] and path.is_file()


def test_no_step_is_taken_for_a_row_of_another():
    steps = [step.about.items() for step in recovering.steps(recovering.Plan())]
    for at, step in enumerate(steps):
        assert not any(step <= other for other in steps[:at] + steps[at + 1:]), step


def test_what_is_measured_is_known_by_what_it_does(tmp_path, monkeypatch):
    monkeypatch.setattr(run, "ROOT", tmp_path)
    def state(text):
        (tmp_path / "a.py").write_text(text)
        return run.state_of(("a.py",), ("wanda",))["code"]
    first = state("# %% ../nbs/08_wanda.ipynb\nx = 1\n")
    assert (
        state("# %% ../nbs/pruning/02_wanda.ipynb\nx = 1  # moved\n") == first != state("x = 2\n")
    )


def test_what_is_measured_is_there():
    for measured, stages in ((run.MEASURED, run.STAGES), (writing.MEASURED, writing.STAGES)):
        assert all((run.ROOT / path).is_file() for path in measured)
        assert run.state_of(measured, stages)["versions"].keys() == set(stages)
    assert {"calib_prune/kernels/tiles.py", "calib_prune/pruning/walk.py", "bench/run.py"} <= set(
        run.MEASURED
    )


def test_results_are_of_one_state():
    found = {o.stem: json.loads(o.read_text()) for o in result_files()}
    assert (
        len({json.dumps([o["states"], o["plan"]]) for k, o in found.items() if k != WRITING}) <= 1
    )
    assert len({json.dumps(o["machine"]) for o in found.values()}) <= 1


@pytest.mark.skipif(len(result_files()) <= len(FILES), reason="not measured yet: make bench")
def test_tables_hold_every_measurement():
    found = load_results(RESULTS)
    measures, targets, growth = measure_table(found), target_table(found), growth_table(found)
    pruning, ability, scoring, second, busy, start, writing = 10, 10, 3, 2, 6, 2, 1
    rows = pruning + ability + scoring + second + busy + start + writing + len(
        found["kernel"]) + len(found["memory"])
    assert len(measures) == rows and measures["ours"].notna().all()
    assert targets["measured"].notna().all() and len(growth) == len(found["growth"])


@pytest.mark.parametrize("who", ["ours", "theirs"])
def test_writing_counts_tokens_up_to_the_end(who):
    tokenizer, write = tiny_tokenizer(), getattr(writing, who)
    def model_that_says(token):
        model = tiny_llama()
        model.lm_head.weight.data.zero_()
        model.lm_head.weight.data[token] = 100 * torch.sign(model.model.norm.weight.data)
        model.model.norm.forward = torch.ones_like  # whatever was read, the same is said
        return model
    assert write(model_that_says(7), tokenizer, texts=5, length=6, batch=2, seed=0) == 30
    assert (
        write(
            model_that_says(start_token(tokenizer)), tokenizer, texts=5, length=6, batch=2, seed=0
        )
        == 0
    )


def test_the_title_of_a_chart_states_what_every_round_shows():
    rounds = pd.DataFrame([
        dict(turn=i, who=who, seconds=s) for i in range(2)
        for who, s in (("ours", 10 + i), ("llm-compressor", 40 + 4 * i))])
    assert (
        prune_message(rounds)
        == "SparseGPT is faster than llm-compressor in every round (median 4.0 times)"
    )
    assert (
        prune_message(rounds.assign(seconds=1.0))
        == "SparseGPT and llm-compressor: the rounds overlap"
    )
