#!/bin/bash
# Command 3, under five minutes: the test bed's gaps (lengths, LoRA, the field) and its models of 0.3 and 4 million weights.
#   bash scripts/gpu/bed.sh        OUT=FOLDER, SECONDS_ALL=275; what is finished goes to OUT/WIDTH.jsonl every ten seconds
# The same command goes on where it stopped: on the same machine by itself, on another one from .carry/bed/WIDTH.jsonl.
# Needs PyTorch and NumPy. To rehearse: DEVICE=cpu BASES=2 STEPS=20 SECONDS_ALL=60
set -uo pipefail
source "$(dirname "$0")/setup.sh"
limit=${SECONDS_ALL:-275}

study() {  # width, bases, the second by which it ends, plans...
    local width=$1 bases=$2 end=$3 folder=$KIT/bed/$1
    shift 3
    mkdir -p "$folder"
    [ ! -f "$folder/runs.jsonl" ] && [ -f ".carry/bed/$width.jsonl" ] && cp ".carry/bed/$width.jsonl" "$folder/runs.jsonl"
    [ $((end - SECONDS)) -lt 15 ] && return
    timeout --kill-after=5 "$((limit - SECONDS))" "$PYTHON" benchmarks/bed.py run --plan "$@" --width "$width" \
        --bases "${BASES:-$bases}" --draws 1 --base_steps "${STEPS:-3000}" --device "$DEVICE" --out "$folder" \
        --minutes "$("$PYTHON" -c "print(($end - $SECONDS) / 60)")" 2>&1 | sed "s/^/$width: /"
    collect
}

collect() {
    local file
    for file in "$KIT"/bed/*/runs.jsonl; do
        [ -f "$file" ] && cp "$file" "$OUT/$(basename "$(dirname "$file")").jsonl"
    done
}

(while sleep 10; do collect; done) &
collecting=$!
trap 'kill $collecting 2>/dev/null' EXIT
study 128 24 $((limit * 68 / 100)) updates lora field
study 64 24 $((limit * 79 / 100)) sizes
study 256 16 "$limit" sizes
study 128 24 "$limit" updates lora field sft
wc -l "$OUT"/*.jsonl
echo "all: $SECONDS s"
