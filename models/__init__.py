"""What is trained, on what, and how: networks, images in memory, the one training loop, prunable units.

``BACKBONES`` is the catalogue of architectures; its order is the table order. To add one: a file (or a class in a file), a line
here, and its name in ``tests/models/test_backbones.py``.
"""

from __future__ import annotations

from models.backbone import Backbone, Network
from models.resnet import WRN16, PreActResNet18, ResNet8, ResNet9, ResNet18, ResNet20
from models.vgg import VGG11, VGG11BN, VGG19BN

__all__ = ["BACKBONES", "Backbone", "Network"]

BACKBONES: tuple[type[Backbone], ...] = (ResNet8, ResNet9, ResNet20, ResNet18, PreActResNet18, WRN16, VGG11BN, VGG19BN, VGG11)
"""Every architecture a matrix can name, in table order; :func:`models.spec.lookup` finds one by name."""
