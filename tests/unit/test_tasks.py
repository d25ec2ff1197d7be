import json
from pathlib import Path

import pytest
import yaml

from calib_prune.advice.nearest import source_distances
from calib_prune.advice.needs import OWN_NEED, Need, parse_need, with_answers
from calib_prune.core import DIMENSIONS, CalibPruneError
from calib_prune.data.files import read_jsonl, write_jsonl
from calib_prune.evaluation import tasks
from calib_prune.evaluation.tasks import (
    KINDS,
    TASK_SETS,
    TASKS,
    choose,
    fill_prompt,
    get_tasks,
    task_config,
    write_task,
)
from calib_prune.model.tiny import tiny_tokenizer

RECORDS = {
    "sciq": {"id": "0", "question": "Who {x}?", "choices": ["a", "b'\"", "c", "d"], "gold": 1},
    "mbpp": {
        "id": "3", "task_id": 11, "text": "Add {a}.", "code": "def f(a): return {1: a}",
        "test_list": ["assert f(1)", "assert f(2)"], "test_setup_code": "import math",
        "challenge_test_list": []}, "humaneval": {
            "id": "0", "prompt": "def f(x):\n", "canonical_solution": "    return x\n",
            "entry_point": "f", "test": "def check(c):\n    assert c(1) == 1"}, "gsm8k": {
                "id": "1", "question": "How many?", "answer": "#### 18", "short_answer": "18",
                "solution": "So the answer is 18."}}


@pytest.fixture
def benchmarks(tmp_path, monkeypatch):
    for name, record in RECORDS.items():
        write_jsonl(tmp_path / f"{name}.jsonl", [record | {"id": str(i)} for i in range(30)])
    monkeypatch.setattr(tasks, "cached", lambda kind, name: tmp_path / f"{name}.jsonl")
    return tmp_path


def test_registry_is_consistent():
    for name, task in TASKS.items():
        assert task.name == name and task.dimension in DIMENSIONS and task.kind in KINDS
        assert task.metric in {
            "choice": ("acc", "acc_norm"), "bpb": ("bits", ),
            "generate": ("exact_match", "pass@1")}[task.kind]
        assert (task.kind == "choice") != bool(task.answer)
        assert (task.kind == "generate") == bool(task.until and task.max_tokens)
    for names in TASK_SETS.values():
        assert set(names) <= set(TASKS) and len(set(names)) == len(names)


@pytest.mark.parametrize("dimension", DIMENSIONS)
def test_default_set_has_three_tasks_in_each_dimension(dimension):
    mine = [o for o in get_tasks("default") if o.dimension == dimension]
    assert len(mine) >= 3 and not any(o.kind == "generate" for o in mine)


def test_lookup():
    assert [o.name for o in get_tasks("piqa, sciq,piqa")] == ["piqa", "sciq"]
    assert [o.name for o in get_tasks(["generate", "gsm8k_generate"])] == list(
        TASK_SETS["generate"]
    )
    with pytest.raises(CalibPruneError, match="'helaswag'.*'hellaswag'"):
        get_tasks("sciq,helaswag")


def test_prompts():
    item = fill_prompt(TASKS["sciq"], RECORDS["sciq"])
    assert item == {
        "id": "0", "context": "Question: Who {x}?\nAnswer:", "choices": ["a", "b'\"", "c", "d"],
        "gold": 1}
    item = fill_prompt(TASKS["mbpp"], RECORDS["mbpp"])
    assert item["context"] == '"""\nAdd {a}.\nassert f(1)\n"""\n' and item["choices"] == [
        "def f(a): return {1: a}"
    ]
    item = fill_prompt(TASKS["mbpp_generate"], RECORDS["mbpp"])
    assert (item["program"], item["tests"]) == (
        "\0\n",
        "f = _answer('f')\nimport math\nassert f(1)\nassert f(2)\n",
    )
    item = fill_prompt(TASKS["humaneval_generate"], RECORDS["humaneval"])
    assert item["program"].replace("\0", "    return x\n") == "def f(x):\n    return x\n\n"
    assert (
        item["tests"]
        == "def f(x):\n\n    pass\nf = _answer('f')\ndef check(c):\n    assert c(1) =="
        " 1\ncheck(f)\n"
    )
    item = fill_prompt(TASKS["gsm8k_generate"], RECORDS["gsm8k"])
    assert item["target"] == "18" and item["program"] == "" and item["context"].endswith(
        "Question: How many?\nAnswer:")


