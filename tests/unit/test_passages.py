"""Passages of a source by perplexity, matched in everything else; and what a study of them says."""
import json
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest

from calib_prune.calibration.oit import js_divergence
from calib_prune.calibration.sets import build_calibration
from calib_prune.core import DIMENSIONS, CalibPruneError
from calib_prune.generation.igsp import PROTOCOLS, WRITERS, generate, journal_name
from calib_prune.generation.passages import (
    THIRDS,
    balance,
    matched_thirds,
    most_typical,
    passage_facts,
    third,
)
from calib_prune.generation.writing import write
from calib_prune.model.tiny import tiny_llama, tiny_tokenizer
from calib_prune.questions.perplexity import (
    MEAN,
    bytes_note,
    effect_text,
    effect_verdict,
    third_contrasts,
    third_effects,
    third_facts,
    third_message,
)
from calib_prune.statistics.examples import example_preset, example_study
from calib_prune.statistics.replicates import OUTCOMES
from calib_prune.statistics.selection import bootstrap_study
from calib_prune.study.keys import text_key
from calib_prune.study.presets import load_preset, mix_of
from tests.golden import shuffled_prose

TOK, HOW = tiny_tokenizer(), dict(budget=512, length=32)
PROMPTS = {"Code": np.arange(40, 90), "Math": np.arange(60, 70)}


@pytest.fixture
def source(tmp_path):
    path = tmp_path / "prose.txt"
    path.write_text("\f".join(shuffled_prose(60)))
    return str(path)


def facts_of(n=90, seed=0):
    "Perplexity goes with the distance, and with chance."
    rng = np.random.default_rng(seed)
    distance = rng.normal(size=n)
    return pd.DataFrame(
        {"log_perplexity": 0.6 * distance + rng.normal(size=n), "distance": distance, "same": 1.0}
    )


def test_the_thirds_are_thirds_and_alike():
    facts = facts_of()
    rows = matched_thirds(facts, 15)
    assert rows.shape == (3, 15) and len(set(rows.ravel())) == 45
    place = facts["log_perplexity"].rank().to_numpy()[rows]
    assert place[0].max() <= 30 < place[1].min() and place[1].max() <= 60 < place[2].min()
    table = balance(facts, rows).set_index("fact")
    assert abs(table.loc["distance", "before"]) > 0.8 and abs(table.loc["distance", "after"]) < 0.2
    assert table.loc["same", "after"] == 0 and table.loc["log_perplexity", "after"] > 1


def test_dropping_brings_the_mean_to_that_of_all():
    facts = np.array([[1.0], [2.0], [-1.0], [5.0], [0.1]])
    assert most_typical(facts, 3).tolist() == [0, 2, 4] and most_typical(facts, 5).tolist() == [
        0, 1, 2, 3, 4]


def test_without_choice_nothing_is_dropped():
    rows = matched_thirds(facts_of(30), 10)
    assert sorted(rows.ravel()) == list(range(30))
    with pytest.raises(
        CalibPruneError, match="33 passages are needed for 11 of each third; there are 30"
    ):
        matched_thirds(facts_of(30), 11)


def test_facts_are_those_of_each_window(source):
    cal = build_calibration(source, TOK, 6, 32)
    facts = passage_facts(cal, np.arange(6) * 31.0, PROMPTS, 0)
    assert facts["log_perplexity"].tolist() == [0, 1, 2, 3, 4, 5]
    assert facts["distance to Code"][4] == js_divergence(cal.tokens[4].numpy(), PROMPTS["Code"])
    ends = [set(np.flatnonzero(o == 0)) - {31} for o in cal.tokens.numpy()]
    assert facts["documents"].tolist() == [
        1 + len(o) - (0 in o) - sum(i + 1 in o for i in o) for o in ends
    ]


def test_thirds_of_a_draw_share_no_text_and_one_journal(source, tmp_path):
    model, made = tiny_llama(), {}
    for o in THIRDS:
        settings = dict(source=source, third=o, length=32)
        name = journal_name("third", settings, 0)
        made[o] = generate(
            model,
            TOK,
            "third",
            512,
            0,
            settings,
            prompts=PROMPTS,
            journal=tmp_path / name,
            about=dict(model="tiny"),
        )
    assert len(list(tmp_path.glob("third-*.journal"))) == 1
    keys = {o: {r["key"].rsplit("/", 1)[0] for r in m.rows} for o, m in made.items()}
    assert not keys["low"] & keys["middle"] and not keys["low"] & keys["high"] and all(
        len(k) == 18 for k in keys.values())
    perplexities = [made[o].report["perplexity"] for o in THIRDS]
    assert perplexities == sorted(perplexities) and all(
        m.report["tokens"] >= 512 for m in made.values()
    )
    text = write(made["low"], tmp_path / "low.jsonl")
    assert build_calibration(str(text), TOK, 16, 32).tokens.shape == (16, 32)
    assert "<|endoftext|>" not in text.read_text()


