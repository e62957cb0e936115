"""Runs the stages of a plan on a Ray cluster, one task per stage. ``ray`` is imported here alone, and only when it is used.

The matrix file, its plug-ins, the code and the store lie in folders that every node sees under the same path: only a stage's key
and how it ended go through Ray. A node that does not see the store of this run, or whose code or libraries differ, ends the run
before it computes anything; the message names it. Ray's own retries are off: deaths are counted here alone.
"""

from __future__ import annotations

import logging
import os
import secrets
import shutil
import socket
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any

from benchmark.run import local as executors
from benchmark.run.local import SHARING, Failure, Schedule, StageError, Watcher
from benchmark.run.plan import Plan, Stage
from benchmark.settings.cells import Matrix
from benchmark.storage.files import abandoned, held
from benchmark.storage.machine import arithmetic, sources, versions
from models.spec import BadInput, digest

__all__ = ["Cluster", "connected"]

OBJECT_STORE = 80 * 2**20
"""Bytes: hardly more than the least that Ray takes. Nothing goes through it."""
SESSION = "levelfield-ray-"
"""How the folders of our own Rays are called."""
UNHEARD = 10
"""How often a stage may come back from a process that died before the stage began there, until that counts as a death too."""
GPU = "CUDA_VISIBLE_DEVICES"
PATIENCE = 10.0
"""Seconds in which the head of a cluster must answer."""
LOOK = 5.0
"""Seconds between two looks at how large the cluster is."""
QUIET = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_DEDUP_LOGS_SKIP_REGEX": ".",  # messages of raylets about workers that died: the progress display has a line for them
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",  # or Ray warns that this will be its default
}


# -- in a worker ---------------------------------------------------------------------------------------------------------------


def _carrier() -> Callable[..., Iterator[tuple[Any, ...]]]:
    def stage(job: Mapping[str, Any], key: str) -> Iterator[tuple[Any, ...]]:
        # A function inside a function travels by value: a node that cannot import the project must still be able to report that.
        import os
        import socket

        yield "started", socket.gethostname(), os.getpid()
        try:
            from benchmark.run.on_ray import attend
        except Exception as error:  # noqa: BLE001 - whatever it is, it ends the run with the node's name
            yield "unfit", f"the project cannot be imported there: {type(error).__name__}: {error}"
            return
        yield from attend(job, key)

    return stage


def attend(job: Mapping[str, Any], key: str) -> Iterator[tuple[Any, ...]]:
    """Runs one stage of ``job`` in this worker process.

    Args:
        job: see ``Cluster._job``.
        key: of the stage.

    Yields:
        How it ended: one word, the reason, notes, and what the process computes with.
    """
    why = _enter(job)
    if why:
        yield "unfit", why
        return
    state = executors.state
    # What was initialised on one GPU goes on there, whatever Ray assigns afterwards.
    if state["lost"] or (job["gpus"] and _entered["gpu"] != os.environ.get(GPU)):
        _leave()
        yield "left", ""
        return
    news: list[executors.News] = []
    state["news"].items = news
    ended, why = "done", ""
    try:
        if executors.work(key):
            ended = "put back"
    except StageError as error:
        ended, why = "failed", str(error)
    except BadInput as error:
        ended, why = "bad input", str(error)
    if state["lost"]:
        _leave()
    yield ended, why, [item.text for item in news if item.what == "note"], arithmetic()


def _leave() -> None:
    """Ends this process once its last message has been sent; Ray starts another one."""
    threading.Timer(1.0, os._exit, (1,)).start()


class _Kept:
    """In place of the queue in a worker: notes are sent when the stage ends."""

    def __init__(self) -> None:
        self.items: list[executors.News] = []

    def put(self, item: executors.News) -> None:
        self.items.append(item)


_entered: dict[str, Any] = {}


