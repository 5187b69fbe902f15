#!/usr/bin/env bash
# Runs inside the virtual machine of `make test-rdma`: real verbs (RC) on a soft-RoCE device, no other way for bytes.
# The machine's /run/rdma-env knows how NIXL's own libibverbs finds the provider of that device.
set -euo pipefail
python=$1
site=$("$python" -c 'import sysconfig; print(sysconfig.get_paths()["purelib"])')
ibv_devinfo -d rxe0 | sed -n '1,12p'
source /run/rdma-env
nixl_env "$site"
export UCX_LOG_LEVEL=${UCX_LOG_LEVEL:-info} NIXL_LOG_LEVEL=WARN PYTHONSAFEPATH=1 OMP_NUM_THREADS=1
exec "$python" "$(dirname "$0")/chain.py"
