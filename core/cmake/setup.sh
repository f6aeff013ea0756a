#!/bin/bash
# Installs what the build needs: Debian packages, and LibTorch into .deps/python. Done before: half a second.
# `setup.sh --checks` adds the tools of `make check-format` and `make lint`.
#
#   LIBTORCH=/path/to/torch    an existing LibTorch (the folder with include/ and lib/) is used, nothing is downloaded
#   CMAKE_PREFIX_PATH=...      likewise, where one of its folders is a LibTorch
#   PYRA_SKIP_PACKAGES=1       leaves the system's packages alone (other systems, packages from elsewhere)
set -euo pipefail
cd "$(dirname "$0")/../.."
here=core/cmake

checks=""
[ "${1:-}" = --checks ] && checks="clang clang-format clang-tidy"

say() { printf 'setup: %s\n' "$*" >&2; }
die() { say "$@"; exit 1; }

packages() {
  local boost=libboost1.81-dev system=unknown
  [ -r /etc/os-release ] && system=$(. /etc/os-release && echo "$ID-${VERSION_ID:-}")
  case $system in
    debian-12) ;;
    ubuntu-24.04) boost=libboost1.83-dev ;;
    *) die "automatic set-up knows Debian 12 and Ubuntu 24.04, this is $system; install the packages that README lists" \
           "and run it again with PYRA_SKIP_PACKAGES=1" ;;
  esac
  echo g++ cmake ninja-build ccache pkg-config python3-pip ca-certificates $boost libcli11-dev libtomlplusplus-dev \
    nlohmann-json3-dev catch2 libturbojpeg0-dev libspng-dev libarchive-dev libstb-dev "$checks"
}

install_packages() {
  local wanted missing="" package
  wanted=$(packages)
  for package in $wanted; do
    [ "$(dpkg-query -W -f '${db:Status-Status}' "$package" 2>/dev/null)" = installed ] || missing+=" $package"
  done
  [ -n "$missing" ] || return 0
  local sudo=""
  if [ "$(id -u)" != 0 ]; then
    sudo="sudo"
    if ! sudo -n true 2>/dev/null; then
      say "packages are missing and need root; run this line, then the same command again:"
      printf 'sudo apt-get update && sudo apt-get install -y --no-install-recommends%s\n' "$missing"
      exit 1
    fi
  fi
  say "installing$missing"
  $sudo apt-get update -qq || say "apt-get update failed; going on with the package lists there are"
  # shellcheck disable=SC2086  # one word a package
  $sudo env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends $missing
}

existing_libtorch() {
  local folder
  if [ -n "${LIBTORCH:-}" ]; then
    if [ ! -e "$LIBTORCH/include/ATen/ATen.h" ] || [ ! -e "$LIBTORCH/lib/libtorch_cpu.so" ]; then
      die "LIBTORCH=$LIBTORCH holds no include/ATen/ATen.h and lib/libtorch_cpu.so"
    fi
    echo "$LIBTORCH"
    return
  fi
  # torch.utils.cmake_prefix_path names share/cmake, two folders below the one that counts.
  local folders=() prefix
  IFS=':;' read -r -a folders <<<"${CMAKE_PREFIX_PATH:-}"
  for prefix in "${folders[@]}"; do
    for folder in "$prefix" "$prefix/../.."; do
      if [ -e "$folder/include/ATen/ATen.h" ] && [ -e "$folder/lib/libtorch_cpu.so" ]; then
        echo "$folder"
        return
      fi
    done
  done
}

# Downloads and unpacks beside the final place and renames at the end: what has the final name is complete.
install_libtorch() {
  local stamp fresh=.deps/python.new free_kb
  stamp=$(cat $here/libtorch.txt $here/unpack_libtorch.py | sha256sum | cut -d' ' -f1)
  [ "$(cat .deps/python/stamp 2>/dev/null)" = "$stamp" ] && return 0
  mkdir -p .deps
  exec 9>.deps/lock
  flock 9
  [ "$(cat .deps/python/stamp 2>/dev/null)" = "$stamp" ] && return 0
  free_kb=$(df -Pk .deps | awk 'NR == 2 {print $4}')
  [ "$free_kb" -gt 1300000 ] || die "LibTorch needs 1.3 GB of disk while it is installed; $((free_kb / 1000)) MB are free"
  rm -rf $fresh .deps/wheels
  say "downloading LibTorch (the wheel torch 2.11.0 and two small ones, 545 MB)"
  python3 -m pip download --no-deps --require-hashes --only-binary=:all: --no-cache-dir --disable-pip-version-check \
    --platform manylinux_2_28_x86_64 --platform manylinux_2_25_x86_64 --platform manylinux_2_17_x86_64 \
    --python-version 3.11 --implementation cp --abi cp311 --abi none -r $here/libtorch.txt -d .deps/wheels >&2
  say "unpacking its CPU part"
  python3 $here/unpack_libtorch.py .deps/wheels/*.whl $fresh
  echo "$stamp" >$fresh/stamp
  rm -rf .deps/wheels .deps/python
  mv $fresh .deps/python
  say "LibTorch 2.11.0 is in .deps/python/torch"
}

[ "$(uname -sm)" = "Linux x86_64" ] || die "this version runs on x86-64 Linux; this machine is $(uname -sm)"
[ -n "${PYRA_SKIP_PACKAGES:-}" ] || install_packages
libtorch=$(existing_libtorch)
if [ -n "$libtorch" ]; then
  say "using LibTorch in $libtorch"
else
  install_libtorch
fi
