#!/usr/bin/env bash
# evaluate.sh TABLE run|table|all, with the settings named in table1.sh; for the scripts beside it.
set -euo pipefail
[ $# = 2 ] || { echo "usage: bash scripts/evaluate.sh TABLE run|table|all" >&2; exit 2; }
root=$(cd "$(dirname "$0")/.." && pwd)
export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}"
python=${PYTHON:-$([ -x "$root/.venv/bin/python" ] && echo "$root/.venv/bin/python" || echo python3)}
shown=("${CONFIG:-$root/configs/$1.yaml}" --out "${OUT:-results}" ${MODEL:+--model "$MODEL"}
       ${ROWS:+--rows "$ROWS"} ${LIMIT:+--limit "$LIMIT"})
asked=("${shown[@]}" ${TASKS:+--tasks "$TASKS"} --data "${DATA:-data}" --batch "${BATCH:-1}"
       --timing-n "${TIMING_N:-100}" ${MODEL_ARGS:+--model-args "$MODEL_ARGS"} ${SHARD:+--shard "$SHARD"}
       ${ZERO3:+--zero3})
launch=("$python")
[ "${NPROC:-1}" -gt 1 ] && launch+=(-m torch.distributed.run --standalone --nproc_per_node "$NPROC")

[ "$2" = run ] && exec "${launch[@]}" -m eval run "${asked[@]}"
failed=0
[ "$2" = table ] || "${launch[@]}" -m eval run "${asked[@]}" || failed=$?
"$python" -m eval status "${shown[@]}" ${TASKS:+--tasks "$TASKS"}
"$python" -m eval table "${shown[@]}"
exit "$failed"
