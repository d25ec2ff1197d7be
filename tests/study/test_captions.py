"Captions: three short fields, below every table and figure."

import matplotlib.pyplot as plt
import pandas as pd
import pytest

from calib_prune.statistics.selection import example_results
from calib_prune.statistics.tables import MOST_WORDS, caption_text, caption_words
from calib_prune.study.artefacts import ARTEFACTS
from calib_prune.study.presets import load_preset
from calib_prune.study.results import save_cell
from tests import ROOT
from tests.notebooks import run_cells
from tests.study.test_resolution import with_bits

TITLE_WORDS = 12  # of a table or figure (style of the project)


@pytest.fixture(autouse=True)
def no_windows():
    plt.switch_backend("agg")
    yield
    plt.close("all")


def too_long(folder):
    "The tables below a folder whose captions have too many words."
    words = {o.relative_to(folder): caption_words(o.read_text()) for o in folder.rglob("*.md")}
    return {str(path): n for path, n in words.items() if n > MOST_WORDS}


def test_fields_come_in_order_and_notes_below():
    said = caption_text("Retention (%).", "m; 2 draws", "one draw", ["First.", "", "Second."])
    assert said == "Retention (%). Setting: m; 2 draws. Caveat: one draw.\n\n- First.\n- Second."
    assert caption_text("Retention", caveat="one draw") == "Retention. Caveat: one draw."
    assert caption_text("", "m") == "Setting: m."


def test_words_are_counted_without_table_and_notes():
    table = "| a b |\n|:----|\n| c d |"
    assert caption_words(f"{table}\n\nTwo words.\n\n- a note of six words, uncounted") == 2
    assert caption_words(table) == 0


def test_the_smoke_study_writes_short_captions(tmp_path):
    preset = ROOT / "presets/smoke.yaml"
    study = with_bits(example_results(load_preset(preset), {}, n=20))
    for name, made in study.items():
        record = made.record | {"cell": name, "calibration": None}
        save_cell(tmp_path / "results", record, pd.DataFrame(), made.items, pd.DataFrame(), {})
    run_cells("main", preset=preset, results=tmp_path / "results", figures=tmp_path / "figures")
    assert len(list(tmp_path.rglob("*.md"))) == 3 and not too_long(tmp_path)


def test_committed_tables_have_short_captions():
    assert not too_long(ROOT / "figures")


@pytest.mark.parametrize("made", ARTEFACTS.values(), ids=lambda o: o.stem)
def test_titles_are_short(made):
    assert len(made.title.split()) <= TITLE_WORDS
