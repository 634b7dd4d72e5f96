#!/usr/bin/env bash
# Builds the kernels into src/gemma2, for working on them: bash scripts/build_kernels.sh [CMake options]
# Needs cmake, ninja and nanobind in the active environment (pip install cmake ninja nanobind).
set -euo pipefail
cd "$(dirname "$0")/.."
cmake -S . -B build/kernels -G Ninja -DGEMMA2_IN_PLACE=ON -DPython_EXECUTABLE="$(command -v python3)" "$@" > build-kernels.log 2>&1 ||
  { cat build-kernels.log; exit 1; }
rm -f build-kernels.log
cmake --build build/kernels
