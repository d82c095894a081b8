#!/usr/bin/env bash
# What does finetuning on a new book learn, and what does it forget? README.md has the criteria.
#   run.sh DEMO BOOKS OUT
# DEMO is the folder that the demo wrote. BOOKS holds train.txt.xz, one paragraph a line and an empty
# line between books, and train.titles.txt. What is finished is skipped. One thread.
set -euo pipefail
if [ $# -ne 3 ]; then
    echo "usage: run.sh DEMO BOOKS OUT" >&2
    exit 2
fi
start=$1/arms/resm_init/checkpoint_last.pt
for file in "$start" "$2/train.txt.xz" "$2/train.titles.txt"; do
    [ -f "$file" ] || { echo "run.sh: no file $file" >&2; exit 2; }
done
demo=$(realpath "$1") books=$(realpath "$2") start=$(realpath "$start")
mkdir -p "$3"
out=$(realpath "$3")
study=$(realpath "$(dirname "$0")")
cd "$study/../../.."
source user_dir_examples/processes.sh
[ -x .venv/bin/fairseq-train ] && PATH="$PWD/.venv/bin:$PATH"
export OMP_NUM_THREADS=1
old=$demo/data/bin new=$out/new/bin

once() { # a name, and a command that is not repeated once it has ended well
    local name=$1
    shift
    [ -e "$out/$name.finished" ] && return
    "$@" >>"$out/$name.log" 2>&1 || { echo "$name failed: $(tail -n 1 "$out/$name.log")" >&2; return 1; }
    touch "$out/$name.finished"
    echo "$name is finished"
}
evaluate() { # runs or further, seed, text, data, split: the same masked tokens for all
    python scripts/evaluate_mlm.py "$start" "$out/$1/seed$2"/*/checkpoint_last.pt \
        --data "$4" --split "$5" --json "$out/$1.seed$2.$3.json"
}
study() {
    once prepare python "$study/prepare.py" "$demo" "$books" "$out/new"
    # which slots the old text reads, in batches as large as those of the finetuning
    once count python scripts/memory_usage.py --checkpoint "$start" --data "$old" --split train \
        --tokens 200000 --save-counts "$out/background.pt"
    once count_new python scripts/memory_usage.py --checkpoint "$start" --data "$new" \
        --split train --tokens 100000 --save-counts "$out/new_counts.pt"
    python "$study/train.py" "$start" "$new" "$out"
    python "$study/train.py" "$start" "$new" "$out" --further
    for part in runs further; do
        for seed in 1 2 3; do
            once "evaluate_${part}_old_$seed" evaluate "$part" "$seed" old "$old" test
            once "evaluate_${part}_new_$seed" evaluate "$part" "$seed" new "$new" valid
        done
    done
    python "$study/table.py" "$out"
}
run study
