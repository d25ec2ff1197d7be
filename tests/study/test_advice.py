"Advice on models whose retention is known: made-up answers in place of pruned models."
import json
import re
import time
from dataclasses import replace
from unittest import mock

import numpy as np
import pandas as pd
import pytest

from calib_prune.advice import compare, halving, measured, nearest, report, trials
from calib_prune.advice.compare import Comparison, short_names
from calib_prune.advice.halving import PLAN_FILE, Halving
from calib_prune.advice.measured import advise
from calib_prune.advice.nearest import advise_quickly
from calib_prune.advice.needs import parse_need
from calib_prune.advice.pages import command_lines, save_advice
from calib_prune.advice.report import Report, check_report_files, report_page, save_report
from calib_prune.advice.trials import Trials, item_limits, own_skip
from calib_prune.cli.advise import method_settings, show_quick
from calib_prune.cli.compare import compare_command, difference_table
from calib_prune.cli.report import report_command
from calib_prune.core import DIMENSIONS, CalibPruneError, content_hash, load_json
from calib_prune.evaluation.flips import flips
from calib_prune.evaluation.measures import get_measure
from calib_prune.evaluation.tasks import TASKS, get_tasks, own_task
from calib_prune.model.divergence import Divergence
from calib_prune.model.loading import save_model
from calib_prune.model.perplexity import Perplexity
from calib_prune.model.tiny import tiny_llama, tiny_tokenizer
from calib_prune.pipeline.evaluate import Evaluation, evaluate_model
from calib_prune.pipeline.prune import PruneSettings, prune_model
from calib_prune.pruning.grids import Quantisation
from tests import ROOT

SECONDS, SCREENED = 50.0, 10.0  # of a made-up trial, and of a screening
BEST = {"codeio": 0.9, "uniform-dimensions": 0.8}  # Code retention; others 0.6


class MadeUp:
    "Searches in a folder, on a clock that only made-up work moves."
    scoring = source = first = loading = 0.0  # seconds; `first`: more for the first two sources

    def __init__(self, folder):
        self.folder, self.now, self.models, self.scored, self.measured = folder, 0.0, 0, set(), []

    def monotonic(self): return self.now
    def __call__(self, **how): return advise("smollm2-135m", output=self.folder, **how)


def file_of(mix, seed): return f"{content_hash(mix)}-{seed}"


def items_of(kept, names, n=32, seed=0):
    "Bits of the right answers; a dense model has 1 bit per byte, before noise of the items."
    rng, tables = np.random.default_rng(seed), []
    items = np.random.default_rng(1)
    for task in names:
        dimension = TASKS[task].dimension
        value = items.lognormal(0, 0.3, n) / kept.get(dimension, 0.8) * rng.lognormal(0, 0.02, n)
        bits = pd.DataFrame(dict(task=task, dimension=dimension, metric="bits", value=value,
                                 item=[f"{i:03}" for i in range(n)], bytes=8, chance=np.nan))
        tables.append(bits)
        if TASKS[task].kind == "choice":
            tables.append(bits.assign(metric=TASKS[task].metric, value=1.0, chance=0.25))
    return pd.concat(tables, ignore_index=True)


@pytest.fixture
def made_up(monkeypatch, tmp_path):
    "Trials take 50 seconds of a clock; each is counted."
    clock = MadeUp(tmp_path / "out")

    def trial(self, mix, seed, part, seconds=SECONDS):
        path = self.folder / part.name / file_of(mix, seed)
        if not path.exists():
            clock.models += 1
            clock.now += seconds
            path.parent.mkdir(exist_ok=True)
            path.write_text("run")
        code = BEST.get(mix, 0.6) + 0.01 * np.random.default_rng(seed).normal()
        return items_of(dict(Code=code, own=code), item_limits(self.tasks, part), seed=seed)

    def dense(self, part, floor=False):
        if (self.folder, part, floor) not in clock.scored: clock.now += clock.scoring
        clock.scored.add((self.folder, part, floor))
        kept = dict.fromkeys((*DIMENSIONS, "own"), 0.5 if floor else 1.0)
        return items_of(kept, item_limits(self.tasks, part), seed=9)

    def screened(self, mix):
        return trial(self, mix, trials.SCREEN_SEED, trials.SCREEN, SCREENED)

    def squares(self, source, *_):
        if (path := trials.squares_path(self, source)).exists(): return
        clock.now += clock.source + clock.first * (len(clock.measured) < 2)
        clock.measured.append(source)
        path.parent.mkdir(exist_ok=True)
        path.touch()

    def loaded(self):
        clock.now += clock.loading
        return None, None

    monkeypatch.setattr(Trials, "load", loaded)
    monkeypatch.setattr(trials, "source_squares", squares)
    monkeypatch.setattr(halving, "screen_items", screened)
    monkeypatch.setattr(measured, "pruning_seconds", lambda *_: 2 * SECONDS)  # estimate
    for module in (halving, trials, measured):
        monkeypatch.setattr(module, "dense_items", dense, raising=False)
        monkeypatch.setattr(module, "trial_items", trial, raising=False)
        monkeypatch.setattr(module, "time", clock, raising=False)
        monkeypatch.setattr(module, "is_kept", lambda self, mix, seed, part: (
            self.folder / part.name / file_of(mix, seed)).exists())
    monkeypatch.setattr(measured, "usable_mixes", lambda _, mixes, sources: mixes)
    return clock


