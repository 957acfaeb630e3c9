#!/usr/bin/env bash
# All that needs a GPU: the tests on CUDA, the benchmarks of notebook 05, then the profile `full`.
#
#   tools/measure_gpu.sh          in the active environment, or in .venv
#
# What has been measured is kept: a second run goes on where the first one stopped. A step that
# fails is named at the end, and does not keep the others from running.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python=python
[ -x .venv/bin/python ] && [ -z "${VIRTUAL_ENV:-}${CONDA_PREFIX:-}" ] && python=.venv/bin/python
failed=()

step() { # COMMAND...
    printf '\n== %s\n' "$*"
    "$python" -m "$@" </dev/null || failed+=("$*")
}

step dynslice assets fetch
step pytest tests/test_device.py
while read -r name command; do
    if [ -f "data/bench/$name.json" ]; then
        printf '\n== %s is there already\n' "data/bench/$name.json"
    else
        # shellcheck disable=SC2086  # a command and its options
        step $command --out "data/bench/$name.json"
    fi
done < <("$python" -c '
from dynslice.report.efficiency import BENCHES
for name, command in BENCHES.values():
    if name.endswith("-cuda"):
        print(name, command)')
step dynslice reproduce --profile full --device cuda

if [ "${#failed[@]}" -gt 0 ]; then
    printf 'failed: %s\n' "${failed[@]}" >&2
    exit 1
fi
echo "everything was measured"
