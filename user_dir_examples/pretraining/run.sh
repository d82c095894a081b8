#!/usr/bin/env bash
# Pretrain with fairseq-hydra-train: run.sh CONFIG DATA-BIN SAVE-DIR [-m] [override ...]
# CONFIG is the name of a file in config/, DATA-BIN a folder made by fairseq-preprocess. With -m,
# each job of the sweep gets a folder in SAVE-DIR.
set -euo pipefail
if [ $# -lt 3 ]; then
    echo "usage: run.sh CONFIG DATA-BIN SAVE-DIR [-m] [override ...]" >&2
    exit 2
fi
here=$(cd "$(dirname "$0")" && pwd)
root=$(cd "$here/../.." && pwd)
[ -f "$here/config/$1.yaml" ] || { echo "run.sh: no file $here/config/$1.yaml" >&2; exit 2; }
[ -d "$2" ] || { echo "run.sh: no folder $2, which fairseq-preprocess must have made" >&2; exit 2; }
config=$1 data=$(realpath "$2") save_dir=$(realpath -m "$3")
shift 3
sweep=()
if [ "${1-}" = -m ]; then sweep=(-m) && shift; fi # hydra wants it before all overrides
bin=$root/.venv/bin
command -v fairseq-hydra-train >/dev/null && bin=$(dirname "$(command -v fairseq-hydra-train)")
# one thread is several times faster than two for a model as small as the tiny ones
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
exec "$bin/fairseq-hydra-train" \
    --config-dir "$here/config" --config-name "$config" "${sweep[@]}" \
    common.user_dir="'$root/pkm_fairseq'" task.data="'$data'" \
    hydra.run.dir="'$save_dir'" hydra.sweep.dir="'$save_dir'" "$@"
