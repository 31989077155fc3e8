#!/bin/sh
# Install what tests/slurm needs, unless it is here: Debian's Slurm and munge.
set -eu
PATH=$PATH:/usr/sbin:/sbin
missing=
for program in munged slurmctld slurmd sbatch; do
    command -v "$program" >/dev/null || missing="$missing $program"
done
[ -n "$missing" ] || exit 0
if [ "$(id -u)" != 0 ] || ! command -v apt-get >/dev/null; then
    echo "not here:$missing; as root: apt-get install slurm-wlm munge" >&2
    exit 1
fi
apt-get update -qq
# RUNLEVEL 1: no service starts, the tests start daemons of their own.
DEBIAN_FRONTEND=noninteractive RUNLEVEL=1 \
    apt-get install -qq --yes --no-install-recommends slurm-wlm munge
