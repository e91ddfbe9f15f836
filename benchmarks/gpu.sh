#!/usr/bin/env bash
# Every check that needs an accelerator, in one call of a few minutes:
#   benchmarks/gpu.sh [cuda|cpu] > benchmarks/results/NAME.txt
# Needs torch, numpy and safetensors alone; nothing has to be installed.
set -euo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python3}
PYTHONUNBUFFERED=1 PYTHONPATH=. "$PYTHON" benchmarks/gpu.py "${1:-cuda}"
