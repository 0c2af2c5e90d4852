#!/bin/bash
# Two processes on one machine train as one run, on 4 virtual CPU devices each.
#
#     bash examples/two_processes.sh --config=configs/tiny.py --workdir=runs/two \
#         --config.training.batch_size=8 --config.training.steps=20 --config.mesh.expert=4
cd "$(dirname "$0")/.." || exit
export JAX_PLATFORMS=cpu JAX_NUM_CPU_DEVICES=4
for index in 0 1; do
    .venv/bin/python train.py --coordinator=localhost:9911 --process_count=2 \
        --process_index=$index "$@" &
done
wait
