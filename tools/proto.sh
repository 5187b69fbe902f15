#!/usr/bin/env bash
# Generates proto/gen from proto/. The output is committed; `make check` regenerates it and compares.
# Usage: tools/proto.sh [OUTPUT_FOLDER]     generate, by default into proto/gen
#        tools/proto.sh --check             generate elsewhere and compare with proto/gen; 1 when they differ
set -euo pipefail
cd "$(dirname "$0")/.."
bin=${VENV:-.venv}/bin

generate() {
  local out=$1
  rm -rf "${out:?}/layercast"
  mkdir -p "$out"
  local protos
  mapfile -t protos < <(cd proto && find layercast -name '*.proto' | sort)
  PATH="$bin:$PATH" "$bin/python" -m grpc_tools.protoc -I proto \
    --python_out="$out" --grpc_python_out="$out" --mypy_out="quiet:$out" --mypy_grpc_out="quiet:$out" "${protos[@]}"
  # Regular packages: a namespace package would be invisible to import-linter.
  find "$out/layercast" -type d -exec touch {}/__init__.py {}/py.typed \;
}

if [ "${1:-}" != --check ]; then
  generate "${1:-proto/gen}"
  exit 0
fi

fresh=$(mktemp -d)
trap 'rm -rf "$fresh"' EXIT
generate "$fresh"
if ! diff --recursive --unified=1 --exclude=__pycache__ proto/gen/layercast "$fresh/layercast"; then
  echo "proto/gen is not what proto/ generates: run \`make proto\` and commit the result." >&2
  exit 1
fi
