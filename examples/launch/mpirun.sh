#!/usr/bin/env bash
# OpenMPI, with as many ranks on each host as it has slots:
#
#     HOSTS=localhost:8 bash mpirun.sh
#     HOSTS=node1:8,node2:8 bash mpirun.sh
#
# launch.init() takes the ranks from OpenMPI. It cannot know the host of rank 0, which is the first of the list.
set -euo pipefail
cd "$(dirname "$0")"

HOSTS="${HOSTS:-localhost:2}"
export MASTER_ADDR="${HOSTS%%[:,]*}"
# Without --bind-to none, OpenMPI may pin all threads of a rank to one core.
exec mpirun --host "$HOSTS" --bind-to none -x MASTER_ADDR -x PATH python train.py "$@"
