#!/usr/bin/env bash
# One command from a fresh clone to tables and figures.
#
#   ./run_all.sh                       set up, fetch the assets, run the quick profile
#   ./run_all.sh --profile NAME ...    the same with any options of `dynslice reproduce`
#   ./run_all.sh --profile rehearsal   the profile `paper` on tiny models, from a stand-in for the hub
#   ./run_all.sh --test                set up, fetch the assets, run all tests
#
# The environment is .venv with the exact pins of requirements.lock, unless an environment that
# satisfies pyproject.toml is active. Everything that is already there is kept, so an interrupted
# run goes on where it stopped.
set -euo pipefail
CDPATH='' cd -- "$(dirname -- "${BASH_SOURCE[0]}")"
started=$SECONDS

say() { printf '\n== %s\n' "$*"; }
fail() { printf 'run_all.sh: %s\n' "$*" >&2; exit 1; }

# What takes long in the set-up is a process group of its own; this shell hears signals at once.
stopped() {
    trap '' INT TERM
    kill -KILL -- -"$!" 2>/dev/null || true # whatever it leaves, the next run clears away
    printf '\nrun_all.sh: interrupted; give the same command again to go on\n' >&2
    exit "$1"
}
trap 'stopped 130' INT
trap 'stopped 143' TERM
interruptible() {
    set -m
    "$@" &
    set +m
    wait $!
}

# The active environment, if dynslice and all that it needs are installed there.
satisfied() {
    [ -n "${VIRTUAL_ENV:-}${CONDA_PREFIX:-}" ] && python tools/check_environment.py 2>/dev/null
}

find_python() {
    local candidate
    for candidate in python3 python3.13 python3.12 python3.11 python; do
        if command -v "$candidate" >/dev/null &&
            "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11, 5))' 2>/dev/null; then
            command -v "$candidate"
            return
        fi
    done
    fail "Python 3.11.5 or newer was not found; install it and run this again"
}

# pip's own output goes to .venv/install.log; here one line that counts the packages.
install() {
    local total
    total=$(grep -c '==' requirements.lock)
    rm -f .venv/.complete # from here on it is not
    .venv/bin/python -m pip install --disable-pip-version-check --no-color \
        -r requirements.lock 2>&1 | tee .venv/install.log | awk -v total="$total" -v tty="$1" '
            /^(Collecting|Processing|Requirement already).*\(from -r requirements.lock/ { n++
                if (tty) printf "\r%d of %d packages, now %-40.40s", n, total, $2 }
            !tty && n && n % 40 == 0 && n != told { told = n; printf "%d of %d packages\n", n, total }
            /^Installing collected/ {
                if (tty) printf "\r"
                printf "%d packages at hand, unpacking them (a minute or two)\n", n }
            { fflush() }' || fail "pip could not install the pins; see .venv/install.log"
    .venv/bin/python -m pip install --disable-pip-version-check --quiet --no-deps \
        --no-build-isolation -e . \
        >>.venv/install.log 2>&1 || fail "dynslice could not be installed; see .venv/install.log"
}

# One run sets up, others wait for it. The lock is the system's, and ends with who holds it.
lock() {
    exec 9>.setting-up
    "$1" -c 'import fcntl; fcntl.flock(9, fcntl.LOCK_EX | fcntl.LOCK_NB)' 2>/dev/null || {
        echo "another run sets up; waiting for it"
        interruptible "$1" -c 'import fcntl; fcntl.flock(9, fcntl.LOCK_EX)'
    }
}

say "1/3 environment"
if satisfied; then
    python=$(command -v python)
    echo "the active environment satisfies the project"
else
    python=.venv/bin/python
    wanted=$(cat requirements.lock pyproject.toml | cksum)
    complete() { [ "$(cat .venv/.complete 2>/dev/null)" = "$wanted" ]; }
    if ! complete; then
        interpreter=$(find_python)
        lock "$interpreter"
    fi
    if complete; then
        echo ".venv is complete"
    else
        echo "making .venv with $interpreter ($("$interpreter" --version))"
        # An installation that was interrupted can be broken in ways that pip does not see.
        [ -f .venv/.complete ] || rm -rf .venv
        interruptible "$interpreter" -m venv .venv ||
            fail "could not make .venv; on Debian, install python3-venv, and look for room on the disk"
        interruptible install "$([ -t 1 ] && echo 1 || true)"
        echo "$wanted" >.venv/.complete
    fi
    exec 9>&-
fi

say "2/3 model, texts and benchmarks"
interruptible "$python" -m dynslice assets fetch
echo "set-up took $((SECONDS - started)) s"

if [ "${1:-}" = "--test" ]; then
    shift
    say "3/3 tests"
    began=$SECONDS
    # Signals go on to pytest and what it started; how that ends is how this ends.
    for signal in INT TERM; do
        trap 'kill -'"$signal"' -- -"$!" 2>/dev/null || true' "$signal"
    done
    interruptible "$python" -m pytest "$@" && status=0 || status=$?
    while kill -0 "$!" 2>/dev/null; do # a signal ended the waiting, not yet the tests
        wait $! && status=0 || status=$?
    done
    echo "the tests took $(((SECONDS - began) / 60)) min $(((SECONDS - began) % 60)) s"
    exit "$status"
fi
say "3/3 measurements, notebooks, figures"
case " $* " in # its models and texts come from a hub of its own
    *" --profile rehearsal "* | *" --profile=rehearsal "*)
        exec "$python" tests/rehearse.py reproduce "$@"
        ;;
esac
exec "$python" -m dynslice reproduce "$@"
