#!/usr/bin/env bash
# Run the GPU suite with a Python that has torch: from a new environment of the wheels in $WHEELS, else .venv's, else python3.
set -euo pipefail
cd "$(dirname "$0")/../.."
export PATH="$HOME/.local/bin:$PATH" PYTHONPATH=src:tests:benchmarks

list() { # without a GPU the suite only lists its rows, and needs no library
  exec python3 -m gpu.suite "$@"
}

device=${LOCKSTEP_GPU_SUITE_DEVICE:-cuda}
if [ "$device" = cuda ] && ! compgen -G "/dev/nvidia[0-9]*" >/dev/null; then list "$@"; fi

python=
if [ -n "${WHEELS:-}" ]; then
  [ -d "$WHEELS" ] || { echo "gpu: WHEELS: $WHEELS is not a folder; fill one with: make gpu-wheels WHEELS=$WHEELS" >&2; exit 2; }
  python=build/gpu-venv/bin/python
  base=$(command -v python3.11 || command -v python3.12 || command -v python3.13 || command -v python3)
  mkdir -p build
  "$base" -c 'import tomllib; print(*tomllib.load(open("pyproject.toml", "rb"))["project"]["dependencies"], sep="\n")' \
    > build/gpu-requirements.txt
  if [ ! -e build/gpu-venv/.made ]; then
    echo "== gpu: installing from $WHEELS into build/gpu-venv"
    rm -rf build/gpu-venv
    if command -v uv >/dev/null; then
      uv venv --quiet --python "$base" build/gpu-venv
      uv pip install --quiet --offline --no-index --find-links "$WHEELS" --python $python -r build/gpu-requirements.txt
    else
      "$base" -m venv build/gpu-venv
      $python -m pip install --quiet --no-index --find-links "$WHEELS" -r build/gpu-requirements.txt
    fi
    touch build/gpu-venv/.made
  fi
  PATH="$PWD/build/gpu-venv/bin:$PATH" # ninja and such
else
  for candidate in .venv/bin/python python3; do
    if command -v $candidate >/dev/null && $candidate -c 'import torch, lightning' 2>/dev/null; then python=$candidate; break; fi
  done
fi
[ -n "$python" ] || { echo "gpu: no Python with torch here; make setup, or make gpu WHEELS=/path/to/wheels" >&2; exit 2; }
exec $python -m gpu.suite "$@"
