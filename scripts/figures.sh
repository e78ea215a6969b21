#!/usr/bin/env bash
# The paper's figures: OUT/flat and OUT/anyres on the embedded models, or OUT on MODEL.
#   MODEL=liuhaotian/llava-v1.5-7b DATA=data TASK=pope BLOCK=50 SAMPLES=4 bash scripts/figures.sh
#   FLIPS=1: also search all of TASK for answers that only the local stage gets right (Figure 3).
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}"
python=${PYTHON:-$([ -x "$root/.venv/bin/python" ] && echo "$root/.venv/bin/python" || echo python3)}
out=${OUT:-results/figures}
asked=(--block "${BLOCK:-50}" --samples "${SAMPLES:-2}" --task "${TASK:-pope}" ${DATA:+--data "$DATA"})

draw() {
    "$python" -m eval figures "${asked[@]}" "$@"
    [ -z "${FLIPS:-}" ] || "$python" -m eval figures "${asked[@]}" "$@" --flips
}
if [ -n "${MODEL:-}" ]; then draw --model "$MODEL" --out "$out"; exit; fi
draw --out "$out/flat"
draw --model "$root/eval/nano/checkpoints/anyres" --out "$out/anyres"
