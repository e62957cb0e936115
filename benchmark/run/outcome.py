"""The rows of a cell, from stored outcomes alone, and the peak memory of a stage."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from scipy.stats import rankdata
from torch import Tensor

from attacks.base import Role
from benchmark.rules.metrics import Score, der, gate, nan_of
from benchmark.rules.selection import NOTHING_TO_VALIDATE_ON, CandidateScore, Selection, choose
from benchmark.run.keys import cell_key
from benchmark.run.literature import compared, reference
from benchmark.settings.cells import Cell
from benchmark.storage.rows import Curve, Key, Row, Timing
from benchmark.storage.store import Entry
from defenses.base import Knowledge
from defenses.controls import NoDefense
from models.cost import Cost

__all__ = ["CellResult", "cell_rows", "gpu_mib", "isolation", "peak_mib", "reset_peak"]


@dataclass(frozen=True)
class CellResult:
    """The rows of a cell for the three files, and its key."""

    key: str
    rows: list[Row]
    curves: list[Curve]
    timing: Timing


def cell_rows(matrix: str, dataset: str, cell: Cell, fingerprint: str, outcome: Entry, victim: Entry, twin: Entry) -> CellResult:
    """Rows of a cell, from stored outcomes alone.

    Args:
        matrix: its name in rows.
        dataset: its name in rows.
        cell: the cell.
        fingerprint: of the data set.
        outcome: the cell's defense run.
        victim: the attacked model.
        twin: the benign twin.
    """
    key, out, vic = cell_key(cell, fingerprint), outcome.outcome, victim.outcome
    axes = _axes(matrix, dataset, cell, key)
    before = Score.read(vic) if vic["status"] == "ok" else Score(math.nan)
    scored = [CandidateScore.read(candidate) for candidate in out["candidates"]]
    common = axes | _attacked(cell, before, vic, nan_of(twin.outcome.get("acc"))) | _given(cell, out, vic)
    rules = [how for how in Selection if how is not Selection.CANARY or cell.canaries]
    rows = [Row(**common, selection=how.value, **_chosen(how, cell, scored, before, out, vic)) for how in rules]
    curves = [Curve(**axes, dial_name=cell.defense.dial_name, **_columns(Curve, one) | _canaries(one)) for one in scored]
    costs: dict[str, Any] = {name: nan_of(out.get(name)) for name in ("seconds", "peak_mib", "gpu_mib", "victim_seconds")}
    costs |= {f"victim_{name}": nan_of(vic.get(name)) for name in ("peak_mib", "gpu_mib")}
    return CellResult(key, rows, curves, Timing(**axes, **costs))


def _axes(matrix: str, dataset: str, cell: Cell, key: str) -> dict[str, Any]:
    scenario = cell.scenario
    axes = {
        "matrix": matrix,
        "dataset": dataset,
        "backbone": scenario.backbone_label,
        "attack": scenario.attack_label,
        "rate": scenario.plan.rate,
        "seed": scenario.seed,
        "track": cell.track.name,
        "scope": cell.scope.value,
        "defense": cell.defense_label,
        "cell": key[:12],
    }
    assert set(axes) == set(Key.__dataclass_fields__)
    return axes


def _columns(kind: type[Row] | type[Curve], one: CandidateScore) -> dict[str, Any]:
    """The columns of ``kind`` that are fields of a candidate's score; without those that were not measured."""
    names = {field.name for field in fields(kind)} & {field.name for field in fields(one)}
    return {name: value for name in names if (value := getattr(one, name)) is not None}


def _canaries(one: CandidateScore) -> dict[str, float]:
    """A candidate's canaries in one figure each: mean ASR, largest loss."""
    asr, loss = one.canary_asr or (), one.canary_loss or ()
    return {"canary_asr": sum(asr) / len(asr) if asr else math.nan, "canary_loss": max(loss, default=math.nan)}


def _attacked(cell: Cell, before: Score, vic: dict[str, Any], acc_benign: float) -> dict[str, Any]:
    """Columns about the scenario and its attacked model."""
    scenario, asr_benign = cell.scenario, nan_of(vic.get("asr_benign"))
    verdict, published = gate(before.asr, asr_benign), reference(scenario)
    literature, comparison = compared(scenario, before)
    return {
        "target": scenario.plan.target,
        "label_mode": scenario.plan.label_mode,
        "realised_rate": vic.get("realised_rate", math.nan),
        "control": cell.defense.control,
        "acc_undefended": before.acc,
        "asr_undefended": before.asr,
        "ra_undefended": before.ra,
        "acc_benign": acc_benign,
        "asr_benign": asr_benign,
        "effect": before.asr - asr_benign,
        "acc_loss": nan_of(vic.get("acc_loss")),
        "acc_loss_se": nan_of(vic.get("acc_loss_se")),
        "implanted": verdict.implanted,
        "gate": f"{verdict.words}; {comparison}",
        "literature": literature,
        "acc_literature": published.acc / 100 if published else math.nan,
        "asr_literature": published.asr / 100 if published else math.nan,
        "preset": cell.preset,
        "features": scenario.frozen.extractor.origin if scenario.frozen else "",
    }


