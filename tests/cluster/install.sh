#!/bin/sh
# What tests/cluster needs beyond Python: Debian's Slurm and munge. Does nothing where they are.
set -eu
PATH="$PATH:/usr/sbin:/sbin"
missing=""
for program in slurmctld slurmd squeue sbatch munged; do
    command -v "$program" >/dev/null || missing="$missing $program"
done
[ -z "$missing" ] && exit 0
command -v apt-get >/dev/null || { echo "not found:$missing; install Slurm and munge with your package manager" >&2; exit 1; }
as_root=""
[ "$(id -u)" = 0 ] || as_root="sudo"
echo "installing slurm-wlm and munge (Debian)"
export DEBIAN_FRONTEND=noninteractive
# Daemons that the packages may start are not used: the tests start their own, with their own configuration.
$as_root apt-get update -q >/dev/null
$as_root apt-get install -q -y --no-install-recommends slurm-wlm munge >/dev/null
