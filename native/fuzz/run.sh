#!/bin/sh
# Builds the fuzz targets with address and undefined-behaviour sanitizers and runs each for SECONDS.
#
#   native/fuzz/run.sh SECONDS [TARGET...]      targets: json safetensors config codes folder (default: all)
#
# BUILD=folder (default build/fuzz), RUNS=n (at most so many inputs), CXX (default clang++, whose libFuzzer follows
# coverage; else g++ with the plain mutating driver). An input over one second of processor time, or over 512 MB of
# memory, is a failure. New inputs that libFuzzer keeps go to BUILD/corpus. Exit status 1 if any target fails; the input lies in
# BUILD/failures.
set -eu
seconds=${1:?usage: native/fuzz/run.sh SECONDS [TARGET...]}
shift
[ $# -gt 0 ] || set -- json safetensors config codes folder
here=$(cd "$(dirname "$0")" && pwd)
build=${BUILD:-$here/../../build/fuzz}
if [ -z "${CXX:-}" ]; then
  if command -v clang++ >/dev/null 2>&1; then CXX=clang++; else CXX=g++; fi
fi
export CXX
mkdir -p "$build/failures"
build=$(cd "$build" && pwd)
cmake -S "$here/.." -B "$build" -DBITDISTILL_PYTHON=OFF -DBITDISTILL_FUZZ=ON \
  -DBITDISTILL_SANITIZE=address,undefined >"$build/configure.log"
for target in "$@"; do
  cmake --build "$build" --target "fuzz_$target" -j2 >"$build/build.log" 2>&1 || {
    tail -n 30 "$build/build.log"
    exit 1
  }
done
python3 "$here/seeds.py" "$build/seeds"
export ASAN_OPTIONS=detect_leaks=1:allocator_may_return_null=0 UBSAN_OPTIONS=halt_on_error=1:print_stacktrace=1
status=0
for target in "$@"; do
  mkdir -p "$build/corpus/$target" "$build/failures/$target"
  cd "$build/failures/$target"
  echo "fuzz_$target, $CXX"
  "$build/fuzz_$target" -max_total_time="$seconds" ${RUNS:+-runs="$RUNS"} -timeout=30 -rss_limit_mb=512 -max_len=65536 \
    -print_final_stats=1 -verbosity=0 "$build/corpus/$target" "$build/seeds/$target" >"$build/$target.log" 2>&1 || {
    status=1
    tail -n 40 "$build/$target.log"
    echo "FAILED: see $build/$target.log and $build/failures/$target"
  }
  grep -E "^(Done|stat::(number_of_executed_units|average_exec_per_sec|peak_rss_mb))" \
    "$build/$target.log" || true
done
exit $status
