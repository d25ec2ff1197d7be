#!/usr/bin/env bash
# setup.sh [PYTHON [VENV [LOCK]]]: make the virtual environment and install the package with its development tools.
set -euo pipefail
cd "$(dirname "$0")/.."
case ${1:-} in -*)
    echo "usage: scripts/setup.sh [PYTHON [VENV [LOCK]]]: a Python of 3.11 or newer (default: python3), where the virtual environment"\
         "goes (default: .venv in the repository), and the file of exact versions (default: requirements.lock; '': the newest)"
    exit
esac
python=${1:-python3} venv=${2:-.venv} lock=${3-requirements.lock}

command -v "$python" >/dev/null || { echo "There is no $python. Choose another: make … PYTHON=python3.12" >&2; exit 1; }

"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
    echo "Python 3.11 or newer is needed; $("$python" --version 2>&1) was found. Choose another: make … PYTHON=python3.12" >&2
    exit 1
}

# Debian ships venv as a package of its own.
if ! "$python" -c 'import ensurepip, venv' 2>/dev/null; then
    sudo=$([ "$(id -u)" = 0 ] || echo sudo)
    command -v apt-get >/dev/null || { echo "This Python has no venv module: install it with your system's packages." >&2; exit 1; }
    echo "Installing Debian's venv package for it ..."
    $sudo apt-get update -qq
    version=$("$python" -c 'import sys; print("python%d.%d" % sys.version_info[:2])')
    $sudo env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "$version-venv" >/dev/null
fi

[ -x "$venv/bin/python" ] || "$python" -m venv "$venv"
pip() { "$venv/bin/python" -m pip "$@" --quiet --disable-pip-version-check; }
locked() {  # is the lock there, and for this machine and this Python?
    [ -f "$lock" ] && [ "$(uname -sm)" = "Linux x86_64" ] &&
        "$venv/bin/python" -c 'import sys; sys.exit(not (3, 11, 5) <= sys.version_info[:3] < (3, 14))'
}

echo "Installing calib-prune and what it needs into $venv (a few minutes the first time) ..."
if locked; then
    # The CPU build of torch where pip finds it; torch's CUDA libraries, 3 GB, only where the build of torch asks for them.
    parts=$(mktemp -d)
    trap 'rm -rf "$parts"' EXIT
    awk -v parts="$parts" '/^[a-z0-9]/ { part = /^(nvidia|cuda)-/ ? "cuda" : /^torch==/ ? "torch" : "core" } part { print > (parts "/" part) }' "$lock"
    sed 's/^\(torch==[0-9.]*\)/\1+cpu/' "$parts/torch" > "$parts/cpu"
    pip install --no-deps --require-hashes -r "$parts/core"
    pip install --no-deps --require-hashes -r "$parts/cpu" 2>/dev/null || pip install --no-deps --require-hashes -r "$parts/torch"
    if "$venv/bin/python" -c 'import importlib.metadata as m, sys; sys.exit(not any("nvidia" in r for r in m.requires("torch")))'; then
        pip install --no-deps --require-hashes -r "$parts/cuda"
    fi
    pip install --no-deps --no-build-isolation --editable .
else
    pip install --editable ".[study,packed,dev,docs,cluster]"
fi
touch "$venv/installed"  # what `make` looks at
echo "Installed. Next: source $venv/bin/activate; calib-prune advise --demo"
