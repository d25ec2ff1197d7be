"""Write README.md, docs/results.md and docs/questions from their notebooks: text and outputs,
without code; --check only compares."""
import re
import sys
from pathlib import Path

from nbconvert import MarkdownExporter

ROOT = Path(__file__).resolve().parent.parent
PAPER = "docs/paper/paper.md"
PAGES = {"README.md": "nbs/index.ipynb", "docs/results.md": "nbs/results.ipynb",
         PAPER: "nbs/joss.ipynb"} | {
    f"docs/questions/{o.stem}.md": f"nbs/pages/{o.name}"
    for o in sorted((ROOT / "nbs" / "pages").glob("*.ipynb"))}
MARKDOWN = MarkdownExporter(exclude_input=True)


def render(page: str) -> str:
    """A page as Markdown. Links start at the notebook's folder, which for README is one level
    deeper than the page."""
    text, _ = MARKDOWN.from_filename(str(ROOT / PAGES[page]))
    if page == "README.md": text = text.replace("](../", "](")
    if page == PAPER:  # its title is in the header that the journal reads
        text = (ROOT / PAPER).with_name("header.yaml").read_text() + text[text.index("# Summary"):]
    return re.sub(r"\n{3,}", "\n\n", text).strip() + "\n"


if __name__ == "__main__":
    for page in PAGES:
        if "--check" not in sys.argv:
            (ROOT / page).parent.mkdir(exist_ok=True)
            (ROOT / page).write_text(render(page))
        elif not (ROOT / page).is_file() or (ROOT / page).read_text() != render(page):
            sys.exit(f"{page} does not match {PAGES[page]}: run `make readme`.")
