"""Runs the stages of a plan in processes of this machine, one thread each; where there is a GPU, they share it.

Stages hand results to one another through the store alone, so which process ran what, in which order and how often it was
interrupted cannot change a row. Every process finds the GPU by itself, and what it stores is on the CPU. A stage that another run
of the same store is computing is put back and tried again after the others. :class:`Schedule` (which stage may start next) and
:func:`work` (what a worker does) also serve :mod:`benchmark.run.on_ray`.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing import connection
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch

from benchmark.run.plan import Plan, Stage
from benchmark.settings.load import load_matrix
from benchmark.storage.machine import cores
from benchmark.storage.store import Busy, Store
from models.progress import hearing
from models.spec import BadInput
from models.training import default_device

__all__ = [
    "Failure", "News", "Schedule", "StageError", "Watcher", "cores", "enter", "places", "run_stages", "single_thread", "state",
    "work",
]  # fmt: skip

ATTEMPTS = 3
"""How often a stage is tried when the process that runs it dies (out of memory, for example)."""
SHARING = 3
"""Processes that share a GPU by default: at the literature's batch of 128 a single one spends about as long on issuing kernels as
the GPU on running them (an estimate; ``benchmark.proof.throughput`` measures what sharing gives)."""
AGAIN = 1.0
"""Seconds until a stage that another process is computing is tried again."""
EPOCHS = 1.0
"""Seconds between two reports of a training's epochs, at least."""


@dataclass(frozen=True)
class Failure:
    """A stage that raised: its position, and why in one line."""

    position: int
    reason: str


class StageError(RuntimeError):
    """A stage raised; the message is the reason in one line. One cell's failure does not end the others."""


class Watcher(Protocol):
    """What a run reports its progress to; the progress display implements it."""

    def started(self, worker: int, label: str, kind: str) -> None: ...
    def epoch(self, worker: int, done: int, total: int) -> None: ...
    def finished(self, worker: int, label: str, kind: str) -> None: ...
    def put_back(self, worker: int) -> None: ...
    def note(self, line: str) -> None: ...


def places() -> int:
    """Stages at once by default: one per core, or :data:`SHARING` on a GPU (never more than there are cores)."""
    return cores() if default_device().type == "cpu" else min(SHARING, cores())


def single_thread() -> None:
    """One thread for all arithmetic: the number of threads changes the bits, and more threads than free cores are slow."""
    torch.set_num_threads(1)


class Schedule:
    """Which stage may start next, and how the others ended. It runs nothing itself.

    Args:
        stages: what to run. A stage waits for those of its ``after`` that are among them; the others are cached.
        watcher: gets notes of failures.
    """

    def __init__(self, stages: Sequence[Stage], watcher: Watcher) -> None:
        self.stages, self.watcher = stages, watcher
        self.positions = {stage.key: position for position, stage in enumerate(stages)}
        """Position of a stage by its key."""
        self.failures: dict[int, Failure] = {}
        self._waiting = list(range(len(stages)))
        self._done: set[int] = set()
        self._deaths: Counter[int] = Counter()
        self._again: dict[int, float] = {}
        self._shared = False

    @property
    def waiting(self) -> bool:
        """Whether stages are left that have not been started (or were, and came back)."""
        return bool(self._waiting)

    def next(self) -> int | None:
        """Position of the first stage that may start now, which counts as started; None while none may.

        A stage that waits for a failed one fails with its reason, unrun.
        """
        now = time.monotonic()
        for position in tuple(self._waiting):
            after = [self.positions[key] for key in self.stages[position].after if key in self.positions]
            blocked = [self.failures[i] for i in after if i in self.failures]
            if blocked:
                self._waiting.remove(position)
                self.failures[position] = Failure(position, blocked[0].reason)
            elif self._again.get(position, 0.0) <= now and all(i in self._done for i in after):
                self._waiting.remove(position)
                return position
        return None

    def done(self, position: int) -> None:
        self._done.add(position)

    def failed(self, position: int, reason: str) -> None:
        """It raised an error; its row gives the reason."""
        self.failures[position] = Failure(position, reason)
        self.watcher.note(f"{self.stages[position].label}: failed: {reason}")

    def put_back(self, position: int) -> None:
        """It, or what it needs, is locked by another process: it is tried again after the others, a little later."""
        if not self._shared:
            self._shared = True
            self.watcher.note("another process is computing stages of this run in the same store: they are read once finished")
        self._again[position] = time.monotonic() + AGAIN
        self._waiting.append(position)

    def back(self, position: int, *, later: bool = False) -> None:
        """It was stopped by something else: it is tried again first, at once or a little ``later``."""
        self._again[position] = time.monotonic() + AGAIN if later else 0.0
        self._waiting.insert(0, position)

    def died(self, position: int) -> None:
        """The process that ran it died: it is tried again, :data:`ATTEMPTS` times in all."""
        self._deaths[position] += 1
        if self._deaths[position] >= ATTEMPTS:
            self.failed(position, f"its process died {ATTEMPTS} times (out of memory?)")
        else:
            self.back(position)


