"""A command of dynslice on a stand-in for the hub that serves what the profile `rehearsal` reads.

    python tests/rehearse.py reproduce --profile rehearsal

Models and texts are made in a temporary folder, with the hub's cache, and removed at the end.
"""

import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import hub_stand_in

from dynslice.experiment.profile import load
from dynslice.inputs import corpora
from dynslice.inputs.checkpoints import quiet

# Which embedded text fills which text of the hub.
FILLED_BY = {"wikitext2": "wikipedia", "ptb": "wikipedia", "c4": "wikipedia", "alpaca": "mmlu"}
FILLED_BY |= {"pg19": "sotu"}
ONE_THREAD = {"OMP_NUM_THREADS": "1"}  # the models are too small for more
SECONDS = 3600  # in which a rehearsal is over, on any machine


def make_repositories(root: Path) -> None:
    """The models of the profile, the first in shards, and every text of the hub."""
    with quiet():
        for name, shard in zip(load("rehearsal").models, ("200KB", "5GB"), strict=True):
            hub_stand_in.write_model(root / "models" / name, name.rpartition("/")[2], shard)
    for name, source in FILLED_BY.items():
        hub_stand_in.write_text(root, name, corpora.embedded(source))


def main(command: list[str]) -> int:
    """Run a command as a child, which gets the signals of this process; its exit status."""
    child = None

    def pass_on(number: int, _frame) -> None:
        if child is None:
            sys.exit(128 + number)
        child.send_signal(number)

    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, pass_on)
    with tempfile.TemporaryDirectory(prefix="rehearsal-") as folder:
        root, home = Path(folder, "served"), Path(folder, "home")
        make_repositories(root)
        with hub_stand_in.serving(root, SECONDS) as hub:
            child = subprocess.Popen(
                command,
                env={**ONE_THREAD, **os.environ, **hub_stand_in.environment(hub, home)},
                process_group=0,  # a terminal tells this process alone, which passes it on
            )
            status = child.wait()
    return status if status >= 0 else 128 - status


if __name__ == "__main__":
    sys.exit(main([sys.executable, "-m", "dynslice", *sys.argv[1:]]))
