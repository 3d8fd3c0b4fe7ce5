#!/usr/bin/env bash
# Turns a base image into ours; run as root by the Dockerfile and by moa-megatron.def.
#   install.sh packages   what the base lacks, in its own layer; proves the rest untouched
#   install.sh project    the project's code beside this script, and BUILD_INFO
#   install.sh user       user 1000 is moa; for engines that take the image's user
# Variables: EXTRAS="name ..." are pyproject.toml's (vision; none for text alone); UNPIN="name ..." gives
# up pins of the base image (never torch's and its kin); PLAN_ONLY=1 prints what would be installed;
# VERSION, REVISION, BUILD_DATE, BASE_IMAGE, BASE_DIGEST: BUILD_INFO.
set -euo pipefail
cd "$(dirname "$0")/../.."
root=$PWD
tools=$root/launch/container
record=$root/base-image.json
python=${MOA_PYTHON:-python}
umask 022 # any user may run the image

refuse() {
  echo "install: $*" >&2
  exit 78
}

check_python() {
  "$python" -c 'import sys; sys.exit(sys.version_info[:2] != (3, 12))' ||
    refuse "MOA_PYTHON=$python is not Python 3.12: choose a BASE_IMAGE with it, or name another MOA_PYTHON"
  "$python" -m pip --version >/dev/null || refuse "$python has no pip: choose a BASE_IMAGE with pip"
}

# Triton compiles its launchers with C, the kernels for CPUs are C++ built for the CPU they meet:
# neither can be done ahead. NVIDIA's images bring a compiler, slim ones do not.
compiler() {
  if command -v g++ >/dev/null 2>&1; then return; fi
  command -v apt-get >/dev/null 2>&1 || refuse "no g++ and no apt-get: choose a BASE_IMAGE with g++"
  apt-get update -qq
  DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends g++ libc6-dev \
    -o Dpkg::Options::=--force-unsafe-io >/dev/null
  rm -rf /var/lib/apt/lists/*
}

# pip's constraints of the image are read by plan_packages.py, which keeps all that our requirements
# allow and names the rest. Left in the environment they would be applied once more as they are, and
# to the throw-away environments that build a package as well.
pip_install() {
  env -u PIP_CONSTRAINT PIP_BREAK_SYSTEM_PACKAGES=1 PIP_ROOT_USER_ACTION=ignore \
    PIP_DISABLE_PIP_VERSION_CHECK=1 "$python" -m pip install --quiet --cache-dir "$scratch/cache" "$@"
}

want() { # FLAGS of `plan_packages.py wanted`
  local extras unpin
  read -r -a extras <<<"${EXTRAS-vision}"
  read -r -a unpin <<<"${UNPIN:-}"
  "$python" "$tools/plan_packages.py" wanted "$record" "$scratch" "$@" \
    --extras "${extras[@]}" --unpin "${unpin[@]}"
}

resolve() {
  pip_install --dry-run --report "$scratch/report.json" \
    -r "$scratch/wanted.txt" -c "$scratch/constraints.txt"
}

packages() {
  check_python
  "$python" "$tools/check_image.py" record "$record"
  scratch=$(mktemp -d)
  want
  if ! resolve; then
    echo "install: the locked versions do not go with the image's: others are chosen" >&2
    want --loose
    resolve || refuse "no versions go with the packages of the base image: name those named" \
      "above that may change, as --build-arg UNPIN='NAME NAME', choose a newer BASE_IMAGE, or" \
      "leave recipes of images out, by --build-arg EXTRAS=none"
  fi
  "$python" "$tools/plan_packages.py" exact "$record" "$scratch"
  if [ "${PLAN_ONLY:-0}" = 0 ]; then
    compiler
    pip_install --no-deps --require-hashes -r "$scratch/exact.txt"
    "$python" "$tools/check_image.py" verify "$record"
  fi
  rm -rf "$scratch"
}

# NVIDIA's images have a user 1000 already; our files must not depend on which name it has.
user() {
  local taken
  taken=$(getent passwd 1000 | cut -d: -f1)
  if [ -z "$taken" ]; then
    useradd --create-home --shell /bin/bash --user-group --uid 1000 moa
  elif [ "$taken" != moa ]; then
    usermod --login moa --home /home/moa --move-home "$taken"
    getent group moa >/dev/null || groupmod --new-name moa "$(id -gn moa)"
  fi
}

project() {
  check_python
  scratch=$(mktemp -d)
  chmod -R a+rX "$root"
  # In place, so that launch/ and tools/ stand beside the code as they do in a checkout.
  pip_install --no-deps --editable "$root"
  "$python" "$tools/check_image.py" verify "$record"
  "$python" "$tools/check_image.py" imports
  # By content, since layers round times: a read-only image could never write bytecode again.
  "$python" -m compileall -q --invalidation-mode checked-hash moa_megatron patches tools launch
  "$python" "$tools/check_image.py" info "$record" "version=${VERSION:-unknown}" \
    "revision=${REVISION:-unknown}" "build_date=${BUILD_DATE:-unknown}" \
    "base_image=${BASE_IMAGE:-unknown}" "base_digest=${BASE_DIGEST:-unknown}" >BUILD_INFO
  rm -rf "$scratch" build
  chmod -R a+rX "$root"
}

case "${1:-}" in
packages | project | user) "$1" ;;
*) refuse "step=${1:-}: use packages, project or user" ;;
esac