pytestmark = pytest.mark.real


@pytest.mark.parametrize("method,bits,need,calibration,said", [
    ("gptq", 3, "all", "uniform-dimensions", "95 % interval]; GPTQ in 3 bits"),
    ("imatrix", 3, "code", "codeio", "95 % interval]; Importance matrix in 3 bits"),
    ("gptq", 3, "general", "openwebtext", "openwebtext was not measured with GPTQ in 3 bits."),
    ("wanda", None, "all", "tuned", "95 % interval]; SparseGPT at 50 %")])
def test_a_rule_shows_the_regrets_of_its_method(method, bits, need, calibration, said, capsys):
    how = method_settings(model := "smollm2-135m", method, None, bits, 64 if bits else None)
    show_quick(quick := advise_quickly(need, model, method=method), model, PruneSettings(**how))
    shown = " ".join(capsys.readouterr().out.split())
    assert quick.calibration == calibration and said in shown
    rule = quick.regrets["policy"].isin([quick.policy, calibration])
    assert rule.any() != ("was not measured" in shown)


def test_the_best_mix_is_found_within_the_minutes(made_up, tmp_path):
    advice = made_up(need="code", minutes=15)
    assert advice.calibration == "codeio" and advice.search.plan.rounds == (5, 2)
    assert advice.search.plan.screened == 20, "the first model corrects the estimate"
    assert advice.confirmed.draws == 3, "the time allows one more than two"
    assert made_up.models == advice.search.plan.models + 2 == 33
    assert made_up.now <= 15 * 60
    assert advice.lead["ci_low"].iloc[0] > 0 and "significant" in advice.verdict
    kept = advice.retention.set_index(["strategy", "dimension"])["value"]
    assert kept["codeio", "Code"] == pytest.approx(0.9, abs=0.03)
    assert kept["codeio", "Math"] == pytest.approx(0.8, abs=0.03)

    files = {file.name: file for file in save_advice(advice, tmp_path / "out")}
    record = json.loads(files["advice.json"].read_text())
    assert record["advice"] == 1 and record["calibration"] == "codeio"
    assert record["models"] == 33 and len(record["rounds"]) == 27
    page = files["advice.html"].read_text()
    assert "<svg" in page and "http" not in page.replace("http://www.w3.org", "").replace(
        "http://purl.org", "").replace("http://creativecommons.org", "").replace(
        "https://matplotlib.org", "")
    assert "--calibration codeio" in files["advice.md"].read_text()


def own_file(folder, name, n=40, **more):
    path = folder / f"{name}.jsonl"
    path.write_text("".join(json.dumps(dict(prompt=f"Which court heard case {i}?") | more) + "\n"
                            for i in range(n)))
    return str(path)


def test_own_items_with_answers_are_a_need(made_up, tmp_path):
    advice = made_up(need=own_file(tmp_path, "courts", answer="The high court"), minutes=15)
    assert advice.search.trials.tasks["tuning"] == ["courts"]
    assert advice.calibration == "codeio"
    kept = advice.retention.set_index(["strategy", "dimension"])["value"]["codeio"]
    assert kept["own"] == pytest.approx(0.9, abs=0.03)
    assert kept["Total"] == pytest.approx(kept[[*DIMENSIONS]].mean()), "of the four abilities"
    floor = advice.floor.set_index("name")["retention"]
    assert floor["total"] == pytest.approx(floor[[*DIMENSIONS]].mean())
    page = {file.name: file for file in save_advice(advice, tmp_path / "out")}["advice.md"]
    assert "| own |" in page.read_text() and not advice.warnings
    high = floor.where(~floor.index.isin(["own", "Math"]), 0.9)
    low = replace(advice, floor=advice.floor.assign(retention=high.to_numpy()))
    assert low.warnings == ["Warning: Math, own: at the floor with codeio, so the score does not "
                            "show that the model uses the prompt."]


def test_the_stored_advice_of_the_demo_has_the_regrets_of_today():
    stored = load_json(ROOT / "results/advice/smollm2-135m/advice.json")
    now = advise_quickly("code", method=stored["settings"]["method"]).record()
    assert stored["quick"]["regrets"] == now["regrets"], (
        "make it again in its folder: calib-prune advise --model smollm2-135m --need code "
        "--minutes 15 --output results/advice/smollm2-135m")


