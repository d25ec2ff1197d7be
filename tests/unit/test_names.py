"One meaning per public name; an abbreviation is defined where a page first uses it."
import ast
import re
from collections import defaultdict
from collections.abc import Iterator

import pytest

from tests import ROOT

PAGES = ["README.md", "docs/results.md", "docs/glossary.md",
         *(page.relative_to(ROOT).as_posix() for page in sorted(ROOT.glob("docs/questions/*.md"))),
         *(page.relative_to(ROOT).as_posix() for page in sorted(ROOT.glob("docs/howto/*.md")))]
# Of computing at large; names of models, benchmarks, formats, makers, files and licences.
KNOWN = set("""API BF16 BSD CLI CPU CPUs CSV CUDA DAG GB GGUF GPU GPUs HTML HTTP HTTPS ID IDs JSON
JSONL KB LLM MB MIT NVIDIA OS PDF PNG README RAM SHA SQL SSD SVG TB TSV UI URL UTF XML YAML ZIP NaN
GiB MiB AMD MMLU ARC GSM MBPP PIQA MATH WX CONTRIBUTING AND NOT TMPDIR LICENSE CHANGELOG LOG MIG
PCIe TF32 FP16 CI""".split())
ABBREVIATION = re.compile(r"(?<![\w./`-])(?:[A-Z]-)?[A-Z]{2,}(?![\w/`.-]*[a-z_/`])")


def names(module: ast.Module) -> Iterator[str]:
    "The public names that a module defines."
    for node in module.body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)): yield node.name
        targets = node.targets if isinstance(node, ast.Assign) else []
        if isinstance(node, ast.AnnAssign): targets = [node.target]
        yield from (target.id for target in targets if isinstance(target, ast.Name))


def definitions() -> dict[str, set[str]]:
    "Every public name of the package, and the modules that define it."
    where = defaultdict(set)
    for path in (ROOT / "calib_prune").rglob("*.py"):
        if path.name in ("_modidx.py", "__init__.py"): continue
        for name in names(ast.parse(path.read_text())):
            if not name.startswith("_"): where[name].add(path.stem)
    return where


def test_no_public_name_has_two_meanings():
    where = definitions()
    assert len(where) > 900
    assert {name: modules for name, modules in where.items() if len(modules) > 1} == {}


def plain(text: str) -> str:
    "The prose of a page: no code, links, pictures or tags."
    text = re.sub(r"```.*?```|`[^`]*`|<[^>]*>", " ", text, flags=re.DOTALL)
    return re.sub(r"!\[[^\]]*\]\([^)]*\)|\]\([^)]*\)", "]", text)


def undefined(text: str) -> list[str]:
    """The abbreviations of a page whose first use is no definition: `name (ABC)`, `ABC (name)`,
    `ABC: name` or an entry of a list, `**ABC**`."""
    missing = []
    for short in dict.fromkeys(found[0] for found in ABBREVIATION.finditer(text)):
        if short in KNOWN: continue
        first = re.search(rf"(?<![\w-]){re.escape(short)}(?!\w)", text)
        assert first
        before, after = text[:first.start()], text[first.end():]
        in_brackets = before.endswith("(") and after.startswith(")")
        if not (in_brackets or re.search(r"[*]$", before) or re.match(r"\**\s*[(:,–]", after)):
            missing.append(short)
    return missing


def test_the_reader_of_abbreviations_sees_them():
    assert undefined("IGSP helps. Information-guided self-pruning (IGSP)") == ["IGSP"]
    assert undefined("Self-generated sampling (SGS) helps; SGS again; `XYZ` is code") == []


@pytest.mark.parametrize("page", PAGES)
def test_abbreviations_are_defined_at_their_first_use(page):
    assert undefined(plain((ROOT / page).read_text())) == []
