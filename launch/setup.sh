#!/usr/bin/env bash
# Creates .venv from uv.lock with Python 3.12; does nothing when it is up to date.
# Needs Python 3.12 with pip, or uv. Usage: launch/setup.sh
# Where MOA_PYTHON names an interpreter, as in the container image, that one is used as it is.
set -euo pipefail
cd "$(dirname "$0")/.."

if [ -n "${MOA_PYTHON:-}" ]; then
  if command -v "$MOA_PYTHON" >/dev/null 2>&1; then exit 0; fi
  echo "setup: MOA_PYTHON=$MOA_PYTHON cannot be run: name a Python 3.12, or unset it for .venv" >&2
  exit 78
fi

# A link leads to the environment of another checkout, which looks after it.
[ ! -L .venv ] || exit 0

stamp=.venv/.moa-lock
if [ -f "$stamp" ] && cmp -s uv.lock "$stamp" && [ "$stamp" -nt pyproject.toml ]; then
  exit 0
fi

find_uv() {
  if command -v uv >/dev/null 2>&1; then
    command -v uv
    return
  fi
  if [ ! -x .uv/bin/uv ]; then
    local python
    python=$(command -v python3.12 || command -v python3 || command -v python || true)
    if [ -z "$python" ] || ! "$python" -c 'import sys; sys.exit(sys.version_info[:2] != (3, 12))'; then
      echo "setup: Python 3.12 is needed (see .python-version): pyenv install 3.12, or install uv" >&2
      exit 78
    fi
    echo "setup: installing uv into .uv" >&2
    "$python" -m venv .uv
    .uv/bin/python -m pip install --quiet --disable-pip-version-check uv
  fi
  echo "$PWD/.uv/bin/uv"
}

uv=$(find_uv)
echo "setup: installing the locked packages into .venv (once; the CUDA build of torch is 4 GB)" >&2
"$uv" sync --locked --quiet
cp uv.lock "$stamp"