def test_own_text_is_a_third_finalist(made_up, tmp_path):
    (text := tmp_path / "notes.txt").write_text("something else " * 9000)
    advice = made_up(need="code", minutes=15, sources=[str(text)])
    assert advice.finalists[0] == advice.quick.calibration == "codeio"
    mine = {str(text), measured.mixed_half(str(text))}
    assert len(advice.finalists) == 3 and mine & {*advice.finalists}
    assert advice.verdict.startswith("It is the rule's mix. ")
    others = len(advice.search.mixes) - 3
    assert advice.verdict.endswith(f"The other {others} candidates were not confirmed.")
    assert advice.seconds <= 900
    models = made_up.models
    again = made_up(need="code", minutes=15, sources=[str(text)])
    assert again.finalists == advice.finalists and made_up.models == models


def test_own_text_is_not_confirmed_where_the_minutes_are_too_few(made_up, tmp_path):
    (text := tmp_path / "notes.txt").write_text("something else " * 9000)
    advice = made_up(need="code", minutes=440 / 60, sources=[str(text)])
    assert len(advice.finalists) == 2 and advice.seconds <= 440
    made_up.now += 300  # the same command later: the plan, not the time left, says who is confirmed
    assert made_up(need="code", minutes=440 / 60, sources=[str(text)]).finalists == advice.finalists


@pytest.fixture
def given_away(tmp_path):
    "Items of one's own, and a text that holds six of them."
    rng = np.random.default_rng(0)
    letters = np.array([*"abcdefghij"])
    words = ["".join(letters[rng.integers(0, 10, 6)]) for _ in range(1200)]
    prompts = [" ".join(words[30 * i:30 * i + 30]) for i in range(40)]
    need, text = tmp_path / "law.jsonl", tmp_path / "notes.txt"
    need.write_text("".join(json.dumps(dict(prompt=p, answer="guilty")) + "\n" for p in prompts))
    text.write_text("\n\n".join([*prompts[:6], "something else " * 40]))
    yield need, text
    TASKS.pop("law", None)  # the next file of this name is another one


def test_text_of_a_model_that_holds_the_items_is_named(given_away, tmp_path):
    need, text = given_away
    save_model(tiny_llama(max_position_embeddings=2048), tiny_tokenizer(), tmp_path / "dense", {})
    made = {name: tmp_path / name for name in ("half", "again", "unread")}
    how = dict(calibration=f"{text.parent}/*.txt", windows=2, length=16)
    prune_model(tmp_path / "dense", made["half"], method="wanda", sparsity=0.5, **how)
    prune_model(made["half"], made["again"], method="magnitude", sparsity=0.6, **how)
    prune_model(tmp_path / "dense", made["unread"], method="magnitude", sparsity=0.5, **how)
    asked = dict(dense=tmp_path / "dense", tasks=str(need), limit=8, floor=False)
    evaluation = evaluate_model(made["half"], **asked)
    [warning] = evaluation.shared
    assert warning == (f"Warning: {text.parent}/*.txt, text of {made['half']}, shares word "
                       "sequences with 6 of 40 items of law. Its score may be too high.")
    assert evaluation.record()["shared"] == [warning]
    both = compare.compare_models([*made.values()], **asked).shared
    assert [f"text of {made[name]}," in note for name, note in zip(("half", "again"), both)] == [
        True, True], "the second was made from the first; the third reads no text"
    text.write_text("other words " * 99)
    assert not evaluate_model(made["half"], tasks=str(need), limit=4).shared, "another text"


def test_text_that_holds_the_need_is_named(made_up, given_away, tmp_path):
    need, text = given_away
    advice = made_up(need=str(need), minutes=15, sources=[str(text)])
    [warning] = advice.warnings
    assert "notes.txt shares word sequences with 6 of 40 items of law" in warning
    page = {file.name: file for file in save_advice(advice, tmp_path / "out")}["advice.md"]
    assert warning in page.read_text()


@pytest.mark.parametrize("file, said", [
    (dict(name="short", n=12, answer="x"), "needs 20, half for tuning"),
    (dict(name="open"), "prompts without answers, so nothing can be scored")])
def test_own_items_that_cannot_be_scored_are_refused(made_up, tmp_path, file, said):
    with pytest.raises(CalibPruneError, match=said):
        made_up(need=own_file(tmp_path, **file), minutes=15)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("need", ["code=2,{}=1", "{},code", "code,{}", "Law={}"])
def test_a_file_of_prompts_is_a_need_by_itself(tmp_path, need):
    with pytest.raises(CalibPruneError, match="laws.jsonl is a need by itself. Give it alone"):
        parse_need(need.format(own_file(tmp_path, "laws")))
    odd = tmp_path / "a=1,b"
    odd.mkdir()
    assert parse_need(own_file(odd, "laws")).single == "own", "no list, but the name of a file"
    with pytest.raises(CalibPruneError, match="There is no file a=1/2.jsonl of prompts"):
        parse_need("a=1/2.jsonl")


def test_items_of_a_need_are_a_task_of_comparisons_too(made_up, tmp_path):
    file = own_file(tmp_path, "verdicts", answer="The high court")
    advice = made_up(need=file, minutes=15)
    assert get_tasks(file)[0].dimension == "verdicts"
    assert made_up(need=file, minutes=15).verdict == advice.verdict


