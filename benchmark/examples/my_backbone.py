"""Three convolutions, each with batch norm and a max-pool: the smallest network here."""

from dataclasses import dataclass

from torch import nn

from models.backbone import Backbone, GlobalAverage


@dataclass(frozen=True)
class ThreeConvs(Backbone):
    """``width`` channels in the first convolution; the embedding has 4 x width entries."""
    name = "three-convs"

    def trunk(self, shape: tuple[int, int, int]) -> tuple[nn.Module, int]:
        layers: list[nn.Module] = []
        for inputs, outputs in ((shape[0], self.width), (self.width, 2 * self.width), (2 * self.width, 4 * self.width)):
            layers += [nn.Conv2d(inputs, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU(), nn.MaxPool2d(2)]
        return nn.Sequential(*layers, GlobalAverage()), 4 * self.width
