#!/usr/bin/env bash
# Two nodes of eight GPUs by torchrun. Run it on each node, in the same shared folder, and run it again on a node where it
# has ended with an error: the others wait for it, and all go on from the last checkpoint.
#
#     HEAD=node-a bash configs/launch/torchrun.sh
#
# HEAD is the name of one of the nodes, the same on all. NNODES=1:2 goes on with one node if the other does not come back.
set -euo pipefail

# Without it, torch 2.14 does not tell a node that replaces another one where the others are, and all agents fail.
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1

exec torchrun \
  --nnodes "${NNODES:-2}" \
  --nproc-per-node 8 \
  --rdzv-backend c10d \
  --rdzv-endpoint "${HEAD:?the name of one of the nodes}:29400" \
  --rdzv-id "${RUN:-qwen3_vl}" \
  --max-restarts 10 \
  --shutdown-timeout 120 \
  -m bigmac_lightning.cli fit \
  --config configs/qwen3_vl.yaml \
  --config configs/launch/many_nodes.yaml \
  --ckpt_path auto
