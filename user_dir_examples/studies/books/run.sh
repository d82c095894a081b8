#!/usr/bin/env bash
# Are the claims of the paper seen at a small scale? README.md has the criteria.
#   run.sh BOOKS OUT [toy]
# BOOKS holds {train,valid,test}.txt.xz, one paragraph a line. What is finished is skipped. Two
# trainings at a time, one thread each. With "toy" it runs through with sizes that show nothing.
set -euo pipefail
if [ $# -lt 2 ] || [ $# -gt 3 ] || [ "${3-toy}" != toy ]; then
    echo "usage: run.sh BOOKS OUT [toy]" >&2
    exit 2
fi
[ -f "$1/train.txt.xz" ] || { echo "run.sh: no file $1/train.txt.xz" >&2; exit 2; }
mkdir -p "$2"
books=$(realpath "$1") out=$(realpath "$2") size=${3-full}
study=$(realpath "$(dirname "$0")")
cd "$study/../../.."
source user_dir_examples/processes.sh
[ -x .venv/bin/fairseq-train ] && PATH="$PWD/.venv/bin:$PATH"
run python "$study/train.py" "$books" "$out" --size "$size"
run python "$study/table.py" "$out" --size "$size" --json "$out/results.json"
