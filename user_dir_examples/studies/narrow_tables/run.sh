#!/usr/bin/env bash
# Does a memory learn as much in half and a third of the bytes? README.md has the criteria.
#   run.sh DATA OUT [toy]
# DATA is the demo's data-bin. What is finished is skipped. Two trainings at a time, one thread
# each. With "toy" it runs through with sizes that show nothing.
set -euo pipefail
if [ $# -lt 2 ] || [ $# -gt 3 ] || [ "${3-toy}" != toy ]; then
    echo "usage: run.sh DATA OUT [toy]" >&2
    exit 2
fi
[ -f "$1/dict.txt" ] || { echo "run.sh: no file $1/dict.txt" >&2; exit 2; }
mkdir -p "$2"
data=$(realpath "$1") out=$(realpath "$2") size=${3-full}
study=$(realpath "$(dirname "$0")")
cd "$study/../../.."
source user_dir_examples/processes.sh
[ -x .venv/bin/fairseq-train ] && PATH="$PWD/.venv/bin:$PATH"
run python "$study/train.py" "$data" "$out" --size "$size"
run python "$study/table.py" "$out" --size "$size"
