#!/usr/bin/env bash
# Everything that needs a CUDA device, in one run: build, tests, benches with CSV files.
#   bench/gpu.sh [DIR [STEP...]]    results go to $OUT or DIR (default bench/results); needs torch, pytest, pytest-benchmark
# Steps: build doctor tests ops memory gas budget cards memcheck racecheck, all unless named. A folder wheels/ with diffusers and
# torchao, where the machine has no network, is installed first.
# Each step has a time limit, and a step that fails does not keep the next from running; the exit status tells.
set -u
cd "$(dirname "$0")/.."
export OUT="${OUT:-${1:-bench/results}}"
mkdir -p "$OUT"
python="${PYTHON:-python3}"
wanted=" ${*:2} "
status=0

step() { # step SECONDS NAME COMMAND...
    local limit=$1 name=$2
    shift 2
    [ "$wanted" = "  " ] || [[ "$wanted" == *" $name "* ]] || return 0
    echo "== $name"
    timeout "$limit" "$@" 2>&1 | tee "$OUT/$name.log"
    local code=${PIPESTATUS[0]}
    [ "$code" -eq 0 ] || { echo "== $name failed ($code)"; status=1; }
}

[ ! -d wheels ] || "$python" -m pip install -q --no-index --no-deps --no-compile wheels/*.whl
step 180 build "$python" -m pip install --no-build-isolation --no-deps -e .
step 60 doctor "$python" -m gas_engine.doctor
step 300 tests "$python" -m pytest tests -q -m gpu
step 300 ops "$python" -m pytest bench -q --benchmark-disable-gc --ignore bench/bench_memory.py --ignore bench/bench_cards.py \
    --ignore bench/bench_budget.py \
    --ignore bench/bench_gas.py
step 300 memory "$python" -m pytest bench/bench_memory.py -q --benchmark-disable-gc
step 900 gas "$python" -m pytest bench/bench_gas.py -q --benchmark-disable-gc
step 300 budget "$python" -m pytest bench/bench_budget.py -q
step 600 cards "$python" -m pytest bench/bench_cards.py -q
if command -v compute-sanitizer > /dev/null; then
    # The ops' own kernels over every sample; torch's are not ours to check, and the sanitizer takes its time.
    for tool in memcheck racecheck; do
        step 120 "$tool" compute-sanitizer --tool "$tool" --error-exitcode 9 --kernel-name-exclude kernel_substring=at:: \
            "$python" -m pytest tests/ops -q -m gpu -k "float64_twin or cotangent or bit_exact"
    done
fi
exit $status
