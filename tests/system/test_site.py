"""The site: every page is there, every link leads somewhere, and it works in a browser, by
keyboard, on a phone, in the dark."""
import re
import shutil
import subprocess
import sys
import threading
from functools import partial
from html.parser import HTMLParser
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

import pytest

from calib_prune.style import contrast_ratio
from scripts import site
from tests import ROOT

HTML = ROOT / "build" / "site" / "html"


@pytest.fixture(scope="module")
def built():
    done = subprocess.run(
        [sys.executable, ROOT / "scripts" / "site.py"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return HTML


class Links(HTMLParser):
    "What a page links to, what it loads, and its anchors."
    def __init__(self, path):
        super().__init__()
        self.links, self.loaded, self.anchors = [], [], set()
        self.feed(path.read_text())

    def handle_starttag(self, tag, attrs):
        found = dict(attrs)
        if "id" in found: self.anchors.add(found["id"])
        if tag == "a" and found.get("href"): self.links.append(found["href"])
        if tag in ("img", "script", "source") and found.get("src"): self.loaded.append(found["src"])
        if tag == "link" and found.get("rel") in ("stylesheet", "icon", "preload", "shortcut icon"):
            self.loaded.append(found["href"])


def test_every_link_leads_somewhere(built):
    pages = {o: Links(o) for o in built.rglob("*.html") if "_static" not in o.parts}
    checked, wrong = 0, []
    for page, found in pages.items():
        for link in {*found.links, *found.loaded}:
            parts = urlsplit(link)
            if parts.scheme in ("http", "https", "mailto"): continue
            target = (page.parent / unquote(parts.path)).resolve() if parts.path else page
            if target.is_dir(): target /= "index.html"
            checked += 1
            if not target.is_file() or parts.fragment and target in pages and unquote(
                    parts.fragment) not in pages[target].anchors:
                wrong.append(f"{page.relative_to(built)}: {link}")
        assert not [
            o for o in found.loaded if o.startswith("http")
        ], f"{page} loads from the network"
    assert not wrong, wrong[:20]
    assert checked > 5000 and len(pages) > 140


def test_nothing_is_left_out(built):
    folders = [ROOT / "nbs" / o for o in site.FOLDERS]
    books = [book for folder in folders for book in folder.glob("*.ipynb")]
    assert len(books) > 90 and all(
        (built / o.relative_to(ROOT).with_suffix(".html")).is_file() for o in books
    )
    shown = site.shown()
    assert len(shown) > 25 and all(
        (built / o.relative_to(ROOT).with_suffix(".html")).is_file() for o in shown
    )
    for page in built.rglob("nbs/**/*.html"):
        assert "#| " not in page.read_text(), f"{page} shows export marks"


def test_the_reference_has_parameters(built):
    page = (built / "api" / "pruning.html").read_text()
    assert (
        "calib_prune.pruning.wanda.wanda" in page and "inputs of the layer" in page
    ), "comments beside parameters are part of it"


def test_the_ledger_holds_every_check(built):
    import pandas as pd
    rows = pd.read_csv(ROOT / "figures" / site.MAIN / "T7-claims.csv")
    page = (built / "claims.html").read_text()
    assert page.count("<summary>show</summary>") == len(rows) and all(
        o in page for o in rows["verdict"].unique()
    )
    assert page.count('<option value="">all</option>') == 2


def test_the_way_leads_by_question_with_the_how_tos_first(built):
    page = (built / "index.html").read_text()
    sidebar = page[page.index("bd-links"):page.index("bd-main")]
    captions = re.findall(r'class="caption-text">([^<]+)<', sidebar)
    asked = [*site.QUESTIONS, "A second model"]
    assert captions == ["How to", "Results", *asked, "Notebooks", "Reference", "More"]
    assert "Study " not in sidebar and "qwen-0.5b" not in re.sub(r"<[^>]+>", "", sidebar)
    body = re.sub(r"<[^>]+>", "", page[page.index('class="bd-article"'):])
    assert body.index("pip install") < body.index("calib-prune prune") < body.index("Read the note")


def test_every_how_to_is_listed_once():
    found = {o.stem for o in (ROOT / "docs" / "howto").glob("*.md")}
    assert [o.rpartition("/")[2] for o in site.howtos()][:2] == site.HOWTOS[:2]
    assert {o.rpartition("/")[2] for o in site.howtos()} == found


def test_verdicts_have_a_word_and_a_colour(built):
    import pandas as pd
    rows = pd.read_csv(ROOT / "figures" / site.MAIN / "T7-claims.csv")
    for page in ("claims.html", f"figures/{site.MAIN}/T7-claims.html"):
        marked = re.findall(r'<span class="verdict (\w+)">([^<]+)<', (built / page).read_text())
        # what an undecided check needs is in brackets
        assert sorted(text.partition(" (")[0] for _, text in marked) == sorted(rows["verdict"])
    kinds = {site.badge(o) for o in ("reproduced", "contradicted", "+1.0 [-1.0, +3.0]: undecided")}
    assert len({re.search(r'"verdict (\w+)"', o)[1] for o in kinds}) == 3
    assert site.badge("range of Code") == "range of Code"


def test_cards_show_a_table_or_a_figure(built):
    for study in site.studies():
        cards = (built / "figures" / study / "index.html").read_text().split('class="sd-col')[1:]
        assert cards and all("<img" in o or 'preview"' in o for o in cards), study


def test_without_tables_it_says_what_to_do(monkeypatch):
    monkeypatch.setattr(site, "MAIN", "nothing")
    with pytest.raises(
        SystemExit,
        match=(
            r"figures/nothing/F0-front.png, .* are not there: run `make figures PRESET=nothing`"
            r" first"
        ),
    ):
        site.lay_out()


def test_links_are_led_to_the_site_or_the_repository(built):
    link = lambda text, page="docs/results.md": site.relinked(text, page)
    assert (
        link("[T7](../figures/claims/smollm2-135m/T7-claims.md)")
        == "[T7](../figures/claims/smollm2-135m/T7-claims.md)"
    )
    assert (
        link("[F1](../figures/claims/smollm2-135m/F1-retention.png)")
        == "[F1](../figures/claims/smollm2-135m/F1-retention.md)"
    )
    assert (
        link("![F1](../figures/claims/smollm2-135m/F1-retention.png)")
        == "![F1](../figures/claims/smollm2-135m/F1-retention.png)"
    )
    assert (
        link("[home](../README.md)") == "[home](../index.md)"
        and link("[data](../nbs/data)") == "[data](../nbs/data/index.md)"
    )
    assert link("[p](../presets/smoke.yaml)") == f"[p]({site.REPOSITORY}/presets/smoke.yaml)"
    assert link("`[a](b)` and [x](https://example.org)") == "`[a](b)` and [x](https://example.org)"
    assert link("[there](#How-many-words?)") == "[there](#how-many-words)"


def test_commands_in_the_pages_exist():
    from typer.main import get_command

    from calib_prune.cli.app import app
    commands, seen = get_command(app).commands, 0
    for page in [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]:
        for line in re.findall(r"^\s*calib-prune (.+)", page.read_text(), re.MULTILINE):
            name, *words = line.split("#")[0].split()
            known = {o for p in commands[name].params for o in (*p.opts, *p.secondary_opts)} | {
                "--help"
            }
            assert {
                o for o in words if o.startswith("--") and o != "--"
            } <= known, f"{page.name}: {line}"
            seen += 1
    assert seen > 20


# --- in a browser

needs_browser = pytest.mark.skipif(
    not shutil.which("chromium"), reason="no Chromium: scripts/browser.sh installs Debian's"
)


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *_): pass


@pytest.fixture(scope="module")
def browser(built):
    from playwright.sync_api import sync_playwright
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(built)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    with sync_playwright() as play:
        found = play.chromium.launch(
            executable_path=shutil.which("chromium"), args=["--no-sandbox"]
        )
        yield partial(opened, found, f"http://127.0.0.1:{server.server_port}")
        found.close()
    server.shutdown()


def opened(browser, base, page, width=1280, dark=False):
    "A page in a window of its own; what went wrong while it loaded fails the test."
    window = browser.new_context(
        viewport=dict(width=width, height=900), color_scheme="dark" if dark else "light"
    ).new_page()
    wrong = []
    window.on("pageerror", lambda o: wrong.append(str(o)))
    window.on("console", lambda o: wrong.append(o.text) if o.type == "error" else None)
    window.on("requestfailed", lambda o: wrong.append(o.url))
    window.goto(f"{base}/{page}")
    window.wait_for_load_state("networkidle")
    assert not wrong, (page, wrong)
    return window


SHOWN = [
    "index.html", "claims.html", "figures/claims/smollm2-135m/index.html",
    "figures/claims/smollm2-135m/T2-retention.html",
    "figures/claims/smollm2-135m/F2-perplexity.html", "nbs/pruning/06_sparsegpt.html",
    "nbs/calibration/04_oit.html", "api/pruning.html", "docs/howto/prune-my-model.html",
    "docs/results.html", "speed.html", "docs/glossary.html"]


@needs_browser
@pytest.mark.parametrize("page", SHOWN)
def test_pages_fit_a_phone_and_show_their_pictures(browser, page):
    for width in (390, 1280):
        window = browser(page, width)
        assert (
            window.evaluate("document.documentElement.scrollWidth") <= width
        ), f"{page} is wider than {width}"
        lost = window.evaluate(
            "[...document.images].filter(o => o.loading !== 'lazy' && !o.naturalWidth).map(o =>"
            " o.src)"
        )
        assert not lost, lost
        assert window.evaluate("[...document.images].every(o => o.alt)") or page.startswith(
            "nbs"
        ), "pictures have a text"


@needs_browser
def test_verdicts_are_inside_a_phone(browser):
    for page in ("claims.html", f"figures/{site.MAIN}/T7-claims.html", "docs/results.html"):
        edges = browser(page, 390).evaluate(
            "[...document.querySelectorAll('.verdict')].map(o => o.getBoundingClientRect().right)"
        )
        assert edges and max(edges) <= 390, page


@needs_browser
def test_a_hundred_columns_of_code_fit_and_commands_wrap(browser):
    window = browser("nbs/pruning/06_sparsegpt.html")
    window.evaluate("document.querySelector('.bd-article pre').textContent = 'x'.repeat(100)")
    beyond = (
        "[...document.querySelectorAll('.bd-article pre')]"
        ".filter(o => o.scrollWidth > o.clientWidth)"
    )
    assert window.evaluate(f"!{beyond}.includes(document.querySelector('.bd-article pre'))")
    for page in ("index.html", "docs/howto/prune-my-model.html", "docs/howto/install.html"):
        lost = browser(page, 390).evaluate(f"{beyond}.map(o => o.textContent)")
        assert not lost, (page, lost)


def rgb(text): return tuple(int(o) / 255 for o in re.findall(r"\d+", text)[:3])


@needs_browser
@pytest.mark.parametrize("dark", [False, True])
def test_text_can_be_read(browser, dark):
    for page in ("index.html", "claims.html", "api/pruning.html"):
        window = browser(page, dark=dark)
        style = lambda query, what: window.evaluate(
            f"getComputedStyle(document.querySelector({query!r})).{what}"
        )
        ground = rgb(style("body", "backgroundColor"))
        assert (sum(ground) < 1) == dark
        for query in ("article p", "article h1", "article p a", ".bd-links a"):
            if window.query_selector(query):
                assert contrast_ratio(rgb(style(query, "color")), ground) >= 4.5, (page, query)
    for kind in ("yes", "no", "open", "none"):
        window.evaluate(
            "kind => document.querySelector('article p').innerHTML = `<b class='verdict ${kind}'>`",
            kind,
        )
        colour, ground = (rgb(style("article .verdict", o)) for o in ("color", "backgroundColor"))
        assert contrast_ratio(colour, ground) >= 4.5, kind


@needs_browser
def test_tables_sort_and_filter_by_keyboard(browser):
    window = browser("figures/claims/smollm2-135m/T2-retention.html")
    column = lambda k: window.evaluate(
        "[...document.querySelectorAll('table.sortable tbody tr')].filter(o => !o.hidden).map(o =>"
        f" o.cells[{k}].textContent.trim())"
    )
    heads = window.evaluate(
        "[...document.querySelectorAll('table.sortable th')].map(o => o.textContent)"
    )
    code = heads.index("Code")
    window.focus(f"table.sortable th:nth-child({code + 1}) button")
    window.keyboard.press("Enter")
    values = [float(o) for o in column(code)]
    assert values == sorted(values) and len(values) > 30
    window.keyboard.press("Enter")
    assert [float(o) for o in column(code)] == sorted(values, reverse=True)
    window.select_option("select >> nth=0", "wanda")
    assert set(column(heads.index("method"))) == {"wanda"}
    window.fill("[data-find]", "codeio")
    assert column(heads.index("strategy")) == ["codeio"] and window.inner_text("output").startswith(
        "1 of"
    )


@needs_browser
def test_points_tell_their_numbers(browser):
    window = browser("figures/claims/smollm2-135m/F2-perplexity.html")
    said = window.evaluate(
        "[...document.querySelectorAll('.panels g')].map(o => o.getAttribute('aria-label'))"
    )
    assert len(said) >= 4 * 15 and all(
        re.search(r"perplexity [\d.]+, \w+ [\d.]+ %", o) for o in said
    )
    window.focus(".panels g")
    window.keyboard.press("Tab")
    assert window.evaluate("document.activeElement.getAttribute('aria-label')") == said[1]


@needs_browser
def test_search_finds(browser):
    for word, page in (("reconstruction", "reconstruction"), ("retention", "retention"),
                       ("glossary", "glossary")):
        window = browser(f"search.html?q={word}")
        window.wait_for_selector("#search-results li a", timeout=60_000)
        assert any(page in o for o in window.evaluate(
            "[...document.querySelectorAll('#search-results li a')].map(o => o.href)"))
        window.wait_for_load_state("networkidle")
        first = window.evaluate(
            "[...document.querySelectorAll('#search-results li')].slice(0, 10)"
            ".map(o => o.querySelector('p')?.textContent ?? '')"
        )
        assert all(len(o) > 20 for o in first), (word, first)
        assert window.evaluate("document.querySelectorAll('#search-results li')[0].className") != (
            "kind-object"
        ), "pages come before names of the library"
