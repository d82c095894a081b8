#!/usr/bin/env bash
# Finetune with fairseq-hydra-train: run.sh TASK GLUE-DATA CHECKPOINT SAVE-DIR [-m] [override ...]
# TASK is the name of a file in config/, GLUE-DATA a folder made by prepare_glue.py. With -m,
# each job of the sweep gets a folder in SAVE-DIR.
set -euo pipefail
if [ $# -lt 4 ]; then
    echo "usage: run.sh TASK GLUE-DATA CHECKPOINT SAVE-DIR [-m] [override ...]" >&2
    exit 2
fi
here=$(cd "$(dirname "$0")" && pwd)
root=$(cd "$here/../.." && pwd)
[ -f "$here/config/$1.yaml" ] || { echo "run.sh: no file $here/config/$1.yaml" >&2; exit 2; }
[ -d "$2/$1" ] || { echo "run.sh: no folder $2/$1, which prepare_glue.py must have made" >&2; exit 2; }
[ -f "$3" ] || { echo "run.sh: no checkpoint $3" >&2; exit 2; }
task=$1 data=$(realpath "$2") checkpoint=$(realpath "$3") save_dir=$(realpath -m "$4")
shift 4
sweep=()
if [ "${1-}" = -m ]; then sweep=(-m) && shift; fi # hydra wants it before all overrides
bin=$root/.venv/bin
command -v fairseq-hydra-train >/dev/null && bin=$(dirname "$(command -v fairseq-hydra-train)")
exec "$bin/fairseq-hydra-train" --config-dir "$here/config" --config-name "$task" "${sweep[@]}" \
    common.user_dir="'$root/pkm_fairseq'" task.data="'$data/$task'" \
    checkpoint.finetune_from_model="'$checkpoint'" \
    hydra.run.dir="'$save_dir'" hydra.sweep.dir="'$save_dir'" "$@"