def _enter(job: Mapping[str, Any]) -> str:
    """Loads the matrix and opens the store, once per job; returns why this node cannot take part, or an empty string."""
    if not Path(job["mark"]).is_file():
        return f"it does not see the run's store, {job['store']}: that folder must be shared, under the same path"
    if _entered.get("job") == job["mark"]:
        return ""
    if why := _differs(versions(), job["versions"]):
        return why
    with suppress(OSError):
        os.chdir(job["cwd"])  # a data set's folder may be named relative to it
    for name, value in job["environment"].items():
        os.environ.setdefault(name, value)
    if not job["gpus"]:
        os.environ[GPU] = ""
    _entered.setdefault("gpu", os.environ.get(GPU))
    try:
        executors.enter(job["matrix"], job["fingerprints"], job["store"], job["cache"], _Kept(), os.getppid())
    except BadInput as error:
        return str(error)
    for name, here in sources(loaded=True).items():
        if here != job["sources"].get(name):
            return f"{name} is not the file that it is where the run was started"
    if _settings(executors.state["plan"].matrix) != job["settings"]:
        return f"{job['matrix']} has other settings there, or has been changed since the run began"
    _entered["job"] = job["mark"]
    return ""


def _differs(here: Mapping[str, str], there: Mapping[str, str]) -> str:
    """The first version that is not that of the process that started the run, in words."""
    differs = (name for name in here if here[name] != there[name])
    return next((f"{name} is {here[name]} there and {there[name]} where the run was started" for name in differs), "")


def _settings(matrix: Matrix) -> str:
    return digest(matrix.settings, matrix.plugins)


# -- in the driver -------------------------------------------------------------------------------------------------------------


class Cluster:
    """A Ray cluster that this process is connected to."""

    def __init__(self, ray: Any, processes: int | None, gpus: float | None) -> None:
        self.ray, self._processes = ray, processes
        self._total: dict[str, float] = ray.cluster_resources()
        self._looked = time.monotonic()
        self.gpus = gpus if gpus is not None else (1 / SHARING if self._total.get("GPU", 0) else 0.0)

    @property
    def words(self) -> str:
        """What there is, and how stages share it."""
        nodes = sum(node["Alive"] for node in self.ray.nodes())
        cpus, gpus = int(self._total.get("CPU", 0)), int(self._total.get("GPU", 0))
        share = f", {self.gpus:.2g} of a GPU each" if self.gpus else ""
        count = f"{self._processes or self._slots()} stages at once"
        return f"Ray: {nodes} node{'s' * (nodes != 1)}, {cpus} CPUs, {gpus} GPUs; {count}, one thread each{share}"

    def _slots(self) -> int:
        """Stages that the cluster can run at once."""
        slots = self._total.get("CPU", 0)
        return int(min(slots, self._total.get("GPU", 0) / self.gpus + 1e-3) if self.gpus else slots)

    def room(self) -> int:
        """Stages that may be in flight: as many as were asked for, or twice the slots, so that a growing cluster gets more."""
        if self._processes:
            return self._processes
        if time.monotonic() - self._looked > LOOK:
            self._total, self._looked = self.ray.cluster_resources(), time.monotonic()
        return max(2 * self._slots(), 2)

    def run(
        self, stages: Sequence[Stage], plan: Plan, store: Path, cache: Path, watcher: Watcher, used: dict[str, str]
    ) -> list[Failure]:
        """Runs every stage as :func:`benchmark.run.local.run_stages` does, on the cluster.

        Args:
            stages: some stages of ``plan``.
            plan: what every worker makes again from the matrix file.
            store: folder of the store.
            cache: folder of decoded images.
            watcher: gets the progress.
            used: receives what the workers compute with (see :func:`benchmark.storage.machine.arithmetic`), values joined by
                semicolons where they differ.

        Raises:
            BadInput: something that the user must correct, or a node that cannot take part, by name.
        """
        if not self._slots():
            needed = "CPU and GPU" if self.gpus else "CPU"
            watcher.note(f"no node of the cluster has a free {needed} yet: stages wait until one joins")
        schedule = Schedule(stages, watcher)
        # By this lock, which lasts as long as the run, workers know its store from another folder of the same name.
        mark = store.absolute() / "locks" / f"run-{secrets.token_hex(8)}"
        with held(mark):
            mark.touch()  # where the file system knows no locks
            try:
                _Tasks(self, schedule, used).run(self._job(plan, store, cache, mark))
            finally:
                mark.unlink(missing_ok=True)
        return list(schedule.failures.values())

    def _job(self, plan: Plan, store: Path, cache: Path, mark: Path) -> dict[str, Any]:
        """What a worker must know to take part."""
        return {
            "matrix": str(plan.matrix.path.absolute()),
            "settings": _settings(plan.matrix),
            "fingerprints": dict(plan.fingerprints),
            "store": str(store.absolute()),
            "cache": str(cache.absolute()),
            "mark": str(mark),
            "cwd": str(Path.cwd()),
            "versions": versions(),
            "sources": sources(),
            "environment": {name: os.environ[name] for name in ("LEVELFIELD_DATA",) if name in os.environ},
            "gpus": self.gpus,
        }


