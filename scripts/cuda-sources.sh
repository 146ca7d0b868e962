#!/usr/bin/env bash
# One number for everything that runs on a GPU: figures in docs/device-runs carry it, so that one sees when they are older than
# the code.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
git ls-files -z autosp-runtime/src/cuda autosp-runtime/src/cuda.rs autosp-runtime/src/attention/graphs.rs \
    autosp-runtime/src/comm/nccl.rs autosp-runtime/src/train/optimizer/gpu.rs autosp-runtime/src/ops/modules.rs templates/kernels |
    sort -z | xargs -0 sha256sum | sha256sum | cut -c1-16
