# Sourced by one.sh and two.sh: where things are, what was carried put in place, and how a part is run.
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
KIT=${KIT:-/tmp/lfu-gpu}          # outlives a call where the machine stays
OUT=${OUT:-runs/gpu}
DEVICE=${DEVICE:-cuda}
PYTHON=${PYTHON:-python3}
mkdir -p "$KIT" "$OUT"
if compgen -G ".carry/one/wheels/*.whl" >/dev/null && [ ! -d "$KIT/site" ]; then
    "$PYTHON" -m pip install -q --no-index --no-deps --no-compile --no-cache-dir --target "$KIT/site" .carry/one/wheels/*.whl
fi
for part in .carry/one/model.* .carry/two/model.*; do
    [ -f "$part" ] && [ ! -f "$KIT/${part##*/}" ] && cp "$part" "$KIT/"
done
export PYTHONPATH="$KIT/site:$PWD/src:$PWD/tests:$PWD/benchmarks:$PWD/scripts/gpu${PYTHONPATH:+:$PYTHONPATH}"
export PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1 HF_HUB_DISABLE_TELEMETRY=1 TOKENIZERS_PARALLELISM=false OMP_NUM_THREADS=1
export LFU_CACHE="${LFU_CACHE:-$KIT/cache}" TQDM_DISABLE=1

# part NAME SECONDS COMMAND...: with its own limit; what it prints is kept in NAME.log, how it ended in parts.txt
part() {
    local name=$1 limit=$2 begun=$SECONDS rc=0
    shift 2
    timeout --signal=INT --kill-after=15 "$limit" "$@" >"$OUT/$name.log" 2>&1 || rc=$?
    echo "$name: exit $rc after $((SECONDS - begun)) s of $limit" | tee -a "$OUT/parts.txt"
}
