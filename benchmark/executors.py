"""Running stages: several processes on this machine, one thread each; where there is a GPU, they share it.

A stage is a victim, an extractor or a cell, named by its place in the matrix; the store is the hand-over between them, so who ran
what, in which order and how often it was interrupted cannot change a row. Every process finds the GPU by itself (it is not told
which device to use), and what it stores is on the CPU. A stage that another run of the same store is computing is put back and
asked for again after the others.
"""

from __future__ import annotations

import multiprocessing
import os
import threading
import time
import traceback
from collections import deque
from collections.abc import Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

from models.spec import BadInput

__all__ = ["Failure", "Stage", "Watcher", "cores", "places", "run_stages", "single_thread"]

ATTEMPTS = 3
"""How often a stage is tried when the process that runs it dies (out of memory, say)."""
SHARING = 3
"""Processes that share a GPU unless somebody says otherwise: at the literature's batch of 128 a single one spends about as long on
issuing kernels as the GPU on running them (an estimate; ``benchmark.throughput`` measures what sharing gives)."""
AGAIN = 1.0
"""Seconds until a stage that another run is computing is asked for again."""


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


# -- inside a worker -----------------------------------------------------------------------------------------------------------

_state: dict[str, Any] = {}


def _start(path: str, store: str, cache: str, news: Any, parent: int) -> None:
    single_thread()
    from benchmark.matrix import load_matrix
    from benchmark.store import Store

    def report(line: str) -> None:
        news.put((os.getpid(), "note", line, ""))

    _state.update(matrix=load_matrix(Path(path)), store=Store(Path(store), report, patient=False), cache=Path(cache), news=news)
    _state.update(pooled=parent > 0, lost=False)
    if parent:
        threading.Thread(target=_die_with, args=(parent,), daemon=True).start()


def _die_with(parent: int) -> None:
    """A worker whose parent was killed must not go on working in secret."""
    while os.getppid() == parent:
        time.sleep(0.5)
    os._exit(1)


def _work(kind: str, number: int, label: str) -> bool:
    """Runs a stage; True when it was put back, because another run is computing it or what it stands on."""
    from benchmark.store import Busy

    if _state.get("lost"):
        os._exit(1)  # the pool starts another process and tries this stage there
    news = _state["news"]
    news.put((os.getpid(), "started", label, kind))
    ended = "finished"
    try:
        _run(kind, number)
    except BadInput:
        raise
    except Busy:
        ended = "put back"
        return True
    except Exception as error:
        _state["lost"] = _state["pooled"] and _device_lost()
        # Told here, where the traceback is whole, so that the reason reads the same in this process and across processes.
        raise StageError(_why(error)) from error
    finally:
        news.put((os.getpid(), ended, label, kind))
    return False


def _run(kind: str, number: int) -> None:
    from benchmark.cell import run_cell, run_extractor, run_victim
    from models.training import arithmetic

    matrix, store, cache = _state["matrix"], _state["store"], _state["cache"]
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
    from benchmark.cell import extractor_key

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

    def put(self, item: tuple[int, str, str, str]) -> None:
        _tell(self.watcher, item)


def _tell(watcher: Watcher, item: tuple[int, str, str, str]) -> None:
    worker, what, text, kind = item
    if what == "started":
        watcher.started(worker, text)
    elif what == "finished":
        watcher.finished(worker, text, kind)
    elif what == "put back":
        watcher.put_back(worker)
    else:
        watcher.note(text)


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
    if processes == 1:
        return _run_inline(stages, arguments, watcher)
    return _run_pool(stages, arguments, watcher, processes)


def _run_inline(stages: Sequence[Stage], arguments: tuple[str, str, str], watcher: Watcher) -> list[Failure]:
    _start(*arguments, _Inline(watcher), 0)
    failures: dict[int, Failure] = {}
    done: set[int] = set()
    waiting = deque(range(len(stages)))
    shared = _Shared(watcher)
    passed = 0  # over how many stages, since the last one that could be run
    while waiting:
        if passed == len(waiting):
            time.sleep(AGAIN)
            passed = 0
        position = waiting.popleft()
        stage = stages[position]
        blocked = [failures[i] for i in stage.after if i in failures]
        put_back = not blocked and not all(i in done for i in stage.after)
        if blocked:
            failures[position] = Failure(position, blocked[0].reason)
        elif not put_back:
            try:
                put_back = _work(stage.kind, stage.number, stage.label)
            except StageError as error:
                failures[position] = Failure(position, str(error))
            else:
                if put_back:
                    shared.told()
                else:
                    done.add(position)
        if put_back:
            waiting.append(position)
            passed += 1
        else:
            passed = 0
    return list(failures.values())


class _Shared:
    """Tells, once, that another run is at work on the same store."""

    def __init__(self, watcher: Watcher) -> None:
        self.watcher, self.silent = watcher, False

    def told(self) -> None:
        if not self.silent:
            self.watcher.note("another run is computing stages of this one in the same store: they are read once they stand")
        self.silent = True


def _run_pool(stages: Sequence[Stage], arguments: tuple[str, str, str], watcher: Watcher, processes: int) -> list[Failure]:
    context = multiprocessing.get_context("spawn")
    news: Any = context.SimpleQueue()
    done: set[int] = set()
    failures: dict[int, Failure] = {}
    tries = dict.fromkeys(range(len(stages)), 0)
    waiting = deque(range(len(stages)))
    again: dict[int, float] = {}
    shared = _Shared(watcher)
    pool = None
    running: dict[Future[bool], int] = {}

    def drain() -> None:
        while not news.empty():
            _tell(watcher, news.get())

    try:
        while waiting or running:
            if pool is None:
                pool = ProcessPoolExecutor(processes, context, initializer=_start, initargs=(*arguments, news, os.getpid()))
            try:
                for _ in range(len(waiting)):
                    if len(running) >= processes:
                        break
                    position = waiting.popleft()
                    stage = stages[position]
                    blocked = [failures[i] for i in stage.after if i in failures]
                    if blocked:
                        failures[position] = Failure(position, blocked[0].reason)
                    elif all(i in done for i in stage.after) and again.get(position, 0.0) <= time.monotonic():
                        running[pool.submit(_work, stage.kind, stage.number, stage.label)] = position
                    else:
                        waiting.append(position)
                if not running and waiting:  # nothing to wait for but another run
                    time.sleep(0.2)
                finished, _ = wait(running, timeout=0.2, return_when=FIRST_COMPLETED)
                drain()
                for future in finished:
                    position = running.pop(future)
                    error = future.exception()
                    if error is None and future.result():
                        shared.told()
                        again[position] = time.monotonic() + AGAIN
                        waiting.append(position)
                    elif error is None:
                        done.add(position)
                    elif isinstance(error, BrokenProcessPool):
                        running[future] = position
                        raise error
                    elif isinstance(error, StageError):
                        failures[position] = Failure(position, str(error))
                    else:
                        raise error
            except BrokenProcessPool:
                pool.shutdown(wait=True, cancel_futures=True)
                pool = None
                for position in running.values():
                    tries[position] += 1
                    if tries[position] >= ATTEMPTS:
                        failures[position] = Failure(position, f"its process died {ATTEMPTS} times (out of memory?)")
                    else:
                        waiting.appendleft(position)
                running.clear()
                watcher.note("a worker process died; its stages are tried again")
    finally:
        drain()
        if pool is not None:
            workers = list((pool._processes or {}).values())  # a pool that is shut down has forgotten them
            pool.shutdown(wait=False, cancel_futures=True)
            for process in workers:
                process.terminate()
    return list(failures.values())
