import random

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from calib_prune.calibration.sources import SOURCES
from calib_prune.core import CalibPruneError
from calib_prune.data.fetch import cached
from calib_prune.data.files import read_jsonl, write_jsonl
from calib_prune.evaluation import contamination, tasks
from calib_prune.evaluation.contamination import (
    DEFAULT_RULE,
    OverlapRule,
    audit,
    audit_sources,
    contamination_grid,
    contamination_notes,
    contamination_table,
    drop_overlapping,
    find_overlaps,
    index_items,
    item_parts,
    longest_run,
    rolling,
    words,
)
from calib_prune.evaluation.tasks import TASKS

# 400 made-up words: three syllables each, so that no two items share a sequence by chance
SYLLABLES = ["ba", "ke", "li", "mo", "nu", "ra", "se", "ti"]
LEXICON = [a + b + c for a in SYLLABLES for b in SYLLABLES for c in SYLLABLES][:400]


def prose(seed, n):
    return " ".join(random.Random(seed).choices(LEXICON, k=n))


SCIQ = [{
    "id": str(i), "question": prose(i, 20), "choices": [prose(i + 100, 3),
                                                        prose(i + 200, 3)], "gold": i % 2}
        for i in range(8)]
SCIQ += [{
    "id": "short", "question": "why do seven green frogs never sing before noon", "choices": [
        "rain", "sun"], "gold": 0}, {
            "id": "tiny", "question": "why do frogs sing", "choices": ["rain", "sun"], "gold": 0}]
TEMPLATE = "which of the following statements best explains why in general all of these things "
PIQA = [{
    "id": str(i), "goal": TEMPLATE + prose(i + 300, 4 if i < 3 else 20), "choices": ["yes", "no"],
    "gold": 0} for i in range(5)]
GSM = [
    {
        "id": "7",
        "question": (
            "Anna buys 12 red apples and 30.5 green pears, then she gives 4 of them to Ben at noon."
        ),
        "solution": "12 + 30.5 - 4 = 38.5",
    }
]
ARITHMETIC = [
    {"id": str(i), "question": f"{i} + {i} =", "choices": [str(2 * i), "1"], "gold": 0}
    for i in range(4)
]


@pytest.fixture(scope="module", autouse=True)
def benchmarks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("benchmarks")
    for name, records in dict(
        sciq=SCIQ, piqa=PIQA, gsm8k=GSM, basic_skills_arithmetic=ARITHMETIC
    ).items():
        write_jsonl(folder / f"{name}.jsonl", records)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tasks, "cached", lambda kind, name: folder / f"{name}.jsonl")
        yield patch


@pytest.fixture(scope="module")
def index(benchmarks): return index_items("sciq")


def hits(documents, names="sciq", rule=DEFAULT_RULE):
    return (
        audit(documents, names, rule).overlaps[["task", "item"]].apply(tuple, axis=1).tolist() or []
    )


@given(
    which=st.integers(0, 7),
    before=st.text(max_size=60),
    after=st.text(max_size=60),
    more=st.lists(st.text(), max_size=3),
)
@settings(max_examples=60)
def test_a_planted_item_is_always_found(index, which, before, after, more):
    found = find_overlaps(index, [*more, f"{before}\n{SCIQ[which]['question']}\n{after}"])
    assert found.item.tolist() == [str(which)] and found.document.tolist() == [len(more)]
    assert 20 / 23 <= found.covered[0] <= 1 and found.match[0].startswith(SCIQ[which]["question"])


@given(which=st.integers(0, 7), start=st.integers(0, 10), size=st.integers(0, 20))
@settings(max_examples=60)
def test_thirteen_words_are_found_and_twelve_are_not(index, which, start, size):
    part = SCIQ[which]["question"].split()[start:start + size]
    assert len(find_overlaps(index, [" ".join(part)])) == (len(part) >= 13)


