"""What setuptools cannot be told in pyproject.toml: the wheel also holds the files of studies, and
the mixing law."""
import shutil
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent
FOUND = [
    ROOT / "Snakefile", *sorted(ROOT.glob("presets/**/*.yaml")),
    *sorted(ROOT.glob("nbs/paper/*.ipynb")), *sorted(ROOT.glob("profiles/*/config.yaml")),
    ROOT / "figures/mixing/smollm2-135m/T12-law.json",
    # of the models whose studies are complete: `advice.nearest.STUDIED`
    *(ROOT / f"figures/{table}.csv" for model in ("smollm2-135m", "qwen-0.5b")
      for table in (f"claims/{model}/T18-policies", f"quantisation/{model}/T21-regret")),
    *(ROOT / f"results/advice/smollm2-135m/advice.{ending}" for ending in ("md", "json"))]
STUDY = [o.relative_to(ROOT).as_posix() for o in FOUND if o.name != "bench.ipynb"]


class WithStudy(build_py):
    def run(self):
        if self.editable_mode: return super().run()  # a checkout has them
        old = Path(self.build_lib, "calib_prune").resolve()
        # any other folder is the caller's
        if ROOT / "build" in old.parents: shutil.rmtree(old, ignore_errors=True)
        super().run()
        for name in STUDY:
            target = Path(self.build_lib, "calib_prune", "project", name)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, target)


setup(cmdclass={"build_py": WithStudy})
