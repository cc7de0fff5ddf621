#!/bin/bash
# Command 1, under five minutes: the tests on the GPU, a full card, the cost of a step, where the time over the floor goes.
#   bash scripts/gpu/one.sh        OUT=FOLDER for the results, DEVICE=cpu SIZE=tiny to rehearse
set -uo pipefail
source "$(dirname "$0")/setup.sh"
SIZE=${SIZE:-8b}
WORKERS=${WORKERS:-14}
: >"$OUT/parts.txt"

"$PYTHON" - <<'PY' | tee "$OUT/machine.txt"
import platform, importlib.metadata as m, torch
print(platform.platform(), "torch", torch.__version__, *(f"{n} {m.version(n)}" for n in ("transformers", "trl", "peft", "accelerate")))
if torch.cuda.is_available():
    print(torch.cuda.get_device_name(), torch.cuda.get_device_properties(0).total_memory >> 20, "MiB")
PY
[ "$DEVICE" = cuda ] && nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv >>"$OUT/machine.txt"

tests=(tests/step/test_oracle.py tests/step/test_precision.py tests/model/test_families.py tests/test_trainer.py
       tests/methods tests/evaluation/test_score.py)
short=(${TESTS:+-k "$TESTS"})  # to rehearse with few of them
# each by its name as it ends: what a time limit cuts off is known too (pyproject.toml's -q would hide the names)
named=(-o addopts= -m "not soak" -v --tb=short -rfE -p no:cacheprovider -p no:benchmark)
parallel=()
[ "$WORKERS" -gt 1 ] && parallel=(-n "$WORKERS")
part tests "${LIMIT_TESTS:-75}" "$PYTHON" -m pytest --device "$DEVICE" "${named[@]}" \
    "${parallel[@]}" "${short[@]}" "${tests[@]}"
part accelerator "${LIMIT_ACCELERATOR:-35}" "$PYTHON" -m pytest --device "$DEVICE" "${named[@]}" \
    tests/step/test_accelerator.py

cost=("$PYTHON" benchmarks/step_cost.py --device "$DEVICE" --preset gpu)
small=()
[ "$SIZE" = 8b ] || small=(--size "$SIZE" --length 24 --batch 2 --dtype float32 --rounds 1)
profile=${LIMIT_PROFILE:-52}
left=$((${SECONDS_ALL:-290} - SECONDS - profile - 3))
part step_cost "$left" "${cost[@]}" "${small[@]}" --minutes "$("$PYTHON" -c "print(($left - 20) / 60)")" \
    --json "$OUT/step_cost.json" --markdown "$OUT/step_cost.md"
part profile "$profile" "${cost[@]}" "${small[@]}" --variants sft decoder decoder_unpadded lora --rounds 2 --no-memory \
    --profile --minutes "$("$PYTHON" -c "print(($profile - 15) / 60)")" --json "$OUT/profile.json" --markdown "$OUT/profile.md"

tail -n 3 "$OUT/tests.log" "$OUT/accelerator.log"
cat "$OUT/step_cost.md" "$OUT/profile.md" 2>/dev/null
cat "$OUT/parts.txt"
# eight files come back from some machines: the logs in one
tail -n 4000 "$OUT"/*.log | gzip -9 >"$OUT/logs.txt.gz" && rm -f "$OUT"/*.log
