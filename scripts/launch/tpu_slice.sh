#!/bin/bash
# One run over all hosts of a TPU slice, started from your own machine:
#
#     scripts/launch/tpu_slice.sh NAME ZONE --model meta-llama/Llama-3.1-8B-Instruct --data my.jsonl --output /mnt/runs/mine
#
# The slice (`gcloud compute tpus tpu-vm create`) has the repository and its extra `tpu` installed on every host, in
# ~/qlora_jax. JAX finds the other hosts by itself. The output folder is written by worker 0 alone; it is on its disk, or on
# one that outlives the slice (a disk of its own, Filestore, a bucket through gcsfuse), if the run is to survive the slice.
# The same command goes on with a run that was stopped.
set -euo pipefail

name=${1:?the name of the slice} zone=${2:?its zone}
shift 2
arguments=${*:+$(printf ' %q' "$@")}
exec gcloud compute tpus tpu-vm ssh "$name" --zone "$zone" --worker=all \
    --command "cd ~/qlora_jax && python scripts/train.py --distributed on --join-timeout 300$arguments"
