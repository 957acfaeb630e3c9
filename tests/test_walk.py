"""The walk on a GPU that is not there, in a process of its own: it adds a device to torch."""

import os
import subprocess
import sys
from pathlib import Path


def test_all_work_stays_on_the_gpu():
    """LR, slicing by every recipe, streaming, perplexity, tasks and recovery (`gpu_walk`)."""
    here = Path(__file__).parent
    command = ["-m", "pytest", "-n", "0", "-p", "gpu_device", "--no-header", here / "gpu_walk.py"]
    known = os.environ.get("PYTHONPATH")
    environment = {"PYTHONPATH": os.pathsep.join([str(here), *([known] if known else [])])}
    walked = subprocess.run(
        [sys.executable, *map(str, command)],
        env={**os.environ, **environment, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        cwd=here.parent,
    )
    assert walked.returncode == 0, walked.stdout[-4000:]
