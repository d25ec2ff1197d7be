"Tests, in the order of what they take: unit, study, system, torture."
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
