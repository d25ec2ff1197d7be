"A study of one tiny model, in a copy of what the workflow uses."
import shutil
from pathlib import Path

from tests import ROOT

GRID = dict(strategies="all", methods=["wanda"], sparsities=["2:4"], seeds=[0], windows=["default"])


def tiny_study(root: Path, model: Path, strategies: dict[str, str], windows: int, length: int,
               copied: tuple[str, ...] = ("nbs/paper", "calib_prune"), **scoring) -> None:
    "Write root/tiny.yaml, beside copies of the workflow's files."
    # here: the torture sets its cache before torch is imported
    import yaml

    from calib_prune.study.presets import load_preset
    for name in copied:
        shutil.copytree(ROOT / name, root / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "Snakefile", root)
    smoke = load_preset(ROOT / "presets/smoke.yaml")
    preset = smoke | dict(
        name="tiny",
        resamples=300,
        model=str(model),
        calibration=dict(windows=windows, length=length),
        strategies=strategies,
        grid=[GRID],
        scoring=scoring | dict(batch_tokens=1024),
        heldout=dict(source="coqa", documents=1, window=length),
        hardware=smoke["hardware"] | dict(cell_gib=1),
    )
    (root / "tiny.yaml").write_text(yaml.safe_dump(preset))


def text_study(root: Path, methods: list[str], **changes) -> Path:
    "A tiny study on text of its own, with other methods and other sections; the root."
    import yaml

    from calib_prune.model.loading import save_model
    from calib_prune.model.tiny import tiny_llama, tiny_tokenizer
    save_model(tiny_llama(max_position_embeddings=2048), tiny_tokenizer(), root / "tiny", {})
    (root / "a.txt").write_text("".join(f"{i} times {i} is {i * i}.\n" for i in range(500)))
    tiny_study(root, root / "tiny", dict(own=str(root / "a.txt")), 4, 64, tasks="sciq", limit=4)
    preset = yaml.safe_load((root / "tiny.yaml").read_text())
    preset["grid"][0]["methods"] = methods
    (root / "tiny.yaml").write_text(yaml.safe_dump(preset | changes))
    return root
