#!/usr/bin/env bash
# Table 1, LLaVA-v1.5-7B: evaluate, then print. After any interruption, run it again.
#   ROWS=hivtp-50 TASKS="pope gqa" LIMIT=32 BATCH=8 bash scripts/table1.sh
# MODEL= ROWS= TASKS= LIMIT= BATCH= (or auto) OUT= DATA= TIMING_N= MODEL_ARGS= NPROC= (GPUs to use)
# ZERO3=1: one model spread over the NPROC GPUs, for a checkpoint that fits on none of them (no times)
set -euo pipefail
exec bash "$(dirname "$0")/evaluate.sh" table1 all
