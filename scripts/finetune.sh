#!/usr/bin/env bash
# Tune the projector of a LLaVA-v1.5 under a pruner, with LLaVA's own trainer; after a stop, again.
#   DATA=llava_v1_5_mix665k.json IMAGES=folder NPROC=8 bash scripts/finetune.sh
#   PRUNER_ARGS="r=2,k=25,c=2 r=2,k=14,c=3"   of several, each step draws one
# MODEL= DATA= IMAGES= OUT= PRUNER= PRUNER_ARGS= NPROC= (GPUs) BATCH= (of a GPU) GLOBAL_BATCH= LR=
# EPOCHS= SAVE_STEPS= ZERO=2 or 3 (none: no DeepSpeed). DRY_RUN=1 prints what it would launch.
# Further arguments are LLaVA's own. finetune_lora.sh: LoRA and the projector.
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}"
python=${PYTHON:-$([ -x "$root/.venv-4.37.2/bin/python" ] && echo "$root/.venv-4.37.2/bin/python" || echo python3)}
model=${MODEL:-liuhaotian/llava-v1.5-7b} nproc=${NPROC:-1} batch=${BATCH:-16}
out=${OUT:-results/$(basename "$model")-${PRUNER:-hivtp}-$([ -n "${LORA:-}" ] && echo lora || echo projector)}
run() { if [ -n "${DRY_RUN:-}" ]; then printf '%q ' "$@"; echo; else "$@"; fi; }

how=(--tune_mm_mlp_adapter True --learning_rate "${LR:-2e-5}")
[ -z "${LORA:-}" ] || how=(--lora_enable True --lora_r 128 --lora_alpha 256 --mm_projector_lr 2e-5
                           --learning_rate "${LR:-2e-4}")
[ -z "${ZERO:-}" ] || how+=(--deepspeed "$root/configs/deepspeed/zero$ZERO.json")
if [ -n "${DRY_RUN:-}" ] || command -v nvidia-smi > /dev/null; then how+=(--bf16 True --tf32 True)
elif [ -z "${ZERO:-}" ]; then how+=(--use_cpu True); fi
read -ra arguments <<< "${PRUNER_ARGS:-r=2,k=14,c=3}"
launch=("$python")
[ "$nproc" = 1 ] || launch+=(-m torch.distributed.run --standalone --nproc_per_node "$nproc")
steps=$((${GLOBAL_BATCH:-128} / (batch * nproc)))
run "${launch[@]}" -m llava_hivtp.training --model_name_or_path "$model" --version v1 \
    --pruner "${PRUNER:-hivtp}" --pruner_args "${arguments[@]}" --output_dir "$out" \
    --data_path "${DATA:?a conversation JSON}" --image_folder "${IMAGES:?a folder}" \
    --num_train_epochs "${EPOCHS:-1}" --per_device_train_batch_size "$batch" \
    --gradient_accumulation_steps $((steps > 0 ? steps : 1)) --save_steps "${SAVE_STEPS:-200}" \
    --save_total_limit 2 --lr_scheduler_type cosine --warmup_ratio 0.03 --weight_decay 0 \
    --model_max_length 2048 --gradient_checkpointing True --dataloader_num_workers 4 \
    --logging_steps 1 --report_to none "${how[@]}" "$@"
run "$python" -m llava_hivtp.training.merge "$model" "$out" "$out-merged"
