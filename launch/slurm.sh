#!/bin/bash
# Train on several nodes under Slurm, over as many jobs as it takes:
#
#   sbatch --nodes=4 --gpus-per-node=8 launch/slurm.sh recipes/pretrain.py --config recipes/pretrain_gpt2_124m.yaml
#
# A job that is about to reach its time limit saves, and is queued again. A job that has failed is queued again up to
# FAILURES times (5). Slurm itself queues a job again that loses a node. output_dir has to be on a disk that all nodes
# share. data_dir may be on local disks: each node then prepares the same shards for itself.
#SBATCH --job-name=llmkit --ntasks-per-node=1 --cpus-per-gpu=8 --time=12:00:00
#SBATCH --requeue --open-mode=append --output=%x-%j.log
#SBATCH --signal=B:USR1@300
# (The signal comes 300 seconds before the limit, and one step and one save have to fit into that time.)
set -u

export NODES=$SLURM_JOB_NUM_NODES RANKS_PER_NODE=${SLURM_GPUS_ON_NODE:-${RANKS_PER_NODE:-1}}
HEAD=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
export HEAD PORT=$((20000 + SLURM_JOB_ID % 10000)) # so that two jobs on a node do not share a port
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=240 # seconds that torch's launcher waits for the save

out_of_time=
save() {
    out_of_time=1
    scancel --signal=TERM "$SLURM_JOB_ID" # to the ranks and their launchers, but not to this script
}
trap save USR1

# shellcheck disable=SC2016  # each node's own shell fills in its number
srun --kill-on-bad-exit=1 bash -c 'NODE_RANK=$SLURM_NODEID exec launch/node.sh "$@"' node \
    "$@" --resume_from_checkpoint latest &
wait $!
status=$?
while kill -0 $! 2>/dev/null; do # the signal ended `wait`, but not the run
    wait $!
    status=$?
done

failures=llmkit-$SLURM_JOB_ID.failures
if [ -z "$out_of_time" ] && [ $status -ne 0 ]; then
    echo "$(date): status $status" >>"$failures"
fi
if [ -n "$out_of_time" ] || { [ $status -ne 0 ] && [ "$(wc -l <"$failures")" -le "${FAILURES:-5}" ]; }; then
    scontrol requeue "$SLURM_JOB_ID"
fi
exit $status
