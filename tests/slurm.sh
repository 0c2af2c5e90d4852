#!/bin/bash
# Sets up a Slurm cluster of this one machine and trains with two tasks through examples/train.sbatch.
# Runs on Debian, as root, from a checkout in which `make demo` or `make test` has made .venv:
#
#     bash tests/slurm.sh
set -euo pipefail
cd "$(dirname "$0")/.."
command -v slurmctld munged >/dev/null || apt-get install -y --no-install-recommends slurm-wlm munge
work=$(mktemp -d) host=$(hostname -s)
mkdir -p "$work"/{state,spool,log} /run/munge
chown munge: /run/munge
pgrep munged >/dev/null || runuser -u munge -- munged

cat > "$work/slurm.conf" <<CONF
ClusterName=here
SlurmctldHost=$host
SlurmUser=root
AuthType=auth/munge
ProctrackType=proctrack/pgid
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
ReturnToService=2
StateSaveLocation=$work/state
SlurmdSpoolDir=$work/spool
SlurmctldPidFile=$work/slurmctld.pid
SlurmdPidFile=$work/slurmd.pid
SlurmctldLogFile=$work/log/slurmctld
SlurmdLogFile=$work/log/slurmd
NodeName=$host NodeAddr=127.0.0.1 CPUs=$(nproc) State=UNKNOWN
PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE State=UP
CONF
export SLURM_CONF="$work/slurm.conf"
trap 'kill $(cat "$work"/*.pid) 2>/dev/null; sleep 1; rm -rf "$work"' EXIT
slurmctld && slurmd
until sinfo -h -t idle | grep -q all; do sleep 1; done

export JAX_PLATFORMS=cpu JAX_NUM_CPU_DEVICES=4
train() {    # train STEPS [sbatch options]
    local steps=$1
    shift
    sbatch "$@" --nodes=1 --ntasks-per-node=2 --gpus-per-node=0 --output="$work/log/job" examples/train.sbatch \
        --config=configs/tiny.py --workdir="$work/run" --config.mesh.expert=4 --config.training.batch_size=8 \
        --config.data.source="text:$PWD/modse_jax" --config.data.tokenizer=bytes --config.training.checkpoint_every=5 \
        --config.training.log_every=1 --config.training.steps="$steps" || true
}
seen() {    # seen TEXT: waits for it in the job's output
    for _ in $(seq 600); do grep -q "$1" "$work/log/job" 2>/dev/null && return; sleep 1; done
    cat "$work/log/job"
    return 1
}
train 10 --wait
grep -q "finished step 10 " "$work/log/job"
train 20 --wait    # another job resumes it
grep -q "resuming step 10 of 20" "$work/log/job" && grep -q "finished step 20 " "$work/log/job"
[ "$(grep -c '"split": "train"' "$work/run/metrics.jsonl")" = 20 ]
train 500    # stopped by its scheduler, it saves, asks to be queued again, and goes on
seen "step 24/500"
scancel --signal=TERM "$(squeue -h -o %i)"
seen "stopped at step"
seen "resuming step 2[4-9] of 500"
scancel "$(squeue -h -o %i)"
cat "$work/log/job"
echo "Slurm: two tasks trained through three jobs, one of them stopped and queued again"
