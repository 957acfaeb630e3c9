"""A server that runs the command line in forked children and disturbs them at chosen moments.

Started by `python faults.py OUTPUT`: it runs the smoke study once itself, so that a run of a child
costs a fork and what is measured. Every file operation below a child's output folder is an event;
it is disturbed at its n-th one. Requests come
as JSON lines on stdin: {"do": "start", ..} answers with a process id, {"do": "wait", "pid": ..}
with how that ended.
"""

import errno
import gc
import json
import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path

WRITING = ("open", "os.mkdir", "tempfile.mkdtemp", "tempfile.mkstemp")
EVENTS = (*WRITING, "os.rename", "os.remove", "os.rmdir", "shutil.rmtree")
ERRORS = {"ENOSPC": errno.ENOSPC, "EROFS": errno.EROFS}


@dataclass(frozen=True)
class Ended:
    """How a child ended: exit status (negative for a signal), what it said, how soon."""

    status: int
    stdout: str
    stderr: str
    events: int
    seconds_after: float | None  # from the disturbance to the end


@dataclass
class Runs:
    """The client: children by name of their output folder."""

    folder: Path
    server: subprocess.Popen
    _started: dict = field(default_factory=dict)

    @classmethod
    def serve(cls, folder: Path) -> "Runs":
        """Start the server; one thread each, so that two children do not fight for the cores."""
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
        environment["DYNSLICE_OUTPUT"] = str(folder / "first")
        server = subprocess.Popen(
            [sys.executable, __file__, str(folder / "first")],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )
        assert json.loads(server.stdout.readline()) == "ready"
        return cls(folder, server)

    def start(self, output: str, *arguments, **how) -> int:
        """Start a command that writes to `output`; how: see `_child`."""
        place = self.folder / output
        place.mkdir(exist_ok=True)
        return self._ask(do="start", output=str(place), arguments=list(map(str, arguments)), **how)

    def wait(self, pid: int) -> Ended:
        """Wait for a child."""
        return Ended(**self._ask(do="wait", pid=pid))

    def run(self, output: str, *arguments, **how) -> Ended:
        """Start a command and wait for it."""
        return self.wait(self.start(output, *arguments, **how))

    def _ask(self, **request):
        print(json.dumps(request), file=self.server.stdin, flush=True)
        return json.loads(self.server.stdout.readline())

    def stop(self) -> None:
        """End the server."""
        self.server.stdin.close()
        self.server.wait()


def _child(
    output: str,
    arguments: list[str],
    at: int | None = None,
    after: float | None = None,
    by: str = "SIGKILL",
    cache: str | None = None,
    patch: str = "",
) -> None:
    """Run one command and never come back.

    at: the event, after: the seconds at which it is disturbed, by a signal or by an error that
    every later writing gives. cache: another cache. patch: Python that is executed first.
    """
    from dynslice.cli import commands
    from dynslice.core import paths

    said = Path(output + ".said")
    said.mkdir(exist_ok=True)
    for number, name in ((1, "stdout"), (2, "stderr")):
        os.dup2(os.open(said / f"{os.getpid()}.{name}", os.O_WRONLY | os.O_CREAT), number)
    notes = open(said / f"{os.getpid()}.notes", "w")  # noqa: SIM115  open before the events count
    paths.OUTPUT = Path(output)
    os.environ["DYNSLICE_OUTPUT"] = output
    watched = [output]
    if cache:
        paths.CACHE = Path(cache)
        watched.append(cache)
    exec(patch, {"paths": paths})
    count = 0

    def disturb() -> None:
        notes.write(f"{time.time()}\n")
        notes.flush()
        os.kill(os.getpid(), getattr(signal, by))

    def watch(event: str, details: tuple) -> None:
        nonlocal count
        if event not in EVENTS or not _below(watched, details):
            return
        if event == "open" and not (details[2] or 0) & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
            return
        count += 1
        if at is not None and by in ERRORS and count >= at and event in WRITING:
            raise OSError(ERRORS[by], os.strerror(ERRORS[by]), str(details[0]))
        if count == at and by not in ERRORS:
            disturb()

    sys.addaudithook(watch)
    if after is not None:
        threading.Timer(after, disturb).start()
    status = 70
    try:
        status = commands.main(arguments)
    except SystemExit as stop:
        status = stop.code
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        Path(said / f"{os.getpid()}.events").write_text(str(count))
        os._exit(status or 0)


def _below(folders: list[str], details: tuple) -> bool:
    places = [f"{d}/" for d in details if isinstance(d, str | Path)]
    return any(place.startswith(f"{folder}/") for place in places for folder in folders)


def _ended(pid: int, output: str) -> dict:
    _, status = os.waitpid(pid, 0)
    end = time.time()
    parts = {p.suffix[1:]: p.read_text() for p in Path(output + ".said").glob(f"{pid}.*")}
    disturbed = parts["notes"].split()
    return {
        "status": os.waitstatus_to_exitcode(status),
        "stdout": parts["stdout"],
        "stderr": parts["stderr"],
        "events": int(parts.get("events", 0)),
        "seconds_after": end - float(disturbed[0]) if disturbed else None,
    }


def _prepare(output: Path) -> None:
    """Run the smoke study here, so that children find its libraries, texts and tasks loaded.

    What they inherit are tokens and items; each loads its model, slices and scores by itself.
    """
    import tqdm

    import dynslice.cli.record
    import dynslice.cli.reproduce
    import dynslice.evaluate.shared_context
    import dynslice.experiment.preflight
    import dynslice.extensions.finetuning  # noqa: F401
    from dynslice.core import assets, paths
    from dynslice.experiment import runner
    from dynslice.experiment.study import Study

    tqdm.tqdm.monitor_interval = 0  # its thread could hold a lock while the server forks
    assets.fetch()
    tokenise, kept = runner.token_stream, {}

    def token_stream(text, split, tokenizer, *amounts, **options):
        key = (text, split, tokenizer.name_or_path, amounts, tuple(sorted(options.items())))
        if key not in kept:
            kept[key] = tokenise(text, split, tokenizer, *amounts, **options)
        return kept[key].clone()

    runner.token_stream = token_stream
    paths.OUTPUT = output
    gc.freeze()
    study = Study.open("smoke", device="cpu")
    study.ensure(study.requests())
    gc.collect()
    gc.freeze()  # or each child would copy what it only looks at for garbage


def _serve() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print is no answer
    _prepare(Path(sys.argv[1]))
    outputs = {}

    def answer(value) -> None:
        print(json.dumps(value), file=answers, flush=True)

    answer("ready")
    for line in sys.stdin:
        request = json.loads(line)
        if request.pop("do") == "wait":
            answer(_ended(request["pid"], outputs[request["pid"]]))
            continue
        pid = os.fork()
        if pid == 0:
            os.setsid()
            _child(**request)
        outputs[pid] = request["output"]
        answer(pid)


if __name__ == "__main__":
    _serve()
