#!/usr/bin/env bash
# bare.sh [FOLDER [TARGET …]]: do the README's commands suffice on a fresh machine?
# Make a bare Debian in an absent folder and run them there.
set -euo pipefail
case ${1:-} in -*)
    echo "usage: sudo --preserve-env scripts/bare.sh [FOLDER [TARGET …]]: an absent folder for a"\
         "Debian 13 (default: /tmp/calib-prune-bare), and what make makes in it (default: reproduce"\
         "test, about an hour). Needs debootstrap and root. The Debian has make, python3 and"\
         "certificates; the project is a clone of HEAD. Settings of apt, pip and the network are"\
         "this machine's."
    exit
esac
root=$(realpath --canonicalize-missing "${1:-/tmp/calib-prune-bare}")
cd "$(dirname "$0")/.."
targets=("${@:2}")
[ ${#targets[@]} -gt 0 ] || targets=(reproduce test)

refuse() { echo "$1" >&2; exit 1; }
[ "$(id -u)" = 0 ] || refuse "A Debian in a folder is made as root: sudo --preserve-env scripts/bare.sh …"
command -v debootstrap >/dev/null || refuse "There is no debootstrap: apt-get install debootstrap"
[ ! -e "$root" ] || refuse "$root exists: choose an absent folder, or remove this one."

echo "Making a bare Debian in $root ..."
debootstrap --variant=minbase --include=ca-certificates,make,python3 trixie "$root" >/dev/null
cp -L /etc/resolv.conf "$root/etc/resolv.conf"
cp -L /etc/ssl/certs/ca-certificates.crt "$root/etc/ssl/certs/ca-certificates.crt"
for settings in /etc/pip.conf /etc/apt/apt.conf.d/*proxy*; do
    [ ! -f "$settings" ] || cp "$settings" "$root$settings"
done
git clone --quiet --no-hardlinks . "$root/calib-prune"

# Settings of the network and of pip; nothing else of this environment goes in.
pip='PIP_(INDEX_URL|EXTRA_INDEX_URL|CERT|PROXY|DEFAULT_TIMEOUT)'
mapfile -t network < <(env | grep -iE "^((https?|no)_proxy|$pip|SSL_CERT_)" || true)
echo "make ${targets[*]} in it ..."
# pivot_root and not chroot: in a chroot, the sandbox of written programs may not make namespaces.
exec unshare --mount --pid --kill-child bash -euc '
    root=$1; shift
    mount --make-rprivate /
    mount --bind "$root" "$root"
    cd "$root"
    mount -t proc proc proc
    mount --rbind /sys sys
    mount --rbind /dev dev
    mkdir -p .outside
    pivot_root . .outside
    umount --lazy /.outside
    exec env -i HOME=/root PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin LANG=C.UTF-8 "$@"
' bash "$root" "${network[@]}" make -C /calib-prune "${targets[@]}"