def test_a_limit_is_nested_ordered_and_spread():
    records = [{"id": str(i)} for i in range(1000)]
    small, large = ([int(o["id"]) for o in choose(records, n)] for n in (50, 200))
    assert len(small) == 50 and set(small) < set(large) and small == sorted(small)
    assert choose(records, None) == records and choose(records, 2000) == records
    assert 350 < sum(large) / 200 < 650 and max(large) > 900  # not the first ones
    assert [int(o["id"]) for o in choose(records, 50, seed=1)] != small
    # Adding items at the end does not reshuffle the ones that were there.
    assert set(small) >= {
        i
        for i in (int(o["id"]) for o in choose([{"id": str(i)} for i in range(1100)], 50))
        if i < 1000
    }
    with pytest.raises(CalibPruneError, match="limit of 0"): choose(records, 0)


def test_files_for_lm_eval(benchmarks, tmp_path):
    out = write_task(TASKS["sciq"], limit=5, folder=tmp_path / "t")
    config = yaml.safe_load((out / "sciq.yaml").read_text())
    items = [json.loads(o) for o in open(config["dataset_kwargs"]["data_files"]["test"])]
    assert len(items) == 5 and items[0]["context"] == "Question: Who {x}?\nAnswer:"
    before = {o.name: o.stat().st_mtime_ns for o in out.iterdir()}
    assert write_task(TASKS["sciq"], limit=5, folder=tmp_path / "t") == out
    assert before == {o.name: o.stat().st_mtime_ns for o in out.iterdir()}
    assert write_task(TASKS["sciq"], limit=6, folder=tmp_path / "t") != out
    assert task_config(TASKS["gsm8k_generate"], tmp_path)["generation_kwargs"] == {
        "until": ["\n\n", "Question:"], "max_gen_toks": 320, "do_sample": False}


def test_items_may_be_passed_over(benchmarks, tmp_path):

    def ids(**how):
        return {
            json.loads(o)["id"]
            for o in open(write_task(TASKS["sciq"], folder=tmp_path, **how) / "items.jsonl")
        }

    every, first = ids(), ids(limit=5)
    assert ids(limit=5, after=5) == ids(limit=10) - first and ids(after=5) == every - first
    with pytest.raises(CalibPruneError, match=str(len(every))):
        ids(after=len(every))


def test_files_are_mended_after_a_move(benchmarks, tmp_path):
    old = write_task(TASKS["sciq"], limit=5, folder=tmp_path / "old")
    want = (old / "items.jsonl").read_text()
    (tmp_path / "old").rename(tmp_path / "new")
    out = tmp_path / "new" / old.name
    data = out / "items.jsonl"
    def mended():
        assert (
            write_task(TASKS["sciq"], limit=5, folder=tmp_path / "new") == out
            and data.read_text() == want
        )
        return yaml.safe_load((out / "sciq.yaml").read_text())["dataset_kwargs"]["data_files"][
            "test"
        ] == str(data)
    assert mended()
    data.unlink()
    assert mended()
    data.write_text(want[:-20])  # a copy that was cut short
    assert mended()


def test_lm_eval_reads_what_was_written(benchmarks, tmp_path):
    from lm_eval.tasks import TaskManager
    folders = [
        str(write_task(TASKS[o], 4, tmp_path / "t")) for o in ("sciq", "mbpp", "gsm8k_generate")
    ]
    loaded = TaskManager(include_path=folders, include_defaults=False).load(
        ["sciq", "mbpp", "gsm8k_generate"]
    )["tasks"]
    doc = list(loaded["sciq"].test_docs())[0]
    assert loaded["sciq"].doc_to_text(doc) == "Question: Who {x}?\nAnswer:"
    assert loaded["sciq"].doc_to_choice(doc) == RECORDS["sciq"]["choices"]
    loaded["mbpp"].build_all_requests(rank=0, world_size=1)
    assert loaded["mbpp"].instances[0].args == (
        '"""\nAdd {a}.\nassert f(1)\n"""\n',
        "def f(a): return {1: a}",
    )
    loaded["gsm8k_generate"].build_all_requests(rank=0, world_size=1)
    assert loaded["gsm8k_generate"].instances[0].args[1]["max_gen_toks"] == 320


@pytest.mark.real
@pytest.mark.parametrize("name", TASKS)
def test_every_real_item_renders(name):
    task = TASKS[name]
    items = [
        fill_prompt(task, o) for o in tasks.read_jsonl(tasks.cached("benchmarks", task.benchmark))
    ]
    assert len(items) >= 164 and len({o["id"] for o in items}) == len(items)
    for o in items:
        assert o["context"].strip()
        assert 0 <= o["gold"] < len(o["choices"]) and all(
            c.strip() for c in o["choices"]) if "choices" in o else o["target"]


