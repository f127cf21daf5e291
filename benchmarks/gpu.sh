#!/bin/sh
# Measures every target of this library on the GPU of this machine, in about six minutes: benchmarks/gpu.sh [options of
# `python -m benchmarks.gpu`]. It needs JAX for CUDA (0.11 or later for CUDA 13) and this library's dependencies; PYTHON says
# which Python has them. On a machine without network, WHEELS is a folder with the wheels that its Python lacks:
#
#     WHEELS=wheels benchmarks/gpu.sh --out results
set -eu
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python3}
if [ -n "${WHEELS:-}" ]; then
    folder=$(mktemp -d)
    trap 'rm -rf "$folder"' EXIT
    "$PYTHON" -m venv --system-site-packages "$folder"
    PYTHON=$folder/bin/python
    "$PYTHON" -m pip install --quiet --no-index --no-deps "$WHEELS"/*.whl
fi
"$PYTHON" -m benchmarks.gpu "$@"
