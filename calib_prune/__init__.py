"""Which ability does your calibration data cost you?

The names most users need; each is imported when it is first used.
"""
import os
import sys
from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.2.0"

if TYPE_CHECKING:
    from .calibration.oit import measure
    from .calibration.sets import build_calibration
    from .evaluation.retention import retention
    from .evaluation.scoring import evaluate
    from .generation.igsp import generate
    from .model.loading import load_model
    from .advice.compare import compare_models
    from .advice.measured import advise
    from .advice.nearest import advise_quickly
    from .pipeline.evaluate import evaluate_model
    from .pipeline.prune import prune_model
    from .pruning.walk import prune
    from .statistics.mixing_law import fitted_law

# torch's threads wait for each other by spinning, by default for milliseconds. Next to a busy
# process, or to our own threads, they hold cores that the others need. 10,000 rounds are about
# 0.1 ms (ours, by measurement).
# torch reads this when it is loaded: import this package first, or set the variable yourself.
if "torch" not in sys.modules and "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")

# torch and lm-eval take seconds to import, and `calib-prune --help` needs neither.
_PUBLIC = {
    "load_model": "model.loading",
    "build_calibration": "calibration.sets",
    "measure": "calibration.oit",
    "generate": "generation.igsp",
    "prune": "pruning.walk",
    "evaluate": "evaluation.scoring",
    "retention": "evaluation.retention",
    "fitted_law": "statistics.mixing_law",
    "prune_model": "pipeline.prune",
    "evaluate_model": "pipeline.evaluate",
    "compare_models": "advice.compare",
    "advise": "advice.measured",
    "advise_quickly": "advice.nearest",
}
__all__ = [
    "advise", "advise_quickly", "build_calibration", "compare_models", "evaluate", "evaluate_model",
    "fitted_law", "generate", "load_model", "measure", "prune", "prune_model", "retention"]


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC: raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_PUBLIC[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
