#!/usr/bin/env bash
# What does finetuning on a new book learn, and what does it forget? README.md has the criteria.
#   run.sh DEMO BOOKS OUT [toy]
# DEMO is the folder that the demo wrote. BOOKS holds train.txt.xz, one paragraph a line and an empty
# line between books, and train.titles.txt. What is finished is skipped. Two trainings at a time, one
# thread each. With "toy" it runs through with sizes that show nothing, on a demo of the quick preset.
set -euo pipefail
if [ $# -lt 3 ] || [ $# -gt 4 ] || [ "${4-toy}" != toy ]; then
    echo "usage: run.sh DEMO BOOKS OUT [toy]" >&2
    exit 2
fi
for file in "$1"/arms/{resm_init,plain}/checkpoint_last.pt "$2/train.txt.xz" "$2/train.titles.txt"; do
    [ -f "$file" ] || { echo "run.sh: no file $file" >&2; exit 2; }
done
mkdir -p "$3"
demo=$(realpath "$1") books=$(realpath "$2") out=$(realpath "$3") size=${4-full}
study=$(realpath "$(dirname "$0")")
cd "$study/../../.."
source user_dir_examples/processes.sh
[ -x .venv/bin/fairseq-train ] && PATH="$PWD/.venv/bin:$PATH"
run python "$study/train.py" "$demo" "$books" "$out" --size "$size"
run python "$study/table.py" "$out" --size "$size"
