#!/usr/bin/env bash
# Everything that needs a CUDA device, in one run: build, tests, benches with CSV files.
#   bench/gpu.sh [DIR [STEP...]]    results go to $OUT or DIR (default bench/results); needs torch, pytest, pytest-benchmark
# Steps: build doctor tests ops memory adversarial gas budget sd15 sdxl nf4 streamed int8 memcheck racecheck, all unless named. Wheels in wheels/, for a
# machine without a network, are installed first.
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
    mkdir -p "$OUT"
    timeout --signal=INT --kill-after=10 "$limit" "$@" 2>&1 | tee "$OUT/$name.log"
    local code=${PIPESTATUS[0]}
    [ "$code" -eq 0 ] || { echo "== $name failed ($code)"; status=1; }
}

[ ! -d wheels ] || "$python" -m pip install -q --no-index --no-deps --no-compile wheels/*.whl
capability=$(nvidia-smi --query-gpu=compute_cap --format=csv,noheader | head -1 | tr -d .)
export GAS_ENGINE_CUDA=on GAS_ENGINE_CUDA_ARCHS="${GAS_ENGINE_CUDA_ARCHS:-$capability}"
gpu_tests="tests/ops tests/test_execution.py tests/test_memory_on_a_device.py"
op_benches="bench/bench_ops.py bench/bench_group_norm_silu.py bench/bench_glu.py bench/bench_bias_leaky_relu.py bench/bench_resample2d.py"
quiet="-q --benchmark-disable-gc --benchmark-columns=median"

step 180 build "$python" -m pip install -q --no-build-isolation --no-deps -e .
step 60 doctor "$python" -m gas_engine.doctor
step 240 tests "$python" -m pytest $gpu_tests -q -m gpu -n "${WORKERS:-6}" --dist worksteal
step 240 ops "$python" -m pytest $op_benches $quiet -m gpu
step 120 memory "$python" -m pytest bench/bench_memory.py $quiet -k cuda
step 120 adversarial "$python" -m pytest bench/bench_adversarial.py $quiet -k cuda
step 400 gas "$python" -m pytest bench/bench_gas.py $quiet
step 120 budget "$python" -m pytest bench/bench_budget.py -q
# Plans take a host a minute or more: those of an earlier run are read from the file. A process each, since an error of the
# device is the end of its process. Without expandable segments FLUX in 14 GiB loses 0.4 GiB to pieces that nothing fits.
export PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True
for card in sd15 sdxl nf4 streamed int8; do
    OUT="$OUT/$card" step 150 "$card" "$python" -m pytest bench/bench_cards.py -q -k "$card" --plans "$OUT/plans.json"
done
if command -v compute-sanitizer > /dev/null; then
    # The ops' own kernels over every sample; torch's are not ours to check, and the sanitizer takes its time.
    for tool in memcheck racecheck; do
        step 240 "$tool" compute-sanitizer --tool "$tool" --target-processes all --error-exitcode 9 \
            --kernel-name-exclude kernel_substring=at:: "$python" -m pytest tests/ops -v -m gpu -n 8 --dist worksteal \
            -k "float64_twin or cotangent or bit_exact"
    done
fi
exit $status
