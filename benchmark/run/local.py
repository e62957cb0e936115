"""Running stages: several processes on this machine, one thread each; where there is a GPU, they share it.

A stage is a victim, an extractor or a cell, named by its place in the matrix; the store is the hand-over between them, so who ran
what, in which order and how often it was interrupted cannot change a row. Every process finds the GPU by itself (it is not told
which device to use), and what it stores is on the CPU. A stage that another run of the same store is computing is put back and
asked for again after the others. What a stage does and which may start next stands here once; :mod:`benchmark.run.on_ray` asks
the same two for the machines of a Ray cluster.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
import traceback
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing import connection
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol

from models.spec import BadInput

__all__ = [
    "Failure", "News", "Schedule", "Stage", "StageError", "Watcher", "cores", "enter", "places", "run_stages", "single_thread",
    "state", "work",
]  # fmt: skip

ATTEMPTS = 3
"""How often a stage is tried when the process that runs it dies (out of memory, say)."""
SHARING = 3
"""Processes that share a GPU unless somebody says otherwise: at the literature's batch of 128 a single one spends about as long on
issuing kernels as the GPU on running them (an estimate; ``benchmark.proof.throughput`` measures what sharing gives)."""
AGAIN = 1.0
"""Seconds until a stage that another process is computing is asked for again."""


@dataclass(frozen=True)
class Stage:
    """One piece of work: which list of the matrix it stands in, where, what it is called, and what must stand before it."""

    kind: Literal["victim", "extractor", "cell"]
    number: int
    label: str
    after: tuple[int, ...] = ()
    """Positions, in the list of stages, of the stages that must have finished."""


@dataclass(frozen=True)
class Failure:
    """A stage that raised: its position, and why in one line."""

    position: int
    reason: str


class StageError(RuntimeError):
    """A stage raised; the message says why in one line. One cell's failure does not end the others."""


class Watcher(Protocol):
    """Hears what happens; the progress display implements it."""

    def started(self, worker: int, label: str) -> None: ...
    def finished(self, worker: int, label: str, kind: str) -> None: ...
    def put_back(self, worker: int) -> None: ...
    def note(self, line: str) -> None: ...