# -- inside a worker -----------------------------------------------------------------------------------------------------------

state: dict[str, Any] = {}
"""What this worker process works on; :func:`_begin` fills it."""


class News(NamedTuple):
    """A worker's message to its parent.

    Attributes:
        worker: its process id.
        what: ``started``, ``epoch``, ``finished``, ``put back`` or ``note``.
        text: the stage's label, or the note.
        kind: of the stage.
        key: of the stage.
        done: epochs that have ended.
        total: all epochs of the training.
    """

    worker: int
    what: str
    text: str
    kind: str = ""
    key: str = ""
    done: int = 0
    total: int = 0


def enter(path: str, fingerprints: Mapping[str, str], store: str, cache: str, news: Any, parent: int) -> None:
    """Makes this process a worker: it loads the matrix, makes the plan and opens the store.

    Args:
        path: the matrix file.
        fingerprints: see :class:`benchmark.run.plan.Plan`.
        store: folder of the store.
        cache: folder of decoded images.
        news: a queue that takes :class:`News`.
        parent: id of the process whose end also ends this one.
    """
    _begin(Plan(load_matrix(Path(path)), fingerprints), Path(store), Path(cache), news, pooled=True)
    threading.Thread(target=_die_with, args=(parent,), daemon=True).start()


def _begin(plan: Plan, store: Path, cache: Path, news: Any, *, pooled: bool) -> None:
    single_thread()

    def report(line: str) -> None:
        news.put(News(os.getpid(), "note", line))

    state.update(plan=plan, store=Store(store, report, patient=False), cache=cache, news=news, pooled=pooled, lost=False)


def _die_with(parent: int) -> None:
    """A worker whose parent was killed must end too."""
    while os.getppid() == parent:
        time.sleep(0.5)
    os._exit(1)


def work(key: str) -> bool:
    """Runs the stage with this key; True when it was put back, because it, or what it needs, is locked by another process."""
    if state.get("lost"):
        os._exit(1)  # the pool starts another process and tries this stage there
    stage: Stage = state["plan"].stages[key]

    def put(what: str, done: int = 0, total: int = 0) -> None:
        state["news"].put(News(os.getpid(), what, stage.label, stage.kind, key, done, total))

    put("started")
    ended = "finished"
    try:
        with hearing(_throttled(lambda done, total: put("epoch", done, total))):
            stage.run(state["store"], state["cache"])
    except BadInput:
        raise
    except Busy:
        ended = "put back"
        return True
    except Exception as error:
        state["lost"] = state["pooled"] and _device_lost()
        # In words here, where the traceback is whole, so that the reason reads the same in this process and across processes.
        raise StageError(_why(error)) from error
    finally:
        put(ended)
    return False


def _throttled(report: Callable[[int, int], None]) -> Callable[[int, int], None]:
    """``report``, called once in :data:`EPOCHS` seconds at most."""
    last = -EPOCHS

    def throttled(done: int, total: int) -> None:
        nonlocal last
        if time.monotonic() - last >= EPOCHS:
            last = time.monotonic()
            report(done, total)

    return throttled


def _device_lost() -> bool:
    """Whether this process has lost the GPU: after an illegal access, everything that it does there fails."""
    if not torch.cuda.is_available():
        return False
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        return True
    return False


# -- in the parent -------------------------------------------------------------------------------------------------------------


class _Inline:
    """In place of the queue when there is one process only: news go straight to the watcher."""

    def __init__(self, watcher: Watcher) -> None:
        self.watcher = watcher

    def put(self, item: News) -> None:
        _tell(self.watcher, item)


def _tell(watcher: Watcher, item: News) -> None:
    if item.what == "started":
        watcher.started(item.worker, item.text, item.kind)
    elif item.what == "epoch":
        watcher.epoch(item.worker, item.done, item.total)
    elif item.what == "finished":
        watcher.finished(item.worker, item.text, item.kind)
    elif item.what == "put back":
        watcher.put_back(item.worker)
    else:
        watcher.note(item.text)


def _why(error: BaseException) -> str:
    last = traceback.extract_tb(error.__traceback__)
    place = f" ({Path(last[-1].filename).name}:{last[-1].lineno})" if last else ""
    first = (str(error).strip().splitlines() or [""])[0]
    return f"{type(error).__name__}: {first}{place}"


def run_stages(
    stages: Sequence[Stage], plan: Plan, store: Path, cache: Path, watcher: Watcher, processes: int
) -> list[Failure]:
    """Runs every stage once the stages it waits for have finished; a stage after a failed one is not run.

    Args:
        stages: some stages of ``plan``.
        plan: what other processes make again from the matrix file.
        store: folder of the store.
        cache: folder of decoded images.
        watcher: gets the progress.
        processes: stages at once; one is run in this process.

    Raises:
        BadInput: something that the user must correct (a full disk, a missing data set); what is stored stays.
    """
    schedule = Schedule(stages, watcher)
    if processes == 1:
        _begin(plan, store, cache, _Inline(watcher), pooled=False)
        _run_inline(schedule)
    else:
        arguments = (str(plan.matrix.path), dict(plan.fingerprints), str(store), str(cache))
        while not _Pool(schedule, arguments, processes).run():
            watcher.note("a worker process died; its stages are tried again")
    return list(schedule.failures.values())


