#!/usr/bin/env bash
# Checks the operator on a machine with an NVIDIA GPU, measures it, and writes one Markdown file. Under 8 minutes; no
# network. Needs torch >= 2.4 with its Triton, numba, pytest and hypothesis; compares with mmcv, torchvision, birder and
# mmdet's stage as far as they are installed.
#
#   bash tools/check_gpu.sh [--out FILE.md] [--device cpu]    # PYTHON=... chooses the interpreter
set -euo pipefail
cd "$(dirname "$0")/.."
[ -n "${PYTHON-}" ] || { [ -x .venv/bin/python ] && PYTHON=.venv/bin/python || PYTHON=python3; }
exec "$PYTHON" -m benchmarks.check_gpu "$@"
