import json
from dataclasses import replace

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from scipy.stats import spearmanr

from calib_prune.calibration.sources import SUITE
from calib_prune.core import CalibPruneError
from calib_prune.data.fetch import cached
from calib_prune.data.files import read_jsonl
from calib_prune.evaluation.contamination import DEFAULT_RULE, Audit, audit, contamination_table
from calib_prune.questions.correlations import (
    correlate_study,
    correlation_footnote,
    correlation_grid,
    correlation_heat_map,
    main_settings,
    metric_figure,
    study_caption,
    whole_metrics,
)
from calib_prune.questions.overlaps import overlap_retention, without_overlaps
from calib_prune.statistics.examples import example_preset, example_study
from calib_prune.statistics.plots import overlap, place_labels
from calib_prune.statistics.selection import bootstrap_study, lacking
from calib_prune.study.audit_rows import load_audit, make_audits, preset_audit, save_audit
from calib_prune.study.metric_rows import ROW_COLUMNS, load_metrics, metrics_summary, save_metrics
from calib_prune.study.presets import grid_cells

PRESET = dict(
    model="tiny", calibration=dict(windows=32, length=512), strategies={o: o for o in SUITE}
)


def correlated(study, metrics, n_boot, n_perm):
    return correlate_study(bootstrap_study(example_preset(study), study, n_boot), metrics, n_perm)


@pytest.fixture(scope="module")
def study():
    kept = {o: np.random.default_rng(i).uniform(0.2, 0.9, 4) for i, o in enumerate(SUITE)}
    return example_study(kept, ("sparsegpt", "wanda"), n=60, seed=0)


@pytest.fixture(scope="module")
def metrics():
    rng = np.random.default_rng(1)
    rows = [
        dict(strategy=o,
             seed=s,
             metric=m,
             value=rng.lognormal(),
             unit="u",
             ci_low=np.nan,
             ci_high=np.nan,
             applicable=True,
             note="",
             content="") for o in SUITE for s in (0, 1) for m in ("distortion", "aggregation")]
    return pd.DataFrame(rows)


def test_rho_is_that_of_scipy_on_means_over_draws(study, metrics):
    related = correlated(study, metrics, 20, 99)
    row = related.table.query(
        "method == 'wanda' and metric == 'distortion' and dimension == 'Code'"
    ).iloc[0]
    x = metrics_summary(metrics).query("metric == 'distortion'").set_index("strategy")["value"]
    mine = related.replicates.where(method="wanda")
    assert np.isclose(
        row["rho"],
        spearmanr([x[o] for o in mine.cells["strategy"]], mine.values[0, :, 2]).statistic,
    )
    assert f"{row['rho']:+.2f} [" in correlation_grid(related).query(
        "setting == 'Wanda 60%' and metric == 'distortion (perplexity)'")["Code"].item()


def test_other_sizes_and_unmeasured_sources_are_left_out(study, metrics):
    small = list(example_study({"c4": (0.1,) * 4}, n=60).values())[-1]
    small.record["windows"] = 8
    both = study | {"c4-sparsegpt-0.6-n8-s0": small}
    one, other = (
        correlated(o, metrics[metrics["strategy"] != "news"], 20, 99) for o in (study, both)
    )
    pd.testing.assert_frame_equal(one.table, other.table)
    assert one.table["n"].eq(14).all()


def test_a_study_that_has_just_begun_gives_sentences(study, metrics):
    few = {k: study[k] for k in list(study)[:4]}
    for part in ({}, {"dense": study["dense"]}, few):
        related = correlated(part, metrics, 5, 9)
        assert related.note and related.table.empty and correlation_grid(
            related)["status"].item() == related.note
        for figure in (metric_figure(related, metrics), correlation_heat_map(related)):
            plt.close(figure)
    assert lacking({}) and lacking({"dense": study["dense"]}) and not lacking(few)


def test_captions_say_which_settings_have_draws(study, metrics):
    more = {
        k: r
        for k, r in example_study(dict.fromkeys(SUITE, (0.5,) * 4), seeds=(1,), n=60).items()
        if k != "dense"
    }
    related = correlated(study | more, metrics, 20, 99)
    assert study_caption(PRESET, related.replicates, "x").endswith(
        "Sets with one draw have the draw variance of the other sets."
    )
    assert "intervals over items and draws" in study_caption(
        PRESET, related.replicates, "x"
    )
    assert "interval" not in correlation_footnote(
        PRESET, related
    )
    figure = metric_figure(related, metrics)
    heads = [o.get_text() for o in figure.findobj(plt.Text) if o.get_text().startswith("95%")]
    assert [o.partition(";")[0] for o in heads] == [
        "95% intervals: items and draws",
        "95% intervals: items and draws",
    ]
    plt.close(figure)


def test_verdicts_do_not_rest_on_part_of_the_metrics(study, metrics):
    whole = bootstrap_study(example_preset(study), study, 5)
    assert (
        whole_metrics(whole, metrics) is metrics
        and whole_metrics(whole, metrics[metrics["strategy"] != "c4"]).empty
    )


