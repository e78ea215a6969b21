#!/usr/bin/env bash
# TTFT and throughput of Tables 1 and 2 as ratios to the unpruned model, beside the ideal ones.
#   bash scripts/efficiency.sh                       7B shapes with random weights, on a GPU
#   LAYERS=2 ROUNDS=3 bash scripts/efficiency.sh     two language-model layers, for a CPU
#   V15=folder NEXT=folder bash scripts/efficiency.sh    checkpoints instead of random weights
# Further options go to `python -m eval efficiency`.
set -euo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-$([ -x .venv/bin/python ] && echo .venv/bin/python || echo python3)}
OUT=${OUT:-results/efficiency}
OPTIONS=(--rounds "${ROUNDS:-20}" --rows "${ROWS:-paper}" ${LAYERS:+--layers "$LAYERS"} "$@")
MODEL15=(--random-weights llava-v1.5-7b)
NEXT7B=(--random-weights llava-v1.6-vicuna-7b)
[ -n "${V15:-}" ] && MODEL15=("$V15")
[ -n "${NEXT:-}" ] && NEXT7B=("$NEXT")

# The printed cells imply answers of about 4 tokens for v1.5 and 10 for NeXT.
"$PYTHON" -m eval efficiency "${MODEL15[@]}" --table configs/table1.yaml --new-tokens 2,4,10 \
    --out "$OUT/table1" "${OPTIONS[@]}"
"$PYTHON" -m eval efficiency "${NEXT7B[@]}" --table configs/table2.yaml --new-tokens 4,10,16 \
    --size 640x480 --size 672x672 --layout unpad,mosaic --out "$OUT/table2" "${OPTIONS[@]}"
