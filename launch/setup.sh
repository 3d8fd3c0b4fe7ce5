#!/usr/bin/env bash
# Creates .venv from uv.lock with Python 3.12, or adds an extra to it; nothing when it is up to date.
set -euo pipefail

usage() {
  cat <<'TEXT'
usage: ./launch/setup.sh [EXTRA...] [--recipe RECIPE]

  ./launch/setup.sh                     the locked packages, into .venv: 2.9 GB, once
  ./launch/setup.sh vision              those of recipes of images as well: 0.3 GB more
  ./launch/setup.sh --recipe tiny-mae   what the recipe needs; ./launch/local.sh calls it so

Extras are those of pyproject.toml; one that was installed stays. Needs Python 3.12 with pip, or uv.
Where MOA_PYTHON names an interpreter, as in a container image, that one is used as it is.
TEXT
}

root=$(cd "$(dirname "$0")/.." && pwd)

refuse() {
  echo "setup: $*" >&2
  exit 78
}

value_in() { # KEY FILE: what a recipe says of the key itself; recipes are flat, so a line tells
  sed -n "s/^[\"']\{0,1\}$1[\"']\{0,1\} *: *[\"']\{0,1\}\([^\"' #]*\).*/\1/p" "$2" | head -n 1
}

# Before there is Python, and without refusing anything: the run does that, and better.
extra_of() { # RECIPE: vision where it, or what it inherits, is of images
  local file=$1 model _
  for _ in 1 2 3 4 5 6 7 8; do
    case $file in
    *.yaml | *.yml) ;;
    *) file=$root/launch/recipes/$file.yaml ;;
    esac
    [ -f "$file" ] && [ -r "$file" ] || return 0
    model=$(value_in moa_model "$file")
    if [ -n "$model" ]; then
      [ "$model" != mae ] || echo vision
      return 0
    fi
    file=$(value_in inherits "$file")
    [ -n "$file" ] || return 0
  done
}

known=$(sed -n '/^\[project.optional-dependencies\]/,/^\[/s/^\([a-z][a-z0-9-]*\) *=.*/\1/p' "$root/pyproject.toml")
asked=()
unknown=()
while [ $# -gt 0 ]; do
  case $1 in
  -h | --help)
    usage
    exit 0
    ;;
  --recipe)
    [ $# -gt 1 ] || refuse "--recipe needs a name from launch/recipes, or a .yaml file"
    mapfile -t -O "${#asked[@]}" asked < <(extra_of "$2")
    shift
    ;;
  *) if grep -qxF -e "$1" <<<"$known"; then asked+=("$1"); else unknown+=("$1"); fi ;;
  esac
  shift
done
[ ${#unknown[@]} = 0 ] || refuse "no extra is called ${unknown[*]}: there are ${known//$'\n'/, }"

cd "$root"
if [ -n "${MOA_PYTHON:-}" ]; then
  if command -v "$MOA_PYTHON" >/dev/null 2>&1; then exit 0; fi
  refuse "MOA_PYTHON=$MOA_PYTHON cannot be run: name a Python 3.12, or unset it for .venv"
fi

# A link leads to the environment of another checkout, which looks after it.
[ ! -L .venv ] || exit 0

stamp=.venv/.moa-lock
installed=.venv/.moa-extras

wanted_extras() { # those asked for and those installed before that still exist, one a line
  {
    printf '%s\n' ${asked[@]+"${asked[@]}"}
    grep -xF -e "$known" "$installed" 2>/dev/null || true
  } | grep . | sort -u
}

up_to_date() {
  [ -f "$stamp" ] && cmp -s uv.lock "$stamp" && [ "$stamp" -nt pyproject.toml ] &&
    [ "$(wanted_extras)" = "$(cat "$installed" 2>/dev/null)" ]
}

if up_to_date; then exit 0; fi
# uv removes what it is not asked for: of two that start at once, the second adds to the first.
if command -v flock >/dev/null 2>&1; then
  exec 9<>uv.lock
  flock -n 9 || { echo "setup: waiting for another one of this checkout" >&2 && flock 9; } || true
fi
if up_to_date; then exit 0; fi

find_uv() {
  if command -v uv >/dev/null 2>&1; then
    command -v uv
    return
  fi
  if [ ! -x .uv/bin/uv ]; then
    local python
    python=$(command -v python3.12 || command -v python3 || command -v python || true)
    if [ -z "$python" ] || ! "$python" -c 'import sys; sys.exit(sys.version_info[:2] != (3, 12))'; then
      refuse "Python 3.12 is needed (see .python-version): pyenv install 3.12, or install uv"
    fi
    echo "setup: installing uv into .uv" >&2
    "$python" -m venv .uv
    .uv/bin/python -m pip install --quiet --disable-pip-version-check uv
  fi
  echo "$PWD/.uv/bin/uv"
}

uv=$(find_uv)
mapfile -t extras < <(wanted_extras)
echo "setup: installing the locked packages into .venv${extras[*]:+, with ${extras[*]}} (once; --help has sizes)" >&2
options=(--locked)
[ -t 2 ] || options+=(--quiet) # its progress is for terminals
for extra in ${extras[@]+"${extras[@]}"}; do options+=(--extra "$extra"); done
"$uv" sync "${options[@]}"
printf '%s\n' ${extras[@]+"${extras[@]}"} | { grep . || true; } >"$installed"
cp uv.lock "$stamp"
