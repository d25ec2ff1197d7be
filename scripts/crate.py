"""A study as a Workflow Run RO-Crate: preset, workflow, results, notebooks, tables and figures,
and which notebook made which table: crate.py STUDY FILE.zip (STUDY such as claims/qwen-0.5b)."""
import contextlib
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml
from rocrate.model.contextentity import ContextEntity
from rocrate.rocrate import ROCrate

from calib_prune import __version__
from calib_prune.core import CalibPruneError, file_sha256
from calib_prune.study.plan import study_of, table_jobs
from calib_prune.study.presets import load_preset
from calib_prune.study.provenance import FROM_FILE, files_read, read_provenance
from calib_prune.study.sums import SUMS, changed_results

ROOT = Path(__file__).resolve().parent.parent
PROFILES = ("https://w3id.org/ro/wfrun/process/0.5", "https://w3id.org/ro/wfrun/workflow/0.5",
            "https://w3id.org/workflowhub/workflow-ro-crate/1.0")
LICENSE = "https://spdx.org/licenses/Apache-2.0"
TYPES = {".json": "application/json", ".csv": "text/csv", ".md": "text/markdown",
         ".yaml": "application/yaml", ".png": "image/png", ".pdf": "application/pdf",
         ".tex": "application/x-tex", ".parquet": "application/vnd.apache.parquet",
         ".ipynb": "application/x-ipynb+json"}


def presets_of(name: str) -> list[Path]:
    "A preset and those that it extends."
    paths = [ROOT / "presets" / f"{name}.yaml"]
    while base := yaml.safe_load(paths[-1].read_text()).get("extends"):
        paths.append((paths[-1].parent / f"{base}.yaml").resolve())
    return paths


def add_file(crate: ROCrate, path: Path, **about: Any) -> Any:
    "A file at its place in the repository."
    place = str(path.relative_to(ROOT))
    kind = TYPES.get(path.suffix, "text/plain")
    return crate.add_file(path, place, properties=dict(name=place, encodingFormat=kind) | about)


def committed(path: Path) -> str:
    "When a file was last committed; empty outside of a checkout."
    try:
        done = subprocess.run(["git", "-C", str(ROOT), "log", "-1", "--format=%cI", "--", path],
                              capture_output=True, text=True)
    except OSError: return ""  # no git
    return done.stdout.strip()


def add_action(crate: ROCrate, name: str, ended: str, **about: Any) -> Any:
    "What made something from something."
    number = sum(entity.id.startswith("#made-") for entity in crate.contextual_entities)
    action = crate.add(ContextEntity(crate, f"#made-{number}", properties={
        "@type": "CreateAction", "name": name,
        "actionStatus": "http://schema.org/CompletedActionStatus"}
        | (dict(endTime=ended) if ended else {})))
    action["agent"] = crate.get("#contributors")
    for key, value in about.items(): action[key] = value
    crate.root_dataset.append_to("mentions", action)
    return action


def read_study(name: str) -> dict[str, Any]:  # notebook → see `read_provenance`, and "read"
    "What made the tables of a study; an error if results or tables are not whole."
    figures, results = ROOT / "figures" / name, ROOT / "results" / name
    made = read_provenance(figures)
    if not made:
        raise CalibPruneError(f"{figures / FROM_FILE} is missing: `calib-prune reproduce --preset "
                              f"{name} --tables-only` writes it.")
    if wrong := changed_results(results):
        file, fault = next(iter(wrong.items()))
        raise CalibPruneError(f"{results / file}: {fault}.")
    for about in made.values():
        for file, digest in about["files"].items():
            if (figures / file).is_file() and file_sha256(figures / file) == digest: continue
            raise CalibPruneError(f"{figures / file} was changed or removed after it was made.")
    preset = f"presets/{name}.yaml"
    with contextlib.chdir(ROOT):
        for job in table_jobs(study_of(load_preset(preset), preset, tables_only=True)):
            if job.notebook not in made:
                raise CalibPruneError(f"{figures} has no tables of {job.notebook}: `calib-prune "
                                      f"reproduce --preset {name} --tables-only` makes them.")
            made[job.notebook]["read"] = [ROOT / file for file in files_read(job)]
    return made


def described_crate(name: str) -> ROCrate:
    "A crate with licence, author and profiles, and no files."
    crate = ROCrate(version="1.1")  # the version of the profiles
    crate.name = f"calib-prune {name}"
    crate.description = (f"The study {name} of calib-prune {__version__}: scores of pruned models, "
                         "the workflow that made them, tables and figures.")
    crate.license = crate.add(ContextEntity(crate, LICENSE, properties={
        "@type": "CreativeWork", "name": "Apache License 2.0"}))
    maker = crate.add(ContextEntity(crate, "#contributors", properties={
        "@type": "Organization", "name": "calib-prune contributors"}))
    crate.root_dataset["author"] = crate.root_dataset["publisher"] = maker
    crate.root_dataset["conformsTo"] = [
        crate.add(ContextEntity(crate, profile, properties={
            "@type": "CreativeWork", "name": profile.split("/")[-2],
            "version": profile.split("/")[-1]})) for profile in PROFILES]
    return crate


def study_crate(name: str) -> ROCrate:
    "The crate of a study."
    made, crate = read_study(name), described_crate(name)
    known: dict[Path, Any] = {}

    def file_of(path: Path) -> Any:  # each file once
        if path not in known: known[path] = add_file(crate, path)
        return known[path]

    workflow = crate.add_workflow(
        ROOT / "Snakefile", "Snakefile", main=True, lang="snakemake",
        properties=dict(name="calib-prune reproduce", version=__version__,
                        encodingFormat="text/plain"))
    workflow["softwareRequirements"] = add_file(crate, ROOT / "requirements.lock")
    add_file(crate, ROOT / "README.md")["about"] = crate.root_dataset

    presets = [add_file(crate, path) for path in presets_of(name)]
    add_file(crate, ROOT / "results" / name / SUMS)
    add_file(crate, ROOT / "docs" / "data-sheet.md")
    outputs = []
    for about in made.values():
        code = {"@type": ["File", "SoftwareSourceCode"], "version": about["calib_prune"]}
        notebook = add_file(crate, ROOT / about["notebook"], **code)
        tables = [add_file(crate, ROOT / "figures" / name / file, sha256=digest)
                  for file, digest in about["files"].items()]
        read = [file_of(path) for path in about["read"]]
        add_action(crate, f"tables and figures of {about['notebook']}",
                   committed(ROOT / "figures" / name / FROM_FILE), instrument=notebook,
                   object=read, result=tables,
                   description=f"Commit {about['commit']}, packages {about['packages']}.")
        outputs += tables
    own = [file for path, file in known.items() if path.is_relative_to(ROOT / "results" / name)]
    add_action(crate, f"study {name}", committed(ROOT / "results" / name / SUMS),
               instrument=workflow, object=presets, result=[*own, *outputs],
               description=f"calib-prune reproduce --preset {name}")
    return crate


if __name__ == "__main__":
    if len(sys.argv) != 3 or not re.fullmatch(r"[\w.-]+/[\w.-]+", sys.argv[1]):
        sys.exit(__doc__)
    if Path(sys.argv[2]).exists(): sys.exit(f"Error: {sys.argv[2]} exists: choose another file.")
    try: study_crate(sys.argv[1]).write_zip(sys.argv[2])
    except CalibPruneError as e: sys.exit(f"Error: {e}")
