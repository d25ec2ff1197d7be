import dataclasses
import functools
import os
import re
from types import SimpleNamespace

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from calib_prune.core import DIMENSIONS, CalibPruneError
from calib_prune.evaluation.measures import ANSWER_BITS
from calib_prune.questions.comparison_figures import (
    averaging_figure,
    averaging_message,
    front_figure,
    front_message,
    margin_figure,
    margin_message,
    retention_panels,
    significant_counts,
    source_message,
    strategy_figure,
    two_methods,
)
from calib_prune.questions.correlations import (
    metric_message,
    rows_in_settings,
    survival_message,
)
from calib_prune.questions.self_generated import (
    ablation_rows,
    about_ours,
    best_band,
    our_mixes,
    protocol_figure,
    steps_that_show,
)
from calib_prune.statistics.comparison import (
    base_differences,
    differences,
    kind_of,
    margin_rows,
    mix_differences,
    over_best,
    range_rows,
    retention_rows,
    sd_interval,
    single_strategies,
    spread_rows,
    swept_part,
)
from calib_prune.statistics.effects import (
    effects,
    lead_of_best,
    significant_sign,
    simultaneous_ends,
    strategy_contrasts,
)
from calib_prune.statistics.examples import example_preset, example_study
from calib_prune.statistics.plots import figure_of
from calib_prune.statistics.replicates import OUTCOMES, Replicates
from calib_prune.statistics.selection import (
    bootstrap_study,
    caption,
    detail_notes,
    endings_note,
    example_results,
    footnote,
    front_cells,
    interval_note,
    main_cells,
    main_sparsity,
    select_cells,
    size_cells,
    sweep_cells,
    weak_note,
)
from calib_prune.statistics.tables import latex_table, latex_text
from calib_prune.study.artefacts import FILE_ENDINGS, made_by
from calib_prune.study.presets import load_preset
from calib_prune.study.results import Result, check_one_edition, save_cell
from calib_prune.style import LEAST_REACH, OWN, contrast_ratio, save_figure
from tests import ROOT
from tests.notebooks import run_cells

BOOKS = ("main", "sweep", "draws")
# a preset without ablations and own text has little to show there
LATE = ("self_generated", "ablations")
KEPT = {
    "c4": (0.8, 0.6, 0.5, 0.3), "stdlib": (0.4, 0.6, 0.8, 0.2), "math": (0.5, 0.55, 0.5, 0.7),
    "uniform": (0.75, 0.65, 0.7, 0.6)}
SWEPT = {"strategies": ["c4", "math", "uniform"], "methods": ["sparsegpt"], "seeds": [0]}


@functools.cache
def small_preset():
    "The default preset with a smaller grid."
    preset = load_preset(ROOT / "presets/claims/smollm2-135m.yaml")
    preset |= {
        "strategies": {o: o for o in KEPT}, "ablations": None, "resamples": 200, "measure": "plain",
        "judged_at": None}
    preset["grid"] = [{
        "strategies": "all", "methods": ["sparsegpt", "wanda"], "sparsities": [0.6], "seeds": [
            0, 1], "windows": [
                "default"]}, SWEPT | {"sparsities": [0.3, 0.5, "2:4"], "windows": ["default"]},
                      SWEPT | {"sparsities": [0.6], "windows": [8]}]
    return preset


@functools.cache
def study(): return example_results(small_preset(), KEPT, n=60)


@functools.cache
def whole(): return bootstrap_study(small_preset(), study())


def part(cells=main_cells, keep=None):
    "The part of the study that a table is about; `keep` tells which models have been run."
    some = whole() if keep is None else bootstrap_study(small_preset(),
                                                 {k: v for k, v in study().items() if keep(k)})
    return select_cells(some, cells(small_preset()))


def run_notebook(name, folder, keep, dimensions=DIMENSIONS):
    """Execute a notebook of nbs/paper in this process, on those cells of the study, with the tasks
    of these dimensions."""
    results, figures = folder / "results", folder / "figures"
    (folder / "preset.yaml").write_text(yaml.safe_dump(small_preset(), sort_keys=False))
    for k, r in study().items():
        items = r.items[r.items["dimension"].isin(dimensions)]
        if keep(k):
            save_cell(results, r.record | {"cell": k, "calibration": None}, pd.DataFrame(), items,
                      pd.DataFrame(), {})
    run_cells(name, preset=folder / "preset.yaml", results=results, figures=figures)
    return {p.name: p.read_bytes() for p in figures.iterdir()}


# --- the notebooks


@pytest.fixture(autouse=True)
def no_windows():
    import matplotlib.pyplot as plt
    plt.switch_backend("agg")
    yield
    plt.close("all")


def stems(name): return {o.stem for o in made_by([name])}


