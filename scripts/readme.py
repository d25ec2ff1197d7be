"Write README.md from nbs/index.ipynb: its text and outputs, without code; --check only compares."
import re
import sys
from pathlib import Path

from nbconvert import MarkdownExporter

root = Path(__file__).resolve().parent.parent


def render() -> str:
    text, _ = MarkdownExporter(exclude_input=True).from_filename(str(root / "nbs/index.ipynb"))
    text = re.sub(r"\n{3,}", "\n\n", text.replace("](../", "]("))
    return text.strip() + "\n"


if __name__ == "__main__":
    readme = root / "README.md"
    if "--check" not in sys.argv: readme.write_text(render())
    elif readme.read_text() != render(): sys.exit("README.md does not match nbs/index.ipynb: run `make readme`.")
