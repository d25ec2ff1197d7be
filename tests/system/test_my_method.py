"The method that docs/howto/add-a-method.md offers to copy."
import runpy
import shutil
import subprocess
import sys

import pytest
import torch

from calib_prune.pruning import methods
from calib_prune.pruning.wanda import magnitude
from tests import ROOT

FILE = ROOT / "docs/howto/my_method.py"


@pytest.fixture
def ria(monkeypatch):
    "The method, known only inside a test."
    monkeypatch.setattr(methods, "METHODS", {**methods.METHODS})
    runpy.run_path(str(FILE))
    return methods.METHODS["ria"]


@pytest.mark.parametrize("sparsity,pattern,zeros", [(0.5, None, 0.5), (0.3, None, 19 / 64),
                                                    (0.5, (2, 4), 0.5), (0.0, None, 0.0)])
def test_the_copied_method_prunes_exactly(ria, sparsity, pattern, zeros):
    weight, inputs = torch.randn(48, 64), torch.randn(400, 64) * torch.linspace(0.1, 4, 64)
    (found,) = ria.solve([weight], [inputs.T @ inputs / 400], sparsity, pattern, 128, 0.01)
    assert found.sparsity == zeros and 0 <= found.error < 1
    assert torch.equal(found.weight[found.weight != 0], weight[found.weight != 0])


def test_the_copied_method_uses_the_inputs(ria):
    torch.manual_seed(0)
    weight, inputs = torch.randn(48, 64), torch.randn(400, 64) * torch.linspace(0.1, 4, 64)
    hessian = inputs.T @ inputs / 400
    (found,) = ria.solve([weight], [hessian], 0.5, None, 128, 0.01)
    assert found.error < 0.8 * magnitude(weight, hessian, 0.5).error


def test_the_copied_file_runs_in_place_of_the_command(tmp_path):
    shutil.copy(FILE, tmp_path)
    done = subprocess.run(
        [sys.executable, FILE.name, "methods"], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0 and "RIA" in done.stdout and "Wanda" in done.stdout, done.stderr
