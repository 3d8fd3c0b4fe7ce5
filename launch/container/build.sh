#!/usr/bin/env bash
# Builds the container image with docker, podman or buildah: `make image`.
# Variables: IMAGE, BASE_IMAGE, EXTRAS, UNPIN, and ENGINE to choose between the three; DRY_RUN=1 only prints.
# Further words go to the engine's build command.
set -euo pipefail
cd "$(dirname "$0")/../.."

version=$(sed -n 's/^version = "\(.*\)"/\1/p' pyproject.toml | head -n 1)
image=${IMAGE:-moa-megatron:$version}
base=${BASE_IMAGE:-$(sed -n 's/^ARG BASE_IMAGE=//p' Dockerfile)}

usable() { # a docker client without its daemon is of no use
  command -v "$1" >/dev/null 2>&1 && { [ "$1" = buildah ] || "$1" info >/dev/null 2>&1; }
}

choose_engine() {
  local name
  for name in ${ENGINE:-docker podman buildah}; do
    if usable "$name"; then
      echo "$name"
      return
    fi
  done
  echo "image: ENGINE=${ENGINE:-docker, podman, buildah} does not run here: start its daemon, or" \
    "install one of the three" >&2
  exit 78
}

# From the name, else from the copy that the engine has; a base not pulled yet is unknown.
base_digest() {
  case $base in
  *@sha256:*) echo "${base#*@}" && return ;;
  esac
  case $engine in
  buildah) buildah inspect --type image --format '{{.FromImageDigest}}' "$base" 2>/dev/null ;;
  *) "$engine" image inspect --format '{{index .RepoDigests 0}}' "$base" 2>/dev/null | sed 's/.*@//' ;;
  esac | grep -x 'sha256:[0-9a-f]*' || echo unknown
}

source_url() { # without the user's name or token
  git remote get-url origin 2>/dev/null | sed -n 's|^https://\([^@/]*@\)\{0,1\}|https://|p' | grep . || echo unknown
}

engine=$(choose_engine)
arguments=(
  "BASE_IMAGE=$base"
  "BASE_DIGEST=$(base_digest)"
  "VERSION=$version"
  "REVISION=$(git describe --always --dirty --abbrev=40 --match '' 2>/dev/null || echo unknown)"
  "BUILD_DATE=$(date -u +%Y-%m-%dT%H:%M:%SZ)"
  "SOURCE=$(source_url)"
  "EXTRAS=${EXTRAS:-$(sed -n 's/^ARG EXTRAS=//p' Dockerfile)}"
  "UNPIN=${UNPIN:-}"
)
command=("$engine" build --tag "$image")
for argument in "${arguments[@]}"; do command+=(--build-arg "$argument"); done
command+=("$@" .)
if [ "${DRY_RUN:-0}" != 0 ]; then
  printf 'would run:'
  printf ' %q' "${command[@]}"
  echo
  exit 0
fi
"${command[@]}"

train="./launch/local.sh tiny-moe --run-dir /tmp/run"
name=$(basename "${image%%:*}")
echo "built $image"
case $engine in
docker)
  echo "  run        docker run --rm --gpus all --ipc host $image $train"
  echo "  enroot     enroot import -o $name.sqsh dockerd://$image"
  echo "  Apptainer  apptainer build $name.sif docker-daemon:$image"
  ;;
podman)
  echo "  run        podman run --rm --device nvidia.com/gpu=all --ipc host $image $train"
  echo "  enroot     enroot import -o $name.sqsh podman://$image"
  echo "  Apptainer  podman save -o $name.tar $image && apptainer build $name.sif docker-archive:$name.tar"
  ;;
buildah)
  echo "  run        buildah run \$(buildah from $image) -- $train"
  echo "  archive    buildah push $image docker-archive:$name.tar:$image"
  echo "  enroot     docker load -i $name.tar && enroot import -o $name.sqsh dockerd://$image"
  echo "  Apptainer  apptainer build $name.sif docker-archive:$name.tar"
  ;;
esac
echo "without GPUs leave out what names them; docs/containers.md has clusters, caches and mounts"
