#!/usr/bin/env bash
# Pretrain the paper's four arms and a plain RoBERTa side by side, small enough for a CPU.
#   run.sh DATA-BIN OUT [UPDATES]
# plain, pkm and resm are trained from scratch for UPDATES updates (default 3000); pkm_init and
# resm_init start from plain after half of them (INIT) and are trained for the other half.
# Two run at a time, one thread each. What is finished is skipped; what was interrupted goes on.
set -euo pipefail
if [ $# -lt 2 ]; then
    echo "usage: run.sh DATA-BIN OUT [UPDATES]" >&2
    exit 2
fi
[ -d "$1" ] || { echo "run.sh: no folder $1, which fairseq-preprocess must have made" >&2; exit 2; }
data=$(realpath "$1") updates=${3:-3000}
mkdir -p "$2"
out=$(realpath "$2")
cd "$(dirname "$0")/../.."
source user_dir_examples/processes.sh
[ -x .venv/bin/fairseq-train ] && PATH="$PWD/.venv/bin:$PATH"
export OMP_NUM_THREADS=1
half=$((updates / 2)) warmup=$((updates / 15))
lr=2e-3
half_lr=$(python -c "print($lr * $half / ($updates - $warmup))") # plain's, after half its updates

train() { # arm, update to stop at, updates of its schedule, warm-up, learning rate, more options
    local arm=$1 stop=$2 total=$3 warmup=$4 lr=$5
    shift 5
    [ -e "$out/$arm/finished_$stop" ] && return
    mkdir -p "$out/$arm"
    fairseq-train "$data" --user-dir pkm_fairseq --save-dir "$out/$arm" \
        --task pkm_masked_lm --tokens-per-sample 64 --max-positions 128 --batch-size 32 \
        --encoder-layers 4 --encoder-embed-dim 128 --encoder-ffn-embed-dim 512 \
        --encoder-attention-heads 4 --dropout 0.0 --attention-dropout 0.0 \
        --adam-betas '(0.9, 0.98)' --adam-eps 1e-6 --weight-decay 0.01 --clip-norm 1.0 \
        --lr "$lr" --lr-scheduler polynomial_decay --warmup-updates "$warmup" \
        --total-num-update "$total" --max-update "$stop" --seed 1 --num-workers 0 --cpu \
        --validate-interval-updates $((updates / 15)) --save-interval-updates "$half" \
        --keep-interval-updates 2 --no-epoch-checkpoints --log-format json --log-interval 50 \
        --max-valid-steps 20 "$@" >>"$out/$arm/train.log" 2>&1 ||
        { echo "$arm failed: $(tail -n 1 "$out/$arm/train.log")" >&2; return 1; }
    touch "$out/$arm/finished_$stop"
    echo "$arm has had $stop updates"
}
memory=(--criterion pkm_masked_lm --optimizer pkm_adam --memory-value-lr 1e-3
    --memory-layers 2 --memory-n-keys 128 --memory-heads 4 --memory-knn 32 --memory-k-dim 64
    --memory-usage-interval $((updates / 15)))
pkm=(--arch pkm_roberta_tiny "${memory[@]}")
resm=(--arch resm_roberta_tiny "${memory[@]}")
plain=(--arch roberta --criterion masked_lm --optimizer adam)

first_half() {
    train plain "$half" "$updates" "$warmup" "$lr" "${plain[@]}"
    start=$out/plain/checkpoint_half.pt
    [ -e "$start" ] || { cp "$out/plain/checkpoint_last.pt" "$start.part" && mv "$start.part" "$start"; }
    train plain "$updates" "$updates" "$warmup" "$lr" "${plain[@]}"
    train resm_init "$half" "$half" 0 "$half_lr" "${resm[@]}" --init-from "$start"
    train pkm_init "$half" "$half" 0 "$half_lr" "${pkm[@]}" --init-from "$start"
}
second_half() {
    train resm "$updates" "$updates" "$warmup" "$lr" "${resm[@]}"
    train pkm "$updates" "$updates" "$warmup" "$lr" "${pkm[@]}"
}
start first_half
first=$!
start second_half
second=$!
wait -n # where one fails, the other one is ended
wait $first
wait $second
