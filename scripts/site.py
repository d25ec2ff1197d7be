"""Lay out the pages of the site in build/site/source and build them: python scripts/site.py.
Nothing is executed or downloaded."""
import filecmp
import html
import json
import math
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from configparser import ConfigParser
from functools import cache
from pathlib import Path
from urllib.parse import quote

import pandas as pd

ROOT = Path(__file__).resolve().parent.parent
BUILD = ROOT / "build" / "site"
SOURCE = BUILD / "source"
settings = ConfigParser()
settings.read(ROOT / "settings.ini")
REPOSITORY = f"{settings['DEFAULT']['git_url']}/blob/{settings['DEFAULT']['branch']}"
HOWTOS = [  # in reading order: use, run a study, extend; pages not named here come last
    "install", "prune-my-model", "choose-my-data", "how-advise-decides", "make-a-small-file",
    "read-the-json", "run-at-paper-scale",
    "verify-the-results", "run-on-several-gpus", "run-on-slurm", "add-a-source",
    "add-a-benchmark", "add-a-method"]
PAGES = ["docs/results.md", "docs/glossary.md", "LOG.md", "CHANGELOG.md", "CONTRIBUTING.md"]
MAIN = "claims/smollm2-135m"  # the study of the front page and of the ledger
QUESTIONS = {  # the navigation: questions by the reader's question, in reading order
    "Which text?": {
        "mixing": "Mixes of sources", "new-sources": "New sources", "recipe": "Mix and method",
        "answers": "Written answers", "quantisation": "Quantisation"},
    "Which pruner?": {"pruners": "Pruning methods", "recovery": "Training after pruning"},
    "Which of the paper's claims hold?": {
        "claims": "Claims of the paper", "perplexity": "Perplexity of the text",
        "rounding": "Weights from a 4-bit file", "fresh-draws": "Fresh draws"}}
NAMES = {question: name for group in QUESTIONS.values() for question, name in group.items()}
MODELS = {
    "smollm2-135m": "SmolLM2-135M", "qwen-0.5b": "Qwen2.5-Coder-0.5B",
    "qwen-1.5b": "Qwen2.5-Coder-1.5B",
    "llama-3.1-8b": "LLaMA-3.1-8B"}
VERDICTS = {  # class of a verdict: how its words begin
    "yes": "reproduced|robust|holds", "no": "contradicted|no effect|does not hold",
    "open": "undecided|inconclusive|same sign|not significant|depends",
    "none": "cannot|not yet|not tested"}
TITLES = {"core": "Foundations", "cli": "Command line", "paper": "Notebooks that papermill runs"}
FOLDERS = {
    o: TITLES.get(o, o.capitalize())
    for o in [*settings["DEFAULT"]["reading_order"].split(), "paper"]
}


def write(path: str, text: str) -> None:
    "Write a page of the source tree."
    file = SOURCE / path
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text.strip() + "\n")


def toctree(pages: list[str], **options: str) -> str:
    "A table of contents."
    lines = [f":{k}: {v}".rstrip() for k, v in options.items()]
    return "\n".join(["```{toctree}", *lines, "", *pages, "```"])


def howtos() -> list[str]:
    "The how-to pages in reading order."
    names = [o.stem for o in (ROOT / "docs" / "howto").glob("*.md")]
    place = {name: i for i, name in enumerate(HOWTOS)}
    return [f"docs/howto/{o}" for o in sorted(names, key=lambda o: (place.get(o, 99), o))]


def question_pages() -> list[str]:
    "The pages of the questions, as far as they are written."
    return sorted(f"docs/questions/{o.stem}" for o in (ROOT / "docs" / "questions").glob("*.md"))


# --- links: pages of the site link to one another, everything else to the repository

