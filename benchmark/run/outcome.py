"""What a stage records of itself, and the rows of a cell, which are made from stored outcomes alone."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmark.rules.metrics import Score, der, gate
from benchmark.rules.selection import NOTHING_TO_VALIDATE_ON, Measured, Selection, choose
from benchmark.run.keys import cell_key
from benchmark.run.literature import compared, reference
from benchmark.settings.cells import Cell
from benchmark.storage.rows import Curve, Key, Row, Timing
from benchmark.storage.store import Entry
from defenses.base import Knowledge
from defenses.controls import NoDefense
from models.cost import Cost

__all__ = [
    "CellResult", "cell_rows", "gpu_mib", "measured_from", "nan_of", "none_of", "numbers", "peak_mib", "reset_peak", "score_of",
]  # fmt: skip


def none_of(value: float) -> float | None:
    return None if math.isnan(value) else value


def nan_of(value: float | None) -> float:
    return math.nan if value is None else value


def numbers(measured: Score) -> dict[str, float | None]:
    return {"acc": none_of(measured.acc), "asr": none_of(measured.asr), "ra": none_of(measured.ra)}


def score_of(stored: dict[str, Any]) -> Score:
    return Score(nan_of(stored["acc"]), nan_of(stored["asr"]), nan_of(stored["ra"]))


def measured_from(c: dict[str, Any]) -> Measured:
    """A candidate's stored scores, as the selection rules read them."""
    return Measured(
        dial=c["dial"],
        is_default=c["is_default"],
        strength=c["strength"],
        pruned=c["pruned"],
        note=c["note"],
        score=score_of(c),
        val_acc=nan_of(c["val_acc"]),
        forward=c["forward"],
        backward=c["backward"],
        isolated=c.get("isolated", 0),
        precision=nan_of(c.get("precision")),
        recall=nan_of(c.get("recall")),
        asr_recraft=nan_of(c.get("asr_recraft")),
        ra_recraft=nan_of(c.get("ra_recraft")),
        val_loss=nan_of(c.get("val_loss")),
        val_loss_se=nan_of(c.get("val_loss_se")),
        knob=nan_of(c.get("knob")),
        starts=c.get("starts", c["is_default"]),
        kept=c.get("kept", False),
        changed=c.get("changed", True),
        units=c.get("units", 0),
        canary_asr=tuple(c.get("canary_asr", ())),
        canary_loss=tuple(c.get("canary_loss", ())),
    )


@dataclass(frozen=True)
class CellResult:
    """What a cell contributes to the three files, and its key."""

    key: str
    rows: list[Row]
    curves: list[Curve]
    timing: Timing


