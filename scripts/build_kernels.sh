#!/usr/bin/env bash
# Builds the kernels into src/gemma2, for working on them: bash scripts/build_kernels.sh [CMake options]
# Needs cmake, ninja and nanobind in the active environment; the extra "dev" has them. Only what changed is compiled.
set -euo pipefail
CDPATH= cd -- "$(dirname "${BASH_SOURCE[0]}")/.."
build=build/kernels
python=$(command -v python3)
# What CMake found for another Python, or for this repository in another place, it would keep.
if ! grep -qs "^Python_EXECUTABLE:.*=$python\$" $build/CMakeCache.txt ||
    ! grep -qs "^CMAKE_HOME_DIRECTORY:.*=$PWD\$" $build/CMakeCache.txt; then
    rm -rf $build
fi
mkdir -p $build
cmake -S . -B $build -G Ninja -DGEMMA2_IN_PLACE=ON -DPython_EXECUTABLE="$python" "$@" >$build/configure.log 2>&1 || {
    cat $build/configure.log
    exit 1
}
cmake --build $build
