#!/usr/bin/env bash
# How many facts does a model store, with a memory and without? README.md has the criteria.
#   run.sh OUT [toy]
# What is finished is skipped. Two trainings at a time, one thread each. With "toy" it runs through
# with sizes that show nothing.
set -euo pipefail
if [ $# -lt 1 ] || [ $# -gt 2 ] || [ "${2-toy}" != toy ]; then
    echo "usage: run.sh OUT [toy]" >&2
    exit 2
fi
mkdir -p "$1"
out=$(realpath "$1") size=${2-full}
study=$(realpath "$(dirname "$0")")
cd "$study/../../.."
source user_dir_examples/processes.sh
[ -x .venv/bin/fairseq-train ] && PATH="$PWD/.venv/bin:$PATH"
run python "$study/train.py" "$out" --size "$size"
run python "$study/step_times.py" "$out" --size "$size"
run python "$study/table.py" "$out" --size "$size"
