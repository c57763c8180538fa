#!/bin/bash
# Start the ranks of one node. slurm.sh and skypilot.yaml run this on each node; you can do the same over ssh.
#
#   NODES=2 NODE_RANK=0 HEAD=10.0.0.1 RANKS_PER_NODE=8 launch/node.sh recipes/pretrain.py --config ...
#
#   NODES            how many nodes there are
#   NODE_RANK        the number of this node, from 0
#   HEAD             the name or address of node 0; the nodes meet at its port PORT (29500)
#   RANKS_PER_NODE   the GPUs of a node
#   MAX_RESTARTS     how often all ranks are started again after one has failed (3)
#   PET_LOCAL_ADDR   this node's address, if the others cannot resolve its host name (torch reads it)
#
# Arguments: more options of `accelerate launch` (another --config_file, for example), then the script and its own.
# Ranks that are started again resume only if the script has --resume_from_checkpoint latest.
set -eu
# Use a new store each time the ranks are started. In the launcher's own store, which torch uses otherwise, they find
# the addresses of the ranks before them, and fail to connect.
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
# These are given here because accelerate reads neither the kind of rendezvous nor the restarts from its YAML file.
exec accelerate launch --config_file accelerate_configs/multi_node.yaml \
    --num_machines "$NODES" --num_processes $((NODES * RANKS_PER_NODE)) --machine_rank "$NODE_RANK" \
    --main_process_ip "$HEAD" --main_process_port "${PORT:-29500}" \
    --rdzv_backend c10d --rdzv_conf "is_host=$((NODE_RANK == 0))" --max_restarts "${MAX_RESTARTS:-3}" \
    "$@"