def target(link: str, page: str) -> str:
    "Where a link of a page leads: a page or file of the site, or the repository."
    path, mark, anchor = link.partition("#")
    # Jupyter writes the heading as it stands
    if not path: return "#" + re.sub(r"[^\w -]", "", anchor.lower()).replace(" ", "-")
    if re.match(r"[a-z]+:", link): return link
    file = (ROOT / page).parent.joinpath(path).resolve()
    if not file.exists() or not file.is_relative_to(ROOT): return link
    inside = file.relative_to(ROOT).as_posix()
    up = "../" * page.count("/")
    if inside == "README.md": return f"{up}index.md"
    if inside.startswith("nbs/") and file.is_dir(): return f"{up}{inside}/index.md"
    if inside.startswith("figures/") and file.with_suffix(".md") in shown():
        return f"{up}{inside.rsplit('.', 1)[0]}.md"
    if (SOURCE / inside).is_file(): return f"{up}{inside}{mark}{anchor}"
    return f"{REPOSITORY}/{quote(inside)}"


def relinked(text: str, page: str) -> str:
    """Markdown whose links lead somewhere on the site. Pictures keep their files; code is left
    alone."""
    def link(found: re.Match) -> str: return f"{found[1]}({target(found[2], page)})"
    parts = re.split(r"(```.*?```|`[^`\n]*`)", text, flags=re.DOTALL)
    written = re.compile(r"((?<!\!)\[(?:[^\[\]]|\[[^\]]*\])*\])\(([^)\s]+)\)")
    return "".join(o if i % 2 else written.sub(link, o) for i, o in enumerate(parts))


# --- notebooks without what only the export needs

