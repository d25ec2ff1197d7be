"How Sphinx builds the site. scripts/site.py lays out its pages."
import re
from importlib.metadata import version as version_of
from pathlib import Path

from docutils import nodes
from fastcore.docments import docments
from latex2mathml.converter import convert

project, author = "calib-prune", "calib-prune contributors"
version = release = version_of("calib-prune")
extensions = ["myst_nb", "sphinx_design", "sphinx.ext.autodoc"]
html_math_renderer = "mathml"  # browsers draw it without a script
nb_execution_mode = "off"
nb_ipywidgets_js = {}  # they would come from the network
myst_enable_extensions = ["dollarmath", "colon_fence"]
myst_heading_anchors = 3
suppress_warnings = ["mystnb.unknown_mime_type", "myst.header"]
autodoc_member_order = "bysource"
html_theme, html_title = "sphinx_book_theme", "calib-prune"
html_static_path, html_css_files = ["_static"], ["site.css"]
html_js_files = ["tables.js", "pages.js"]
html_search_scorer = str(Path(__file__).with_name("scorer.js"))
html_copy_source = html_show_sourcelink = False
html_favicon = "_static/icon.svg"
html_context = dict(default_mode="auto")
html_theme_options = dict(show_toc_level=2, home_page_in_toc=True, use_download_button=False,
                          use_fullscreen_button=False, navbar_persistent=[])
nb_code_prompt_show, nb_code_prompt_hide = "Show imports", "Hide imports"  # nothing else is folded


def with_parameters(app, what, name, obj, options, lines):
    "Add the comments that stand beside parameters to a function's text."
    if what not in ("function", "method", "class"): return
    try: found = docments(obj, full=True)
    except (TypeError, ValueError, OSError, SyntaxError, AttributeError, KeyError): return
    for key, about in found.items():
        if not about.get("docment"): continue
        said = re.sub(r"\s+", " ", str(about["docment"])).replace("*", r"\*").replace("|", r"\|")
        lines.append("")
        lines.append(f":returns: {said}" if key == "return" else f":param {key}: {said}")


def plain_text(app, what, name, obj, options, lines):
    "Docstrings are Markdown-like plain text: their stars and backquotes are no reStructuredText."
    for i, line in enumerate(lines):
        lines[i] = (
            re.sub(r"(?<!`)`([^`]+)`(?!`)", r"``\1``", line).replace("*", r"\*").replace("|", r"\|")
        )


def formula(display):
    "Writes a formula as MathML."
    def visit(self, node):
        found = convert(node.astext(), display=display)
        self.body.append(f"<p>{found}</p>" if display == "block" else found)
        raise nodes.SkipNode
    return visit, None


def setup(app):
    app.add_html_math_renderer("mathml", formula("inline"), formula("block"))
    app.connect("autodoc-process-docstring", plain_text)
    app.connect("autodoc-process-docstring", with_parameters)
