#!/usr/bin/env bash
# All that needs a GPU: the tests on CUDA, the benchmarks of notebook 05, then the profile `full`.
#
#   tools/measure_gpu.sh               on the active environment or .venv, device cuda
#
# What has been measured is kept: a second run goes on where the first one stopped. A step that
# fails is named at the end, and does not keep the others from running.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
device=${DEVICE:-cuda}
python=python
[ -x .venv/bin/python ] && [ -z "${VIRTUAL_ENV:-}${CONDA_PREFIX:-}" ] && python=.venv/bin/python
failed=()

step() { # NAME COMMAND...
    local name=$1
    shift
    printf '\n== %s\n' "$name"
    "$@" || failed+=("$name")
}

bench() { # NAME OPTIONS...
    local out=data/bench/$1.json
    shift
    if [ -f "$out" ]; then
        echo "$out is there already"
    else
        "$python" -m dynslice bench --device "$device" "$@" --out "$out"
    fi
}

step "assets" "$python" -m dynslice assets fetch
step "tests on $device" "$python" -m pytest tests/test_device.py
step "SmolLM2-135M" bench "smollm2-135m-$device" --windows 128 --window 2048
for shape in llama-3-8b mistral-7b; do
    step "the shape of $shape" \
        bench "$shape-$device" --shape "$shape" --windows 128 --window 2048 --repeats 1
done
step "profile full" "$python" -m dynslice reproduce --profile full --device "$device"

if [ "${#failed[@]}" -gt 0 ]; then
    printf 'failed: %s\n' "${failed[@]}" >&2
    exit 1
fi
echo "all steps were measured"