def cores() -> int:
    """Cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def places() -> int:
    """Stages at once where nobody says how many: one per core, or :data:`SHARING` on a GPU (never more than there are cores)."""
    from models.training import default_device

    return cores() if default_device().type == "cpu" else min(SHARING, cores())


def single_thread() -> None:
    """One thread for all arithmetic: the number of threads changes the bits, and more threads than free cores collapse."""
    import torch

    torch.set_num_threads(1)


# -- what may start next -------------------------------------------------------------------------------------------------------


class Schedule:
    """Which stage may start next, and what became of the others. It runs nothing: executors ask it and tell it."""

    def __init__(self, stages: Sequence[Stage], watcher: Watcher) -> None:
        self.stages, self.watcher = stages, watcher
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
            after = self.stages[position].after
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
        """It raised: its row says why."""
        self.failures[position] = Failure(position, reason)
        self.watcher.note(f"{self.stages[position].label}: failed: {reason}")

    def put_back(self, position: int) -> None:
        """Another process is computing it, or what it stands on: it comes after the others, a little later."""
        if not self._shared:
            self._shared = True
            self.watcher.note("another process is computing stages of this run in the same store: they are read once they stand")
        self._again[position] = time.monotonic() + AGAIN
        self._waiting.append(position)

    def back(self, position: int, *, later: bool = False) -> None:
        """It did not come to an end, through no fault of its own: it comes first, at once or a little ``later``."""
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
"""What this worker process works on; :func:`enter` fills it."""


class News(NamedTuple):
    """What a worker tells its parent: its process id, what happened, about what."""

    worker: int
    what: str
    text: str
    kind: str = ""
    number: int = -1


def enter(path: str, store: str, cache: str, news: Any, parent: int) -> None:
    """Makes this process a worker: it loads the matrix, opens the store, and ends with ``parent`` (0: it is its own)."""
    single_thread()
    from benchmark.settings.load import load_matrix
    from benchmark.storage.store import Store

    def report(line: str) -> None:
        news.put(News(os.getpid(), "note", line))

    state.update(matrix=load_matrix(Path(path)), store=Store(Path(store), report, patient=False), cache=Path(cache), news=news)
    state.update(pooled=parent > 0, lost=False)
    if parent:
        threading.Thread(target=_die_with, args=(parent,), daemon=True).start()


def _die_with(parent: int) -> None:
    """A worker whose parent was killed must not go on working in secret."""
    while os.getppid() == parent:
        time.sleep(0.5)
    os._exit(1)


def work(kind: str, number: int, label: str) -> bool:
    """Runs a stage; True when it was put back, because another process is computing it or what it stands on."""
    from benchmark.storage.store import Busy

    if state.get("lost"):
        os._exit(1)  # the pool starts another process and tries this stage there
    news = state["news"]
    news.put(News(os.getpid(), "started", label, kind, number))
    ended = "finished"
    try:
        _run(kind, number)
    except BadInput:
        raise
    except Busy:
        ended = "put back"
        return True
    except Exception as error:
        state["lost"] = state["pooled"] and _device_lost()
        # Told here, where the traceback is whole, so that the reason reads the same in this process and across processes.
        raise StageError(_why(error)) from error
    finally:
        news.put(News(os.getpid(), ended, label, kind, number))
    return False


def _run(kind: str, number: int) -> None:
    from benchmark.run.defend import run_cell
    from benchmark.run.victim import run_extractor, run_victim
    from models.training import arithmetic

    matrix, store, cache = state["matrix"], state["store"], state["cache"]
    # What a stage computes outside its trainings (scores, estimates, searches) is as precise as the victim's recipe says.
    if kind == "victim":
        scenario = victims_of(matrix)[number]
        with arithmetic(scenario.recipe.precision):
            run_victim(scenario, store, cache)
    elif kind == "extractor":
        extractor, scenario = extractors_of(matrix)[number]
        with arithmetic(scenario.recipe.precision):
            run_extractor(extractor, scenario, store, cache)
    else:
        cell = matrix.cells[number]
        with arithmetic(cell.scenario.recipe.precision):
            run_cell(cell, store, cache)


def _device_lost() -> bool:
    """Whether the GPU answers this process no more: an illegal access spoils everything the process does there afterwards."""
    import torch

    if not torch.cuda.is_available():
        return False
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        return True
    return False


def victims_of(matrix: Any) -> list[Any]:
    """Every victim a matrix needs, benign twins first, each once, in matrix order."""
    seen: dict[str, Any] = {}
    from models.spec import canonical

    for scenario in [s.twin() for s in matrix.scenarios] + list(matrix.scenarios):
        seen.setdefault(canonical(scenario.spec()), scenario)
    return list(seen.values())


def extractors_of(matrix: Any) -> list[Any]:
    """Every (extractor, scenario) that is trained for a matrix, each once; those on clean images first: victims stand on them."""
    from benchmark.run.keys import extractor_key

    wanted = [(s.frozen.extractor, s) for s in victims_of(matrix) if s.frozen]
    for cell in matrix.cells:
        wanted += [(one, cell.scenario) for one in cell.extractors]
    seen: dict[str, Any] = {}
    for extractor, scenario in wanted:
        if extractor.reads != "nothing":
            seen.setdefault(extractor_key(extractor, scenario, ""), (extractor, scenario))
    return sorted(seen.values(), key=lambda pair: pair[0].reads != "clean")


# -- in the parent -------------------------------------------------------------------------------------------------------------


class _Inline:
    """The queue's place when there is one process only: news go straight to the watcher."""

    def __init__(self, watcher: Watcher) -> None:
        self.watcher = watcher

    def put(self, item: News) -> None:
        _tell(self.watcher, item)


def _tell(watcher: Watcher, item: News) -> None:
    if item.what == "started":
        watcher.started(item.worker, item.text)
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
    stages: Sequence[Stage], matrix_path: Path, store: Path, cache: Path, watcher: Watcher, processes: int
) -> list[Failure]:
    """Runs every stage once the stages it waits for have finished; a stage after a failed one is not run.

    Raises:
        BadInput: something a person must mend (a full disk, a missing data set); what is stored stays.
    """
    arguments = (str(matrix_path), str(store), str(cache))
    schedule = Schedule(stages, watcher)
    if processes == 1:
        _run_inline(schedule, arguments)
    else:
        _run_pool(schedule, arguments, processes)
    return list(schedule.failures.values())


