#!/usr/bin/env bash
# One machine, one rank per GPU (or NPROC of them):
#
#     bash torchrun.sh
#
# Several machines: the same line on each of them, HOST being one of them and 29400 a port that is free there:
#
#     NNODES=2 RDZV=HOST:29400 bash torchrun.sh
#
# `macrobatch launch` is torchrun with defaults for one machine. With torchrun itself:
#
#     torchrun --standalone --nproc-per-node gpu train.py
#     torchrun --nnodes 2 --nproc-per-node gpu --rdzv-backend c10d --rdzv-endpoint HOST:29400 train.py
set -euo pipefail
cd "$(dirname "$0")"

options=()
[ -z "${NPROC:-}" ] || options+=(--nproc "$NPROC")
[ -z "${NNODES:-}" ] || options+=(--nnodes "$NNODES" --rdzv "$RDZV")
exec macrobatch launch "${options[@]}" train.py "$@"
