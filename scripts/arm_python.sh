#!/usr/bin/env bash
# Makes build/arm/python, a Python for 64-bit ARM that runs under qemu-aarch64, with what the tests need in build/arm/site. The
# interpreter and the C library are the distribution's own packages, downloaded and unpacked: nothing is installed. NumPy and
# pytest come from the package index. Does nothing when all is there; `make clean` removes it.
set -euo pipefail
cd "$(dirname "$0")/.."

venv=$(cd "${VENV:-.venv}" && pwd)
arm=$(pwd)/build/arm
root=$arm/root

[ -e "$arm/.python-ready" ] && exit 0

# With lists and a cache of its own, and as if nothing were installed: what is fetched runs with nothing else there.
private_apt() {
  apt-get -qq -o APT::Architecture=arm64 -o APT::Architectures=arm64 -o APT::Install-Recommends=0 -o APT::Sandbox::User="$(id -un)" \
    -o Dir::State="$arm/apt/state" -o Dir::State::status="$arm/apt/status" -o Dir::Cache="$arm/apt/cache" "$@"
}

rm -rf "$arm/apt" "$root" "$arm/site"
mkdir -p "$arm/apt/state/lists/partial" "$arm/apt/cache/archives/partial" "$root"
: >"$arm/apt/status"
private_apt update
private_apt install -y --download-only python3-minimal libpython3-stdlib libpython3-dev libstdc++6 >/dev/null
for package in "$arm"/apt/cache/archives/*.deb; do dpkg-deb -x "$package" "$root"; done
cat >"$arm/python" <<SH
#!/bin/sh
PYTHONHOME="$root/usr" exec qemu-aarch64 -cpu "\${ARM_CPU:-neoverse-n1}" -L "$root" "\$(readlink -f "$root/usr/bin/python3")" "\$@"
SH
chmod +x "$arm/python"
version=$("$arm/python" -c 'import sys; print("%d.%d" % sys.version_info[:2])')
"$venv/bin/python" -m pip --disable-pip-version-check -qq install --no-warn-conflicts --target "$arm/site" --python-version "$version" --only-binary=:all: \
  --platform manylinux_2_28_aarch64 --platform manylinux_2_17_aarch64 --platform manylinux2014_aarch64 numpy pytest hypothesis
rm -rf "$arm/apt"
touch "$arm/.python-ready"
