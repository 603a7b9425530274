#!/usr/bin/env bash
# Download the wheels of lockstep's dependencies, in the versions of requirements.lock, into a folder; build deepspeed's there.
# torch's plain wheel brings CUDA as wheels of its own, which the lock has too.
set -euo pipefail
cd "$(dirname "$0")/../.."
export PATH="$HOME/.local/bin:$PATH"
mkdir -p "$1" build
python=$(command -v python3.11 || command -v python3.12 || command -v python3.13 || command -v python3)
sed -nE 's/^([A-Za-z0-9._-]+==[^ \\]+( ;[^\\]*)?).*/\1/p' requirements.lock > build/gpu-constraints.txt
"$python" -c 'import tomllib; print(*tomllib.load(open("pyproject.toml", "rb"))["project"]["dependencies"], sep="\n")' \
  > build/gpu-requirements.txt
pip=("$python" -m pip)
if command -v uv >/dev/null; then pip=(uv run --quiet --no-project --isolated --python "$python" --with pip python -m pip); fi
"${pip[@]}" wheel --quiet --wheel-dir "$1" --constraint build/gpu-constraints.txt --requirement build/gpu-requirements.txt
echo "== gpu-wheels: $(find "$1" -name '*.whl' | wc -l) wheels in $1, $(du -sh "$1" | cut -f1); now: make gpu WHEELS=$1"
