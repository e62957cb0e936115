"""Stages on a real Ray cluster of several nodes on this machine: the same rows, whatever dies."""

from __future__ import annotations

import io
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console

from benchmark.data.datasets import load
from benchmark.run import local as executors
from benchmark.run import on_ray as ray_executor
from benchmark.run.local import Failure, Schedule, run_stages
from benchmark.run.plan import Plan, Stage
from benchmark.run.session import run_matrix
from benchmark.settings.cells import Matrix
from benchmark.settings.load import load_matrix
from benchmark.storage.files import held
from benchmark.storage.machine import arithmetic, sources, versions
from benchmark.storage.store import Store
from models.spec import BadInput, canonical

ray = pytest.importorskip("ray")
AT_LENGTH = pytest.mark.skipif(
    "LEVELFIELD_CLUSTER" not in os.environ, reason="minutes, and a machine with nothing else to do: LEVELFIELD_CLUSTER=1 has it"
)
# Ray's own: sockets and files of the daemons that it starts are closed when they are collected.
pytestmark = [
    pytest.mark.filterwarnings("ignore:unclosed:ResourceWarning"),
    pytest.mark.filterwarnings("ignore:subprocess .* is still running:ResourceWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]

Order = Callable[[list[Stage]], list[Stage]]
ROOT = Path(__file__).resolve().parents[3]
NODES = 4
MATRIX = """
title = "plug-ins that misbehave"
plugins = ["odd.py"]
seeds = [0, 1]
dataset = { source = "digits", clean_fraction = 0.2, train_limit = 120, test_limit = 40 }
recipe = { epochs = 1, batch = 32, lr = 0.05, crop = 1, flip = false }
backbone = [{ name = "vgg11-bn", width = 2, hidden = 8 }]
attack = [{ name = "badnets" }]
[[defense]]
name = "none"
[[defense]]
name = "clp"
tracks = ["model"]
[[defense]]
name = "stays"
tracks = ["model"]
"""
OTHERS = """
[[defense]]
name = "dies"
tracks = ["model"]
[[defense]]
name = "breaks"
tracks = ["model"]
"""
ODD = '''
"""Defenses that misbehave."""
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar
from defenses.base import Candidate, DefenderView, Defense, Knowledge

@dataclass(frozen=True)
class Stays(Defense):
    """Writes where it is and stays there, where somebody asked for that; one alone does."""
    name: ClassVar[str] = "stays"
    needs: ClassVar[Knowledge] = Knowledge.MODEL

    def candidates(self, view: DefenderView) -> Iterator[Candidate]:
        asked = Path(__file__).parent / "stay"
        if asked.exists():
            import ray
            asked.unlink()
            (asked.parent / "here.tmp").write_text(f"{ray.get_runtime_context().get_node_id()} {os.getpid()}")
            (asked.parent / "here.tmp").rename(asked.parent / "here")
            time.sleep(3600)
        yield Candidate(view.model)

@dataclass(frozen=True)
class Dies(Defense):
    """Ends its process, every time."""
    name: ClassVar[str] = "dies"
    needs: ClassVar[Knowledge] = Knowledge.MODEL

    def candidates(self, view: DefenderView) -> Iterator[Candidate]:
        with (Path(__file__).parent / "deaths").open("a") as deaths:
            deaths.write("x")
        os._exit(9)
        yield

@dataclass(frozen=True)
class Breaks(Defense):
    """Raises."""
    name: ClassVar[str] = "breaks"
    needs: ClassVar[Knowledge] = Knowledge.MODEL

    def candidates(self, view: DefenderView) -> Iterator[Candidate]:
        raise RuntimeError("no luck")
        yield
'''


class Ear:
    """Remembers what it was told."""

    def __init__(self) -> None:
        self.begun: list[tuple[int, str]] = []
        self.ended: list[str] = []
        self.notes: list[str] = []

    def started(self, worker: int, label: str, kind: str) -> None:
        self.begun.append((worker, label))

    def epoch(self, worker: int, done: int, total: int) -> None:
        pass

    def finished(self, worker: int, label: str, kind: str) -> None:
        self.ended.append(label)

    def put_back(self, worker: int) -> None:
        self.ended.append("put back")

    def note(self, line: str) -> None:
        self.notes.append(line)


def matrix_in(folder: Path, settings: str = MATRIX) -> Matrix:
    (folder / "odd.py").write_text(ODD)
    (folder / "tiny.toml").write_text(settings)
    return load_matrix(folder / "tiny.toml")


def plan_of(matrix: Matrix, cache: Path) -> Plan:
    spec = matrix.scenarios[0].dataset
    return Plan(matrix, {canonical(spec): load(spec, cache).fingerprint})


def named(*labels: str) -> list[Stage]:
    """Stages that are never run; their keys are their labels."""
    scenario: Any = None
    return [Stage("defended", label, label, scenario) for label in labels]


def go(matrix: Matrix, folder: Path, **options: Any) -> str:
    """Runs the matrix; what was said on the way."""
    out = io.StringIO()
    run_matrix(matrix, results=folder / "results", cache=folder / "cache", console=Console(file=out, width=500), **options)
    return out.getvalue()


def content(folder: Path) -> tuple[bytes, ...]:
    return tuple((folder / "results" / "tiny" / name).read_bytes() for name in ("rows.csv", "curves.csv", "manifest.json"))


@pytest.fixture(scope="module")
def matrix(tmp_path_factory: pytest.TempPathFactory) -> Matrix:
    return matrix_in(tmp_path_factory.mktemp("matrix"))


@pytest.fixture(scope="module")
def reference(matrix: Matrix, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One process of this machine, matrix order."""
    folder = tmp_path_factory.mktemp("reference")
    go(matrix, folder, processes=1)
    return folder


class Nodes:
    """A head that computes nothing, and nodes of one CPU each."""

    def __init__(self) -> None:
        from ray.cluster_utils import Cluster

        quick = {"health_check_initial_delay_ms": 1000, "health_check_period_ms": 500, "health_check_failure_threshold": 4}
        few = {"object_store_memory": ray_executor.OBJECT_STORE}
        self.cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "_system_config": quick, **few})
        self.nodes = [self.cluster.add_node(num_cpus=1, **few) for _ in range(NODES)]

    def kill(self, node_id: str) -> None:
        node = next(node for node in self.nodes if node.node_id == node_id)
        self.cluster.remove_node(node, allow_graceful=False)


@pytest.fixture(scope="module")
def nodes() -> Iterator[Nodes]:
    """Connected to once for all tests, so that the workers need not be started for each."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in ray_executor.QUIET.items():
            patch.setenv(name, value)
        made = Nodes()
        patch.setenv("RAY_ADDRESS", made.cluster.address)
        with ray_executor.connected(None, None):
            yield made
        made.cluster.shutdown()


def riffled(stages: list[Stage]) -> list[Stage]:
    """Another order: the last first, every other one."""
    return stages[::-2] + stages[-2::-2]


# -- the same rows -------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(("processes", "order"), [(1, None), (2, riffled), (4, lambda stages: stages[::-1])])
def test_rows_are_those_of_one_process(
    matrix: Matrix, reference: Path, nodes: Nodes, tmp_path: Path, processes: int, order: Order | None
) -> None:
    said = go(matrix, tmp_path, executor="ray", processes=processes, order=order)
    assert content(tmp_path) == content(reference)
    assert f"Ray: {NODES + 1} nodes, {NODES} CPUs, 0 GPUs; {processes} stages at once, one thread each" in said
    before = (tmp_path / "results" / "tiny" / "manifest.json").stat().st_mtime_ns
    again = go(matrix, tmp_path, executor="ray", processes=processes)
    assert "Ray" not in again, "all is cached: nothing to ask the cluster for"
    assert (tmp_path / "results" / "tiny" / "manifest.json").stat().st_mtime_ns == before


@pytest.mark.slow
def test_as_many_stages_at_once_as_asked_for(matrix: Matrix, nodes: Nodes, tmp_path: Path) -> None:
    class Counting(Ear):
        now, most = 0, 0

        def started(self, worker: int, label: str, kind: str) -> None:
            super().started(worker, label, kind)
            self.now += 1
            self.most = max(self.most, self.now)

        def finished(self, worker: int, label: str, kind: str) -> None:
            super().finished(worker, label, kind)
            self.now -= 1

    plan = plan_of(matrix, tmp_path / "cache")
    stages = [stage for stage in plan.stages.values() if stage.kind == "victim"]
    with ray_executor.connected(2, None) as cluster:
        ear, used = Counting(), dict[str, str]()
        assert cluster.run(stages, plan, tmp_path / "store", tmp_path / "cache", ear, used) == []
    assert used == arithmetic()
    assert sorted(ear.ended) == sorted(stage.label for stage in stages)
    assert 1 <= ear.most <= 2
    assert {worker for worker, _ in ear.begun} <= set(range(1, NODES + 1))
    assert all(" on " in label for _, label in ear.begun)
    assert not list((tmp_path / "store" / "locks").glob("run-*"))


# -- what goes wrong -----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_node_with_other_code_ends_the_run_by_name(
    matrix: Matrix, nodes: Nodes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ray_executor, "sources", lambda: {**sources(), "models/spec.py": "another"})
    with pytest.raises(BadInput, match=r"node \S+ cannot take part: models/spec.py is not the file that it is where"):
        go(matrix, tmp_path, executor="ray")
    assert not (tmp_path / "cache" / "store" / "victim").exists()
    assert not (tmp_path / "results" / "tiny" / "rows.csv").exists()


@pytest.mark.slow
@AT_LENGTH
def test_a_dead_node_a_stage_that_kills_its_process_and_one_that_raises(reference: Path, nodes: Nodes, tmp_path: Path) -> None:
    worse = matrix_in(tmp_path, MATRIX + OTHERS)  # last: the node is not replaced
    (tmp_path / "stay").touch()

    def kill() -> None:
        while not (tmp_path / "here").exists():
            time.sleep(0.1)
        nodes.kill((tmp_path / "here").read_text().split()[0])

    killer = threading.Thread(target=kill, daemon=True)
    killer.start()
    said = go(worse, tmp_path, executor="ray")
    killer.join(60)
    lines = (tmp_path / "results" / "tiny" / "rows.csv").read_text().splitlines()
    misbehaved = [line for line in lines if ",dies," in line or ",breaks," in line]
    assert [line for line in lines if line not in misbehaved] == (
        (reference / "results" / "tiny" / "rows.csv").read_text().splitlines()
    )
    assert len(misbehaved) == 2 * 2 * 3
    assert all("its process died 3 times" in line for line in misbehaved if ",dies," in line)
    assert all("RuntimeError: no luck (odd.py:" in line for line in misbehaved if ",breaks," in line)
    # The node may take one of those along that were about to die by themselves.
    assert len((tmp_path / "deaths").read_text()) in (2 * executors.ATTEMPTS - 1, 2 * executors.ATTEMPTS)
    assert not killer.is_alive()
    assert said.count("died; its stage is tried again") in (2 * executors.ATTEMPTS, 2 * executors.ATTEMPTS + 1)
    assert said.count("note: breaks (whole) on vgg11-bn-w2 / badnets / seed 0: failed: RuntimeError: no luck") == 1
    assert said.count("note: dies (whole) on vgg11-bn-w2 / badnets / seed 1: failed: its process died 3 times") == 1


def ends(pid: int) -> bool:
    """Whether a process ends within a minute."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and Path(f"/proc/{pid}").exists():
        time.sleep(0.1)
    return not Path(f"/proc/{pid}").exists()


# A shell's background jobs, and so tests that are one, do not hear Ctrl-C; this command does.
HEARS = "import os, signal, sys; signal.signal(signal.SIGINT, signal.SIG_DFL); os.execv(sys.argv[1], sys.argv[1:])"


@pytest.mark.slow
@pytest.mark.parametrize("sent", [signal.SIGINT, pytest.param(signal.SIGKILL, marks=AT_LENGTH)])
def test_a_run_that_ends_leaves_no_stage_running(tmp_path: Path, sent: signal.Signals) -> None:
    """Interrupted as from a terminal, which tells every process of the run; or killed, which tells nobody."""
    matrix = matrix_in(tmp_path)
    (tmp_path / "stay").touch()
    command = [sys.executable, "-m", "benchmark", "run", "-m", str(matrix.path), "--executor", "ray", "--processes", "1",
               "--no-wandb", "--results", str(tmp_path / "results"), "--cache", str(tmp_path / "cache")]  # fmt: skip
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    sessions = Path("/tmp")
    before = set(sessions.glob(f"{ray_executor.SESSION}*"))
    with (tmp_path / "said").open("w") as said:
        process = subprocess.Popen(
            [sys.executable, "-c", HEARS, *command], cwd=ROOT, stdout=said, stderr=subprocess.STDOUT, start_new_session=True,
            env=environment,
        )  # fmt: skip
        deadline = time.monotonic() + 400
        while process.poll() is None and not (tmp_path / "here").exists() and time.monotonic() < deadline:
            time.sleep(0.1)
        assert (tmp_path / "here").exists(), (tmp_path / "said").read_text()
        stage = int((tmp_path / "here").read_text().split()[1])
        mine = set(sessions.glob(f"{ray_executor.SESSION}*")) - before
        (os.killpg if sent == signal.SIGINT else os.kill)(process.pid, sent)
        status = process.wait(300)
    told = (tmp_path / "said").read_text()
    assert status == (130 if sent == signal.SIGINT else -signal.SIGKILL), told
    assert ("issue the same command again" in told) == (sent == signal.SIGINT)
    assert "Traceback" not in told
    assert "raylet" not in told
    assert ends(stage)
    if sent == signal.SIGINT:
        assert (tmp_path / "results" / "tiny" / "rows.csv").exists()
        assert not any(folder.exists() for folder in mine)
    for folder in mine:
        shutil.rmtree(folder, ignore_errors=True)


# -- without a cluster ---------------------------------------------------------------------------------------------------------


def job_of(matrix: Matrix, folder: Path) -> dict[str, Any]:
    (folder / "mark").touch()
    return {
        "matrix": str(matrix.path),
        "settings": ray_executor._settings(matrix),
        "fingerprints": {canonical(matrix.scenarios[0].dataset): "print"},
        "store": str(folder / "store"),
        "cache": str(folder / "cache"),
        "mark": str(folder / "mark"),
        "cwd": str(Path.cwd()),
        "versions": versions(),
        "sources": sources(),
        "environment": {},
        "gpus": 0.5,
    }


@pytest.fixture
def worker(monkeypatch: pytest.MonkeyPatch) -> None:
    """This process plays a worker, without the watch on its parent."""
    monkeypatch.setattr(executors, "state", {})
    monkeypatch.setattr(executors, "_die_with", lambda parent: None)
    monkeypatch.setattr(ray_executor, "_entered", {})


@pytest.mark.usefixtures("worker")
@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"mark": "/nowhere/run-1"}, "does not see the run's store, .*must be shared, under the same path"),
        ({"versions": {**versions(), "torch": "0.4"}}, r"torch is \S+ there and 0\.4 where the run was started"),
        ({"sources": {**sources(), "benchmark/run/defend.py": ""}}, "benchmark/run/defend.py is not the file"),
        ({"sources": {**sources(), "benchmark/settings/presets.toml": ""}}, "benchmark/settings/presets.toml is not the file"),
        ({"settings": "of another file"}, "tiny.toml has other settings there, or has been changed"),
        ({"matrix": "/nowhere/tiny.toml"}, "cannot be read"),
    ],
)
def test_why_a_node_cannot_take_part(matrix: Matrix, tmp_path: Path, change: dict[str, Any], why: str) -> None:
    said = list(ray_executor.attend(job_of(matrix, tmp_path) | change, "a"))
    assert [message[0] for message in said] == ["unfit"]
    with pytest.raises(BadInput, match=f"node far cannot take part: .*{why}"):
        ray_executor._ended(Schedule(named("a"), Ear()), 0, "far", 1, said[0])
    assert not (tmp_path / "store" / "victim").exists()


@pytest.mark.usefixtures("worker")
def test_a_worker_loads_a_run_once_and_says_how_each_stage_ended(
    matrix: Matrix, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loads: list[str] = []
    start = executors.enter
    monkeypatch.setattr(executors, "enter", lambda *arguments: (loads.append(arguments[0]), start(*arguments)))
    raised: list[Exception] = [RuntimeError("a\nb"), BadInput("the disk is full")]

    job = job_of(matrix, tmp_path)
    keys = [stage.key for stage in Plan(matrix, job["fingerprints"]).cells[:3]]

    def run(stage: Stage, store: Store, cache: Path) -> None:
        number = keys.index(stage.key)
        store.report(f"note {number}")
        if number:
            raise raised[number - 1]

    monkeypatch.setattr(Stage, "run", run)
    ends = [list(ray_executor.attend(job, key)) for key in keys]
    assert [message[0][0] for message in ends] == ["done", "failed", "bad input"]
    assert [message[0][2] for message in ends] == [["note 0"], ["note 1"], ["note 2"]]
    assert ends[1][0][1].startswith("RuntimeError: a (")
    assert ends[2][0][1] == "the disk is full"
    assert loads == [str(matrix.path)]
    left: list[int] = []
    monkeypatch.setattr(ray_executor, "_leave", lambda: left.append(1))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "a GPU that this process did not begin with")
    assert list(ray_executor.attend(job, keys[0])) == [("left", "")]
    assert [message[0] for message in ray_executor.attend(job | {"gpus": 0.0}, keys[0])] == ["done"]
    executors.state["lost"] = True
    assert list(ray_executor.attend(job | {"gpus": 0.0}, keys[0])) == [("left", "")]
    assert left == [1, 1]


def test_what_a_last_message_does() -> None:
    ear = Ear()
    schedule = Schedule(named("stage 0", "stage 1", "stage 2"), ear)
    for position in (0, 1, 2):
        assert schedule.next() == position
    ray_executor._ended(schedule, 0, "far", 1, ("left", ""))
    assert schedule.next() is None  # not to the same process, which is about to end
    schedule._again.clear()
    assert schedule.next() == 0
    ray_executor._ended(schedule, 0, "far", 1, ("done", "", ["a note"], {}))
    ray_executor._ended(schedule, 1, "far", 1, ("failed", "no luck", [], {}))
    assert list(schedule.failures.values()) == [Failure(1, "no luck")]
    ray_executor._ended(schedule, 2, "far", 1, ("put back", "", [], {}))
    assert schedule.waiting
    assert schedule.next() is None  # not at once
    assert ear.ended == ["put back", "stage 0", "stage 1", "put back"]
    assert ear.notes[:2] == ["a note", "stage 1: failed: no luck"]
    with pytest.raises(BadInput, match="the disk is full"):
        ray_executor._ended(schedule, 2, "far", 1, ("bad input", "the disk is full", [], {}))


def test_nodes_that_compute_otherwise_are_named() -> None:
    ear, used = Ear(), dict[str, str]()
    for host, device in (("a", "H100"), ("b", "A100"), ("c", "A100"), ("d", "H100")):
        ray_executor._computed(ear, host, {"device": device}, used)
    assert used == {"device": "A100; H100"}
    assert ear.notes == ["b computes with A100, others with H100: rows repeat bit for bit on one kind alone"]


class Pretended:
    """As much of ``ray`` as a cluster is described by."""

    def __init__(self, **resources: float) -> None:
        self.resources = resources

    def cluster_resources(self) -> dict[str, float]:
        return self.resources

    def nodes(self) -> list[dict[str, bool]]:
        return [{"Alive": True}, {"Alive": True}, {"Alive": False}]


class Scripted(Pretended):
    """A ``ray`` whose tasks say what a script says: for each label, one list of messages (or errors) per attempt."""

    exceptions = ray.exceptions

    def __init__(self, scripts: dict[str, list[list[Any]]]) -> None:
        super().__init__(CPU=2)
        self.scripts, self.asked, self.cancelled = scripts, list[dict[str, Any]](), list[str]()
        self.labels: dict[Any, str] = {}

    def remote(self, **options: Any) -> Callable[[Any], Any]:
        self.asked.append(options)
        return lambda function: SimpleNamespace(remote=self.start)

    def start(self, job: Any, key: str) -> Any:
        attempt = iter(self.scripts[key].pop(0))
        self.labels[attempt] = key
        return attempt

    def wait(self, attempts: list[Any], **options: Any) -> tuple[list[Any], list[Any]]:
        return attempts[-1:], attempts[:-1]

    def get(self, message: Any) -> Any:
        if isinstance(message, BaseException):
            raise message
        return message

    def cancel(self, attempt: Any, *, force: bool) -> None:
        assert force
        self.cancelled.append(self.labels[attempt])


def scripted(matrix: Matrix, folder: Path, ear: Ear, **scripts: list[list[Any]]) -> tuple[Scripted, Callable[[], list[Failure]]]:
    """A pretended Ray, and how to run its scripts as stages."""
    pretended = Scripted(scripts)
    cluster = ray_executor.Cluster(pretended, 2, None)
    plan = Plan(matrix, {canonical(matrix.scenarios[0].dataset): "print"})
    return pretended, lambda: cluster.run(named(*scripts), plan, folder / "store", folder / "cache", ear, {})


BEGUN, DONE = ("started", "far", 7), ("done", "", [], {})


def test_only_its_own_deaths_count_for_a_stage(matrix: Matrix, tmp_path: Path) -> None:
    ear, dead = Ear(), ray.exceptions.WorkerCrashedError()
    pretended, run = scripted(
        matrix,
        tmp_path,
        ear,
        plain=[[BEGUN, DONE]],
        twice=[[BEGUN, dead], [BEGUN, dead], [BEGUN, DONE]],
        always=[[BEGUN, dead]] * executors.ATTEMPTS,
        unlucky=[[dead]] * ray_executor.UNHEARD + [[BEGUN, DONE]],
        nowhere=[[dead]] * (ray_executor.UNHEARD + executors.ATTEMPTS),
    )
    why = "its process died 3 times (out of memory?)"
    assert sorted(failure.position for failure in run()) == [2, 4]
    assert sorted(note for note in ear.notes if "failed" in note) == [f"always: failed: {why}", f"nowhere: failed: {why}"]
    assert sum("on far died" in note for note in ear.notes) == 2 + executors.ATTEMPTS
    assert sorted(label for label in ear.ended if label != "put back") == ["plain", "twice", "unlucky"]
    assert not any(pretended.scripts.values()), "each attempt was made"
    assert [options["max_retries"] for options in pretended.asked] == [0]


@pytest.mark.parametrize(
    ("last", "raised"),
    [
        (("unfit", "no store"), BadInput),
        (("bad input", "the disk is full", [], {}), BadInput),
        (ray.exceptions.TaskCancelledError(), KeyboardInterrupt),
        (KeyboardInterrupt(), KeyboardInterrupt),
    ],
)
def test_what_ends_a_run_cancels_what_runs(matrix: Matrix, tmp_path: Path, last: Any, raised: type[BaseException]) -> None:
    pretended, run = scripted(matrix, tmp_path, Ear(), a=[[BEGUN, DONE]], b=[[BEGUN, last]])
    with pytest.raises(raised):
        run()
    assert "a" in pretended.cancelled
    assert not list((tmp_path / "store" / "locks").glob("run-*"))


def test_a_stage_takes_a_third_of_a_gpu_where_there_are_gpus() -> None:
    plain = ray_executor.Cluster(Pretended(CPU=8), None, None)
    assert (plain.gpus, plain._slots(), plain.room()) == (0, 8, 16)
    assert plain.words == "Ray: 2 nodes, 8 CPUs, 0 GPUs; 8 stages at once, one thread each"
    shared = ray_executor.Cluster(Pretended(CPU=32, GPU=2), None, None)
    assert shared.gpus == 1 / executors.SHARING
    assert shared._slots() == 2 * executors.SHARING
    assert shared.words == "Ray: 2 nodes, 32 CPUs, 2 GPUs; 6 stages at once, one thread each, 0.33 of a GPU each"
    assert ray_executor.Cluster(Pretended(CPU=4, GPU=2), None, 0.25)._slots() == 4
    assert ray_executor.Cluster(Pretended(CPU=4, GPU=2), None, 0.0)._slots() == 4
    assert ray_executor.Cluster(Pretended(CPU=4, GPU=2), 3, 1.0).room() == 3


def test_what_a_person_is_told_without_ray_or_a_cluster(matrix: Matrix, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(BadInput, match=r"--gpus is a stage's share .* goes with --executor ray"):
        go(matrix, tmp_path, gpus=0.5)
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "shutdown", lambda: None)
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")
    with pytest.raises(BadInput, match=r"--executor ray: no cluster at RAY_ADDRESS=127.0.0.1:1: .*refused$"):
        go(matrix, tmp_path, executor="ray")
    monkeypatch.setenv("RAY_ADDRESS", "auto")

    def refuse(**options: Any) -> None:
        raise ConnectionError("nobody there\nand more")

    monkeypatch.setattr(ray, "init", refuse)
    with pytest.raises(BadInput, match=r"--executor ray: no cluster at RAY_ADDRESS=auto: nobody there$"):
        go(matrix, tmp_path, executor="ray")
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(BadInput, match="ray is not installed here: pip install"):
        go(matrix, tmp_path, executor="ray")


def test_folders_of_killed_runs_are_removed_once_nobody_can_own_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    old, young, owned = (tmp_path / f"{ray_executor.SESSION}{name}" for name in ("old", "young", "owned"))
    for folder in (old, young, owned):
        (folder / "logs").mkdir(parents=True)
    for folder in (old, owned):
        os.utime(folder, (0, 0))
    with held(owned / "lock"):
        os.utime(owned, (0, 0))
        with ray_executor._session() as mine:
            assert sorted(tmp_path.iterdir()) == sorted([mine, owned, young])
    assert sorted(tmp_path.iterdir()) == sorted([owned, young])


# -- what a stage costs beside its work ----------------------------------------------------------------------------------------


def overhead(cached: Stage, run: Callable[[Sequence[Stage]], object], counts: tuple[int, int] = (20, 220)) -> float:
    """Milliseconds that a cached stage costs: the difference of two runs of different length, so that starting is not counted."""
    seconds = []
    for count in counts:
        start = time.perf_counter()
        run([cached] * count)
        seconds.append(time.perf_counter() - start)
    return 1000 * (seconds[1] - seconds[0]) / (counts[1] - counts[0])


@pytest.mark.slow
@AT_LENGTH
def test_a_cached_stage_costs_milliseconds(matrix: Matrix, nodes: Nodes, tmp_path: Path) -> None:
    store, cache, used = tmp_path / "store", tmp_path / "cache", dict[str, str]()
    plan = plan_of(matrix, cache)
    cached = next(stage for stage in plan.stages.values() if stage.kind == "victim")
    cached.run(Store(store), cache)
    with ray_executor.connected(2, None) as cluster:
        cluster.run([cached] * 2, plan, store, cache, Ear(), used)
        on_ray = overhead(cached, lambda stages: cluster.run(stages, plan, store, cache, Ear(), used))
    here = overhead(cached, lambda stages: run_stages(stages, plan, store, cache, Ear(), 1))
    print(f"milliseconds per empty stage: {here:.1f} in this process, {on_ray:.1f} on Ray")  # noqa: T201 - pytest -rP shows it
    assert 0 < on_ray < 1000