def test_items_after_those_that_are_scored():
    records = [{"id": str(i)} for i in range(1000)]
    some, more, next_ones = choose(records, 50), choose(records, 80), choose(records, 30, after=50)
    of = lambda items: {o["id"] for o in items}
    assert of(some) | of(next_ones) == of(more) and not of(some) & of(next_ones)
    assert choose(records, 30, after=1000) == [] and len(choose(records, 30, after=990)) == 10


def test_the_eight_examples_are_those_of_lm_eval():
    import lm_eval
    config = Path(lm_eval.__file__).parent / "tasks/gsm8k/gsm8k-cot.yaml"
    samples = yaml.safe_load(config.read_text())["fewshot_config"]["samples"]
    shown = [f"Q: {sample['question']}\nA: {sample['target']}\n\n" for sample in samples]
    record = dict(RECORDS["gsm8k"], question="How many?")
    prompt = fill_prompt(TASKS["gsm8k_cot"], record)["context"]
    assert prompt == "".join(shown) + "Q: How many?\nA:"


def test_the_floor_has_the_prompt_of_the_next_item(tmp_path):
    own = read_jsonl(write_task(TASKS["sciq"], 3, tmp_path) / "items.jsonl")
    floor = read_jsonl(write_task(TASKS["sciq"], 3, tmp_path, next_prompt=True) / "items.jsonl")
    prompts = [item["context"] for item in own]
    assert [item["context"] for item in floor] == prompts[1:] + prompts[:1]
    assert [item["choices"] for item in floor] == [item["choices"] for item in own]
    with pytest.raises(CalibPruneError, match="'sciq' has 1 item.*Take 2 items"):
        write_task(TASKS["sciq"], 1, tmp_path, next_prompt=True)


@pytest.mark.parametrize("line, said", [("[" * 100_000, "Line 1 of .* is not JSON")])
def test_prompts_that_cannot_be_read_are_refused(tmp_path, line, said):
    (file := tmp_path / "mine.jsonl").write_text(line)
    with pytest.raises(CalibPruneError, match=said): parse_need(str(file))


def test_weights_of_a_need_have_a_sum():
    assert dict(parse_need("code=3,math=1").weights) == dict(Code=0.75, Math=0.25)
    with pytest.raises(CalibPruneError, match="sum of the weights"):
        parse_need("code=1e308,math=1e308")


def test_a_byte_order_mark_is_no_text(tmp_path):
    (file := tmp_path / "mine.jsonl").write_text("".join(
        json.dumps(dict(prompt=f"Case {i}?", answer="x")) + "\n" for i in range(20)), "utf-8-sig")
    need = with_answers(parse_need(str(file)))
    assert len(tasks.task_items(TASKS[need.task])) == len(need.prompts) == 20


@pytest.mark.parametrize("given", ["Total.jsonl", "worst=p.jsonl", "all=p.jsonl"])
def test_a_dimension_has_no_name_of_a_table_or_a_need(tmp_path, monkeypatch, given):
    monkeypatch.chdir(tmp_path)
    file = given.rpartition("=")[2]
    Path(file).write_text(json.dumps(dict(prompt="Case?", answer="x")))
    with pytest.raises(CalibPruneError, match="a meaning of its own"): get_tasks(given)


def test_an_equals_sign_in_a_path_names_no_dimension(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "lang=en").mkdir()
    (tmp_path / "lang=en/p.jsonl").write_text("".join(
        json.dumps(dict(prompt=f"Case {i}?", answer="x")) + "\n" for i in range(20)))
    assert [task.dimension for task in get_tasks("lang=en/p.jsonl")] == ["p"]
    del TASKS["p"]
    assert [task.dimension for task in get_tasks("code=lang=en/p.jsonl")] == ["Code"]
    del TASKS["p"]
    assert TASKS[with_answers(parse_need("lang=en/p.jsonl")).task].dimension == "own"


def test_a_source_with_an_equals_sign_is_measured(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "lang=en").mkdir()
    (tmp_path / "lang=en/n.txt").write_text("the high court heard it " * 200)
    prompts = tuple(f"Which court heard case {i}?" for i in range(10))
    sources = ["lang=en/n.txt", "lang=en/*.txt"]
    need = Need("p.jsonl", {OWN_NEED: 1.0}, prompts=prompts)
    found = source_distances(need, tiny_tokenizer(), sources, windows=2, length=64)
    assert sorted(found["source"]) == sorted(sources)
