# The image that ranks run in, with docker, pyxis or apptainer. Layers that change rarely come first: Debian packages, Python
# packages, the CUDA compiler, the source. A change of the source rebuilds only the last layer.
#
#   docker build --target train -t lockstep --build-arg REVISION=$(git rev-parse HEAD) .
#   docker build --target cluster -t lockstep-cluster .        with Slurm: `docker run --rm lockstep-cluster make demo`
#
# The user is lockstep (uid 1000). Any other works too: `--user "$(id -u)" -e HOME=/tmp -v "$PWD:$PWD" -w "$PWD"`. Caches and
# compiled ops are written to HOME, runs to the current folder.

# Any Debian or Ubuntu image with Python 3.11 or newer; without Python, that of the distribution is installed. The image needs no
# CUDA: libraries and compiler come from wheels that match torch, the driver from the host.
ARG BASE=python:3.11-slim-bookworm

FROM ${BASE} AS lockstep
# DeepSpeed compiles its ops at first use, which needs g++, the Python headers and libaio. NCCL needs libibverbs for InfiniBand.
RUN apt-get update \
    && DEBIAN_FRONTEND=noninteractive apt-get install --yes --no-install-recommends \
        ca-certificates g++ git ibverbs-providers libaio-dev libibverbs1 make \
        $(python3 --version >/dev/null 2>&1 || echo python3-dev python3-venv) \
    && rm -rf /var/lib/apt/lists/*
RUN python3 -m venv /opt/uv \
    && /opt/uv/bin/pip install --no-cache-dir uv \
    && ln -s /opt/uv/bin/uv /usr/local/bin/uv \
    && useradd --uid 1000 --create-home --shell /bin/bash lockstep

# The environment belongs to root and is readable by all, because pyxis and apptainer run as the caller. Bytecode is compiled
# here, because the caller cannot write it.
ENV VIRTUAL_ENV=/opt/lockstep/venv CUDA_HOME=/opt/lockstep/cuda
ENV PATH=${VIRTUAL_ENV}/bin:${CUDA_HOME}/bin:${PATH}
COPY requirements.lock /opt/lockstep/
RUN --mount=type=cache,target=/var/cache/uv \
    uv venv --python python3 "$VIRTUAL_ENV" \
    && uv pip sync --cache-dir /var/cache/uv --link-mode copy --compile-bytecode --require-hashes /opt/lockstep/requirements.lock

# nvcc of the CUDA version that torch was built with, and the library names for the linker, which the wheels do not contain.
RUN --mount=type=cache,target=/var/cache/uv \
    cuda=$(sed -n 's/^cuda-toolkit==\([0-9.]*\).*/\1/p' /opt/lockstep/requirements.lock) \
    && uv pip install --cache-dir /var/cache/uv --link-mode copy --constraint /opt/lockstep/requirements.lock "cuda-toolkit[nvcc,curand]==$cuda" \
    && ln -s "$VIRTUAL_ENV"/lib/python3*/site-packages/nvidia/cu"${cuda%%.*}" "$CUDA_HOME" \
    && ln -s lib "$CUDA_HOME/lib64" \
    && for library in "$CUDA_HOME"/lib/lib*.so.*; do ln -sf "${library##*/}" "${library%%.so.*}.so"; done

# Makes enroot (pyxis) and the NVIDIA runtime of docker mount the driver.
ENV NVIDIA_VISIBLE_DEVICES=all NVIDIA_DRIVER_CAPABILITIES=compute,utility
WORKDIR /opt/lockstep/src
COPY --chown=lockstep:lockstep . ./
# Makes the Makefile use this environment: `make setup` has nothing to do.
RUN uv pip install --no-cache --no-deps --no-build-isolation --editable . \
    && ln -s "$VIRTUAL_ENV" .venv \
    && touch .venv/.made \
    && chown lockstep:lockstep .
CMD ["python", "launch/local.py", "--help"]

FROM lockstep AS cluster
# All packages of `make slurm`, which `make demo` runs first: as this user it could install none.
RUN apt-get update \
    && DEBIAN_FRONTEND=noninteractive apt-get install --yes --no-install-recommends \
        mariadb-server-core munge slurm-client slurmctld slurmd slurmdbd \
    && rm -rf /var/lib/apt/lists/*
USER lockstep

# The last target is the default. It has no Slurm: only the host needs the commands of the cluster.
FROM lockstep AS train
ARG REVISION=unknown
LABEL org.opencontainers.image.revision=${REVISION}
USER lockstep