def _run_inline(schedule: Schedule) -> None:
    while schedule.waiting:
        position = schedule.next()
        if position is None:
            if schedule.waiting:
                time.sleep(AGAIN)
            continue
        try:
            put_back = work(schedule.stages[position].key)
        except StageError as error:
            schedule.failed(position, str(error))
        else:
            (schedule.put_back if put_back else schedule.done)(position)


class _Pool:
    """A pool of worker processes, which runs stages until all have ended or one of the processes dies."""

    def __init__(self, schedule: Schedule, arguments: tuple[Any, ...], processes: int) -> None:
        self.schedule, self.processes = schedule, processes
        context = multiprocessing.get_context("spawn")
        # A process may die while it holds the queue's lock, so every pool has a queue of its own.
        self.news: Any = context.SimpleQueue()
        self.pool = ProcessPoolExecutor(processes, context, initializer=enter, initargs=(*arguments, self.news, os.getpid()))
        self.running: dict[Future[bool], int] = {}
        """Positions of the stages that were given to the pool."""
        self.at: dict[int, int] = {}
        """Which of them each process is running."""

    def run(self) -> bool:
        """Runs stages; True when all have ended, False when a process died, which ends the pool."""
        try:
            while self.schedule.waiting or self.running:
                self._submit()
                if not self.running:  # nothing to wait for but another run
                    time.sleep(0.2)
                finished, _ = wait(self.running, timeout=0.2, return_when=FIRST_COMPLETED)
                self._drain()
                for future in finished:
                    self._ended(future)
                if not finished and connection.wait([process.sentinel for process in _processes(self.pool)], timeout=0):
                    # The pool misses the death of a process that it started just after it last looked which there are.
                    raise BrokenProcessPool("a process ended")
        except BrokenProcessPool:
            self._died()
            return False
        finally:
            self._drain()
            workers = _processes(self.pool)  # a pool that is shut down has forgotten them
            self.pool.shutdown(wait=False, cancel_futures=True)
            for process in workers:
                process.kill()  # on SIGTERM Lightning goes on to the end of its batch
        return True

    def _submit(self) -> None:
        while len(self.running) < self.processes and (position := self.schedule.next()) is not None:
            try:
                self.running[self.pool.submit(work, self.schedule.stages[position].key)] = position
            except BrokenProcessPool:
                self.schedule.back(position)
                raise

    def _drain(self) -> None:
        while not self.news.empty():
            item: News = self.news.get()
            if item.what == "started":
                self.at[item.worker] = self.schedule.positions[item.key]
            elif item.what in ("finished", "put back"):
                self.at.pop(item.worker, None)
            _tell(self.schedule.watcher, item)

    def _ended(self, future: Future[bool]) -> None:
        error = future.exception()
        if isinstance(error, BrokenProcessPool):
            raise error
        position = self.running.pop(future)
        if isinstance(error, StageError):
            self.schedule.failed(position, str(error))
        elif error is not None:
            raise error
        else:
            (self.schedule.put_back if future.result() else self.schedule.done)(position)

    def _died(self) -> None:
        """Gives back what was running. A death counts for the stage of the process that died; if that is unknown, for all."""
        dead = _dead(self.pool)
        self._drain()
        for future in tuple(self.running):
            with suppress(BrokenProcessPool):
                self._ended(future)
        left = set(self.running.values())
        own = {self.at[worker] for worker in dead if worker in self.at} & left or left
        for position in sorted(left, reverse=True):  # the last one given back comes first
            (self.schedule.died if position in own else self.schedule.back)(position)
        for worker in self.at:
            self.schedule.watcher.put_back(worker)


def _processes(pool: ProcessPoolExecutor) -> list[Any]:
    return list((pool._processes or {}).values())


def _dead(pool: ProcessPoolExecutor) -> set[int | None]:
    """Ends what is left of a broken pool; the ids of those of its processes that had died by themselves.

    The pool sends the others SIGTERM. One that is in a training ignores it, and the pool would wait for it for ever.
    """
    processes = _processes(pool)
    alive = {process.sentinel: process for process in processes}
    deadline = time.monotonic() + 1
    while alive and time.monotonic() < deadline:
        for sentinel in connection.wait(list(alive), timeout=0.1):
            del alive[sentinel]
    for process in alive.values():
        process.kill()
    pool.shutdown(wait=True, cancel_futures=True)
    asked = {process.pid for process in alive.values()}
    return {process.pid for process in processes if process.pid not in asked and process.exitcode != -signal.SIGTERM}