def test_main_settings_have_the_most_sources():
    table = pd.DataFrame([
        dict(method=m, sparsity=s, n=n)
        for m, s, n in (("a", 0.3, 15), ("a", 0.6, 15), ("a", 0.7, 5), ("b", "2:4", 6))])
    assert main_settings(table) == [
        dict(method="a", sparsity=0.6),
        dict(method="b", sparsity="2:4"),
    ]
    assert main_settings(table, 0.3)[0] == dict(method="a", sparsity=0.3), "where claims are judged"
    assert main_settings(table, 0.7)[0] == dict(method="a", sparsity=0.6), "most sources first"


def test_names_do_not_cover_each_other():
    figure, ax = plt.subplots(figsize=(3.5, 2))
    points = pd.DataFrame(
        dict(
            x=[1, 1.02, 1.04, 3], y=[1, 1.02, 1, 3], name=["wikipedia", "openwebtext", "news", "c4"]
        )
    )
    ax.plot(points["x"], points["y"], "o")
    figure.canvas.draw()  # the layout is final
    place_labels(ax, points)
    names = [t for t in ax.texts if t.get_text()]
    boxes = np.array([t.get_window_extent(figure.canvas.get_renderer()).extents for t in names])
    shared = overlap(boxes[:, None], boxes)
    assert len(names) == 4 and np.allclose(shared - np.diag(np.diag(shared)), 0)
    plt.close(figure)


def test_metrics_come_back_as_they_were(metrics, tmp_path):
    mine = metrics[metrics["strategy"] == "c4"][ROW_COLUMNS].reset_index(drop=True)
    path = save_metrics(tmp_path, "c4", dict(scheme=2), mine, [])
    assert "NaN" not in path.read_text() and json.loads(path.read_text())["seeds"] == [0, 1]
    pd.testing.assert_frame_equal(
        load_metrics(PRESET, tmp_path, partial=True), mine, check_dtype=False
    )
    with pytest.raises(CalibPruneError, match="openwebtext"): load_metrics(PRESET, tmp_path)


@pytest.mark.real
def test_written_text_is_audited_as_it_comes(tmp_path, monkeypatch):
    monkeypatch.setattr(
        "calib_prune.study.audit_rows.audit_sources",
        lambda names, tasks, progress: audit(["Nothing."], tasks, name="c4"),
    )
    items = [o["question"] for o in read_jsonl(cached("benchmarks", "gsm8k"))]
    cell = dict(methods=["wanda"], sparsities=[0.5], windows=["default"])
    preset = PRESET | dict(
        name="shown",
        scoring=dict(tasks=["gsm8k"]),
        strategies={"c4": "c4", "sgs": "generated:sgs", "cool": "generated:sgs temperature=0.5"},
        grid=[cell | dict(strategies=["c4", "sgs"], seeds=[0, 1])],
        ablations=[cell | dict(strategies=["cool"], seeds=[0])],
    )
    def found(**texts):
        for name, text in texts.items():
            path = tmp_path / "generated" / f"{name.replace('_', '-')}.jsonl"
            path.parent.mkdir(exist_ok=True)
            path.write_text(json.dumps(dict(text=text)) + "\n")
        make_audits(preset, tmp_path)
        done = preset_audit(preset, tmp_path)
        return done.sources, set(done.overlaps["item"])
    assert found() == (("c4",), set())
    # of the ablations: no table compares it with clean items
    assert found(cool_s0=items[0]) == (("c4",), set())
    assert found(sgs_s0=items[1]) == (("c4", "sgs"), {"1"})
    assert found(sgs_s1=items[2]) == (("c4", "sgs"), {"1", "2"})
    assert found(sgs_s0="Nothing of it.") == (("c4", "sgs"), {"2"})
    stamp = (written := tmp_path / "contamination-written.json").stat().st_mtime_ns
    assert found()[1] == {"2"} and written.stat().st_mtime_ns == stamp


def test_audits_come_back_and_leave_items_out_for_all_alike(study, tmp_path, monkeypatch):
    monkeypatch.setattr(
        "calib_prune.study.audit_rows.get_source", lambda _: type("S", (), dict(revision="1"))
    )
    found = pd.DataFrame([
        dict(source="c4", task="sciq", item=f"{i:04}", covered=0.5, document=3, match="é a")
        for i in range(7)])
    items = study["dense"].items[["task", "item"]].assign(checked=lambda o: o["item"] != "0001")
    made = Audit(found, items, ("c4", "math"), DEFAULT_RULE)
    back = load_audit(save_audit(made, tmp_path / "a.json", dict(scheme=2)))
    pd.testing.assert_frame_equal(contamination_table(back), contamination_table(made))
    assert back.rule == DEFAULT_RULE and "é a" in (tmp_path / "a.json").read_text()
    preset = example_preset(study)
    table = overlap_retention(bootstrap_study(preset, study, 20), back, grid_cells(preset), 20)
    assert set(table["strategy"]) == {"c4"} and set(table["dimension"]) == {"General", "Total"}
    assert set(table["n_items"] - table["clean_n_items"]) == {7}
    other = study | {
        k: replace(r, items=r.items[::-1].reset_index(drop=True))
        for k, r in study.items()
        if k != "dense"
    }
    # rows in the dense model's places, and not
    one, two = (without_overlaps(o, back) for o in (study, other))
    ordered = lambda items: items.sort_values(["task", "item", "metric"], ignore_index=True)
    for k, r in one.items(): pd.testing.assert_frame_equal(ordered(r.items), ordered(two[k].items))
    assert len(one["dense"].items) < len(study["dense"].items)
