#!/usr/bin/env bash
# Pretrain with an architecture, a criterion and an output of the memory of one's own, by
# fairseq-train and by fairseq-hydra-train, and validate: run.sh DATA-BIN SAVE-DIR [UPDATES]
# DATA-BIN is a folder made by fairseq-preprocess; UPDATES are 200 unless given.
set -euo pipefail
if [ $# -lt 2 ]; then
    echo "usage: run.sh DATA-BIN SAVE-DIR [UPDATES]" >&2
    exit 2
fi
[ -d "$1" ] || { echo "run.sh: no folder $1, which fairseq-preprocess must have made" >&2; exit 2; }
data=$(realpath "$1") out=$(realpath -m "$2") updates=${3:-200}
cd "$(dirname "$0")/../.."
source user_dir_examples/processes.sh
[ -x .venv/bin/fairseq-train ] && PATH="$PWD/.venv/bin:$PATH"
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
interval=$(((updates + 3) / 4)) warmup=$((updates / 10))

run fairseq-train "$data" --user-dir user_dir_examples/extend --save-dir "$out/cli" \
    --arch my_resm_tiny --criterion my_masked_lm --key-penalty 0.5 --memory-output my_gate \
    --task pkm_masked_lm --tokens-per-sample 64 --batch-size 16 \
    --required-batch-size-multiple 1 --optimizer pkm_adam \
    --adam-betas '(0.9,0.98)' --adam-eps 1e-6 --clip-norm 1.0 --lr 1e-3 \
    --lr-scheduler polynomial_decay --warmup-updates "$warmup" --total-num-update "$updates" \
    --max-update "$updates" --seed 1 --num-workers 0 --log-format json --log-interval "$interval"

# the same by hydra, which finds all but the four names of ours in the pretraining example
run fairseq-hydra-train --config-dir user_dir_examples/pretraining/config --config-name resm_tiny \
    common.user_dir=user_dir_examples/extend task.data="'$data'" hydra.run.dir="'$out/hydra'" \
    model._name=my_resm_tiny criterion._name=my_masked_lm +criterion.key_penalty=0.5 \
    model.memory_output=my_gate dataset.required_batch_size_multiple=1 \
    optimization.max_update="$updates" lr_scheduler.warmup_updates="$warmup" \
    common.log_interval="$interval"

run fairseq-validate "$data" --user-dir user_dir_examples/extend --path "$out/hydra/checkpoint_last.pt" \
    --task pkm_masked_lm --valid-subset valid --batch-size 16 \
    --required-batch-size-multiple 1 --log-format json