def _run_inline(schedule: Schedule, arguments: tuple[str, str, str]) -> None:
    enter(*arguments, _Inline(schedule.watcher), 0)
    while schedule.waiting:
        position = schedule.next()
        if position is None:
            if schedule.waiting:
                time.sleep(AGAIN)
            continue
        stage = schedule.stages[position]
        try:
            put_back = work(stage.kind, stage.number, stage.label)
        except StageError as error:
            schedule.failed(position, str(error))
        else:
            (schedule.put_back if put_back else schedule.done)(position)


def _run_pool(schedule: Schedule, arguments: tuple[str, str, str], processes: int) -> None:
    while not _run_one_pool(schedule, arguments, processes):
        schedule.watcher.note("a worker process died; its stages are tried again")


def _run_one_pool(schedule: Schedule, arguments: tuple[str, str, str], processes: int) -> bool:
    """Runs stages in a fresh pool until all have ended (True) or one of its processes dies, which ends the pool (False)."""
    context = multiprocessing.get_context("spawn")
    # A process may die while it holds the queue's lock, so the next pool has a queue of its own.
    news: Any = context.SimpleQueue()
    pool = ProcessPoolExecutor(processes, context, initializer=enter, initargs=(*arguments, news, os.getpid()))
    places: dict[tuple[str, int], int] = {(stage.kind, stage.number): position for position, stage in enumerate(schedule.stages)}
    running: dict[Future[bool], int] = {}
    at: dict[int, int] = {}

    def drain() -> None:
        while not news.empty():
            item: News = news.get()
            if item.what == "started":
                at[item.worker] = places[item.kind, item.number]
            elif item.what != "note":
                at.pop(item.worker, None)
            _tell(schedule.watcher, item)

    def ended(future: Future[bool]) -> None:
        error = future.exception()
        if isinstance(error, BrokenProcessPool):
            raise error
        position = running.pop(future)
        if isinstance(error, StageError):
            schedule.failed(position, str(error))
        elif error is not None:
            raise error
        else:
            (schedule.put_back if future.result() else schedule.done)(position)

    try:
        while schedule.waiting or running:
            while len(running) < processes and (position := schedule.next()) is not None:
                stage = schedule.stages[position]
                try:
                    running[pool.submit(work, stage.kind, stage.number, stage.label)] = position
                except BrokenProcessPool:
                    schedule.back(position)
                    raise
            if not running:  # nothing to wait for but another run
                time.sleep(0.2)
            finished, _ = wait(running, timeout=0.2, return_when=FIRST_COMPLETED)
            drain()
            for future in finished:
                ended(future)
            if not finished and connection.wait([process.sentinel for process in _processes(pool)], timeout=0):
                # The pool hears of no death of a process that it started just after its last look at which there are.
                raise BrokenProcessPool("a process ended")
    except BrokenProcessPool:
        dead = _dead(pool)
        drain()
        for future in tuple(running):
            with suppress(BrokenProcessPool):
                ended(future)
        left = set(running.values())
        # What ran beside the one that died has not died. Where nobody can tell which one it was, it counts for all.
        own = {at[worker] for worker in dead if worker in at} & left or left
        for position in sorted(left, reverse=True):  # who comes back last comes first
            (schedule.died if position in own else schedule.back)(position)
        for worker in at:
            schedule.watcher.put_back(worker)
        return False
    finally:
        drain()
        workers = _processes(pool)  # a pool that is shut down has forgotten them
        pool.shutdown(wait=False, cancel_futures=True)
        for process in workers:
            process.kill()  # Lightning takes SIGTERM for a wish, and goes on to the end of its batch
    return True


def _processes(pool: ProcessPoolExecutor) -> list[Any]:
    return list((pool._processes or {}).values())


def _dead(pool: ProcessPoolExecutor) -> set[int | None]:
    """Ends what is left of a broken pool; the ids of those of its processes that had died by themselves.

    The pool asks the others to end (SIGTERM). One that is in a training does not follow, and the pool would wait for it for ever.
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