@pytest.mark.parametrize("name", BOOKS)
def test_a_notebook_writes_its_files_and_writes_them_again(name, tmp_path):
    files = run_notebook(name, tmp_path, lambda o: True)
    assert set(files) == {f"{o}.{end}" for o in stems(name) for end in FILE_ENDINGS[o[0]]}
    again = run_notebook(name, tmp_path, lambda o: True)
    for file in files: assert files[file] == again[file], file
    assert "Incomplete" not in "".join(v.decode() for k, v in files.items() if k.endswith(".md"))


def test_a_study_of_two_dimensions_has_its_tables_and_no_total(tmp_path):
    files = run_notebook("main", tmp_path, lambda o: True, ("Code", "Math"))
    assert {o.split(".")[0] for o in files} == stems("main")
    assert set(pd.read_csv(tmp_path / "figures/T2-retention.csv")["dimension"]) == {"Code", "Math"}


@pytest.mark.parametrize(
    "keep",
    [lambda o: o == "dense" or "stdlib" in o and "s0" in o, lambda o: False],
    ids=["one", "none"],
)
@pytest.mark.parametrize("name", BOOKS + LATE)
def test_a_study_that_has_just_begun_says_so(name, keep, tmp_path):
    files = run_notebook(name, tmp_path, keep)
    assert {o.split(".")[0] for o in files} == stems(name)
    # no strategy of it writes its own text
    said = {"ablations": "The preset plans no cell", "T8-tuning": "Nothing was tuned"}
    for file, text in files.items():
        if file.endswith(".md"):
            assert said.get(name, said.get(file[:-3], "Incomplete")) in text.decode(), file


# --- which cells


def test_cells_of_each_question():
    preset = small_preset()
    assert main_sparsity(preset) == 0.6 and len(main_cells(preset)) == 16
    assert {c.sparsity for c in sweep_cells(preset)} == {0.3, 0.5, 0.6} and {
        c.method for c in sweep_cells(preset)
    } == {"sparsegpt"}
    assert {(c.strategy, c.windows) for c in size_cells(preset)} == {
        (o, w) for o in SWEPT["strategies"] for w in (8, 32)
    }


def test_other_sizes_and_sparsities_stay_out_of_the_main_table():
    rows = retention_rows(part())
    assert set(rows["windows"]) == {32} and set(rows["sparsity"]) == {0.6} and set(
        rows["draws"]) == {2}


def test_self_generated_text_is_not_a_mix():
    preset = small_preset() | {
        "strategies": small_preset()["strategies"] | {"uniform": "generated:igsp"}
    }
    found = select_cells(bootstrap_study(preset, study(), 50), main_cells(small_preset()))
    assert set(retention_rows(found).query("strategy == 'uniform'")["source"]) == {"self-generated"}
    assert set(mix_differences(found)["over"]) == {"best single source"}
    assert set(mix_differences(part())["over"]) == {"best single source", "c4", "stdlib", "math"}


# --- numbers


def test_numbers_are_those_of_the_analysis():
    mine, found = differences(part(), [("uniform", "c4")]), part().replicates
    theirs = effects(strategy_contrasts(found, [("uniform", "c4")]))
    ends = ["value", "ci_low", "ci_high"]
    np.testing.assert_array_equal(mine[ends], theirs[ends])


def test_the_best_source_is_the_best():
    best, found = over_best(part(), "uniform").set_index(["method", "dimension"]), part()
    for (method, dimension), row in best.iterrows():
        each = [
            o.set_index(["method", "dimension"]).loc[(method, dimension), "value"]
            for s in ("c4", "stdlib", "math")
            for o in [differences(found, [("uniform", s)])]
        ]
        assert row["value"] == min(each) and row["ci_low"] <= row["value"] <= row["ci_high"]


def test_a_sweep_chooses_its_best_source_among_the_same_ones_at_every_point():
    "Only c4 and math are pruned to 40 %; stdlib, the best, must not come in at 60 %."
    kept = {"c4": (0.5,) * 4, "math": (0.6,) * 4, "stdlib": (0.9,) * 4, "uniform": (0.7,) * 4}
    made = example_study(kept, ("sparsegpt", "wanda"), sparsities=(0.5, 0.6), n=80)
    made |= example_study({k: v for k, v in kept.items() if k != "stdlib"}, sparsities=(0.4,), n=80)
    preset = example_preset(made)
    swept = select_cells(bootstrap_study(preset, made, 50), sweep_cells(preset))
    rows = margin_rows(swept, "uniform", "c4", "sparsity").query(
        "over == 'best single source' and dimension == 'Total'"
    )
    assert {k: set(mine["best"]) for k, mine in rows.groupby("method")} == {
        "sparsegpt": {"math"},
        "wanda": {"stdlib"},
    }
    assert {k: list(mine["n_sources"]) for k, mine in rows.groupby("method")} == {
        "sparsegpt": [2, 2, 2],
        "wanda": [3, 3],
    }
    # the mix goes further than any source
    made |= example_study({"uniform": (0.7,) * 4}, sparsities=(0.7,), n=80)
    preset = example_preset(made)
    further = margin_rows(select_cells(bootstrap_study(preset, made, 50), sweep_cells(preset)),
                          "uniform", "c4", "sparsity")
    further = further.query("over == 'best single source' and dimension == 'Total'").reset_index(
        drop=True
    )
    pd.testing.assert_frame_equal(
        further[["method", "sparsity", "best", "value"]],
        rows.reset_index(drop=True)[["method", "sparsity", "best", "value"]],
    )


