#!/usr/bin/env bash
# browser.sh: install Debian's Chromium for the tests of the site, if it is missing and can be had.
set -euo pipefail
command -v chromium >/dev/null && exit
sudo=$([ "$(id -u)" = 0 ] || echo "sudo -n")
if ! command -v apt-get >/dev/null || ! $sudo true 2>/dev/null; then
    echo "No Chromium, and no right to install it: the site is not tested in a browser." >&2
    exit
fi
$sudo apt-get update -qq
$sudo apt-get install -y -qq --no-install-recommends chromium >/dev/null
