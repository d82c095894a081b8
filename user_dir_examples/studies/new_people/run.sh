#!/usr/bin/env bash
# What does a model forget when it learns new facts? README.md has the criteria.
#   run.sh FACTS OUT [toy]
# FACTS is the folder that the study of facts filled. What is finished is skipped. Two trainings at a
# time, one thread each. With "toy" it runs through with sizes that show nothing.
set -euo pipefail
if [ $# -lt 2 ] || [ $# -gt 3 ] || [ "${3-toy}" != toy ]; then
    echo "usage: run.sh FACTS OUT [toy]" >&2
    exit 2
fi
[ -d "$1/runs" ] || { echo "run.sh: no folder $1/runs" >&2; exit 2; }
mkdir -p "$2"
facts=$(realpath "$1") out=$(realpath "$2") size=${3-full}
study=$(realpath "$(dirname "$0")")
cd "$study/../../.."
source user_dir_examples/processes.sh
[ -x .venv/bin/fairseq-train ] && PATH="$PWD/.venv/bin:$PATH"
run python "$study/train.py" "$facts" "$out" --size "$size"
run python "$study/table.py" "$out" --size "$size"
