"""The defenses: one published method per file, and the catalogue of them."""

from __future__ import annotations

from defenses.abl import ABL
from defenses.activation_clustering import ActivationClustering
from defenses.anp import ANP
from defenses.asd import ASD
from defenses.base import Defense
from defenses.benign_salience import BenignSalience
from defenses.bnp import BNP
from defenses.cbd import CBD
from defenses.clp import CLP
from defenses.controls import NoDefense, PerfectFilter, RandomPruning, TrainingFromScratch
from defenses.ct import CT
from defenses.d_br import DBR
from defenses.d_st import DST
from defenses.dbd import DBD
from defenses.ep import EP
from defenses.extractor_controls import LinearProbe, NearestClassMean
from defenses.fine_pruning import FinePruning
from defenses.fine_tuning import FineTuning
from defenses.fmp import FMP
from defenses.fst import FST
from defenses.ft_sam import FTSAM
from defenses.hid import HID
from defenses.holder_pruning import HolderPruning
from defenses.i_bau import IBAU
from defenses.nad import NAD
from defenses.neural_cleanse import NeuralCleanse
from defenses.npd import NPD
from defenses.pruning import Pruning
from defenses.rnp import RNP
from defenses.sau import SAU
from defenses.spectral_signatures import SpectralSignatures
from defenses.trap_and_replace import TrapAndReplace
from defenses.unit import UNIT

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
    NeuralCleanse,
    IBAU,
    UNIT,
    FTSAM,
    NAD,
    FST,
    SAU,
    NPD,
    BenignSalience,
    CLP,
    HolderPruning,
    EP,
    SpectralSignatures,
    ActivationClustering,
    ABL,
    DBD,
    HID,
    CBD,
    TrapAndReplace,
    DBR,
    DST,
    ASD,
    CT,
)
"""Every defense of the suite, in the order of the tables: controls first, then by what a defender must hold."""
