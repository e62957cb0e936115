"""The defenses: one published method per file, and the catalogue of them."""

from __future__ import annotations

from defenses.abl import ABL
from defenses.activation_clustering import ActivationClustering
from defenses.anp import ANP
from defenses.base import Defense
from defenses.benign_salience import BenignSalience
from defenses.bnp import BNP
from defenses.clp import CLP
from defenses.controls import NoDefense, PerfectFilter, RandomPruning, TrainingFromScratch
from defenses.dbd import DBD
from defenses.ep import EP
from defenses.extractor_controls import LinearProbe, NearestClassMean
from defenses.fine_pruning import FinePruning
from defenses.fine_tuning import FineTuning
from defenses.fmp import FMP
from defenses.hid import HID
from defenses.holder_pruning import HolderPruning
from defenses.pruning import Pruning
from defenses.rnp import RNP
from defenses.spectral_signatures import SpectralSignatures

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
    RNP,
    FMP,
    BNP,
    BenignSalience,
    CLP,
    HolderPruning,
    EP,
    SpectralSignatures,
    ActivationClustering,
    ABL,
    DBD,
    HID,
)
"""Every defense of the suite, in the order of the tables: controls first, then by what a defender must hold."""
