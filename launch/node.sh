#!/bin/bash
# Start the ranks of one node. slurm.sh and skypilot.yaml run this on each of them; so can you, over ssh.
#
#   NODES=2 NODE_RANK=0 HEAD=10.0.0.1 RANKS_PER_NODE=8 launch/node.sh recipes/pretrain.py --config ...
#
#   NODES            how many nodes there are
#   NODE_RANK        which one this is, from 0
#   HEAD             the name or address of node 0; the nodes meet at its port PORT (29500)
#   RANKS_PER_NODE   the GPUs of a node
#   MAX_RESTARTS     how often all ranks are started again where one has ended (3)
#   PET_LOCAL_ADDR   torch's: this node's address, where the others cannot resolve its host name
#
# The arguments are those of `accelerate launch` after these, another --config_file for example, and then the script's.
set -eu
# A new store for each start of the ranks. torch would let them meet in its launcher's own, where they find the addresses
# that the ranks of the start before have left, and fail to connect.
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
# On the command line, because accelerate reads neither the kind of rendezvous nor the restarts from its YAML.
exec accelerate launch --config_file accelerate_configs/multi_node.yaml \
    --num_machines "$NODES" --num_processes $((NODES * RANKS_PER_NODE)) --machine_rank "$NODE_RANK" \
    --main_process_ip "$HEAD" --main_process_port "${PORT:-29500}" \
    --rdzv_backend c10d --rdzv_conf "is_host=$((NODE_RANK == 0))" --max_restarts "${MAX_RESTARTS:-3}" \
    "$@"