class _Tasks:
    """The stages of one run as Ray tasks."""

    def __init__(self, cluster: Cluster, schedule: Schedule, used: dict[str, str]) -> None:
        self.cluster, self.schedule, self.used, self.ray = cluster, schedule, used, cluster.ray
        self.running: dict[Any, int] = {}
        """Position of the stage of every task in flight."""
        self.on: dict[Any, tuple[str, int]] = {}
        """Host and number of the worker, of those that have begun."""
        self.numbers: dict[tuple[str, int], int] = {}
        self.unheard: Counter[int] = Counter()

    def run(self, job: dict[str, Any]) -> None:
        """Runs every stage of the schedule; whatever ends it cancels the tasks in flight."""
        # max_calls: Ray would start a process for every stage that has a GPU, to free the GPU's memory.
        options = {"num_returns": "streaming", "max_retries": 0, "max_calls": 0, "num_cpus": 1, "num_gpus": self.cluster.gpus}
        task = self.ray.remote(**options)(_carrier())
        try:
            while self.schedule.waiting or self.running:
                while len(self.running) < self.cluster.room() and (position := self.schedule.next()) is not None:
                    self.running[task.remote(job, self.schedule.stages[position].key)] = position
                if not self.running:  # nothing to wait for but another run
                    time.sleep(0.2)
                    continue
                ready, _ = self.ray.wait(list(self.running), num_returns=1, timeout=0.2, fetch_local=False)
                for generator in ready:
                    self._heard(generator)
        finally:
            for generator in self.running:
                with suppress(Exception):
                    self.ray.cancel(generator, force=True)

    def _heard(self, generator: Any) -> None:
        """Takes the next message of a task."""
        errors = self.ray.exceptions
        try:
            message = self.ray.get(next(generator))
        except errors.TaskCancelledError:
            raise KeyboardInterrupt from None  # a Ctrl-C at a terminal reaches local workers too
        except (errors.RayError, StopIteration) as error:
            if isinstance(error, errors.RayTaskError):
                raise
            self._died(generator)
            return
        if message[0] == "started":
            _, host, pid = message
            worker = self.numbers.setdefault((host, pid), len(self.numbers) + 1)
            self.on[generator] = host, worker
            stage = self.schedule.stages[self.running[generator]]
            self.schedule.watcher.started(worker, f"{stage.label} on {host}", stage.kind)
        else:
            host, worker = self.on.pop(generator)
            _ended(self.schedule, self.running.pop(generator), host, worker, message)
            if len(message) > 3:
                _computed(self.schedule.watcher, host, message[3], self.used)

    def _died(self, generator: Any) -> None:
        """The process of a task died."""
        position = self.running.pop(generator)
        if generator not in self.on and self.unheard[position] < UNHEARD:
            self.unheard[position] += 1  # given to a process that another stage had just ended: this one did not cause it
            self.schedule.back(position)
            return
        host, worker = self.on.pop(generator, ("some node", 0))
        self.schedule.watcher.note(f"a worker process on {host} died; its stage is tried again")
        self.schedule.watcher.put_back(worker)
        self.schedule.died(position)


