#!/bin/sh
# The C++ tests under sanitizers: address and undefined behaviour, then threads (N2, N4 of docs/engine.md).
#
#   native/tests/sanitize.sh [SHAPES]       BUILD=folder (default build/sanitize), CXX=compiler
set -eu
shapes=${1:-2000}
here=$(cd "$(dirname "$0")" && pwd)
build=${BUILD:-$here/../../build/sanitize}
mkdir -p "$build"
for kind in address,undefined thread; do
  cmake -S "$here/.." -B "$build/$kind" -DBITDISTILL_PYTHON=OFF -DBITDISTILL_TESTS=ON -DBITDISTILL_SANITIZE="$kind" \
    >"$build.log" 2>&1
  cmake --build "$build/$kind" --target test_kernels test_floats -j2 >>"$build.log" 2>&1
  export UBSAN_OPTIONS=halt_on_error=1:print_stacktrace=1 TSAN_OPTIONS=halt_on_error=1:die_after_fork=0
  echo "sanitizers: $kind"
  "$build/$kind/test_floats"
  "$build/$kind/test_kernels" "$shapes"
done
