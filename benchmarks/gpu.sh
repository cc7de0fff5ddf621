#!/bin/sh
# The step's cost on a GPU in one call of at most ten minutes: bf16, sizes up to what fits.
#   sh benchmarks/gpu.sh [FOLDER]      writes FOLDER/step_cost.json, .md and .png (default: runs/gpu)
set -e
cd "$(dirname "$0")/.."
out=${1:-runs/gpu}
exec "${PYTHON:-python3}" benchmarks/step_cost.py --device cuda --preset gpu --minutes "${MINUTES:-9.5}" \
    --json "$out/step_cost.json" --markdown "$out/step_cost.md" --plots "$out"
