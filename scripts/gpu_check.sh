#!/usr/bin/env bash
# Builds moeops on a machine with a GPU, then runs what the arguments name, in order: test, sanitize, bench.
#   scripts/gpu_check.sh test bench
# Writes logs and benchmark results to the folder $OUT (default: runs/gpu). Uses the python3 on PATH, which must have
# torch with CUDA and the build requirements; installs moeops into it without touching anything else.
set -uo pipefail
cd "$(dirname "$0")/.."
OUT=${OUT:-runs/gpu}
ARCH=${ARCH:-90a-real}
mkdir -p "$OUT"
export PYTHONUNBUFFERED=1 CMAKE_BUILD_PARALLEL_LEVEL=${CMAKE_BUILD_PARALLEL_LEVEL:-$(nproc)}
failures=0

step() {  # step NAME SECONDS COMMAND...: runs with a limit, keeps the log, reports the last lines
  local name=$1 limit=$2 begin=$SECONDS
  shift 2
  echo "== $name"
  if timeout "$limit" "$@" >"$OUT/$name.log" 2>&1; then
    tail -n "${TAIL:-3}" "$OUT/$name.log"
  else
    echo "$name FAILED with $?"
    tail -n 40 "$OUT/$name.log"
    failures=$((failures + 1))
  fi
  echo "   $name: $((SECONDS - begin)) s"
}

# Every op without torch's caching allocator, which would hide what lies outside a tensor. initcheck has to see torch's
# kernels too, because they write the inputs; the other tools look at ours only.
sanitize() {  # sanitize TOOL SCRIPT_OPTION [OPTION...]
  local tool=$1 option=$2
  shift 2
  PYTORCH_NO_CUDA_MEMORY_CACHING=1 step "sanitize-$tool" "${SANITIZE_SECONDS:-300}" compute-sanitizer --tool "$tool" "$@" \
    --error-exitcode 86 --print-limit 20 python3 scripts/sanitize_ops.py $option
}

step build 300 python3 -m pip install --no-build-isolation --no-deps -e . \
  -C cmake.define.MOEOPS_CUDA=ON -C cmake.define.CMAKE_CUDA_ARCHITECTURES="$ARCH"
python3 -m moeops info >"$OUT/info.log" || exit 1
for what in "$@"; do
  case $what in
    test) step test 420 python3 -m pytest -q -n 6 -m cuda tests ;;
    sanitize)
      sanitize memcheck "" --kernel-name kns=moeops
      sanitize racecheck --own-kernels --kernel-name kns=moeops
      sanitize initcheck --own-kernels
      ;;
    bench) TAIL=400 step bench 540 python3 -m benchmarks.run --device cuda --json "$OUT/cuda.json" ;;
    *) echo "unknown step $what: wanted test, sanitize or bench" && exit 2 ;;
  esac
done
exit $((failures > 0))