def test_a_journal_saves_reading(source, tmp_path, monkeypatch):
    first = third(tiny_llama(), TOK, **HOW, source=source, journal=tmp_path / "j")
    monkeypatch.setattr("calib_prune.generation.passages.window_nll", lambda *_: 1 / 0)
    assert third(tiny_llama(), TOK, **HOW, source=source, journal=tmp_path / "j").rows == first.rows
    with pytest.raises(CalibPruneError, match="another model or other settings"):
        third(tiny_llama(), TOK, **HOW, source=source, seed=1, journal=tmp_path / "j")


@pytest.mark.parametrize("wrong, message",
                         [(dict(third="lowest"), "Unknown third 'lowest'"),
                          (dict(read=2), "read is 2, but should be greater than or equal to 3"),
                          (dict(budget=10**7), "ask for at most"),
                          (dict(temperature=0.5), "Unknown setting of third 'temperature'")])
def test_what_cannot_work_is_refused(source, wrong, message):
    with pytest.raises(CalibPruneError, match=message):
        generate(tiny_llama(), TOK, "third", wrong.pop("budget", 512), 0,
                 dict(source=source, length=32) | wrong)


def test_it_is_no_writer():
    assert WRITERS == ["self-cal", "sgs", "igsp"] and set(PROTOCOLS) == {*WRITERS, "third"}


def test_the_prompts_belong_to_the_key():
    preset = load_preset("presets/perplexity/smollm2-135m.yaml")
    key = text_key(preset, "math-low", 0)
    assert key["settings"] == dict(source="math", third="low") and set(key["references"]) == set(
        preset["scoring"]["tasks"]
    )
    preset["scoring"]["limit"] = 3
    assert (
        text_key(preset, "math-low", 0)["scored"] != key["scored"]
    ), "prompts that are scored are no references"
    assert "references" not in text_key(load_preset("presets/claims/smollm2-135m.yaml"), "igsp", 0)


# --- the report

def effects_of(preset, cells, **how):
    return third_effects(third_contrasts(preset, cells), **how)


def study_of(change, sources=("wikipedia", "math"), **how):
    kept = {
        f"{s}-{t}": tuple(0.7 + i * o for o in change)
        for s in sources
        for i, t in enumerate(THIRDS)
    }
    study = example_study(kept, **(dict(seeds=(0, 1, 2), n=400, draw_sd=0.002, seed=2) | how))
    preset = example_preset(study)
    preset["strategies"] = {
        k: "generated:third source={} third={}".format(*k.split("-")) for k in kept
    }
    return preset, bootstrap_study(preset, study, 400).cells


def test_an_effect_is_the_high_third_less_the_low_one():
    preset, cells = study_of((0.0, 0.05, -0.1, 0.02), seed=None)
    effects = effects_of(preset, cells).set_index(["source", "dimension"])["value"]
    for source in ("wikipedia", "math", MEAN):
        assert effects[source].round(6).to_dict() == pytest.approx(
            dict(zip((*DIMENSIONS, "Total"), (0, 0.1, -0.2, 0.05, -0.0125))), abs=0.01
        )


def test_what_a_draw_does_to_both_thirds_is_no_noise_of_their_difference():
    preset, cells = study_of((0.0,) * 4, draw_sd=0.0)
    common = {(o.strategy.split("-")[0], o.seed): 0.05 *
              np.random.default_rng(i).normal(size=len(OUTCOMES))
              for i, o in cells.cells.iterrows()}
    shaken = np.stack([common[o.strategy.split("-")[0], o.seed] for o in cells.cells.itertuples()])
    moved = replace(cells, values=cells.values + shaken)
    pd.testing.assert_frame_equal(
        effects_of(preset, moved), effects_of(preset, cells), atol=1e-9
    )
    alone = moved.rows(
        [o.seed == (0 if o.strategy.endswith("low") else 1) for o in moved.cells.itertuples()]
    )
    assert effects_of(preset, alone).empty, "thirds of different draws are no pair"