@given(which=st.integers(0, 7), seed=st.integers(0, 10**6))
@settings(max_examples=60)
def test_shuffled_words_are_not_found(index, which, seed):
    text = SCIQ[which]["question"].split()
    random.Random(seed).shuffle(text)
    same = any(text[i:i + 13] == SCIQ[which]["question"].split()[j:j + 13] for i in range(8)
               for j in range(8))
    assert find_overlaps(index, [" ".join(text)]).empty != same


def test_agrees_with_a_plain_search(index):
    "Against the definition: sets of tuples of words."
    rng = random.Random(1)
    pieces = [o["question"].split() for o in SCIQ[:8]]
    documents = []
    for _ in range(200):
        a, b = rng.choice(pieces), rng.choice(pieces)
        documents.append(
            " ".join(a[rng.randrange(12) :][: rng.randrange(21)] + b[: rng.randrange(21)])
        )
    grams = lambda text: {tuple(text[i:i + 13]) for i in range(len(text) - 12)}
    theirs = [grams(o.split()) for o in documents]
    for o in SCIQ[:8]:
        mine = grams(words(" ".join(item_parts(TASKS["sciq"], o))))
        expected = any(mine & t for t in theirs)
        assert (o["id"] in set(find_overlaps(index, documents).item)) == expected
    single = [find_overlaps(index, [d]).item.tolist() for d in documents]
    assert single == [
        [o["id"] for o in SCIQ[:8] if grams(words(" ".join(item_parts(TASKS["sciq"], o)))) & t]
        for t in theirs
    ]


def test_batches_do_not_matter(index, monkeypatch):
    documents = [prose(k + 1000, 30) for k in range(20)] + [o["question"] for o in SCIQ[:8]] * 2
    whole = find_overlaps(index, documents)
    small = contamination.document_batches
    monkeypatch.setattr(contamination, "document_batches", lambda *args: small(*args, size=1))
    pd.testing.assert_frame_equal(find_overlaps(index, documents), whole)
    assert whole.document.tolist() == list(range(20, 28))  # the first of the two


def test_a_sequence_does_not_run_over_the_border_of_documents():
    text = SCIQ[0]["question"].split()
    assert hits([" ".join(text[:10]), " ".join(text[10:])]) == [] != hits([
        " ".join(text[:10]) + "\n" + " ".join(text[10:])])


@pytest.mark.parametrize("change", [
    str.upper, lambda t: t.replace(" ", "  -- "), lambda t: t.replace(" ", ",\n"), str.title,
    lambda t: f"**{t}**!", lambda t: t.replace(" ", "_")])
def test_case_and_punctuation_do_not_matter(change):
    assert hits([change(SCIQ[3]["question"])]) == [("sciq", "3")]


def test_numbers():
    other = "Anna buys 7 red apples and 1,234 green pears then she gives 99 of them to Ben"
    assert hits([other], "gsm8k") == [("gsm8k", "7")]
    assert hits([other], "gsm8k", OverlapRule(numbers="keep")) == []
    assert hits([GSM[0]["question"]], "gsm8k", OverlapRule(numbers="keep")) == [("gsm8k", "7")]
    assert words("x12y ½ 3.14.15 ") == ["x", "0", "y", "0", "0", "0"] and words("Über_ﬁne") == [
        "über",
        "fine",
    ]
    assert words("e\u0301t") == words("\u00e9t")
    assert words(r"$\frac{a}{2}$ [asy] draw(a); [/asy] \begin{align*} so") == ["a", "0", "so"]


def test_short_parts_must_occur_as_a_whole():
    question = SCIQ[8]["question"]
    assert hits([f"Tell me {question}, please."]) == [("sciq", "short")]
    assert hits([question.rsplit(" ", 1)[0]]) == []
    assert hits([question], rule=OverlapRule(least=13)) == []
    assert hits(["why do frogs sing rain"]) == []  # too short to be evidence
    checked = audit(["x"], "sciq").items.set_index("item").checked
    assert checked["short"] and not checked["tiny"]


