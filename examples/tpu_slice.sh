#!/bin/bash
# Trains on all hosts of a TPU slice. Every host needs the same checkout, with .venv, in ~/modse-jax,
# and the workdir must be on a file system that all of them see.
#
#     bash examples/tpu_slice.sh NAME --config=configs/modse_300m_x8.py \
#         --workdir=/mnt/shared/300m --config.mesh.expert=4
name=$1
shift
gcloud compute tpus tpu-vm ssh "$name" --worker=all \
    --command="cd modse-jax && .venv/bin/python train.py --distributed $(printf '%q ' "$@")"
