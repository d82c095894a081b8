#!/bin/sh
# On a machine with a GPU and without network: install, run the CUDA tests, write JSON and a log.
exec "${PYTHON:-python3}" "$(dirname "$0")/_gpu_check.py" "$@"