def test_templates_are_no_evidence():
    assert hits([TEMPLATE], "piqa") == []
    assert hits([TEMPLATE], "piqa", OverlapRule(template=6)) == [("piqa", str(i)) for i in range(5)]
    assert hits([PIQA[4]["goal"]], "piqa") == [("piqa", "4")]


def test_repeats_inside_one_item_make_no_template(benchmarks, tmp_path):
    text = prose(5, 13)
    write_jsonl(
        tmp_path / "sciq.jsonl",
        [{"id": "a", "question": " ".join([text] * 4), "choices": ["b"], "gold": 0}],
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tasks, "cached", lambda kind, name: tmp_path / f"{name}.jsonl")
        assert hits([text]) == [("sciq", "a")]


def test_formulas_are_no_evidence():
    found = audit(["1 + 1 = 2 " * 20], "basic_skills_arithmetic")
    assert found.overlaps.empty and not found.items.checked.any()
    table = contamination_table(found)
    assert table.checked.item() == 0 and np.isnan(table.share.item())
    assert contamination_notes(found)[-1] == "Too short to be checked: basic_skills_arithmetic."


def test_wrong_answers_and_prompts_are_not_part_of_an_item():
    assert item_parts(TASKS["sciq"], SCIQ[0]) == [SCIQ[0]["question"], SCIQ[0]["choices"][0]]
    record = {
        "prompt": "def f():", "canonical_solution": "return 1", "test": "assert",
        "entry_point": "f"}
    assert item_parts(TASKS["humaneval"], record) == ["def f():", "return 1"]
    record = {"question": "How many?", "short_answer": "18", "solution": "no"}
    assert item_parts(TASKS["gsm8k_generate"], record) == ["How many?", "18"]


def test_audit_of_documents_without_words():
    assert audit(["", "  \n", "…!?"], "sciq").overlaps.empty
    assert contamination_table(audit([""], "sciq")).overlapping.tolist() == [0]


def test_a_users_file(tmp_path):
    path = tmp_path / "mine.txt"
    path.write_text("hello\f" + SCIQ[2]["question"])
    told = []
    found = audit_sources([str(path)], "sciq,piqa", progress=lambda *o: told.append(o))
    assert found.overlaps[["task", "item", "document"]].values.tolist() == [["sciq", "2", 1]]
    assert told == [("contamination audit", 1, 1)]
    table = contamination_table(found)
    assert table.overlapping.tolist() == table.mostly.tolist() == [
        1, 0] and table.share.tolist() == [1 / 9, 0] and table["items"].tolist() == [10, 5]
    assert contamination_grid(table)["sciq"].tolist() == [
        "1 of 9 (11.1%)"
    ] and "piqa" not in contamination_grid(table)
    assert "Without overlap: piqa." in contamination_notes(found)


def test_drop_overlapping_keeps_models_paired():
    found = audit(
        [SCIQ[2]["question"], " ".join(SCIQ[5]["question"].split()[:13])], "sciq", name="mine"
    )
    dense = pd.DataFrame([
        dict(task="sciq", dimension="General", item=o["id"], metric=m, value=1.0, bytes=0)
        for o in SCIQ for m in ("bits", "acc")])
    pruned = dense.assign(value=0.0).iloc[::-1]
    a, b = (drop_overlapping(o, found, ["mine"]) for o in (dense, pruned))
    assert set(a.item) == set(b.item) == {o["id"] for o in SCIQ} - {"2", "5"} and len(a) == 16
    assert set(drop_overlapping(dense, found, ["mine"], covered=0.7).item) == {
        o["id"] for o in SCIQ
    } - {"2"}
    pd.testing.assert_frame_equal(drop_overlapping(dense, found, []), dense)


