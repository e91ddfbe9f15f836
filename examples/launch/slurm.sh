#!/bin/bash
# fewstep on several nodes of Slurm, continued until it is finished:
#
#   sbatch --nodes=8 slurm.sh runs/sdxl distill t2i --teacher sdxl --domain "Prompts('prompts.txt')"
#
# First the run folder, on a disk that all nodes share; then the command without --out and --device.
# Exit codes: 0 finished; 75 saved, and the same command continues; others as srun gives them.
# Before its time is over the job saves, and is queued again. What Slurm takes off its nodes is
# saved too, if Slurm waits for it (KillWait, GraceTime).

#SBATCH --job-name=fewstep
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=24:00:00
#SBATCH --signal=B:USR1@300
#SBATCH --requeue
#SBATCH --open-mode=append

set -uo pipefail
if (($# < 2)); then
    echo "usage: sbatch slurm.sh RUN distill RECIPE --teacher ..." >&2
    exit 2
fi
run=$1
shift

# torchrun kills so many seconds after SIGTERM; a checkpoint has to be written by then.
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=240
host=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)

stopped=""
job=""
save() { # Slurm tells this script alone that time is nearly over, and everyone to end
    stopped=time
    [[ -z $job ]] || kill -TERM "$job" 2>/dev/null
}
trap save USR1
trap 'stopped=end' TERM

srun --kill-on-bad-exit=1 torchrun \
    --nnodes="$SLURM_JOB_NUM_NODES" \
    --nproc-per-node="${SLURM_GPUS_ON_NODE:-8}" \
    --rdzv-backend=c10d \
    --rdzv-endpoint="$host:$((29000 + SLURM_JOB_ID % 1000))" \
    --rdzv-id="$SLURM_JOB_ID-${SLURM_RESTART_COUNT:-0}" \
    --max-restarts=3 \
    --signals-to-handle=SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1 \
    -m fewstep "$@" --out "$run" --device cuda &
job=$!
[[ -z $stopped ]] || save

while wait "$job"; code=$?; kill -0 "$job" 2>/dev/null; do
    : # a signal ended the wait, and not the job
done

# torchrun ends with 1 whether a run failed or was saved, so the folder is asked.
[[ -e $run/student/manifest.json ]] && exit 0
[[ -z $stopped ]] && exit "$code"
[[ $stopped == time ]] && scontrol requeue "$SLURM_JOB_ID"
exit 75
