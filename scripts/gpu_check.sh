#!/usr/bin/env bash
# Everything that needs a GPU, offline, in under nine minutes: tests of kernel and graphs, timings.
#   OUT=results/gpu bash scripts/gpu_check.sh
#   WHEELS=folder      installs these wheels first (beside the machine's own torch)
#   ROUNDS=1 ROWS=hivtp-25 V15=tiny NEXT=tiny-anyres SECONDS_ALLOWED=3600 bash scripts/gpu_check.sh
#                      a dry run, also without a GPU
set -uo pipefail
cd "$(dirname "$0")/.."
OUT=${OUT:-results/gpu} PYTHON=${PYTHON:-python3} END=${SECONDS_ALLOWED:-530} FAILED=0
V15=${V15:-llava-v1.5-7b} NEXT=${NEXT:-llava-v1.6-vicuna-7b}
export HF_HUB_OFFLINE=1 PYTHONUNBUFFERED=1 PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}
mkdir -p "$OUT"
[ -n "${WHEELS:-}" ] && "$PYTHON" -m pip install -q --no-index --no-deps "$WHEELS"/*.whl
# llava hides what it could not import: say it here, before the GPU's time is spent.
"$PYTHON" -c "import llava.model.language_model.llava_llama, matplotlib, pytest, typer, yaml" ||
    exit 1

step() { # seconds, name, command: cut off where these seconds or all are over
    local left=$((END - SECONDS)) limit=$(($1 * END / 530)) name=$2
    timeout $((left < limit ? (left > 1 ? left : 1) : limit)) "${@:3}" >"$OUT/$name.log" 2>&1
    local code=$?
    echo "$name: exit $code after $SECONDS s"
    [ "$code" -eq 0 ] || FAILED=1
}
time_of() { # limit, name, rounds (fewer where time is short), shape, options
    step "$1" "$2" "$PYTHON" -m eval efficiency --out "$OUT/$2" --rounds "${ROUNDS:-$3}" \
        --seconds $(($1 * END / 530 * 7 / 10)) --random-weights "${@:4}"
}

step 60 tests "$PYTHON" -m pytest -q tests/library/test_kernels.py \
    tests/library/test_importance.py -k "not compile"
step 45 graphs-tests "$PYTHON" -m pytest -q tests/test_efficiency.py -k graphs
step 35 tap "$PYTHON" -m eval tap --encoder "$V15" --rounds "${ROUNDS:-20}" --out "$OUT/tap"
T1=(--table configs/table1.yaml) T2=(--table configs/table2.yaml --layout unpad,mosaic)
time_of 90 v15 9 "$V15" "${T1[@]}" --rows "${ROWS:-paper}" --new-tokens 2,4,10,16
time_of 85 next 5 "$NEXT" "${T2[@]}" --rows "${ROWS:-hivtp-*}" --new-tokens 2,4,10,16 \
    --size 672x672 --size 640x480
time_of 50 long 5 "$V15" "${T1[@]}" --rows "${ROWS:-hivtp-25}" --new-tokens 2,4,10,16,64,128
time_of 85 batch 3 "$V15" "${T1[@]}" --rows hivtp-25 --new-tokens 2,32 --batch 16 --largest-batch
time_of 45 graphs 5 "$V15" "${T1[@]}" --rows "${ROWS:-hivtp-*}" --new-tokens 2,4,10,64 --graphs
time_of 35 graphs-next 5 "$NEXT" "${T2[@]}" --rows "${ROWS:-hivtp-25}" --new-tokens 2,10,64 \
    --size 672x672 --graphs
if "$PYTHON" -c "import flash_attn" 2>/dev/null; then
    time_of 60 flash 3 "$V15" "${T1[@]}" --rows "${ROWS:-hivtp-25}" --new-tokens 2,10 \
        --attention flash_attention_2
fi
exit $FAILED
