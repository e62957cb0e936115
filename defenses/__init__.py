"""The defenses: one published method per file, and the catalogue of them."""

from __future__ import annotations

from defenses.abl import ABL
from defenses.anp import ANP
from defenses.base import Defense
from defenses.benign_salience import BenignSalience
from defenses.clp import CLP
from defenses.controls import NoDefense, PerfectFilter, RandomPruning, TrainingFromScratch
from defenses.dbd import DBD
from defenses.extractor_controls import LinearProbe, NearestClassMean
from defenses.fine_pruning import FinePruning
from defenses.fine_tuning import FineTuning
from defenses.fst import FST
from defenses.ft_sam import FTSAM
from defenses.hid import HID
from defenses.holder_pruning import HolderPruning
from defenses.nad import NAD
from defenses.npd import NPD
from defenses.pruning import Pruning
from defenses.sau import SAU

__all__ = ["DEFENSES"]

DEFENSES: tuple[type[Defense], ...] = (
    NoDefense,
    RandomPruning,
    TrainingFromScratch,
    PerfectFilter,
    NearestClassMean,
    LinearProbe,
    FineTuning,
    Pruning,
    FinePruning,
    ANP,
    FTSAM,
    NAD,
    FST,
    SAU,
    NPD,
    BenignSalience,
    CLP,
    HolderPruning,
    ABL,
    DBD,
    HID,
)
"""Every defense of the suite, in the order of the tables: controls first, then by what a defender must hold."""
