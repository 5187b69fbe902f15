#!/usr/bin/env bash
# Everything that only a GPU can tell, in one call from anywhere, with no install and no network:
#   bench/gpu.sh           all parts, some five minutes on one H100
#   bench/gpu.sh --shake   correctness of everything and small figures, under three minutes
#   bench/gpu.sh --small   tiny shapes on whatever there is, a CPU too; what the tests run
#   bench/gpu.sh PART...   only these parts
# Prints a table and one line of JSON last; with OUT set, writes results and logs into that folder.
# PYTHON names the interpreter (torch, transformers, numpy, safetensors and pytest must be there; triton should).
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
export PYTHONPATH="$PWD:$PWD/node_agent:$PWD/proto/gen${PYTHONPATH:+:$PYTHONPATH}"
export PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 HF_HUB_OFFLINE=1
exec "${PYTHON:-python3}" -m bench.gpu "$@"
