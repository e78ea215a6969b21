#!/usr/bin/env bash
# Tables 1, 2 and 3 on the embedded model, offline: results/nano/.
# FULL=1: every row and ten times the questions.
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
cd "$root"
python=${PYTHON:-$([ -x .venv/bin/python ] && echo .venv/bin/python || echo python3)}
exec "$python" -m eval.nano demo ${FULL:+--size full} --out "${OUT:-results/nano}"