def _ended(schedule: Schedule, position: int, host: str, worker: int, message: tuple[Any, ...]) -> None:
    """Passes a stage's last message on to the schedule and the watcher."""
    stage, (ended, why) = schedule.stages[position], message[:2]
    if ended == "unfit":
        raise BadInput(f"node {host} cannot take part: {why}")
    for note in message[2] if len(message) > 2 else ():
        schedule.watcher.note(note)
    if ended in ("put back", "left"):
        schedule.watcher.put_back(worker)
    else:
        schedule.watcher.finished(worker, stage.label, stage.kind)
    if ended == "bad input":
        raise BadInput(why)
    if ended == "left":
        schedule.back(position, later=True)
    elif ended == "failed":
        schedule.failed(position, why)
    else:
        (schedule.put_back if ended == "put back" else schedule.done)(position)


def _computed(watcher: Watcher, host: str, there: Mapping[str, str], used: dict[str, str]) -> None:
    """Keeps what rows were computed with; a note names a node that differs."""
    for name, value in there.items():
        known = used.setdefault(name, value).split("; ")
        if value not in known:
            watcher.note(f"{host} computes with {value}, others with {used[name]}: rows repeat bit for bit on one kind alone")
            used[name] = "; ".join(sorted([*known, value]))


@contextmanager
def connected(processes: int | None, gpus: float | None) -> Iterator[Cluster]:
    """Connects to the cluster that ``RAY_ADDRESS`` names (``auto``: the one that was started on this machine); without it, starts
    Ray on this machine alone and ends it afterwards.

    Args:
        processes: stages in flight at most; on this machine alone also the CPUs that Ray hands out. None = as many as have room.
        gpus: share of a GPU that a stage takes, in [0, 1]; None = a third where the cluster has GPUs.

    Raises:
        BadInput: Ray is not installed, or there is no such cluster.
    """
    for name, value in QUIET.items():
        os.environ.setdefault(name, value)
    try:
        import ray
    except ImportError as error:
        raise BadInput("--executor ray: ray is not installed here: pip install -c constraints.txt -e '.[ray]'") from error
    if ray.is_initialized():
        yield Cluster(ray, processes, gpus)
        return
    options: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    address = os.environ.get("RAY_ADDRESS") or "local"
    with _session() if address == "local" else nullcontext() as folder:
        if folder:
            options |= {"num_cpus": processes or executors.cores(), "include_dashboard": False}
            options |= {"object_store_memory": OBJECT_STORE, "_temp_dir": str(folder)}
        try:
            try:
                if address not in ("local", "auto"):  # Ray itself would try for minutes
                    host, _, port = address.rpartition(":")
                    socket.create_connection((host.strip("[]"), int(port)), timeout=PATIENCE).close()
                ray.init(address=address, **options)
            except Exception as error:  # Ray raises plain ones too
                first = (str(error).strip().splitlines() or [type(error).__name__])[0]
                what = "Ray does not start here" if folder else f"no cluster at RAY_ADDRESS={address}"
                raise BadInput(f"--executor ray: {what}: {first}") from error
            yield Cluster(ray, processes, gpus)
        finally:
            ray.shutdown()


@contextmanager
def _session() -> Iterator[Path]:
    """A folder for the sockets and logs of a Ray of our own, removed afterwards; a killed run leaves one, removed after an hour."""
    root = Path(os.environ.get("RAY_TMPDIR") or "/tmp")  # not $TMPDIR: sockets want short paths
    for old in root.glob(f"{SESSION}*"):
        with suppress(BadInput, OSError):
            if abandoned(old):
                with held(old / "lock", wait=False) as free:
                    if free:
                        shutil.rmtree(old, ignore_errors=True)
    folder = Path(tempfile.mkdtemp(prefix=SESSION, dir=root))
    try:
        with held(folder / "lock"):
            yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
