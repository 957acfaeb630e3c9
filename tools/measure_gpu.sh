#!/usr/bin/env bash
# All that needs a GPU: the tests on CUDA, the benchmarks of notebook 05, then the profile `full`.
#
#   tools/measure_gpu.sh          in the active environment, or in .venv
#
#   --device DEVICE               where [cuda]
#   --out FOLDER                  of the benchmarks [data/bench]
#   --small                       tiny models and the profile `smoke`, to see that all of it runs
#
# What has been measured is kept: a second run goes on where the first one stopped. A step that
# fails is named at the end, and does not keep the others from running.
set -uo pipefail
CDPATH='' cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.."
python=python
[ -x .venv/bin/python ] && [ -z "${VIRTUAL_ENV:-}${CONDA_PREFIX:-}" ] && python=.venv/bin/python
device=cuda out=data/bench small=no failed=()
while [ $# -gt 0 ]; do
    case "$1" in
    --device) device="${2:?a device}" && shift ;;
    --out) out="${2:?a folder}" && shift ;;
    --small) small=yes ;;
    *) echo "unknown option $1" >&2 && exit 2 ;;
    esac
    shift
done
mkdir -p "$out"

step() { # COMMAND...
    printf '\n== %s\n' "$*"
    "$python" -m "$@" </dev/null || failed+=("$*")
}

tests=(tests/test_device.py)
reproduce=(--profile full)
if [ $small = yes ]; then
    tests+=(-n 0 -k "not smollm2")
    reproduce=(--profile smoke --only 02)
fi

step dynslice assets fetch
step pytest "${tests[@]}"
while read -r name command; do
    if [ -f "$out/$name.json" ]; then
        printf '\n== %s is there already\n' "$out/$name.json"
        continue
    fi
    command="${command/--device cuda/--device $device}"
    if [ $small = yes ]; then
        command="dynslice bench --model embedded:tiny-random --device $device"
        command+=" --windows 4 --window 64 --repeats 1"
    fi
    # shellcheck disable=SC2086  # a command and its options
    step $command --out "$out/$name.json"
done < <("$python" -c '
from dynslice.report.efficiency import BENCHES
for name, command in BENCHES.values():
    if name.endswith("-cuda"):
        print(name, command)')
step dynslice reproduce "${reproduce[@]}" --device "$device"

if [ "${#failed[@]}" -gt 0 ]; then
    printf 'failed: %s\n' "${failed[@]}" >&2
    exit 1
fi
echo "everything was measured"