def test_a_source_whose_name_would_be_two_in_a_mix_is_refused(tmp_path):
    (text := tmp_path / "my,notes.txt").write_text("word " * 9000)
    with pytest.raises(CalibPruneError, match="notes.txt: in a mix, a comma separates two"):
        advise_quickly("code", "smollm2-135m", [str(text)])


def test_the_regret_of_the_nearest_source_is_none_of_own_text(tmp_path, capsys):
    "The studies pruned with the nearest of the packaged sources."
    (text := tmp_path / "solutions.txt").write_text("words " * 9000)
    own = [str(text)]
    with mock.patch.object(nearest, "source_distances", return_value=pd.DataFrame(
            dict(ability="Code", source=[str(text), "codeio"], bits=[0.1, 0.2]))):
        quick = advise_quickly("code", "smollm2-135m", own, method="sparsegpt")
    assert quick.calibration == str(text)
    assert set(quick.regrets["policy"]) == {"c4", "uniform", "uniform-dimensions"}
    show_quick(quick, "smollm2-135m", PruneSettings(method="sparsegpt", sparsity="0.5"), own)
    shown = "".join(capsys.readouterr().out.split())
    assert "solutions.txtwasnotmeasuredwithSparseGPTat50%." in shown


def test_own_items_for_tuning_and_confirming_are_different_ones(tmp_path):
    for n in (20, 41, 300):
        task = own_task(f"own={own_file(tmp_path, f'items{n}', n, answer='x')}").name
        tasks = dict(tuning=[task], confirming=[task, "piqa"])
        first, tuning, confirming = (
            item_limits(tasks, part) for part in (trials.SCREEN, trials.TUNING, trials.CONFIRMING))
        assert tuning == {task: min(32, n // 2)} and confirming == tuning | dict(piqa=12)
        assert first[task] == tuning[task] / 2 and own_skip(task, trials.TUNING) == 0
        assert own_skip(task, trials.CONFIRMING) == tuning[task]


@pytest.mark.parametrize("cut", [4, 21])  # in the screening, before the plan is fixed; after it
def test_a_search_goes_on_where_it_was(made_up, monkeypatch, tmp_path, cut):
    whole = halving.run_trial

    def cut_off(search, mix, stage):
        whole(search, mix, stage)
        if len(search.scores) == cut: raise KeyboardInterrupt
    monkeypatch.setattr(halving, "run_trial", cut_off)
    with pytest.raises(KeyboardInterrupt): made_up(need="code", minutes=15)
    plan = json.loads((tmp_path / "out" / PLAN_FILE).read_text())
    tried = max(0, cut - 20)
    assert plan["spent"] == pytest.approx((cut - tried) * SCREENED + (1 + tried) * SECONDS)
    assert (plan["plan"] or {}).get("rounds") == ([5, 2] if tried else None)
    monkeypatch.setattr(halving, "run_trial", whole)
    advice = made_up(need="code", minutes=15)
    assert made_up.models == 33 and advice.search.plan.rounds == (5, 2)


def restarts_take(seconds, clock, monkeypatch):
    "What comes before the folder is read takes time in every run."
    def usable(_, mixes, sources):
        clock.now += seconds
        return mixes
    monkeypatch.setattr(measured, "usable_mixes", usable)


@pytest.mark.parametrize("restart", [0, 30])  # seconds
def test_a_search_that_used_its_minutes_goes_on_with_what_is_stored(made_up, monkeypatch, restart):
    whole, minutes = halving.screen, 400 / 60  # as few as are let through

    def cut_off(search):
        whole(search)
        raise KeyboardInterrupt
    monkeypatch.setattr(halving, "screen", cut_off)
    with pytest.raises(KeyboardInterrupt): made_up(need="code", minutes=minutes)
    restarts_take(restart, made_up, monkeypatch)
    monkeypatch.setattr(halving, "screen", whole)
    assert made_up(need="code", minutes=minutes).search.plan.screened == 20


def test_a_finished_search_answers_fewer_minutes(made_up):
    advice, models = made_up(need="code", minutes=15), made_up.models
    for minutes in (1, 15):
        again = made_up(need="code", minutes=minutes)
        assert again.verdict == advice.verdict and again.search.plan == advice.search.plan
    assert made_up.models == models
    assert made_up(need="code", minutes=20).search.plan.rounds > advice.search.plan.rounds


def test_a_longer_search_that_is_interrupted_leaves_the_answer(made_up, monkeypatch):
    advice, whole = made_up(need="code", minutes=8), halving.run_trial
    monkeypatch.setattr(halving, "run_trial", mock.Mock(side_effect=KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt): made_up(need="code", minutes=30)
    monkeypatch.setattr(halving, "run_trial", whole)
    monkeypatch.setattr(Halving, "pace", lambda search, part: 0.0)  # time for more draws
    for minutes in (1, 8):
        again = made_up(need="code", minutes=minutes)
        assert again.verdict == advice.verdict and again.confirmed.draws == advice.confirmed.draws
    assert made_up(need="code", minutes=30).search.plan.rounds > advice.search.plan.rounds


def test_an_unfinished_search_is_none_of_fewer_minutes(made_up, monkeypatch):
    monkeypatch.setattr(measured, "_confirm", mock.Mock(side_effect=KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt): made_up(need="code", minutes=15)
    for _ in range(2):  # a refused search is none that goes on
        with pytest.raises(CalibPruneError, match="are too few.* the rule names codeio"):
            made_up(need="code", minutes=1)


def minutes_named(made_up, minutes=1, **how):
    "The minutes that a refusal asks for."
    with pytest.raises(CalibPruneError, match="are too few") as refused:
        made_up(need="code", minutes=minutes, **how)
    return int(re.search(r"Give --minutes (\d+) or more", str(refused.value))[1])


def test_too_few_minutes_name_the_minutes_it_takes(made_up):
    assert minutes_named(made_up) == 7


def test_too_few_minutes_name_the_minutes_for_own_text_too(made_up, tmp_path):
    (text := tmp_path / "notes.txt").write_text("something else " * 9000)
    with pytest.raises(CalibPruneError, match=r"Give --minutes 7 or more \(--minutes 10 to "):
        made_up(need="code", minutes=1, sources=[str(text)])
    assert len(made_up(need="code", minutes=7, sources=[str(text)]).finalists) == 2
    made_up.folder = tmp_path / "again"
    assert len(made_up(need="code", minutes=10, sources=[str(text)]).finalists) == 3


@pytest.fixture
def slow(made_up):
    "All that comes before the first model takes minutes, too."
    made_up.scoring, made_up.source, made_up.first, made_up.loading = 30.0, 20.0, 10.0, 100.0
    return made_up


def test_far_too_few_minutes_are_refused_after_two_sources(slow):
    named = minutes_named(slow)
    assert len(slow.measured) == 2
    slow.now += 1000  # the same command later, with what is stored
    advice = slow(need="code", minutes=named)
    assert len(slow.measured) > 10 and advice.seconds <= 60 * named


def test_minutes_that_suffice_are_not_refused_early(slow, monkeypatch, tmp_path):
    "The model is not loaded once per source, and the first sources take longer."
    with monkeypatch.context() as patch:
        patch.setattr(measured, "EARLY_MARGIN", np.inf)
        named = minutes_named(slow)
    assert len(slow.measured) > 10, "refused when all is measured"
    slow.folder, slow.measured = tmp_path / "again", []
    assert slow(need="code", minutes=named).seconds <= 60 * named


def test_a_search_that_was_interrupted_is_not_refused_later(slow, monkeypatch):
    whole, named = halving.screen, minutes_named(slow)
    monkeypatch.setattr(measured, "EARLY_MARGIN", 1.0)
    monkeypatch.setattr(halving, "screen", mock.Mock(side_effect=KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt): slow(need="code", minutes=named)
    monkeypatch.setattr(halving, "screen", whole)
    restarts_take(400, slow, monkeypatch)
    assert slow(need="code", minutes=named).calibration == "codeio"


def test_own_text_is_no_finalist_only_if_all_that_is_measured_says_so(slow, tmp_path):
    "By the time of the first two sources, the minutes are too few for a third finalist."
    (text := tmp_path / "notes.txt").write_text("something else " * 9000)
    slow.first = 68.0
    advice = slow(need="code", minutes=26, sources=[str(text)])
    assert len(advice.finalists) == 3


def test_a_search_that_was_killed_in_its_first_model_goes_on(slow, monkeypatch):
    whole, named = halving.timed_items, 20
    monkeypatch.setattr(halving, "timed_items", mock.Mock(side_effect=KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt): slow(need="code", minutes=named)
    monkeypatch.setattr(halving, "timed_items", whole)
    restarts_take(300, slow, monkeypatch)
    assert slow(need="code", minutes=named).calibration == "codeio"


def test_the_time_of_a_source_is_without_loading(slow):
    search = Trials("smollm2-135m", slow.folder, {})
    slow.folder.mkdir()
    assert trials.measure_sources(search, ["c4", "news", "math"]) == [30 / 8, 30 / 8, 20 / 8]


@pytest.mark.parametrize("more, seconds", [
    ({}, 40), (dict(windows=64), 80), (dict(reconstruct=2), 40 + 2 * 6.4 * 16),
    (dict(method="wanda"), 32)])
def test_the_time_of_a_trial_counts_windows_and_passes(tmp_path, more, seconds):
    "SparseGPT takes 2.5 passes, Wanda 2, a pass of reconstruction 6.4."
    how = PruneSettings(**(dict(method="sparsegpt", windows=32) | more))
    guessed = measured.pruning_seconds(Trials("smollm2-135m", tmp_path, {}, how), 0.5)
    assert guessed == pytest.approx(seconds)


def test_methods_that_work_by_dimension_are_refused_at_the_start(made_up, tmp_path):
    with pytest.raises(CalibPruneError, match="minimax needs mixes of several dimensions"):
        made_up(need="code", minutes=15, method="minimax")
    assert not (tmp_path / "out").exists()


def test_times_that_an_earlier_run_took_are_remembered(tmp_path):
    "A repeated command finds the dense model's answers, and must not take them for quick work."
    search = Trials("smollm2-135m", tmp_path, dict(tuning=[], confirming=[]))
    slow = trials.longest_seconds(search, "tuning", lambda: time.sleep(0.2))
    assert slow >= 0.2 and trials.longest_seconds(search, "tuning", lambda: None) == slow


@pytest.mark.parametrize("change, named", [(dict(need="math"), "tasks"),
                                           (dict(sparsity="0.6"), "settings")])
def test_a_folder_holds_one_advice(made_up, change, named):
    made_up(need="code", minutes=10)
    with pytest.raises(CalibPruneError, match=rf"other settings \({named}\)"):
        made_up(**dict(need="code", minutes=10) | change)


@pytest.mark.parametrize("name", ["version", "stages"])
def test_a_folder_of_another_version_is_refused(made_up, name):
    made_up(need="code", minutes=15)
    stored = load_json(file := made_up.folder / trials.STATE_FILE)
    file.write_text(json.dumps(stored | {name: 1, "model": "another"}))
    with pytest.raises(CalibPruneError, match="holds advice of another version of calib-prune"):
        made_up(need="code", minutes=15)


def test_the_progress_says_how_many_seconds_are_used(slow):
    told = []
    slow(need="code", minutes=60, progress=lambda *state: told.append(state))
    told = [state[1:] for state in told if state[0] == "seconds of the search"]
    used = [done for done, _ in told]
    assert used == sorted(used) and used[0] == 60 + 100, "scored with and without prompts, loaded"
    assert used[-1] > 400 and {whole for _, whole in told} == {3600}


def test_a_search_quantises(made_up):
    how = dict(method="gptq", sparsity="0", quantise=Quantisation(3, 64, fitted=True), block=64)
    advice = made_up(need="code", minutes=15, **how)
    assert advice.calibration == "codeio" and advice.search.trials.settings.quantise.bits == 3
    assert "--bits 3" in " ".join(command_lines("smollm2-135m", "codeio",
                                                advice.search.trials.settings))


def test_a_plan_is_of_one_need(made_up, tmp_path):
    "These needs have the same tasks, so the settings of the folder do not tell them apart."
    path = tmp_path / "out" / PLAN_FILE
    made_up(need="all", minutes=10)
    before, models = path.read_bytes(), made_up.models
    for other in ("worst", "code=2,general,commonsense,math"):
        with pytest.raises(CalibPruneError, match=f"another need than '{other}': choose another"):
            made_up(need=other, minutes=10)
    assert path.read_bytes() == before and made_up.models == models
    plan = json.loads(before)
    del plan["need"], plan["answered"]
    path.write_text(json.dumps(plan))  # as earlier versions wrote it
    made_up(need="all", minutes=10)
    assert made_up.models == models and json.loads(path.read_text())["need"]["worst"] is False


def test_a_need_at_the_floor_cannot_be_measured(made_up, monkeypatch):
    same = lambda self, part, floor=False: items_of({}, item_limits(self.tasks, part),
                                                    seed=int(floor))
    monkeypatch.setattr(measured, "dense_items", same)
    monkeypatch.setattr(measured, "measure_sources", lambda *_: pytest.fail("measures sources"))
    with pytest.raises(CalibPruneError, match="Code cannot be measured on this model"):
        made_up(need="code", minutes=10)


def test_a_changed_text_or_model_is_another_trial(tmp_path):
    """The file name of a trial changes with the text of its source, and the folder is bound to the
    weights, not to the model's name."""
    text = tmp_path / "notes.txt"
    names = []
    for word in ("first", "second"):
        text.write_text(f"{word} " * 50)
        names.append(trials._file_name(str(text)))
    assert names[0] != names[1] and trials._file_name("c4") == trials._file_name("c4")
    weights = []
    for seed in (0, 1):
        place = tmp_path / f"m{seed}"
        save_model(tiny_llama(seed), tiny_tokenizer(), str(place), {})
        place.rename(tmp_path / "model")
        weights.append(Trials(str(tmp_path / "model"), tmp_path, {}).identity()["weights"])
        (tmp_path / "model").rename(place)
    assert weights[0] != weights[1]


@pytest.mark.parametrize("folders", [["out/dense", "out/c4"], ["dense", "c4"]])
def test_a_model_called_dense_keeps_its_name(folders):
    items = {name: items_of({}, ["piqa"], seed=i) for i, name in enumerate(("a", "b"))}
    names = short_names(folders)
    table = Comparison(items["a"], dict(zip(names, items.values())), None,
                       get_measure("answer-bits"), 50).flips
    assert len({*zip(table["first"], table["second"])}) == 3


def test_a_comparison_is_shown_although_its_figure_cannot_be_saved(monkeypatch, tmp_path, capsys):
    items = items_of({}, ["piqa", "mbpp"])
    found = Comparison(items, dict(a=items, b=items), None, get_measure("answer-bits"), 50)
    monkeypatch.setattr(compare, "compare_models", lambda *args: found)
    (tmp_path / "file").touch()
    with pytest.raises((CalibPruneError, OSError)):
        compare_command(["a", "b"], "dense", figure=str(tmp_path / "file" / "figure.svg"))
    assert "differences of retention" in capsys.readouterr().out


def guessed(*tasks, n=32):
    "Answers that are right as often as chance has it: nothing is above it."
    items = items_of({}, tasks, n)
    right = (items.groupby(["task", "metric"]).cumcount() % 4 == 0).astype(float)
    return items.assign(value=items["value"].where(items["metric"] == "bits", right))


@pytest.mark.parametrize("as_json", [False, True])
def test_scores_are_shown_although_retention_has_no_answer(monkeypatch, capsys, as_json):
    "They took hours, and models at chance are met only afterwards."
    items, measure = guessed("piqa"), get_measure("above-chance")
    found = Comparison(items, dict(a=items, b=items), None, measure, 50)
    monkeypatch.setattr(compare, "compare_models", lambda *args: found)
    for name in ("own_record", "check_method", "check_report_files", "check_request", "_distances"):
        monkeypatch.setattr(report, name, lambda *_: dict(method="admm"))
    monkeypatch.setattr(report, "evaluate_model",
                        lambda *_, **how: Evaluation(items, items, None, measure))
    for command, given, shown in ((compare_command, ["a", "b"], ["dense", "a", "b"]),
                                  (report_command, "a", ["dense", "pruned"])):
        with pytest.raises((CalibPruneError, SystemExit)) as said:
            command(given, "dense", as_json=as_json)
        out = capsys.readouterr().out
        if as_json:
            record = json.loads(out)
            scores = record["scores"]["b"] if command is compare_command else record["scores"]
            assert scores[0]["n"] == 32 and "chance" in record["error"] and said.value.code == 1
        else: assert "scores: accuracies" in out and all(name in out for name in shown)


def test_a_report_scores_last(monkeypatch):
    "What fails after the scores would lose hours."
    for name in ("own_record", "check_method", "check_report_files", "check_request"):
        monkeypatch.setattr(report, name, lambda *_: dict(method="admm"))
    monkeypatch.setattr(report, "load_model", mock.Mock(side_effect=MemoryError))
    monkeypatch.setattr(report, "evaluate_model", lambda *_, **how: pytest.fail("too early"))
    with pytest.raises(MemoryError):
        report.report_on("pruned", "dense")
    with pytest.raises(CalibPruneError, match="-1"):  # what makes scoring impossible is found first
        report.report_on("pruned", "dense", "piqa", limit=-1)


@pytest.mark.parametrize("few", [1, 5])
def test_too_few_items_are_not_judged_and_take_no_other_interval(few):
    """Five items of Code, or one, which has no replicates: Commonsense keeps its interval."""
    made = [pd.concat([items_of(kept, ["piqa"], 200), items_of({"Code": 0.5}, ["mbpp"], few)])
            for kept in ({"Commonsense": 1.0}, {"Commonsense": 0.9}, {"Commonsense": 0.6})]
    found = Comparison(made[0], dict(a=made[1], b=made[2]), None, get_measure("answer-bits"), 200)
    ends = found.differences.set_index("name")["ci_low"]
    assert ends["Commonsense"] > 0 and np.isnan(ends["Code"])
    assert "a has higher retention in Commonsense" in found.verdict[0]
    assert found.verdict[1] == f"Code cannot be judged: fewer than 10 items: mbpp has {few}."
    assert [row["95 % CI"] for row in difference_table(found)][1] == "no interval"


def test_too_few_items_of_the_only_dimension_are_said_once(monkeypatch):
    monkeypatch.setitem(TASKS, "law", replace(TASKS["mbpp"], name="law", dimension="Law"))
    made = [items_of({"Law": kept}, ["law"], 5) for kept in (1.0, 0.9, 0.6)]
    found = Comparison(made[0], dict(a=made[1], b=made[2]), None, get_measure("answer-bits"), 50)
    assert found.verdict[1:] == ["Law cannot be judged: fewer than 10 items: law has 5."]
    assert found.best == "Highest Law retention: a, no interval"


@pytest.mark.parametrize("floor", [0.6, None])
def test_no_sentence_repeats_the_only_dimension_as_total(monkeypatch, floor):
    monkeypatch.setitem(TASKS, "law", replace(TASKS["mbpp"], name="law", dimension="Law"))
    made = [items_of({"Law": kept}, ["law"], 200, seed)
            for seed, kept in enumerate((1.0, 0.9, 0.6, floor or 1.0))]
    written = made[0].assign(task="law_written", metric="pass@1", value=1.0)
    monkeypatch.setitem(TASKS, "law_written", replace(
        TASKS["mbpp_generate"], name="law_written", dimension="Law"))
    dense, a, b = (pd.concat([items, written]) if floor is None else items for items in made[:3])
    measure = get_measure("plain" if floor is None else "answer-bits")
    found = Comparison(dense, dict(a=a, b=b), made[3], measure, 200)
    alone = Evaluation(b, dense, made[3], measure)
    said = [*found.verdict, *found.floor_notes, *alone.floor_notes]
    assert len(alone.floor_notes) == 1 and len(found.floor_notes) == 1
    assert "Law" in " ".join(said) and "total" not in " ".join(said)


def test_a_measure_without_likelihoods_has_no_floor():
    likelihoods = items_of({}, ["jeopardy"])
    written = likelihoods.assign(task="gsm8k_generate", dimension="Math", metric="exact_match",
                                 value=1.0, chance=0.0)
    dense = pd.concat([likelihoods, written], ignore_index=True)
    found = Comparison(dense, dict(a=dense, b=dense), likelihoods, get_measure("above-chance"), 50)
    assert found.floor is None and len(found.floor_notes) == 1


def made_report(tasks=("piqa", "mbpp"), **record):
    "A report on a model that was never made."
    layers = [dict(name=f"layers.{i}.mlp.up_proj", layer=i, error=0.1, sparsity=0.5)
              for i in range(3)]
    about = dict(model="smollm2-135m", model_revision="commit:1", method="admm", sparsity="0.5",
                 achieved_sparsity=0.5, calibration=dict(mix="c4", windows=8, length=64),
                 mean_error=0.1, saved_dtype="float32", layers=layers) | record
    dense, items = items_of({}, tasks), items_of({}, tasks, seed=1)
    return Report(about, "dense", Evaluation(items, dense, None, get_measure("answer-bits")),
                  flips(dense, items), dict.fromkeys(("dense", "pruned"),
                                                     Perplexity(9.0, 9, 9, 9, 9)),
                  Divergence(0.1, 0.01, 0.9, 99), [])


@pytest.mark.parametrize("quantise, said", [(None, "pruned"), (dict(bits=3), "quantised")])
def test_a_report_says_what_was_done_to_the_model(quantise, said):
    page = report_page(made_report(**dict(method="gptq", sparsity="0", quantise=quantise)
                                   if quantise else {}))
    assert f"| mean error of the layers, as {said} | 0.1000 |" in page
    assert f" {said}. Divergence" in page


def test_a_report_names_the_steps_and_the_scope():
    made = made_report(reconstruct=3, refine=0, allocation="uniform", sparsity_in_scope=0.61,
                       scope=dict(layers="2-28", exclude="*.down_proj"))
    page = report_page(made)
    for line in ("method | L-ADMM + reconstructed (3)", "layers asked for | 2-28",
                 "left dense | `*.down_proj`", "zeros in the maps asked for | 61.00 %"):
        assert f"| {line} |" in page
    assert "left dense" not in report_page(made_report())


@pytest.mark.parametrize("tasks, there", [(("piqa", "mbpp"), True), (("mbpp",), False)])
def test_a_report_explains_p_only_next_to_its_column(tasks, there):
    page = report_page(made_report(tasks))
    assert ("McNemar" in page) == ("| p |" in page) == there


def test_an_interrupted_report_can_be_repeated(monkeypatch, tmp_path):
    "A folder without a record holds somebody else's files, and a report there is refused."
    whole = report.write_atomic
    for files in range(5):  # written before the interruption
        left, folder = iter(range(files)), tmp_path / str(files)

        def cut_off(path, data):
            if next(left, None) is None: raise KeyboardInterrupt
            return whole(path, data)
        monkeypatch.setattr(report, "write_atomic", cut_off)
        with pytest.raises(KeyboardInterrupt): save_report(made_report(), folder)
        check_report_files(folder)
    monkeypatch.setattr(report, "write_atomic", whole)
    made = [file.name for file in save_report(made_report(), folder)]
    assert made == ["report.html", "report.md", "layers.svg", "report.json", "README.md"]


def test_tuning_and_confirming_share_no_item_with_reports():
    from calib_prune.data.fetch import cached
    from calib_prune.data.files import read_jsonl
    from calib_prune.evaluation.tasks import choose
    for task in get_tasks("default"):
        records = read_jsonl(cached("benchmarks", task.benchmark))
        parts = [choose(records, 100), *(choose(records, trials.SLICE_ITEMS, after=part.skip)
                                         for part in (trials.TUNING, trials.CONFIRMING))]
        names = [{record["id"] for record in part} for part in parts]
        assert len(names[1]) == len(names[2]) == 32
        assert not (names[0] & names[1] or names[1] & names[2] or names[0] & names[2])