def test_draws_that_part_the_thirds_are_noise():
    preset, cells = study_of((0.0,) * 4, draw_sd=0.0)
    apart = np.array([{0: 0.04, 1: 0.0, 2: -0.04}[o.seed] * o.strategy.endswith("high")
                      for o in cells.cells.itertuples()])
    wide, still = (
        effects_of(preset, replace(cells, values=cells.values + more)).eval("ci_high - ci_low")
        for more in (apart[:, None], 0.0)
    )
    assert (wide > still + 0.01).all()


def test_verdicts():
    def verdicts(*ends, signs=(1, 1)):
        rows = [
            dict(source=s, dimension="Code", value=v * 0.01, ci_low=0, ci_high=0)
            for s, v in zip("ab", signs)
        ]
        return effect_verdict(
            pd.DataFrame([
                *rows,
                dict(source=MEAN, dimension="Code", value=0, ci_low=ends[0], ci_high=ends[1])]),
            "Code")
    assert verdicts(0.01, 0.05) == "moves" and verdicts(-0.05, -0.001, signs=(-1, -1)) == "moves"
    assert (
        verdicts(0.01, 0.05, signs=(1, -1)) == "undecided"
        and verdicts(-0.01, 0.03) == "undecided"
    )
    assert (
        verdicts(-0.019, 0.019) == "does not move"
        and verdicts(0.001, 0.019, signs=(1, -1)) == "does not move"
    )


def test_the_table_says_what_was_found(tmp_path):
    preset, cells = study_of((0.0, 0.0, -0.1, 0.0))
    (tmp_path / "generated").mkdir()
    for k in preset["strategies"]:
        for seed in range(3):
            source, t = k.split("-")
            report = dict(
                tokens=2,
                perplexity=[8, 16, 32][THIRDS.index(t)] * (1.0, 2.0, 0.5)[seed],
                balance=[dict(fact="documents", before=1.0, after=0.1 * seed)],
            )
            (tmp_path / "generated" / f"{k}-s{seed}.jsonl").write_text(
                json.dumps(dict(text="ö" * (10 + seed * (t == "high")))) + "\n"
            )
            (tmp_path / "generated" / f"{k}-s{seed}.report.json").write_text(json.dumps(report))
    preset["name"] = tmp_path.name
    assert mix_of(preset, "math-low", 1).endswith("math-low-s1.jsonl")
    texts, balances = third_facts(preset, tmp_path)
    assert bytes_note(texts) == (
        "Bytes per token, high compared with low tercile:"
        " wikipedia +0 to +20 %, math +0 to +20 %."
    )
    assert texts.bytes_per_token.min() == 10.0, "twenty bytes, two tokens"
    assert len(texts) == 18 and balances.groupby("source")["after"].mean().round(
        6
    ).to_dict() == dict(math=0.1, wikipedia=0.1)
    table = effect_text(effects_of(preset, cells), texts).set_index("source")
    assert table.loc["math", list(THIRDS)].tolist() == ["8.0", "16.0", "32.0"]
    assert table.loc["perplexity", "Code"] == "moves" and table.loc["math", "Code"].startswith("-")
    held = effects_of(preset, cells, simultaneous=True)
    assert "Code −" in third_message(held) and "[" in third_message(held)
    at = held[held["source"] == MEAN].set_index("dimension")
    alone = effects_of(preset, cells).query("source == @MEAN").set_index("dimension")
    assert at.ci_low["Code"] < alone.ci_low["Code"] and "Total" not in at.index


def test_four_dimensions_of_noise_give_a_title_without_an_effect():
    title = third_message(effects_of(*study_of((0.0,) * 4), simultaneous=True))
    assert "no significant effect" in title or "effect below 2 points" in title


def test_half_a_study_says_nothing_of_the_other_half():
    preset, cells = study_of((0.0,) * 4)
    some = cells.rows(
        cells.cells["strategy"].isin(["wikipedia-low", "wikipedia-high", "math-low"]).tolist()
    )
    effects = effects_of(preset, some)
    assert set(effects["source"]) == {"wikipedia"}
    assert effect_verdict(effects, "Code") == "undecided"
    assert len(effects_of(preset, cells.rows([False] * len(cells.cells)))) == 0
