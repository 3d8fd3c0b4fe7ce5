# moa-megatron on NVIDIA's PyTorch image, or on any image with Python 3.12 and pip: `make image`.
# docs/containers.md tells how to use the result.
ARG BASE_IMAGE=nvcr.io/nvidia/pytorch:26.06-py3
# hadolint ignore=DL3006
FROM ${BASE_IMAGE}

USER 0
WORKDIR /opt/moa-megatron

# Packages change rarely and take minutes: their layer needs nothing but the lock and these scripts.
# Proof that the base's torch, Transformer Engine and Apex are untouched belongs to the same layer,
# so that no image exists without it.
# EXTRAS=none leaves out what only recipes of images need.
ARG EXTRAS=vision
ARG UNPIN=""
COPY pyproject.toml uv.lock ./
COPY launch/container/install.sh launch/container/check_image.py launch/container/plan_packages.py \
    launch/container/
RUN ./launch/container/install.sh packages

ARG BASE_IMAGE
ARG BASE_DIGEST=unknown
ARG VERSION=unknown
ARG REVISION=unknown
ARG BUILD_DATE=unknown
ARG SOURCE=unknown
COPY . ./
RUN ./launch/container/install.sh project && ./launch/container/install.sh user

# Only what is true of the image itself. Caches are the caller's: pyxis lets a variable of the image
# win over the job's, so XDG_CACHE_HOME set here could not be moved to a scratch disk by export.
# PYTHONPYCACHEPREFIX would hide the bytecode that was compiled above.
ENV PYTHONNOUSERSITE=1 \
    MOA_PYTHON=python

LABEL org.opencontainers.image.title="moa-megatron" \
    org.opencontainers.image.description="Pretraining with Mixture of Activations on Megatron-core" \
    org.opencontainers.image.licenses="Apache-2.0" \
    org.opencontainers.image.version="${VERSION}" \
    org.opencontainers.image.revision="${REVISION}" \
    org.opencontainers.image.created="${BUILD_DATE}" \
    org.opencontainers.image.source="${SOURCE}" \
    org.opencontainers.image.base.name="${BASE_IMAGE}" \
    org.opencontainers.image.base.digest="${BASE_DIGEST}"

# By number, which Kubernetes can check; any other user works as well.
USER 1000:1000
# pyxis and Apptainer run no entry point: without one the image is the same everywhere.
ENTRYPOINT []
CMD ["bash"]