def test_clear_errors():
    scored = pd.DataFrame(dict(task=["sciq"], item=["0"]))
    found = audit(["x"], "sciq", name="mine")
    for message, call in {
            "put a single text into a list": lambda: audit("text", "sciq"),
            "no documents to audit": lambda: audit([], "sciq"),
            "Document 1 is not text but a NoneType": lambda: audit(["a", None], "sciq"),
            "no sources to audit": lambda: audit_sources([], "sciq"),
            "list of names, not the text 'c4'": lambda: audit_sources("c4", "sciq"),
            "Unknown source 'c5'": lambda: audit_sources(["c5"], "sciq"),
            "Unknown task 'sciqq'": lambda: audit(["a"], "sciqq"),
            "use 1 ≤ least ≤ n": lambda: OverlapRule(n=4),
            "use 2 or more": lambda: OverlapRule(template=1),
            "Unknown way to read numbers 'drop'": lambda: OverlapRule(numbers="drop"),
            "Unknown audited source 'c4'": lambda: drop_overlapping(scored, found, ["c4"]),
            "Item '0' of task 'piqa' was not audited": lambda: drop_overlapping(
                scored.assign(task="piqa"), found, ["mine"]),
            "Item 0 of task 'sciq' was not audited": lambda: drop_overlapping(
                scored.assign(item=0), found, ["mine"])}.items():
        with pytest.raises(CalibPruneError, match=message): call()


@given(st.lists(st.integers(0, 3), max_size=30), st.integers(1, 6))
def test_hashes_are_the_same_exactly_for_the_same_words(ids, n):
    values = np.random.default_rng(0).integers(0, 2**64, 4, np.uint64)
    (_, h), = rolling(values[np.array(ids, int)], [n])
    grams = [tuple(ids[i:i + n]) for i in range(len(ids) - n + 1)]
    assert len(h) == len(grams) and len(set(zip(grams, h.tolist()))) == len(set(grams)) == len(
        set(h.tolist())
    )


@given(st.lists(st.booleans(), min_size=1).filter(any))
def test_longest_run(hit):
    run = longest_run(np.array(hit))
    size = max(len(o) for o in "".join("x" if o else " " for o in hit).split())
    assert run.stop - run.start == size and all(hit[run])


@pytest.mark.real
def test_known_truths(benchmarks):
    benchmarks.setattr(tasks, "cached", cached)
    index = index_items("mbpp,gsm8k,math500,piqa")
    by_number = {r["task_id"]: r["id"] for r in read_jsonl(cached("benchmarks", "mbpp"))}
    translated = [
        r for r in read_jsonl(cached("sources", "polyglot")) if r["task_id"] in by_number
    ][:300]
    found = find_overlaps(index, [r["text"] for r in translated]).query("task == 'mbpp'")
    assert all(by_number[translated[o.document]["task_id"]] == o.item for o in found.itertuples()
               if o.covered > 0.5)
    assert all(
        " ".join(o.match.split()[:8]) in " ".join(words(translated[o.document]["text"]))
        for o in found.itertuples()
    )
    # MBPP has a few near-duplicates of its own
    assert len(set(found.item) - {by_number[r["task_id"]] for r in translated}) <= 5
    assert len(found) >= 0.7 * len({r["task_id"] for r in translated})
    questions = {r["template"]: r["text"] for r in read_jsonl(cached("sources", "gsm-symbolic"))}
    symbolic = find_overlaps(index, questions.values())
    assert set(symbolic.task) == {"gsm8k"} and 55 <= len(symbolic) <= 85
    assert find_overlaps(index, SOURCES["c4"].documents()).empty
    problems = read_jsonl(cached("benchmarks", "math500"))
    found = find_overlaps(index, [o["problem"] + "\n" + o["solution"] for o in problems]).query(
        "task == 'math500'"
    )
    assert (
        len(found) == (index.items.query("task == 'math500'").evidence > 0).sum() >= 450
        and (found.covered == 1).all()
    )
