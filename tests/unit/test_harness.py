"Tasks of lm-eval as items: scored with its own prompts and answers."
import json

import pytest
import yaml

from calib_prune.core import CalibPruneError
from calib_prune.data.harness_items import harness_file, is_harness
from calib_prune.data.own_items import read_own_items
from calib_prune.evaluation.scoring import evaluate, language_model, quiet
from calib_prune.evaluation.tasks import get_tasks
from calib_prune.model.tiny import tiny_llama, tiny_tokenizer

COURTS = ["the high court", "the jury", "nobody"]
ASKED = [dict(q=f"Who heard case {i}?", courts=COURTS, right=i % 3) for i in range(6)]
CHOICE = dict(output_type="multiple_choice", doc_to_text="Question: {{q}}\nAnswer:",
              doc_to_choice="courts", doc_to_target="right")


@pytest.fixture
def task(tmp_path):
    "Writes a YAML file of lm-eval next to its data, with some fields changed."
    def write(name="courts", more="", ending="yaml", **fields):
        data, path = tmp_path / f"{name}.jsonl", tmp_path / f"{name}.{ending}"
        data.write_text("\n".join(map(json.dumps, ASKED)))
        files = dict(data_files=dict(test=str(data)), cache_dir=str(tmp_path / "arrow"))
        config = dict(task=name, dataset_path="json", test_split="test", dataset_kwargs=files)
        path.write_text(yaml.safe_dump(config | CHOICE | fields) + more)
        return str(path)
    return write


@pytest.mark.parametrize("fields", [
    {}, dict(gen_prefix="It was"),
    dict(num_fewshot=2, fewshot_split="test", description="Cases.\n\n"),
    dict(target_delimiter="", doc_to_text="{{q}}\n"), dict(target_delimiter="\n")])
def test_scores_are_those_of_lm_eval(task, fields):
    from lm_eval.evaluator import evaluate as run
    from lm_eval.tasks import TaskManager
    path = task(**fields)
    model, tokenizer = tiny_llama(0, max_position_embeddings=512), tiny_tokenizer()
    mine = evaluate(model, tokenizer, [f"Law={path}"])
    with quiet():
        folder = str(path).rpartition("/")[0]
        loaded = TaskManager(include_path=folder, include_defaults=False).load(["courts"])["tasks"]
        loaded["courts"].set_fewshot_seed(1234)  # as its `simple_evaluate` does
        lm = language_model(model, tokenizer, stock=True)
        theirs = run(lm=lm, task_dict=loaded, bootstrap_iters=0)
    accuracy = mine.loc[mine["metric"] == "acc", "value"]
    assert len(accuracy) == len(ASKED) and {*mine["dimension"]} == {"Law"}
    assert accuracy.mean() == theirs["results"]["courts"]["acc,none"]
    bits = mine.loc[mine["metric"] == "bits"].sort_values("item")["value"]
    right = [-sample["resps"][sample["doc"]["right"]][0][0]
             for sample in sorted(theirs["samples"]["courts"], key=lambda s: s["doc_id"])]
    assert bits.tolist() == pytest.approx([value / 0.6931471805599453 for value in right], rel=1e-4)


@pytest.mark.parametrize("fields, answer", [
    (dict(output_type="loglikelihood", doc_to_target="{{' ' + courts[right]}}"), " the jury"),
    (dict(output_type="generate_until", doc_to_target="{{courts[right]}}", target_delimiter="\n"),
     "\nthe jury"),
    (dict(output_type="generate_until"), " the jury")])  # a position among the choices
def test_one_right_answer_is_scored_in_bits(task, fields, answer):
    path = task(**fields)
    assert read_own_items(harness_file(path))[1]["answer"] == answer
    [made] = get_tasks([path])
    assert (made.name, made.kind, made.delimiter) == ("courts", "bpb", "")


def test_functions_of_the_file_are_run(task, tmp_path):
    (tmp_path / "own.py").write_text("def ask(doc): return doc['q'].upper()\n")
    path = task(more="doc_to_text: !function own.ask\n")
    assert read_own_items(harness_file(path))[0]["prompt"] == "WHO HEARD CASE 0?"


@pytest.mark.parametrize("fields, said", [
    (dict(output_type="loglikelihood_rolling"), "no answers to prompts"),
    (dict(output_type="generate_until", doc_to_choice=None), "no text that is the right answer"),
    (dict(output_type="generate_until", unsafe_code=True), "a function of its own"),
    (dict(task=None), "cannot load the task"), (dict(doc_to_text="{{q"), "cannot load the task"),
    (dict(num_fewshot=9, fewshot_split="test"), "cannot load the task"),
    (dict(dataset_path="no/such-set"), "cannot load the task")])
def test_tasks_that_cannot_be_scored_are_refused(task, fields, said):
    with pytest.raises(CalibPruneError, match=said): harness_file(task(**fields))


def test_a_changed_file_is_read_again(task):
    first = read_own_items(harness_file(task()))[0]["prompt"]
    again = read_own_items(harness_file(task(doc_to_text="{{q}} Say:")))[0]["prompt"]
    assert first.endswith("Answer:") and again.endswith("Say:")


def test_the_named_file_is_read_whatever_lies_beside_it(task, tmp_path):
    for name in ("courts-old", "a"): task(name, doc_to_text="another")
    for name in ("courts-old", "a"):
        file = tmp_path / f"{name}.yaml"
        file.write_text(file.read_text().replace(f"task: {name}", "task: courts"))
    for ending in ("yaml", "yml"):
        assert read_own_items(harness_file(task(ending=ending)))[0]["prompt"].startswith("Question")


def test_items_that_cannot_be_scored_are_left_out_and_counted(task, tmp_path):
    path = task()
    rows = [*ASKED, ASKED[0] | dict(courts=["the jury", "the jury"]), ASKED[0]]
    (tmp_path / "courts.jsonl").write_text("\n".join(map(json.dumps, rows)))
    with pytest.warns(UserWarning, match="courts: 1 items are left out"):
        assert len(read_own_items(harness_file(path))) == len(ASKED), "and a repeated one once"


def test_names():
    assert is_harness("lm-eval:mmlu") and is_harness("a/b.yaml") and not is_harness("arc_easy")
    with pytest.raises(CalibPruneError, match="has no task 'arc_esy'"):
        harness_file("lm-eval:arc_esy")
