#!/bin/sh
# Install Debian's Slurm and munge, which tests/slurm needs, if they are missing.
set -eu
PATH=$PATH:/usr/sbin:/sbin
missing=
for program in munged slurmctld slurmd sbatch; do
    command -v "$program" >/dev/null || missing="$missing $program"
done
[ -n "$missing" ] || exit 0
if [ "$(id -u)" != 0 ] || ! command -v apt-get >/dev/null; then
    echo "install_slurm.sh: missing:$missing; run as root: apt-get install slurm-wlm munge" >&2
    exit 1
fi
apt-get update -qq
# RUNLEVEL 1: no service starts, since the tests start their own daemons.
DEBIAN_FRONTEND=noninteractive RUNLEVEL=1 \
    apt-get install -qq --yes --no-install-recommends slurm-wlm munge