def _chosen(
    how: Selection, cell: Cell, scored: list[CandidateScore], before: Score, out: dict[str, Any], vic: dict[str, Any]
) -> dict[str, Any]:
    """Columns about the candidate that a rule chooses; the status and its reason alone where there is none."""
    if out["status"] != "ok":
        return {"status": out["status"], "reason": out["reason"]}
    chosen = choose(how, scored, before, cell.tau)
    if chosen is None:
        return {"status": "refused", "reason": _nothing_to_choose_by(cell, out)}
    one, spent = scored[chosen], _cost(how, scored, chosen, out)
    return {
        **_columns(Row, one),
        "status": "ok",
        "reason": out["reason"],
        "der": der(before, one),
        "mark": _mark(one, cell, nan_of(vic.get("realised_rate"))),
        "note": "; ".join(note for note in (*_notes(cell, vic), one.note) if note),
        "samples_forward": spent.forward,
        "samples_backward": spent.backward,
        "cost_epochs": spent.epochs(vic["train_size"]),
    }


def _notes(cell: Cell, vic: dict[str, Any]) -> list[str]:
    notes = []
    if isinstance(cell.defense, NoDefense):
        notes += [
            f"the {name} alone: ASR {100 * nan_of(alone['asr']):.1f} %, RA {100 * nan_of(alone['ra']):.1f} %"
            for name, alone in vic.get("single_keys", {}).items()
        ]
    if vic.get("exported") and cell.defense.needs & (Knowledge.TRAIN | Knowledge.ROLES):
        notes.append("training-control attack: met through its exported static set")
    return notes


def _given(cell: Cell, out: dict[str, Any], vic: dict[str, Any]) -> dict[str, Any]:
    """Columns about what the defense used; empty for a cell that did not finish."""
    if out["status"] != "ok":
        return {}
    used = out["used"].split(" + ")
    extractor = cell.extractor or cell.defense.extractor
    lent = Cost(out["extractor_forward"], out["extractor_backward"])
    return {
        "used": out["used"],
        "clean_images": out["clean_images"] if "clean" in used else 0,
        "train_images": vic["train_size"] if {"train", "roles"} & set(used) else 0,
        "trained_anew": out["trained"],
        "extractor": extractor.origin if extractor else "",
        "extractor_epochs": lent.epochs(vic["train_size"]) if extractor else math.nan,
    }


def _cost(how: Selection, scored: list[CandidateScore], chosen: int, out: dict[str, Any]) -> Cost:
    """Samples it took to get the chosen candidate.

    A fixed default needs the first candidate (its cost includes the extractors) and its own; every other rule needs all
    candidates; the choice by canaries needs their copies as well.
    """
    paid = [scored[i] for i in ({0, chosen} if how is Selection.DEFAULT else range(len(scored)))]
    forward, backward = (out.get(f"canary_{name}", 0) if how is Selection.CANARY else 0 for name in ("forward", "backward"))
    return Cost(forward + sum(one.forward for one in paid), backward + sum(one.backward for one in paid))


def _nothing_to_choose_by(cell: Cell, out: dict[str, Any]) -> str:
    if Knowledge.CLEAN not in cell.grants:
        return NOTHING_TO_VALIDATE_ON
    other = "no canary is planted for a defense that does more than edit the model with the clean budget"
    return str(out.get("canary_reason", other))


def _mark(one: CandidateScore, cell: Cell, base_rate: float) -> str:
    """The mark of a chosen model: nothing was edited, or its isolated set holds no more poison than the training set."""
    if not one.changed and not isinstance(cell.defense, NoDefense):
        return "no change"
    detects = base_rate > 0 and not math.isnan(nan_of(one.recall))
    return "mechanism failed" if detects and not nan_of(one.precision) > base_rate else ""


def reset_peak() -> None:
    """Resets the peak memory of this process, where the system can (Linux), and of its GPU memory."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    marker = Path("/proc/self/clear_refs")
    if marker.exists():
        try:
            marker.write_text("5")
        except OSError:
            return


def gpu_mib() -> float | None:
    """Peak GPU memory allocated since :func:`reset_peak`, in MiB; None without a GPU."""
    return torch.cuda.max_memory_allocated() / 2**20 if torch.cuda.is_available() else None


def peak_mib() -> float:
    """Peak resident memory in MiB; since :func:`reset_peak` on Linux."""
    status = Path("/proc/self/status")
    if status.exists():
        for line in status.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) / 1024
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def isolation(isolated: Tensor | None, suspicion: Tensor | None, role: Tensor) -> dict[str, Any]:
    """Size, precision, recall and AUROC of an isolated set; nothing for a method that isolates none.

    Args:
        isolated: bool (N,), True = taken for poisoned.
        suspicion: float (N,), larger = sooner taken for poisoned; None = the AUROC is that of ``isolated`` itself.
        role: (N,), :class:`attacks.base.Role`. Samples that are not poisoned, covers among them, are the negative class.
    """
    if isolated is None:
        return {}
    poisoned = role == Role.POISON
    hits, size, there = int((isolated & poisoned).sum()), int(isolated.sum()), int(poisoned.sum())
    order = isolated if suspicion is None else suspicion
    return {
        "isolated": size,
        "precision": hits / size if size else math.nan,
        "recall": hits / there if there else math.nan,
        "auroc": _auroc(order.double(), poisoned),
    }


def _auroc(order: Tensor, positive: Tensor) -> float:
    """Chance that a positive sample is above a negative one, ties counted half (Mann-Whitney); NaN where one kind is missing."""
    count, others = int(positive.sum()), int((~positive).sum())
    if not count or not others:
        return math.nan
    ranks = rankdata(order.numpy())[positive.numpy()].sum()
    return float((ranks - count * (count + 1) / 2) / (count * others))
