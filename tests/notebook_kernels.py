"""`dynslice reproduce` in this process, all notebooks in one kernel instead of one for each."""

import json
import os
from contextlib import contextmanager
from pathlib import Path

import nbformat
import papermill
import pytest
from jupyter_client.manager import KernelManager
from nbclient import NotebookClient
from papermill.parameterize import parameterize_notebook

from dynslice.cli import rendering
from dynslice.core import paths

QUIET = ["--log-level=40"]  # errors only, as `dynslice reproduce` starts its kernels


def with_parameters(source, parameters):
    """A notebook's source as papermill gives it parameters."""
    notebook = papermill.iorw.load_notebook_node(str(source))
    return parameterize_notebook(notebook, parameters, kernel_name="python3", language="python")


class OneKernel:
    """A kernel that is started for the first notebook and emptied after each."""

    def __init__(self):
        self._manager = KernelManager(kernel_name="python3")

    def execute(self, source, target, parameters):
        """What `rendering.execute` does: run a notebook and write it to `target`."""
        if not self._manager.has_kernel:
            self._manager.start_kernel(cwd=os.getcwd(), extra_arguments=QUIET)
        notebook = with_parameters(source, parameters)
        notebook.cells.append(nbformat.v4.new_code_cell("%reset -f"))
        NotebookClient(notebook, km=self._manager, timeout=300).execute()
        notebook.cells.pop()
        content = rendering.tidied(json.loads(nbformat.writes(notebook)))
        Path(target).write_text(json.dumps(content, indent=1) + "\n")

    def stop(self):
        """End the kernel, if there is one."""
        if self._manager.has_kernel:
            self._manager.shutdown_kernel(now=True)


@contextmanager
def one_kernel(output):
    """Let `dynslice reproduce` write to `output`, and render in one kernel."""
    kernel = OneKernel()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(paths, "OUTPUT", output)
        patch.setenv("DYNSLICE_OUTPUT", str(output))
        patch.setattr(rendering, "execute", kernel.execute)
        try:
            with rendering.own_kernels():
                yield
        finally:
            kernel.stop()
