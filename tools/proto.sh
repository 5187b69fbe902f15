#!/usr/bin/env bash
# Generates proto/gen from proto/. The output is committed; `make check` regenerates it and compares.
# Usage: tools/proto.sh [OUTPUT_FOLDER]
set -euo pipefail
cd "$(dirname "$0")/.."
out=${1:-proto/gen}
bin=${VENV:-.venv}/bin
rm -rf "${out:?}/layercast"
mkdir -p "$out"
PATH="$bin:$PATH" "$bin/python" -m grpc_tools.protoc -I proto \
  --python_out="$out" --grpc_python_out="$out" --mypy_out="quiet:$out" --mypy_grpc_out="quiet:$out" \
  $(cd proto && find layercast -name '*.proto' | sort)
# Regular packages: a namespace package would be invisible to import-linter.
find "$out/layercast" -type d -exec touch {}/__init__.py {}/py.typed \;