def reader_notebook(path: Path, page: str) -> dict:
    "A notebook as readers want it: no export marks, imports folded away, links that work."
    book, cells = json.loads(path.read_text()), []
    for cell in book["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] == "markdown": cells.append(cell | {"source": relinked(source, page)})
        if cell["cell_type"] != "code" or source.startswith("#| default_exp"): continue
        tags = [o for o in cell["metadata"].get("tags", []) if o != "parameters"]
        if source.startswith("#| hide"): tags.append("remove-input")
        source = re.sub(r"^#\| \w+.*\n?", "", source, flags=re.MULTILINE).strip("\n")
        if not source: continue
        only_imports = all(re.match(r"(from|import) |[\s)]|$", o) for o in source.splitlines())
        if only_imports: tags.append("hide-input")
        cells.append(cell | {"source": source, "metadata": {"tags": tags}})
    return book | {"cells": cells}


def add_notebooks() -> list[str]:
    "All notebooks, and a page per folder; returns those pages."
    indexes = []
    for folder, title in FOLDERS.items():
        names = []
        for path in sorted((ROOT / "nbs" / folder).glob("*.ipynb")):
            page = path.relative_to(ROOT).as_posix()
            # they are pages already, or for a journal
            if page in ("nbs/index.ipynb", "nbs/results.ipynb", "nbs/joss.ipynb"): continue
            write(page, json.dumps(reader_notebook(path, page)))
            names.append(path.stem)
        about = "\n".join(
            f"- [{subtitle(ROOT / 'nbs' / folder / f'{o}.ipynb')}]({o}.ipynb)" for o in names
        )
        write(
            f"nbs/{folder}/index.md",
            f"# {title}\n\n{about}\n\n{toctree(names, maxdepth='1', hidden='')}",
        )
        indexes.append(f"nbs/{folder}/index".replace("//", "/"))
    return indexes


def subtitle(path: Path) -> str:
    "What a notebook is about: its title and the line below it."
    first = "".join(json.loads(path.read_text())["cells"][0]["source"])
    title, quoted = re.search(r"^# (.+)", first, re.MULTILINE), re.search(
        r"^> (.+)", first, re.MULTILINE
    )
    return f"{title[1] if title else path.stem}: {quoted[1] if quoted else ''}".rstrip(": ")


# --- verdicts: a word in a colour of its own

def badge(text: str) -> str:
    "A verdict as a coloured word; other text stays."
    verdict = text.rpartition("]: ")[2]  # after our number, in the table of models
    kind = next((k for k, words in VERDICTS.items() if re.match(words, verdict)), "")
    return f'<span class="verdict {kind}">{text}</span>' if kind else text


def badged(text: str) -> str:
    "Markdown whose tables with a column of verdicts show the verdicts as coloured words."
    lines, marked = [], False
    for line in text.splitlines():
        heads = re.search(r"\| (verdict|agreement) ", line)
        marked = line.startswith("|") and (marked or bool(heads))
        if marked: line = re.sub(r"(?<=\| )[^|]+?(?= +\|)", lambda cell: badge(cell[0]), line)
        lines.append(line)
    return "\n".join(lines)


# --- tables and figures

@cache
def shown() -> set[Path]:
    "The tables and figures that have a page, by the path of the page in the repository."
    from calib_prune.study.artefacts import ARTEFACTS
    return {
        ROOT / "figures" / study / f"{stem}.md" for study in studies() for stem in ARTEFACTS
        if any((ROOT / "figures" / study / f"{stem}.{end}").is_file() for end in ("csv", "png"))}


def studies() -> list[str]:
    "Studies with stored tables, the main one first."
    presets = (
        o.relative_to(ROOT / "presets").with_suffix("").as_posix()
        for o in (ROOT / "presets").rglob("*.yaml")
    )
    found = [o for o in presets if (ROOT / "figures" / o).is_dir()]
    return sorted(found, key=lambda o: (o != MAIN, o))


def sortable(table: pd.DataFrame, caption: str, filters: Sequence[str] = (),
             fold: str = ""  # a column whose text is shown on demand
            ) -> str:
    """A table that can be sorted by a click or a key, and filtered by words and by columns of few
    values."""
    table = table.map(lambda o: html.escape(o) if isinstance(o, str) else o)
    cells = table.assign(verdict=table["verdict"].map(badge)) if "verdict" in table else table
    if fold:
        folded = [f"<details><summary>show</summary>{o}</details>" for o in table[fold]]
        cells = cells.assign(**{fold: folded})
    options = lambda o: '<option value="">all</option>' + "".join(
        f"<option>{v}</option>" for v in dict.fromkeys(table[o]) if v
    )
    choices = "".join(
        f'<label>{o} <select data-column="{list(table).index(o)}">{options(o)}</select></label> '
        for o in filters
    )
    words = '<label>find <input type="search" data-find></label>'
    body = cells.to_html(index=False, border=0, classes="sortable", escape=False, na_rep="")
    body = body.replace("<thead>", f"<caption>{html.escape(caption)}</caption><thead>", 1)
    return (
        f'```{{raw}} html\n<div class="filtered"><p class="filters">{choices}{words}'
        f' <output></output></p>\n<div class="scroll">{body}</div></div>\n```'
    )


def artefact_page(study: str, stem: str) -> str:
    "One table or figure: what it shows, the notebook that makes it, the rows that it is made of."
    from calib_prune.study.artefacts import ARTEFACTS
    made, folder = ARTEFACTS[stem], ROOT / "figures" / study
    up = "../" * (2 + study.count("/"))
    links = [
        f"[notebook]({up}nbs/paper/{made.notebook}.ipynb)",
        f"[rows of the study]({REPOSITORY}/results/{study})",
        f"[preset]({REPOSITORY}/presets/{study}.yaml)",
    ]
    if (csv := folder / f"{stem}.csv").is_file():
        shutil.copy(csv, SOURCE / "figures" / study)
        links.append(f"{{download}}`numbers (CSV) <{stem}.csv>`")
        body = relinked(csv.with_suffix(".md").read_text(), f"figures/{study}/{stem}.md")
        body = badged(body)
        if stem == "T2-retention":
            body = (
                f"{sortable(wide_retention(csv), made.title, ['method', 'sparsity', 'kind'])}\n\n{below_table(body)}"  # noqa: E501
            )
        if stem == "T7-claims":
            body = f"The same as a table to sort and filter: [ledger]({up}claims.md).\n\n{body}"
    else:
        for end in ("png", "pdf"): shutil.copy(folder / f"{stem}.{end}", SOURCE / "figures" / study)
        links.append(f"{{download}}`PDF <{stem}.pdf>`")
        body = f"![{made.title}]({stem}.png)"
        if stem == "F2-perplexity": body += f"\n\n{hover_figure(study)}"
    head = f"# {made.number}: {made.title}\n\n{' · '.join(links)}"
    return f"{head}\n\n{body}{made_from(made, folder)}"


def made_from(made, folder: Path) -> str:
    "What a table or figure was made from: results, code, packages."
    from calib_prune.study.provenance import read_provenance
    about = read_provenance(folder).get(made.notebook)
    if not about: return ""
    digest = about["results_sha256"][:12]
    return (f"\n\n*Made from* {about['results']} files of results (SHA-256 `{digest}`), commit "
            f"`{about['commit']}`, packages `{about['packages']}`; `calib-prune verify "
            f"{made.stem}` makes it again.\n")


def below_table(text: str) -> str:
    "What stands below a Markdown table."
    return "\n".join(o for o in text.splitlines() if not o.startswith("|"))


def wide_retention(csv: Path) -> pd.DataFrame:
    "Table T2 with one column per dimension, numbers only, so that it sorts."
    rows = pd.read_csv(csv).fillna({"method": "", "source": ""})
    lines = ["method", "sparsity", "strategy", "source"]
    rows["value"] = (100 * rows["value"]).round(1)
    wide = rows.pivot_table(index=lines, columns="dimension", values="value", sort=False)
    wide = wide.rename_axis(columns=None).reset_index().rename(columns=dict(source="kind"))
    return wide.assign(sparsity=[
        f"{100 * float(o):.0f} %" if not isinstance(o, str) else o for o in wide["sparsity"]])


def hover_figure(study: str) -> str:
    """Figure F2 for one method as points that tell their numbers when pointed at or reached by the
    Tab key."""
    kept = pd.read_csv(ROOT / "figures" / study / "T2-retention.csv").query("method == 'sparsegpt'")
    metrics = pd.read_csv(ROOT / "figures" / study /
                          "T1-sources.csv").query("metric == 'distortion'").set_index("strategy")
    panels = []
    for d in ("General", "Commonsense", "Code", "Math"):
        mine = kept[(kept["dimension"] == d) & kept["strategy"].isin(metrics.index) &
                    (kept["source"] != "mix")]
        percent = 100 * mine[["value", "ci_low", "ci_high"]].to_numpy()
        perplexities = metrics["value"][mine["strategy"]]
        panels.append(panel(d, [*zip(mine["strategy"], mine["source"], perplexities, *percent.T)]))
    return ("## Point by point (SparseGPT)\n\nPoint at a source, or reach it with the Tab key.\n\n"
            f'```{{raw}} html\n<div class="panels">{"".join(panels)}</div>\n```')


def panel(title: str, points: list[tuple]) -> str:
    "Retention against perplexity (logarithmic) as SVG; each point has a title."
    if not points: return ""
    xs, lows, highs = [math.log(o[2]) for o in points], [o[4] for o in points], [
        o[5] for o in points]
    x = lambda o: 40 + 250 * (math.log(o) - min(xs)) / (max(xs) - min(xs))
    y = lambda o: 180 - 160 * (o - min(lows)) / (max(highs) - min(lows))
    marks = []
    for v in range(10 * math.ceil(min(lows) / 10), int(max(highs)) + 1, 10):
        marks.append(f'<line x1="36" x2="300" y1="{y(v):.1f}" y2="{y(v):.1f}" class="grid"/>'
                     f'<text x="32" y="{y(v) + 4:.1f}" text-anchor="end">{v}</text>')
    for v in (2**k for k in range(1, 9) if min(xs) <= math.log(2**k) <= max(xs)):
        marks.append(f'<text x="{x(v):.1f}" y="196" text-anchor="middle">{v}</text>')
    for name, kind, p, value, low, high in points:
        said = html.escape(
            f"{name} ({kind}): perplexity {p:.1f}, {title} {value:.1f} % [{low:.1f}, {high:.1f}]"
        )
        marks.append(
            f'<g tabindex="0" role="img" aria-label="{said}"'
            f' class="{kind.lower()}"><title>{said}</title><line x1="{x(p):.1f}" x2="{x(p):.1f}"'
            f' y1="{y(low):.1f}" y2="{y(high):.1f}"/><circle cx="{x(p):.1f}" cy="{y(value):.1f}"'
            ' r="4.5"/></g>'
        )
    return (
        f'<figure><svg viewBox="0 0 310 215" role="group" aria-label="{title} against'
        f' perplexity">{"".join(marks)}<text x="170" y="211" text-anchor="middle">perplexity of the'
        f' text</text></svg><figcaption>{title} retention, %</figcaption></figure>'
    )


def first_sentence(preset: str) -> str:
    "The first sentence of the comment that a preset begins with; it may go over several lines."
    comment = re.match(r"(?:#.*\n)+", preset)
    text = " ".join(line.lstrip("# ") for line in comment[0].splitlines()) if comment else ""
    return re.match(r".*?[.?!](?=\s|$)|.*", text)[0]


def study_title(study: str) -> str:
    "What a study is called: its question and its model."
    question, _, model = study.partition("/")
    return f"{NAMES[question]}: {MODELS.get(model, model)}" if question in NAMES else study


def add_gallery() -> list[str]:
    "A page per table and figure, and an overview per study; returns the studies."
    from calib_prune.study.artefacts import ARTEFACTS
    pages, have = [], shown()
    for study in studies():
        stems = [o for o in ARTEFACTS if ROOT / "figures" / study / f"{o}.md" in have]
        if not stems: continue
        (SOURCE / "figures" / study).mkdir(parents=True, exist_ok=True)
        for stem in stems: write(f"figures/{study}/{stem}.md", artefact_page(study, stem))
        cards = "\n".join(card(study, stem, ARTEFACTS[stem]) for stem in stems)
        about = first_sentence((ROOT / "presets" / f"{study}.yaml").read_text())
        grid = f"::::{{grid}} 2 2 3 3\n:gutter: 3\n\n{cards}\n::::"
        tree = toctree(stems, hidden="", maxdepth="1")
        title = f"# {study_title(study)}"
        write(f"figures/{study}/index.md", f"{title}\n\n{about}\n\n{grid}\n\n{tree}")
        pages.append(study)
    return pages


def card(study: str, stem: str, made) -> str:
    "A card of the gallery: the figure, or the first rows and columns of the table."
    lines = [f":::{{grid-item-card}} {made.number}: {made.title}", f":link: {stem}"]
    lines.append(":link-type: doc")
    table = ROOT / "figures" / study / f"{stem}.md"
    if table.is_file(): lines += ["", preview(table.read_text())]
    else: lines += [f":img-top: {stem}.png", f":img-alt: {made.title}"]
    return "\n".join([*lines, ":::"])


def preview(text: str, rows: int = 5, columns: int = 3) -> str:
    """The corner of a Markdown table as a small picture of it, without columns that say nothing
    in this corner; readers of screens skip it."""
    plain = re.sub(r"\[([^\]]+)\]\([^)]+\)", r"\1", text)
    plain = re.sub(r" \[[^\]]*\]", "", plain)  # intervals
    lines = [o.strip() for o in plain.splitlines() if re.match(r"\|(?![:-]+\|)", o)][:rows]
    table = pd.DataFrame([o[1:-1].split("|") for o in lines]).map(str.strip)
    telling = [o for o in table if table[o][2:].nunique() > 1] or list(table)
    corner = table[telling[:columns]]
    body = corner.to_html(header=False, index=False, border=0, classes="preview")
    body = body.replace("<table", '<table aria-hidden="true"')
    return f"```{{raw}} html\n{body}\n```"


def add_ledger() -> None:
    "All claims with their verdicts, to sort and filter."
    rows = pd.read_csv(ROOT / "figures" / MAIN / "T7-claims.csv")
    def number(o: float, unit: str) -> str:
        return "" if pd.isna(o) else f"{o:+.2f}" if unit == "ρ" else f"{o:.1f}"

    ends = [
        f" [{number(o.ci_low, o.unit)},\u00a0{number(o.ci_high, o.unit)}]"
        if pd.notna(o.ci_low)
        else ""
        for o in rows.itertuples()
    ]
    said = [f"{number(o.ours, o.unit)}{end}" for o, end in zip(rows.itertuples(), ends)]
    table = rows.assign(ours=said, paper=[number(o.paper, o.unit) for o in rows.itertuples()])
    table = table[["claim", "text", "check", "paper", "ours", "verdict", "why"]].rename(
        columns=dict(text="what the paper says")
    )
    write(
        "claims.md",
        "# Claims ledger\n\nEvery claim of the paper with our numbers [95 % interval] and a"
        " verdict, which follows from the interval by a fixed rule. Made by"
        " [claims](nbs/paper/claims.ipynb); as a plain table:"
        f" [T7](figures/{MAIN}/T7-claims.md).\n\n"
        + sortable(table, "Claims and verdicts", ["claim", "verdict"], fold="why"),
    )


# --- library reference

def add_reference() -> list[str]:
    "A page per package, from docstrings and the comments beside parameters."
    pages = []
    for folder, title in list(FOLDERS.items())[:-1]:
        modules = []
        for path in sorted((ROOT / "nbs" / folder).glob("*.ipynb")):
            exported = re.search(r"#\| default_exp ([\w.]+)", path.read_text())
            if exported: modules.append(exported[1])
        parts = [
            f"## calib_prune.{o}\n\n```{{eval-rst}}\n.. automodule:: calib_prune.{o}\n  "
            " :members:\n```"
            for o in modules
        ]
        write(f"api/{folder}.md", f"# {title}\n\n" + "\n\n".join(parts))
        pages.append(folder)
    return pages


def studies_of(question: str, gallery: list[str]) -> tuple[list[str], list[str]]:
    "The overviews of a question's studies: of the first model, and of others."
    mine = [o for o in gallery if o.startswith(f"{question}/")]
    first = [o for o in mine if o.endswith(MAIN.partition("/")[2])] or mine
    pages = lambda studies: [f"figures/{o}/index" for o in studies]
    return pages(first), pages(o for o in mine if o not in first)


def add_question_page(page: str, gallery: list[str]) -> None:
    "The page of a question, followed by its tables and figures."
    name = page.rpartition("/")[2]
    first, others = studies_of(name, gallery)
    if not first: return
    links = [f"[{study_title(o[8:-6])}](../../{o}.md)" for o in [*first, *others]]
    text = (SOURCE / f"{page}.md").read_text()
    more = f"**Tables and figures**: {' · '.join(links)}"
    tree = toctree([f"/{o}" for o in first], hidden="", maxdepth="1")
    write(f"{page}.md", f"{text}\n{more}\n\n{tree}")


def by_question(gallery: list[str]) -> list[str]:
    "The navigation of the results: a table of contents per question of the reader."
    written, trees, second = question_pages(), [], []
    for caption, questions in QUESTIONS.items():
        pages = ["claims"] if "claims" in questions else []
        for question, name in questions.items():
            first, others = studies_of(question, gallery)
            page = f"docs/questions/{question}"
            pages += [f"{name} <{page}>"] if page in written else [f"{name} <{o}>" for o in first]
            second += [f"{name} <{o}>" for o in others]
        trees.append(toctree(pages, hidden="", caption=caption, maxdepth="1"))
    if second: trees.append(toctree(second, hidden="", caption="A second model", maxdepth="1"))
    return trees


def front_page(indexes: list[str], gallery: list[str], reference: list[str]) -> str:
    "The question, one figure, its answer, the first commands, and the ways on."
    readme = (ROOT / "README.md").read_text()
    question = re.search(r"^> (.+)", readme, re.MULTILINE)[1]
    answer = re.search(r"^\*\*Answer\*\*: (.+)", readme, re.MULTILINE)[1]
    about = readme.split("\n\n")[2]
    shutil.copy(ROOT / "figures" / MAIN / "F0-front.png", SOURCE)
    body = (ROOT / "docs" / "site" / "index.md").read_text()
    said = dict(
        QUESTION=question, ANSWER=answer[0].upper() + answer[1:], ABOUT=relinked(about, "README.md")
    )
    for word, text in said.items(): body = body.replace(word, text)
    others = [o for o in question_pages() if o.rpartition("/")[2] not in NAMES]
    unasked = [f"figures/{o}/index" for o in gallery if o.partition("/")[0] not in NAMES]
    more = [*unasked, "docs/glossary", "LOG", "CHANGELOG", "CONTRIBUTING"]
    tree = lambda caption, pages: toctree(pages, hidden="", caption=caption, maxdepth="1")
    trees = [
        tree("How to", howtos()),
        tree("Results", ["All results <docs/results>", *others, "speed"]),
        *by_question(gallery),
        tree("Notebooks", indexes),
        tree("Reference", [f"api/{o}" for o in reference]),
        tree("More", more)]
    return "\n\n".join([body, *trees])


def add_speed() -> None:
    "The benchmark's tables and figures on one page."
    folder = ROOT / "figures" / "bench"
    (SOURCE / "figures" / "bench").mkdir(parents=True, exist_ok=True)
    parts = ["# Speed\n\nSide by side with peers in one run, as ratios (`make bench`)."]
    for path in sorted(folder.glob("*.md")):
        parts.append(
            "## "
            f"{path.stem.capitalize()}\n\n{relinked(path.read_text(), f'figures/bench/{path.name}')}"  # noqa: E501
        )
    for path in sorted(folder.glob("*.png")):
        shutil.copy(path, SOURCE / "figures" / "bench")
        parts.append(f"![{path.stem}](figures/bench/{path.name})")
    write("speed.md", "\n\n".join(parts))


def missing() -> list[str]:
    "Stored tables and figures that the site cannot do without."
    wanted = ["F0-front.png", "T1-sources.csv", "T2-retention.csv", "T7-claims.csv"]
    return [f"figures/{MAIN}/{o}" for o in wanted if not (ROOT / "figures" / MAIN / o).is_file()]


def keep_times(before: Path) -> None:
    "Give pages that are as before their old time, so that Sphinx does not read them again."
    for old in before.rglob("*"):
        new = SOURCE / old.relative_to(before)
        if new.is_file() and filecmp.cmp(old, new, shallow=False):
            os.utime(new, ns=(old.stat().st_atime_ns, old.stat().st_mtime_ns))
    shutil.rmtree(before, ignore_errors=True)


def lay_out() -> None:
    "Write all pages."
    if lacking := missing():
        sys.exit(
            f"The site shows {', '.join(lacking)}, which {'is' if len(lacking) == 1 else 'are'} not"
            f" there: run `make figures PRESET={MAIN}` first."
        )
    before = BUILD / "before"
    shutil.rmtree(before, ignore_errors=True)
    if SOURCE.is_dir(): SOURCE.rename(before)
    shutil.copytree(ROOT / "docs" / "site", SOURCE, ignore=shutil.ignore_patterns("index.md"))
    pages = [*PAGES, *(f"{o}.md" for o in [*howtos(), *question_pages()])]
    for page in pages: write(page, "")  # links look whether a page is there
    indexes = add_notebooks()
    for page in pages:
        text = badged(relinked((ROOT / page).read_text(), page))
        for picture in re.findall(r"!\[[^\]]*\]\(([^)]+)\)", text):
            file = (ROOT / page).parent.joinpath(picture).resolve()
            (SOURCE / file.relative_to(ROOT)).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(file, SOURCE / file.relative_to(ROOT))
        write(page, text)
    gallery = add_gallery()
    for page in question_pages(): add_question_page(page, gallery)
    add_ledger()
    add_speed()
    write("index.md", front_page(indexes, gallery, add_reference()))
    keep_times(before)


if __name__ == "__main__":
    lay_out()
    sys.exit(
        subprocess.call([
            sys.executable, "-m", "sphinx", "--fail-on-warning", "--keep-going", "-q", "-j", "auto",
            "-d", BUILD / "doctrees", SOURCE, BUILD / "html"]))
