# The image of a run: the same launch scripts in docker, pyxis and apptainer. In the order of how seldom they change: Debian's
# packages, what requirements.lock pins, the CUDA compiler, the source. An edit of the source rebuilds the last layer only.
#
#   docker build --target train -t lockstep --build-arg REVISION=$(git rev-parse HEAD) .
#   docker build --target cluster -t lockstep-cluster .        and Slurm: `docker run --rm lockstep-cluster make demo`
#
# The user is lockstep (uid 1000), and any other will do: `--user "$(id -u)" -e HOME=/tmp -v "$PWD:$PWD" -w "$PWD"`. Caches and
# compiled ops go below HOME, runs below the current folder.

# Any Debian or Ubuntu: where it has no Python, the distribution's is installed, which must be 3.11 or newer. It need not have
# CUDA: libraries and compiler come from the wheels that fit torch's, the driver from the host.
ARG BASE=python:3.11-slim-bookworm

FROM ${BASE} AS lockstep
# DeepSpeed compiles its ops at first use, with g++, Python's headers and libaio; NCCL finds InfiniBand through libibverbs.
RUN apt-get update \
    && DEBIAN_FRONTEND=noninteractive apt-get install --yes --no-install-recommends \
        ca-certificates g++ git ibverbs-providers libaio-dev libibverbs1 make \
        $(python3 --version >/dev/null 2>&1 || echo python3-dev python3-venv) \
    && rm -rf /var/lib/apt/lists/*
RUN python3 -m venv /opt/uv \
    && /opt/uv/bin/pip install --no-cache-dir uv \
    && ln -s /opt/uv/bin/uv /usr/local/bin/uv \
    && useradd --uid 1000 --create-home --shell /bin/bash lockstep

# The environment is readable to all and belongs to root: pyxis and apptainer run as the caller. Bytecode is compiled here, since
# whoever runs the image cannot write it.
ENV VIRTUAL_ENV=/opt/lockstep/venv CUDA_HOME=/opt/lockstep/cuda
ENV PATH=${VIRTUAL_ENV}/bin:${CUDA_HOME}/bin:${PATH}
COPY requirements.lock /opt/lockstep/
RUN --mount=type=cache,target=/var/cache/uv \
    uv venv --python python3 "$VIRTUAL_ENV" \
    && uv pip sync --cache-dir /var/cache/uv --link-mode copy --compile-bytecode --require-hashes /opt/lockstep/requirements.lock

# nvcc of the very CUDA that torch was built with, and the names that a linker looks for, which the wheels leave out.
RUN --mount=type=cache,target=/var/cache/uv \
    cuda=$(sed -n 's/^cuda-toolkit==\([0-9.]*\).*/\1/p' /opt/lockstep/requirements.lock) \
    && uv pip install --cache-dir /var/cache/uv --link-mode copy --constraint /opt/lockstep/requirements.lock "cuda-toolkit[nvcc,curand]==$cuda" \
    && ln -s "$VIRTUAL_ENV"/lib/python3*/site-packages/nvidia/cu"${cuda%%.*}" "$CUDA_HOME" \
    && ln -s lib "$CUDA_HOME/lib64" \
    && for library in "$CUDA_HOME"/lib/lib*.so.*; do ln -sf "${library##*/}" "${library%%.so.*}.so"; done

# enroot (pyxis) and docker's NVIDIA runtime bring the driver in where these say so.
ENV NVIDIA_VISIBLE_DEVICES=all NVIDIA_DRIVER_CAPABILITIES=compute,utility
WORKDIR /opt/lockstep/src
COPY --chown=lockstep:lockstep . ./
# The Makefile takes the environment for its own: `make setup` has nothing to do.
RUN uv pip install --no-cache --no-deps --no-build-isolation --editable . \
    && ln -s "$VIRTUAL_ENV" .venv \
    && touch .venv/.made \
    && chown lockstep:lockstep .
CMD ["python", "launch/local.py", "--help"]

FROM lockstep AS cluster
# Slurm of Debian, so that slurm/cluster.py can bring up a cluster inside.
RUN apt-get update \
    && DEBIAN_FRONTEND=noninteractive apt-get install --yes --no-install-recommends munge slurm-client slurmctld slurmd \
    && rm -rf /var/lib/apt/lists/*
USER lockstep

# The last, so that it is what a build without --target makes: Slurm's commands belong to the cluster, not to this image.
FROM lockstep AS train
ARG REVISION=unknown
LABEL org.opencontainers.image.revision=${REVISION}
USER lockstep
