#!/usr/bin/env bash
# setup.sh [PYTHON [VENV]]: make the virtual environment and install the package with its development tools.
set -euo pipefail
cd "$(dirname "$0")/.."
case ${1:-} in -*)
    echo "usage: scripts/setup.sh [PYTHON [VENV]]: a Python of 3.11 or newer (default: python3), and where the virtual environment goes"\
         "(default: .venv in the repository)"
    exit
esac
python=${1:-python3} venv=${2:-.venv}

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
    $sudo apt-get install -y -qq --no-install-recommends "$version-venv"
fi

[ -x "$venv/bin/python" ] || "$python" -m venv "$venv"
echo "Installing calib-prune and what it needs into $venv (a few minutes the first time) ..."
"$venv/bin/python" -m pip install --quiet --disable-pip-version-check --editable ".[study,dev,docs,cluster]"
touch "$venv/installed"  # what `make` looks at