def test_a_mix_that_is_not_there_has_no_margin():
    assert margin_rows(part(sweep_cells), "nobody", "c4", "sparsity").empty
    assert mix_differences(part(keep=lambda o: "uniform" not in o)).empty


@given(st.floats(0.001, 1), st.floats(0, 1), st.integers(1, 60))
def test_an_interval_of_a_spread_holds_it_and_shrinks_with_draws(sd, noise, freedom):
    low, high = sd_interval(sd**2 + noise**2, noise, freedom)
    assert 0 <= low < sd < high or freedom < 3
    wider = sd_interval(sd**2 + noise**2, noise, max(freedom // 2, 1))
    assert wider[1] >= high * (1 - 1e-9)


def test_degrees_of_freedom():
    rows = spread_rows(part()).groupby("between")["freedom"].agg(lambda o: set(o))
    assert rows["draws"] == {4} and rows["sources"] == {2}
    assert set(spread_rows(part(keep=lambda o: not o.endswith("s1")))["between"]) == {"sources"}


# --- captions


def test_captions_say_what_is_missing_and_which_noise_intervals_have():
    full, one_draw, one_method = part(), part(keep=lambda o: not o.endswith("s1")), part(
        keep=lambda o: not o.endswith("wanda-0.6-n32-s1"))
    said = "smollm2-135m; SparseGPT and Wanda at 60%; 32 windows × 512 tokens; 2 draws"
    assert caption(full, "x").startswith(f"x. Setting: {said}")
    assert "intervals over items and draws" in caption(full, "x")
    assert "8 of 16 cells" in footnote(one_draw)
    assert "SparseGPT 1 of 2" in detail_notes(one_draw)[0]
    assert "only" in interval_note(one_draw.replicates)
    assert interval_note(one_method.replicates).endswith(
        "Sets with one draw have the draw variance of the other sets."
    ) and "Wanda 1 of 2" in detail_notes(one_method)[0]


def test_captions_of_a_sweep_count_only_what_is_swept():
    everything = part(sweep_cells)
    swept = swept_part(everything, "sparsity")
    assert "stdlib" in set(everything.replicates.cells["strategy"]) and set(
        swept.replicates.cells["strategy"]
    ) == set(SWEPT["strategies"])
    assert (
        {c.strategy for c in swept.wanted} == set(SWEPT["strategies"])
        and "dense" in swept.study
        and swept.study.keys() < everything.study.keys()
    )
    few = swept_part(
        part(sweep_cells, lambda o: o in ("dense", "stdlib-sparsegpt-0.6-n32-s0")), "sparsity"
    )
    assert "0 of 12 cells" in footnote(few)


# --- LaTeX


@pytest.mark.parametrize("path", sorted(ROOT.glob("figures/**/*.md")), ids=lambda o: o.stem)
def test_pdflatex_takes_every_character(path):
    """Letters with accents are left: inputenc makes them from ASCII ones. All else outside ASCII
    needs a macro."""
    left = set(latex_text(path.read_text(encoding="utf-8")))
    assert not {o for o in left if not o.isascii() and not "À" <= o <= "ſ"}


def test_latex_says_what_the_table_says():
    shown = pd.DataFrame({"a_b → c": ["-1.4 [-4.4, +1.4]", r"50% & #1 {x} ~ ^ \ $"], "n": [1, 22]})
    rows = pd.DataFrame({"formula": ["p(a | b)", "−Σ log₂"], "unit": ["bits", ""]}).to_markdown(
        index=False
    )
    made = latex_table(
        shown,
        f"ρ < 0.05 for `x_y`. More.\n\n**C1** holds (*so*).\n\n- *one*: 3 × 4\n- two\n\n{rows}",
        "tab:a_b",
    )
    for line in (
        r"a\_b $\to$ c & n \\",
        r"$-$1.4 [$-$4.4, +1.4] & 1 \\",
        r"50\% \& \#1 \{x\} \textasciitilde{} \textasciicircum{} \textbackslash{} \$ & 22 \\",
        r"\caption[{$\rho$ $<$ 0.05 for \texttt{x\_y}}]{$\rho$ $<$ 0.05 for \texttt{x\_y}. More.}",
        r"\textbf{C1} holds (\emph{so}).",
        r"\item \emph{one}: 3 $\times$ 4",
        r"p(a $|$ b) & bits \\",
    ):
        assert line in made.splitlines(), line
    opened, closed = (re.findall(rf"\\{o}{{(\w+)}}", made) for o in ("begin", "end"))
    assert sorted(opened) == sorted(closed) and made.count(r"\item ") == 2
    bare = re.sub(r"\\[{}$]", "", made)
    assert bare.count("{") == bare.count("}") and bare.count("$") % 2 == 0


def test_a_long_table_breaks_and_one_without_caption_does_not_float():
    shown = pd.DataFrame(dict(n=range(60)))
    assert latex_table(shown, "x.").count("{longtable}") == 2 and r"\begin{table}" in latex_table(
        shown[:9], "x."
    )
    assert "{table}" not in latex_table(shown[:9])


def test_captions_say_how_answers_ended():
    assert endings_note(part()) == ""
    here = part()
    ended = pd.DataFrame([
        dict(task="mbpp_generate",
             dimension="Code",
             item="0",
             metric=m,
             value=v,
             bytes=0,
             chance=np.nan) for m, v in (("cut", 1.0), ("late", 0.0))])
    names = [o for o in here.study if o == "dense" or o.startswith("c4-sparsegpt")]
    more = {
        k: dataclasses.replace(o, items=pd.concat([o.items, ended], ignore_index=True))
        if k in names else o for k, o in here.study.items()}
    said = endings_note(dataclasses.replace(here, study=more))
    n = len(names) - 1
    assert (
        said
        == f"Dense model: mbpp_generate: 1 of 1 answers were cut at 512 tokens. {n} pruned models:"
        f" mbpp_generate: {n} of {n} answers were cut at 512 tokens."
    )


def test_captions_name_tasks_in_which_the_dense_model_has_few_right():
    here = part()
    rows = lambda task, metric, right, n, chance: pd.DataFrame([
        dict(task=task,
             dimension="Math",
             item=str(i),
             metric=metric,
             value=float(i < right),
             bytes=0,
             chance=chance) for i in range(n)])
    dense = here.study["dense"]
    made = pd.concat([
        rows("gsm8k_generate", "exact_match", 2, 32, 0.0),
        rows("basic_skills_arithmetic", "acc", 60, 96, 0.1)],
                     ignore_index=True)
    weak = dataclasses.replace(
        here, study=here.study | {"dense": dataclasses.replace(dense, items=made)}
    )
    assert weak_note(weak).endswith(
        "few right answers beyond guessing: gsm8k_generate (2 of 32 right)."
    )
    assert weak_note(
        dataclasses.replace(weak, replicates=dataclasses.replace(weak.replicates,
                                                            measure=ANSWER_BITS))) == ""
    assert weak_note(
        dataclasses.replace(weak,
                            replicates=dataclasses.replace(weak.replicates,
                                                      left_out=("gsm8k_generate", )))) == ""
    nothing = part(keep=lambda o: o == "dense")
    assert (
        "dense" in nothing.study
        and weak_note(dataclasses.replace(nothing, study={"dense": weak.study["dense"]})) == ""
    ), "no measure is known yet"


def test_our_mixes_are_those_of_chosen_shares():
    names = {
        "c4": "c4", "mine": "notes.jsonl", "uniform": "uniform", "igsp": "generated:igsp",
        "tuned": "c4=3,math=1", "uniform-dimensions": "uniform-dimensions"}
    strategies = [*names, "uniform-dimensions, balanced"]
    some = SimpleNamespace(
        preset=dict(strategies=names),
        replicates=SimpleNamespace(cells=pd.DataFrame(dict(strategy=strategies))),
    )
    assert our_mixes(some) == ["tuned", "uniform-dimensions, balanced"]
    assert (
        about_ours(["tuned"], "another model")
        == " Ours: `tuned` has its shares of the dimensions from held-out text, tuned on another"
        " model."
    )
    assert (
        about_ours(our_mixes(some)).startswith(" Ours: `balanced` weigh") and about_ours([]) == ""
    )


def test_intervals_that_hold_at_once_take_the_place_of_single_ones():
    rows = pd.DataFrame([
        dict(value=0.03, ci_low=0.01, ci_high=0.05, all_low=-0.01, all_high=0.07),
        dict(value=0.03, ci_low=0.01, ci_high=0.05, all_low=np.nan, all_high=np.nan)])
    assert simultaneous_ends(rows)[["ci_low", "ci_high"]].to_numpy().tolist() == [
        [-0.01, 0.07],
        [0.01, 0.05],
    ]
    assert simultaneous_ends(rows[["value", "ci_low"]]).equals(
        rows[["value", "ci_low"]]
    ) and rows.ci_low.tolist() == [0.01, 0.01]


def test_the_best_source_may_be_the_baseline():
    row = lambda mix, value: dict(
        mix=mix, over="c4", value=value, ci_low=value - 0.01, ci_high=value + 0.01
    )
    below, above = pd.DataFrame([row("math", -0.02), row("uniform", 0.1)]), pd.DataFrame(
        [row("math", 0.02), row("uniform", 0.1)]
    )
    for delta, name, bands in ((below, "c4", 0), (above, "math", 1), (below.assign(value=np.nan),
                                                                      "", 0)):
        ax = plt.figure().add_subplot()
        assert best_band(ax, delta, ["c4", "math"]) == name and len(ax.patches) == bands
        plt.close()


def test_a_title_names_the_sparsities_where_the_margin_is_significant():
    line = pd.DataFrame([
        dict(method="sparsegpt",
             mix="uniform",
             over="c4",
             sparsity=s,
             ci_low=v - 0.02,
             ci_high=v + 0.02) for s, v in ((0.3, 0.01), (0.5, 0.03), (0.6, 0.05), (0.7, 0.09))])
    assert (
        margin_message(line) == "Total retention, SparseGPT: uniform above c4 at 3 of 4 sparsities"
    )
    assert margin_message(line[:3]) == "Total retention, SparseGPT: uniform above c4 at 50% and 60%"
    assert (
        margin_message(line[:1])
        == "SparseGPT: uniform not significantly different from c4 at any sparsity"
    )


def test_variants_are_judged_together():
    rng = np.random.default_rng(0)
    noise = np.concatenate([np.zeros((1, 16)), 0.01 * rng.normal(size=(2000, 16))])
    values = np.repeat((noise + 0.022 * (np.arange(16) == 0))[..., None], len(OUTCOMES), 2)
    cells = pd.DataFrame(dict(strategy=[f"igsp-{i}" for i in range(16)]))
    items = dict.fromkeys(OUTCOMES, 100)
    ends = effects(Replicates(cells, values, items, {}), ["Total"], together=[])
    ends = ends.set_index("strategy")
    assert ends.all_low["igsp-0"] < 0 < 0.022 - 1.96 * 0.01, "beyond noise alone, not among sixteen"
    table = ends.reset_index().assign(difference=0.022)
    assert "none differs" in steps_that_show(table, "igsp")
    assert "`igsp-0` is higher in total" in steps_that_show(
        table.assign(all_low=table.all_low.where(table.strategy != "igsp-0", 0.001)), "igsp"
    )
    assert "cannot be judged" in steps_that_show(table.assign(all_low=np.nan), "igsp")
    assert ablation_rows(whole(), part(keep=lambda o: o == "dense"), pd.DataFrame()).empty


@pytest.mark.parametrize("first", ["keyless", "keyed"])
def test_results_that_do_not_say_how_they_were_scored_are_refused_among_others(first):
    keyed = {
        "record": dict(key=dict(model="a", tasks={}, batch_tokens=1, versions=dict(scoring=4)))
    }
    result = lambda record: Result(record, pd.DataFrame(), pd.DataFrame(), {})
    both = [("c4", result({})), ("math", result(keyed["record"]))]
    with pytest.raises(
        CalibPruneError,
        match="1 of 2 results do not say how they were scored, as the others do: c4",
    ):
        check_one_edition(dict(both if first == "keyless" else both[::-1]))
    check_one_edition(dict(both[:1]))
    other = result(dict(key=keyed["record"]["key"] | dict(versions=dict(scoring=3))))
    with pytest.raises(CalibPruneError, match="than math .they differ in scoring.: c4"):
        check_one_edition({"math": both[1][1], "c4": other})


# --- figures


def held(some): return base_differences(some, simultaneous=True)


def panels_of(rows, note=""):
    return retention_panels(rows, held(part()), source_message(part()), note)


def beside_c4(delta, note=""): return strategy_figure(retention_rows(part()), delta, note)


DRAWN = [(panels_of, lambda o=main_cells, **keep: retention_rows(part(**keep))),
         (beside_c4, lambda **keep: held(part(**keep))),
         (averaging_figure, lambda **keep: range_rows(part(**keep))),
         (margin_figure,
          lambda **keep: margin_rows(part(sweep_cells, **keep), "uniform", "c4", "sparsity"))]


@pytest.mark.parametrize("draw,rows", DRAWN)
def test_figures_refuse_nothing(draw, rows):
    empty = rows(keep=lambda o: False)
    with pytest.raises(CalibPruneError, match="nothing to draw"): draw(empty)
    assert figure_of(draw, empty, "why").texts


@pytest.mark.parametrize("draw,rows", DRAWN)
def test_figures_have_no_small_print_and_a_title(draw, rows, tmp_path):
    import matplotlib.text
    figure = draw(rows(), "note")
    small = [
        o.get_text()
        for o in figure.findobj(matplotlib.text.Text)
        if o.get_text() and o.get_fontsize() < 7
    ]
    assert not small and len(figure.get_suptitle()) > 20
    assert all(os.path.getsize(o) for o in save_figure(figure, tmp_path / "figure"))


def test_numbers_on_cells_can_be_read():
    figure = panels_of(retention_rows(part()))
    for ax in figure.axes[:2]:
        mesh = ax.collections[0]
        assert len(ax.texts) == mesh.get_array().size
        assert (min(
            contrast_ratio(o.get_color(), c[:3]) for o, c in zip(ax.texts, mesh.get_facecolors()))
                >= 4.5)


def test_colours_show_the_difference_from_c4_and_not_the_level_of_a_column():
    rows, delta = retention_rows(part()), held(part())
    ax = retention_panels(rows, delta, "").axes[0]
    shown = np.asarray(ax.collections[0].get_array()).reshape(len(KEPT), -1)
    names = [o.get_text() for o in ax.get_yticklabels()]
    assert (shown[names.index("c4")] == 0).all()
    math = delta.query("method == 'sparsegpt' and mix == 'math' and dimension == 'Math'")
    expected = math["value"].item()
    assert np.isclose(shown[names.index("math"), 3], 100 * expected)


def test_what_has_no_interval_has_no_colour_and_is_not_in_the_title():
    rows, delta = retention_rows(part()), held(part())
    lost = ["General", "Commonsense", "Math"]
    ends = dict(ci_low=np.nan, ci_high=np.nan)
    bare = [
        o.assign(**{k: o[k].where(~o["dimension"].isin(lost)) for k in ends}) for o in (rows, delta)
    ]
    found = part().replicates
    values = found.values.copy()
    values[1:, :, [OUTCOMES.index(o) for o in lost]] = np.nan
    figure = retention_panels(
        *bare,
        source_message(
            dataclasses.replace(part(), replicates=dataclasses.replace(found, values=values))
        )
    )
    ax = figure.axes[0]
    shown = np.asarray(ax.collections[0].get_array()).reshape(len(KEPT), -1)
    assert (shown[:, [0, 1, 3]] == 0).all() and np.ptp(shown[:, 2]) > 0
    assert sum(o.get_text().endswith("[–]") for o in ax.texts) == 3 * len(KEPT) and not any(
        "nan" in o.get_text() for o in ax.texts
    )
    assert "Code" in figure.get_suptitle() and not any(o in figure.get_suptitle() for o in lost)


def test_titles_of_correlations_speak_of_the_panels_shown():
    row = lambda sparsity, dimension, rho, p, q: dict(
        method="wanda",
        sparsity=sparsity,
        metric="distortion",
        dimension=dimension,
        rho=rho,
        p=p,
        q=q,
    )
    table = pd.DataFrame([
        row(0.6, "General", 0.6, 0.01, 0.2),
        row(0.6, "Code", -0.9, 0.001, 0.01),
        row(0.6, "Total", -0.9, 0.001, 0.01),
        row(0.5, "General", 0.99, 0.0001, 0.001),
        row(0.5, "Code", 0.1, 0.7, 0.8)])
    shown = rows_in_settings(table, [dict(method="wanda", sparsity=0.6)])
    assert (
        metric_message(shown, "distortion")
        == "Perplexity: 1 of 2 correlations with retention is significant (q < 0.05)"
    )
    none = metric_message(shown.assign(p=0.5, q=0.5), "distortion")
    assert none == "Perplexity: none of 2 correlations with retention is significant (q < 0.05)"
    assert (
        survival_message(shown, 5)
        == "2 of 3 correlations are significant after correction for 5 tests"
    )
    assert (
        survival_message(shown.assign(q=0.5), 5)
        == "No correlation is significant after correction for 5 tests"
    )


def test_a_third_method_is_named_instead_of_shown():
    row = lambda method, strategy, value: dict(
        method=method, strategy=strategy, dimension="Total", value=value
    )
    kept = dict(sparsegpt=0.9, wanda=0.5, admm=0.7, alps=0.6)
    table = pd.DataFrame([row(m, s, v) for m, v in kept.items() for s in ("c4", "math")])
    shown, note = two_methods(table)
    assert (
        set(shown["method"]) == {"sparsegpt", "admm"} and note == "Not shown: Wanda and ALPS (T2)."
    )
    few = table[table["method"].isin(["sparsegpt", "wanda"])]
    assert two_methods(few)[0].equals(few) and not two_methods(few)[1]


# --- what a title and a colour may state


def alone(kept, n=60, seeds=(0, 1), **more):
    "A study of these strategies under SparseGPT, as a table's part."
    preset = small_preset() | dict(strategies={o: o for o in kept} | more.pop("strategies", {}))
    preset["grid"] = [
        dict(strategies="all",
             methods=["sparsegpt"],
             sparsities=[0.6],
             seeds=list(seeds),
             windows=["default"])]
    return select_cells(
        bootstrap_study(preset, example_results(preset, kept, n=n, **more), 400), main_cells(preset)
    )


ALIKE = dict.fromkeys(KEPT, (0.6,) * 4)


def panel(some):
    return retention_panels(retention_rows(some), held(some), source_message(some), footnote(some))


@pytest.mark.parametrize("seeds", [(0,), (0, 1)], ids=["one draw", "two"])
def test_sources_that_cannot_be_told_apart_have_no_winner_and_no_colour(seeds):
    some = alone(ALIKE, seeds=seeds)
    figure = panel(some)
    assert (
        figure.get_suptitle()
        == "No source has significantly higher retention than all others"
    )
    assert (np.asarray(figure.axes[0].collections[0].get_array()) == 0).all()
    note = " ".join(" ".join(o.get_text() for o in figure.texts).split())
    assert "grey: its interval, paired and simultaneous" in note
    assert ("over items only" in note) == (len(seeds) == 1)


def test_a_source_that_leads_all_others_is_named_with_its_dimension():
    many = (0, 1, 2, 3)  # two draws of four sources say little about the noise of draws
    assert (
        source_message(alone(KEPT, n=400, seeds=many))
        == "Best source: c4 (General), stdlib (Code), math (Math); otherwise not significant"
    )
    best = {"c4": (0.9,) * 4, "stdlib": (0.3,) * 4, "math": (0.3,) * 4}
    assert source_message(alone(best, n=400)) == "Best source in every dimension: c4"
    two = {
        "c4": (0.9, 0.9, 0.3, 0.3), "openwebtext": (0.9, 0.9, 0.3, 0.3),
        "stdlib": (0.3, 0.3, 0.9, 0.9), "codeio": (0.3, 0.3, 0.9, 0.9)}
    assert (
        source_message(alone(two, n=400))
        == "No single source has the highest retention in every dimension"
    )
    assert (
        source_message(alone({"c4": (0.5,) * 4, "uniform": (0.9,) * 4}))
        == "Retention by dimension: no two sources to compare"
    )
    assert (
        source_message(part()).startswith("SparseGPT: ")
        and source_message(part(keep=lambda o: False)) == ""
    )


def test_one_own_file_is_a_source_and_can_win():
    preset = dict(
        strategies={
            "mine": "my.txt", "field": "notes.jsonl:body", "hub": "hub:org/name",
            "two": "my.txt,c4", "weighted": "my.txt=2,c4=1", "uniform": "uniform", "c4": "c4",
            "c4-only": "c4=1", "igsp": "generated:igsp"})
    kinds = {o: kind_of(preset, o, "") for o in preset["strategies"]}
    assert kinds == dict(
        mine=OWN,
        field=OWN,
        hub=OWN,
        two="mix",
        weighted="mix",
        uniform="mix",
        igsp="self-generated",
    ) | {"c4": "General", "c4-only": "General"}
    some = alone(
        {"mine": (0.9,) * 4, "c4": (0.4,) * 4, "uniform": (0.5,) * 4},
        n=400,
        strategies={"mine": "my.txt"},
    )
    assert single_strategies(some) == ["mine", "c4"] and set(
        over_best(some, "uniform")["best"]
    ) == {"mine"}
    assert source_message(some) == "Best source in every dimension: mine"
    figure = panel(some)
    assert "own source" in [o.get_text() for o in figure.legends[0].get_texts()]


def test_the_colour_scale_has_a_least_width():
    figure = panel(alone({"c4": (0.60,) * 4, "math": (0.66,) * 4}, n=4000, seeds=(0,), draw_sd=0.0))
    mesh = figure.axes[0].collections[0]
    assert mesh.norm.vmax == -mesh.norm.vmin == LEAST_REACH and np.abs(mesh.get_array()).max() > 0
    assert panel(alone(KEPT, n=400)).axes[0].collections[0].norm.vmax > LEAST_REACH


def test_intervals_of_many_strategies_hold_together():
    some = alone(ALIKE | {o: (0.6,) * 4 for o in ("news", "papers", "codeio", "csqa")})
    single, together = base_differences(some), held(some)
    assert (
        together["value"].equals(single["value"])
        and (together["ci_low"] < single["ci_low"]).mean() > 0.95
    )
    total = together[together["dimension"] == "Total"]
    assert significant_counts(total) == "no significant difference from c4"
    assert (
        significant_counts(total.assign(ci_low=np.nan, ci_high=np.nan))
        == "no intervals, no comparison with c4"
    )
    assert (
        significant_counts(held(alone(KEPT, n=400)).query("dimension == 'Total'"))
        == "1 of 3 strategies above c4, 0 below"
    )
    values = some.replicates.values.copy()
    values[1:, :, OUTCOMES.index("Code")] = np.nan
    lost = dataclasses.replace(some, replicates=dataclasses.replace(some.replicates, values=values))
    assert held(lost).query("dimension == 'Code'")["ci_low"].isna().all()


def test_the_best_of_noise_has_no_significant_lead():
    rng, claimed = np.random.default_rng(0), []
    for _ in range(200):
        noise = rng.normal(size=(401, 8, 1))
        noise[1:] += noise[0]
        claimed.append(lead_of_best(noise)[1][0] > 0)
    assert np.mean(claimed) < 0.05
    assert significant_sign([1, -2, -1], [2, -1, 1]).tolist() == [1, -1, 0]


def test_an_average_that_does_not_differ_is_said_to_be_not_significant():
    rows = lambda accuracy, code: pd.DataFrame([
        dict(method="sparsegpt", dimension=d, ci_low=low)
        for d, low in (("Accuracy", accuracy), ("Code", code))])
    assert (
        averaging_message(rows(0, 0.1))
        == "Strategies differ in Code retention; averaged accuracy: not significant"
    )
    assert (
        averaging_message(rows(0, 0))
        == "No significant difference between strategies in averaged accuracy and Code retention"
    )


def every_title():
    """The titles of the figures that a table of this package draws, on rows with and without
    differences."""
    for some in (part(), alone(ALIKE), alone(KEPT, n=400)):
        yield panel(some).get_suptitle()
        yield strategy_figure(retention_rows(some), held(some)).get_suptitle()
        yield averaging_figure(range_rows(some)).get_suptitle()
        yield protocol_figure(retention_rows(some), held(some)).get_suptitle()
    swept = part(sweep_cells)
    yield margin_figure(
        margin_rows(swept, "uniform", "c4", "sparsity", simultaneous=True)
    ).get_suptitle()


def test_titles_have_twelve_words_at_most_and_the_words_of_the_field():
    for title in every_title():
        assert 3 < len(title.split()) <= 12, title
        assert not re.search(r"\b(keeps?|kept|beyond noise|most)\b", title), title


def test_the_front_figure_has_twenty_marks_and_a_title_that_its_intervals_allow():
    preset = small_preset() | {"strategies": {o: o for o in [*KEPT, "codeio", "igsp"]}}
    kept = KEPT | {
        "codeio": (0.5, 0.6, 0.9, 0.4), "igsp": (0.7, 0.6, 0.6, 0.5), "c4": (0.8, 0.6, 0.3, 0.3)}
    few = front_cells(preset)
    assert {c.method for c in few} == {"sparsegpt"} and {c.sparsity for c in few} == {0.6}
    part = select_cells(
        bootstrap_study(preset, example_results(preset, kept, n=200, draw_sd=0.002), n_boot=200),
        few,
    )
    message = front_message(part.replicates)
    assert message == "Code retention is highest with codeio and lowest with c4"
    figure = front_figure(retention_rows(part), message)
    marks = [
        line for ax in figure.axes for line in ax.lines if line.get_marker() not in ("None", "")
    ]
    assert len(marks) == 20 and len(figure.axes) == 4
    assert {o.get_text() for o in figure.axes[0].get_yticklabels()} == {
        "c4", "codeio", "math", "uniform", "igsp"}
    alike = select_cells(
        bootstrap_study(
            preset, example_results(preset, dict.fromkeys(kept, (0.6,) * 4), n=60), n_boot=200
        ),
        few,
    )
    assert front_message(alike.replicates) == "Highest retention: not significant in any dimension"


def test_the_front_figure_takes_the_first_strategies_of_a_study_of_ones_own():
    preset = small_preset() | {"strategies": {"notes": "notes.txt", "stdlib": "stdlib"}}
    preset["grid"] = [
        SWEPT | {"strategies": "all", "sparsities": [0.5, "2:4"], "windows": ["default"]}
    ]
    few = front_cells(preset)
    assert {c.strategy for c in few} == {"notes", "stdlib"} and {str(c.sparsity) for c in few} <= {
        "0.5",
        "2:4",
    }
    assert (
        front_message(select_cells(bootstrap_study(preset, {}), []).replicates)
        == "Retention by dimension: no two calibration sets to compare"
    )
