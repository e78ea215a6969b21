#!/usr/bin/env bash
# The field's table, LLaVA-v1.5-7B (CONFIG=configs/field_next.yaml: LLaVA-NeXT-7B), with printed numbers
# of other papers beside ours. Settings as in table1.sh. After any interruption, run it again.
#   ROWS="full,*-64" TASKS="pope gqa" LIMIT=32 BATCH=8 bash scripts/field.sh
set -euo pipefail
exec bash "$(dirname "$0")/evaluate.sh" field all
