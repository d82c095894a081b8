#!/usr/bin/env bash
# What does finetuning on a new book learn, and what does it forget? README.md has the criteria.
#   run.sh BOOKS OUT
# BOOKS holds train.txt.xz, one paragraph a line and an empty line between books, and
# train.titles.txt. What is finished is skipped; what was interrupted goes on. One thread.
set -euo pipefail
if [ $# -ne 2 ]; then
    echo "usage: run.sh BOOKS OUT" >&2
    exit 2
fi
[ -f "$1/train.txt.xz" ] || { echo "run.sh: no file $1/train.txt.xz" >&2; exit 2; }
books=$(realpath "$1")
mkdir -p "$2"
out=$(realpath "$2")
study=$(realpath "$(dirname "$0")")
cd "$study/../../.."
source user_dir_examples/processes.sh
[ -x .venv/bin/fairseq-train ] && PATH="$PWD/.venv/bin:$PATH"
export OMP_NUM_THREADS=1
old=$out/data/old/bin new=$out/data/new/bin base=$out/base/checkpoint_last.pt

once() { # a name, and a command that is not repeated once it has ended well
    local name=$1
    shift
    [ -e "$out/$name.finished" ] && return
    mkdir -p "$(dirname "$out/$name")"
    "$@" >>"$out/$name.log" 2>&1 || { echo "$name failed: $(tail -n 1 "$out/$name.log")" >&2; return 1; }
    touch "$out/$name.finished"
    echo "$(date +%T) $name"
}
common=(--user-dir pkm_fairseq --task pkm_masked_lm --tokens-per-sample 32 --max-positions 32
    --encoder-layers 3 --encoder-embed-dim 128 --encoder-ffn-embed-dim 256
    --encoder-attention-heads 4 --dropout 0 --attention-dropout 0 --adam-betas '(0.9, 0.98)'
    --adam-eps 1e-6 --weight-decay 0.01 --clip-norm 1.0 --required-batch-size-multiple 1
    --num-workers 0 --cpu --no-epoch-checkpoints --log-format json --log-interval 20
    --validate-interval 1000000 --validate-interval-updates 500 --max-valid-steps 20)
memory=(--arch resm_roberta_tiny --criterion pkm_masked_lm --optimizer pkm_adam
    --memory-layers 1 --memory-n-keys 128 --memory-heads 4 --memory-knn 16 --memory-k-dim 64)

pretrain() { # the model that all runs start from: ResM + INIT
    fairseq-train "$old" --save-dir "$out/plain" "${common[@]}" --arch roberta \
        --criterion masked_lm --optimizer adam --lr 3e-3 --lr-scheduler polynomial_decay \
        --warmup-updates 200 --total-num-update 4000 --max-update 2000 --batch-size 64 --seed 1 \
        --save-interval-updates 500 --keep-interval-updates 1
    fairseq-train "$old" --save-dir "$out/base" "${common[@]}" "${memory[@]}" \
        --init-from "$out/plain/checkpoint_last.pt" --lr 1.5e-3 --lr-scheduler polynomial_decay \
        --warmup-updates 0 --total-num-update 1500 --max-update 1500 --batch-size 64 --seed 1 \
        --memory-usage-interval 0 --save-interval-updates 500 --keep-interval-updates 1
}
count() { # which slots the old text reads, in batches as large as those of the finetuning
    python scripts/memory_usage.py --checkpoint "$base" --data "$old" --split train \
        --tokens 200000 --save-counts "$out/background.pt"
}
finetune() { # folder, options: 200 updates on the new book
    local folder=$1
    shift
    fairseq-train "$new" --save-dir "$folder" "${common[@]}" "${memory[@]}" \
        --finetune-from-model "$base" --lr-scheduler fixed --batch-size 16 --max-update 200 \
        --memory-usage-interval 0 --memory-usage-tokens 1000 --disable-validation \
        --no-save-optimizer-state --save-interval-updates 0 "$@"
}
evaluate() { # seed: old and new text, with the same masked tokens for all
    local checkpoints=("$base")
    for arm in "${arms[@]}"; do checkpoints+=("$out/runs/seed$1/$arm/checkpoint_last.pt"); done
    python scripts/evaluate_mlm.py "${checkpoints[@]}" --data "$old" --split valid \
        --json "$out/results/seed$1.old.json"
    python scripts/evaluate_mlm.py "${checkpoints[@]}" --data "$new" --split valid \
        --json "$out/results/seed$1.new.json"
}
slots=(--memory-finetune slots --memory-background "$out/background.pt")
arms=()
run_arm() { # seed, arm, options
    local seed=$1 arm=$2
    shift 2
    arms+=("$arm")
    once "runs/seed$seed/$arm" finetune "$out/runs/seed$seed/$arm" --seed "$seed" "$@"
}
all_runs() { # seed
    arms=()
    for lr in 1e-3 1e-2; do
        run_arm "$1" "values_lr$lr" --lr 0 --memory-value-lr "$lr" --memory-finetune values
        for top in 16 64 256 1024 10% 50%; do
            run_arm "$1" "slots_${top/\%/pct}_lr$lr" --lr 0 --memory-value-lr "$lr" \
                "${slots[@]}" --memory-finetune-slots "$top"
        done
    done
    for lr in 1e-4 1e-3; do
        run_arm "$1" "full_lr$lr" --lr "$lr"
        run_arm "$1" "key_dropout_lr$lr" --lr "$lr" --memory-key-dropout 0.3
        run_arm "$1" "freeze_lr$lr" --lr "$lr" --memory-freeze all
    done
}
study() {
    once prepare python "$study/prepare.py" "$books" "$out/data"
    once pretrain pretrain
    once count count
    mkdir -p "$out/results"
    for seed in 1 2 3; do
        all_runs "$seed"
        once "evaluate_seed$seed" evaluate "$seed"
    done
    python "$study/table.py" "$out"
}
run study
