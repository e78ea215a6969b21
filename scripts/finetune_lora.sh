#!/usr/bin/env bash
# LoRA in the language model, and the projector, under a pruner; settings as in finetune.sh.
set -euo pipefail
LORA=1 exec bash "$(dirname "$0")/finetune.sh" "$@"
