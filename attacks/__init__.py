"""The attacks. A new one is a file and a line here; the order is the order of every table."""

from attacks.adaptive_latent import AdapBlend, AdapPatch
from attacks.advtrojan import AdvTrojan
from attacks.badnets import BadNets
from attacks.base import Attack
from attacks.blended import Blended
from attacks.bpp import Bpp
from attacks.dfst import DFST
from attacks.feature_shift import FeatureShift
from attacks.flat_holder import FlatHolder
from attacks.flat_lipschitz import FlatLipschitz
from attacks.imc import IMC
from attacks.input_aware import InputAware
from attacks.lc import LC
from attacks.lf import LF
from attacks.narcissus import Narcissus
from attacks.natural import Natural
from attacks.rescaled import Rescaled
from attacks.sig import SIG
from attacks.ssba import SSBA
from attacks.trojannn import TrojanNN
from attacks.wanet import WaNet

__all__ = ["ATTACKS"]

ATTACKS: tuple[type[Attack], ...] = (
    BadNets,
    Blended,
    SIG,
    LC,
    LF,
    SSBA,
    TrojanNN,
    WaNet,
    InputAware,
    Bpp,
    AdapBlend,
    AdapPatch,
    Narcissus,
    DFST,
    AdvTrojan,
    IMC,
    Natural,
    FlatLipschitz,
    FlatHolder,
    FeatureShift,
    Rescaled,
)
"""Every attack of the suite; the last four wrap another one and aim at pruning defenses."""
