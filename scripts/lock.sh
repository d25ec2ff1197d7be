#!/usr/bin/env bash
# lock.sh [--upgrade]: write requirements.lock, exact versions with hashes, from the ranges in pyproject.toml. Versions that it has stay.
set -euo pipefail
cd "$(dirname "$0")/.."
lock=requirements.lock place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
python3 -m venv "$place/venv"
"$place/venv/bin/python" -m pip install --quiet --disable-pip-version-check "uv>=0.9,<1"

# Linux on x86-64 with Python 3.11.5 to 3.13, the machines of which tests and results are known.
cp pyproject.toml README.md "$place"
cat >> "$place/pyproject.toml" <<'TOML'

[tool.uv]
environments = ["sys_platform == 'linux' and platform_machine == 'x86_64' and python_full_version >= '3.11.5' and python_full_version < '3.14'"]
TOML
[ ! -f "$lock" ] || cp "$lock" "$place"
(cd "$place" && venv/bin/uv pip compile pyproject.toml --extra study --extra packed --extra dev --extra docs --extra cluster --universal \
    --python-version 3.11.5 --generate-hashes --no-annotate --no-header --quiet "$@" --output-file "$lock")

# The CPU build of torch for Python 3.11 has the same version and another hash: pip takes it where it finds it.
cpu=torch==2.13.0 hash=sha256:981442fab184a8791f7724dda9196ffa723bb038c6059d1b04b5f80196e746a6
sed -i "/$hash/d; s|^\($cpu .*\)|\1\n    --hash=$hash \\\\|" "$place/$lock"
grep -q "$hash" "$place/$lock" || { echo "torch is no longer $cpu: put the hash of its CPU build into scripts/lock.sh" >&2; exit 1; }
{ echo "# Exact versions for Linux on x86-64, Python 3.11.5 to 3.13. Written by \`make lock\` from pyproject.toml."; grep -v "^# Exact" "$place/$lock"; } > "$lock"
