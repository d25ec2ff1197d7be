"Notebooks of nbs/paper without a kernel, whose start takes longer than most of them."
from tests import ROOT


def run_cells(name, **parameters):
    "Execute a notebook in this process, with parameters as papermill sets them: strings."
    import nbformat
    space = {}
    for cell in nbformat.read(ROOT / f"nbs/paper/{name}.ipynb", 4).cells:
        if cell.cell_type != "code": continue
        exec(cell.source, space)
        if "parameters" in cell.metadata.get("tags", []):
            space |= {key: str(value) for key, value in parameters.items()}