def cell_rows(matrix: str, dataset: str, cell: Cell, fingerprint: str, outcome: Entry, victim: Entry, twin: Entry) -> CellResult:
    """Rows of a cell from stored outcomes alone: its own, its victim's and its benign twin's. ``dataset``: its name in rows."""
    scenario, out, vic = cell.scenario, outcome.outcome, victim.outcome
    key = cell_key(cell, fingerprint)
    axes: dict[str, Any] = {
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
    before = score_of(vic) if vic["status"] == "ok" else Score(math.nan)
    benign, answered = nan_of(twin.outcome.get("acc")), nan_of(vic.get("asr_benign"))
    verdict, published = gate(before.asr, answered), reference(scenario)
    literature, said = compared(scenario, before)
    base_rate = nan_of(vic.get("realised_rate"))
    measured = [measured_from(candidate) for candidate in out["candidates"]]
    common = {
        "target": scenario.plan.target,
        "label_mode": scenario.plan.label_mode,
        "realised_rate": vic.get("realised_rate", math.nan),
        "control": cell.defense.control,
        "acc_undefended": before.acc,
        "asr_undefended": before.asr,
        "ra_undefended": before.ra,
        "acc_benign": benign,
        "asr_benign": answered,
        "effect": before.asr - answered,
        "acc_loss": nan_of(vic.get("acc_loss")),
        "acc_loss_se": nan_of(vic.get("acc_loss_se")),
        "implanted": verdict.implanted,
        "gate": f"{verdict.words}; {said}",
        "literature": literature,
        "acc_literature": published.acc / 100 if published else math.nan,
        "asr_literature": published.asr / 100 if published else math.nan,
        "preset": cell.preset,
        "features": scenario.frozen.extractor.origin if scenario.frozen else "",
        **_given(cell, out, vic),
    }
    notes = []
    if isinstance(cell.defense, NoDefense):
        notes += [
            f"the {name} alone: ASR {100 * nan_of(alone['asr']):.1f} %, RA {100 * nan_of(alone['ra']):.1f} %"
            for name, alone in vic.get("single_keys", {}).items()
        ]
    if vic.get("exported") and cell.defense.needs & (Knowledge.TRAIN | Knowledge.ROLES):
        notes.append("training-control attack: met through its exported static set")
    rows = []
    for how in Selection:
        if how is Selection.CANARY and not cell.canaries:
            continue
        row: dict[str, Any] = {**axes, **common, "selection": how.value, "status": out["status"], "reason": out["reason"]}
        chosen = choose(how, measured, before, cell.tau) if out["status"] == "ok" else None
        if out["status"] == "ok" and chosen is None:
            row |= {"status": "refused", "reason": _nothing_to_choose_by(cell, out)}
        if chosen is not None:
            m = measured[chosen]
            forward, backward = _cost(how, measured, chosen, out)
            spent = Cost(forward, backward)
            row |= {
                "acc": m.score.acc,
                "asr": m.score.asr,
                "ra": m.score.ra,
                "der": der(before, m.score),
                "asr_recraft": m.asr_recraft,
                "ra_recraft": m.ra_recraft,
                "knob": m.knob,
                "dial": nan_of(m.dial),
                "kept": m.kept,
                "mark": _mark(m, cell, base_rate),
                "pruned": m.pruned,
                "units": m.units,
                "val_acc": m.val_acc,
                "val_loss": m.val_loss,
                "val_loss_se": m.val_loss_se,
                "note": "; ".join([*notes, *([m.note] if m.note else [])]),
                "samples_forward": forward,
                "samples_backward": backward,
                "cost_epochs": spent.epochs(vic["train_size"]),
                "isolated": m.isolated,
                "precision": m.precision,
                "recall": m.recall,
            }
        rows.append(Row(**row))
    curves = [
        Curve(
            **axes,
            dial_name=cell.defense.dial_name,
            knob=m.knob,
            dial=nan_of(m.dial),
            is_default=m.is_default,
            kept=m.kept,
            strength=m.strength,
            pruned=m.pruned,
            acc=m.score.acc,
            asr=m.score.asr,
            ra=m.score.ra,
            val_acc=m.val_acc,
            val_loss=m.val_loss,
            val_loss_se=m.val_loss_se,
            canary_asr=sum(m.canary_asr) / len(m.canary_asr) if m.canary_asr else math.nan,
            canary_loss=max(m.canary_loss, default=math.nan),
        )
        for m in measured
    ]
    costs: dict[str, Any] = {name: nan_of(out.get(name)) for name in ("seconds", "peak_mib", "gpu_mib", "victim_seconds")}
    before_it: dict[str, Any] = {f"victim_{name}": nan_of(vic.get(name)) for name in ("peak_mib", "gpu_mib")}
    timing = Timing(**axes, **costs, **before_it)
    return CellResult(key, rows, curves, timing)


def _given(cell: Cell, out: dict[str, Any], vic: dict[str, Any]) -> dict[str, Any]:
    """What the defender was given and took, for its rows; nothing for a cell that did not finish."""
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


def _cost(how: Selection, measured: list[Measured], chosen: int, out: dict[str, Any]) -> tuple[int, int]:
    """Samples it took to get the chosen candidate: a fixed default needs the first yield (which carries the scoring) and its own; a
    choice needs every candidate; a choice by canaries, the copies too."""
    paid = {0, chosen} if how is Selection.DEFAULT else set(range(len(measured)))
    extra = [out.get(f"canary_{name}", 0) if how is Selection.CANARY else 0 for name in ("forward", "backward")]
    return sum(measured[i].forward for i in paid) + extra[0], sum(measured[i].backward for i in paid) + extra[1]


def _nothing_to_choose_by(cell: Cell, out: dict[str, Any]) -> str:
    if Knowledge.CLEAN not in cell.grants:
        return NOTHING_TO_VALIDATE_ON
    other = "no canary is planted for a defense that does more than edit the model with the clean budget"
    return str(out.get("canary_reason", other))


def _mark(m: Measured, cell: Cell, base_rate: float) -> str:
    """What a reader must know of a chosen model: that nothing was edited, or that its detector found no more poison than chance."""
    if not m.changed and not isinstance(cell.defense, NoDefense):
        return "no change"
    detects = base_rate > 0 and not math.isnan(m.recall)
    return "mechanism failed" if detects and not m.precision > base_rate else ""


def reset_peak() -> None:
    """Starts a new high-water mark of this process's memory, where the system can (Linux), and of its GPU memory."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    marker = Path("/proc/self/clear_refs")
    if marker.exists():
        try:
            marker.write_text("5")
        except OSError:
            return


def gpu_mib() -> float | None:
    """The high-water mark of GPU memory allocated since :func:`reset_peak`, in MiB; None without a GPU."""
    return torch.cuda.max_memory_allocated() / 2**20 if torch.cuda.is_available() else None


def peak_mib() -> float:
    """The high-water mark of resident memory in MiB, since :func:`reset_peak` where the system can tell."""
    status = Path("/proc/self/status")
    if status.exists():
        for line in status.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) / 1024
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
