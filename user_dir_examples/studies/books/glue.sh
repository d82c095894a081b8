#!/usr/bin/env bash
# Are the paper's claims on downstream tasks seen at a small scale? README.md has the criteria.
#   glue.sh STUDY GLUE OUT [toy]
# STUDY is OUT of run.sh, GLUE has the folders of GLUE's download. Of each seed whose arms are all
# pretrained, it finetunes all arms. What is finished is skipped. Two trainings at a time, one
# thread each. With "toy" it runs through with sizes that show nothing.
set -euo pipefail
if [ $# -lt 3 ] || [ $# -gt 4 ] || [ "${4-toy}" != toy ]; then
    echo "usage: glue.sh STUDY GLUE OUT [toy]" >&2
    exit 2
fi
[ -f "$1/data/spm.model" ] || { echo "glue.sh: no file $1/data/spm.model, which run.sh makes" >&2; exit 2; }
mkdir -p "$3"
books=$(realpath "$1") glue=$(realpath "$2") out=$(realpath "$3") size=${4-full}
study=$(realpath "$(dirname "$0")")
cd "$study/../../.."
source user_dir_examples/processes.sh
[ -x .venv/bin/fairseq-train ] && PATH="$PWD/.venv/bin:$PATH"
if [ "$size" = toy ]; then
    tasks=(RTE) seeds=(1) keys=16 arms=(pkm resm_init plain)
else
    tasks=(SST-2 CoLA MRPC RTE) seeds=(1 2 3) keys=64 arms=(pkm resm pkm_init resm_init plain)
fi
run python scripts/prepare_glue.py --glue-data "$glue" --out "$out/data" --tasks "${tasks[@]}" \
    --dict "$books/data/bin/dict.txt" --bpe sentencepiece --sentencepiece-model "$books/data/spm.model"

finetune() { # folder, arms, settings
    run python scripts/finetune_glue.py --data "$out/data" --out "$1" --preset "$study/glue.yaml" \
        --seeds 1 --workers 2 --checkpoint "${checkpoints[@]}" "${@:2}"
}
for seed in "${seeds[@]}"; do
    checkpoints=() missing=
    for arm in "${arms[@]}"; do
        folder=$books/runs/${arm}_${keys}keys_values0.001_seed$seed
        [ $arm = plain ] && folder=$books/runs/plain_seed$seed
        [ -f "$folder/result.json" ] || missing=$folder
        checkpoints+=("$arm=$folder/checkpoint_last.pt")
    done
    [ -z "$missing" ] || { echo "seed $seed is left out: $missing is not finished"; continue; }
    run python "$study/repeat_positions.py" "$out/seed$seed/start" "${checkpoints[@]}"
    checkpoints=()
    for arm in "${arms[@]}"; do checkpoints+=("$arm=$out/seed$seed/start/$arm.pt"); done
    finetune "$out/seed$seed/none"
    unset 'checkpoints[-1]' # plain, which has no memory
    finetune "$out/seed$seed/freeze" --set memory_freeze=all
    finetune "$out/seed$seed/key_dropout" --set memory_key_dropout=0.1
done
run python "$study/glue_table.py" "$out" --json "$out/glue_results.json"
