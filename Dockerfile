# syntax=docker/dockerfile:1
# Two images from one file: `--target cpu` and `--target gpu`. docs/operating.md, Containers, has the commands.
# Everything is installed into /usr/local, where login shells (KubeRay starts Ray in one) find it too.
ARG PYTHON_IMAGE=python:3.11.14-slim-bookworm

FROM ${PYTHON_IMAGE} AS wheel
WORKDIR /source
RUN pip install --no-cache-dir --disable-pip-version-check "build==1.3.0" "setuptools==84.2.1"
COPY pyproject.toml README.md LICENSE ./
COPY kernels kernels
COPY transfer transfer
COPY embedding_worker embedding_worker
COPY language_worker language_worker
COPY cluster cluster
RUN python -m build --wheel --no-isolation --outdir /wheels

# Third parties change seldom: a layer of their own, made before our wheel is looked at. The C compiler makes the small loops that
# decode on the CPU, and Triton's launchers, when they first run. (Debian drops old versions of its packages, so the release in
# PYTHON_IMAGE is their pin.)
FROM ${PYTHON_IMAGE} AS base
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends gcc libc6-dev \
    && rm -rf /var/lib/apt/lists/*
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PYTHONDONTWRITEBYTECODE=1
WORKDIR /opt/tandem
COPY constraints.txt ./
RUN groupadd --gid 1000 tandem && useradd --uid 1000 --gid 1000 --create-home tandem
COPY cluster/demo/model demo-model

FROM base AS cpu
# TORCH_INDEX: an index with the builds of torch for CPUs; without it the larger ordinary build comes, which runs as well.
ARG TORCH_INDEX=""
RUN pip install --constraint constraints.txt ${TORCH_INDEX:+--extra-index-url "${TORCH_INDEX}"} torch
# [data] is what batch jobs read images and write answers with (docs/operating.md, Jobs).
RUN --mount=type=bind,from=wheel,source=/wheels,target=/wheels \
    for wheel in /wheels/*.whl; do pip install --constraint constraints.txt "${wheel}[data]"; done
USER 1000:1000
WORKDIR /home/tandem
EXPOSE 8000
CMD ["tandem", "serve", "--model", "/opt/tandem/demo-model", "--served-model-name", "tandem-demo"]

FROM base AS gpu
# CUDA comes with torch, the driver with the node.
RUN pip install --constraint constraints.txt torch triton
RUN --mount=type=bind,from=wheel,source=/wheels,target=/wheels \
    for wheel in /wheels/*.whl; do pip install --constraint constraints.txt "${wheel}[data]"; done
# Which devices a container sees is said by who starts it (--gpus, a device plugin): an image that asks for all of them would give
# them to pods on the node that asked for none.
ENV NVIDIA_DRIVER_CAPABILITIES=compute,utility TRITON_CACHE_DIR=/tmp/triton
USER 1000:1000
WORKDIR /home/tandem
EXPOSE 8000
CMD ["tandem", "serve", "--model", "/opt/tandem/demo-model", "--served-model-name", "tandem-demo"]
