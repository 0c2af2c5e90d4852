#!/bin/bash
# Sets up a Slurm cluster of this one machine, trains with two tasks through examples/train.sbatch,
# and trains a sweep through two jobs. Runs on Debian, as root, from a checkout in which `make test`
# has made .venv:
#
#     bash tests/slurm.sh [train] [sweep]
#
# The part `sweep` has not run to its end yet. On a busy machine, two jobs were submitted and started,
# and one that got SIGTERM was put back into the queue and started again. The checks after that (steps
# saved and resumed, the table, a second command, a refused partition) have not been reached.
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
check_train() {
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
}
check_sweep() {
    export JAX_NUM_CPU_DEVICES=1
    cat > "$work/small.py" <<PY
from configs import tiny
from modse_jax.sweeps.definition import Sweep, axis, product, seeds

def get_sweep():
    config = tiny.get_config()
    config.data.update(source="text:$PWD/modse_jax", tokenizer="bytes")
    config.training.update(batch_size=4, steps=400, log_every=1, checkpoint_every=1000)
    return Sweep(base=config, arms=product(axis("moe.top_k", (1, 2)), seeds(0, 1)), compares_shapes=False)
PY
    sweep() { .venv/bin/python -m modse_jax sweep --sweep="$work/small.py" --workdir="$work/sweep" "$@"; }
    finished() { cut -d, -f1,2 "$work/sweep/results.csv" | grep -c ",finished" || true; }
    sweep --launcher=slurm --jobs=2 --slurm=time=30 --slurm=cpus-per-task=1
    # Slurm stops one of the jobs. It saves its run, is put back into the queue, and goes on.
    for _ in $(seq 3000); do
        step=$(cat "$work"/sweep/runs/*/training/metrics.jsonl 2>/dev/null | grep -c '"train"' || true)
        [ "$step" -ge 10 ] && break
        sleep 0.2
    done
    scancel --signal=TERM "$(squeue -h -t running -o %i | head -1)"
    while [ -n "$(squeue -h)" ]; do sleep 1; done
    cat "$work"/sweep/slurm/*log.out "$work"/sweep/slurm/*log.err
    cut -d, -f1,2 "$work/sweep/results.csv"
    [ "$(finished)" = 4 ]
    cat "$work"/sweep/runs/*/output.txt | grep "stopped at step"
    cat "$work"/sweep/runs/*/output.txt | grep "resuming step"
    [ "$(cat "$work"/sweep/runs/*/output.txt | grep -c "starting at step 0")" = 4 ]
    # Everything has been trained, so nothing is submitted.
    sweep --launcher=slurm --slurm=time=30
    [ -z "$(squeue -h)" ]
    # sbatch refuses a partition that does not exist: one line and exit code 1.
    rm "$work"/sweep/runs/*/result.json
    code=0
    sweep --launcher=slurm --slurm=time=30 --slurm=partition=none || code=$?
    [ $code = 1 ]
    echo "Slurm: two jobs trained a sweep of four runs, one of them stopped and queued again"
}
for part in "${@:-train sweep}"; do
    for name in $part; do "check_$name"; done
done
