"""SimCLR: Chen, Kornblith, Norouzi and Hinton, "A Simple Framework for Contrastive Learning of Visual Representations", ICML 2020,
arXiv 2002.05709.

Two random views of an image are pulled together and pushed away from all other images of the batch. No label is looked at.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, normalize

from models.augmentations import VIEW_DRAWS, simclr_view
from models.backbone import Network
from models.classifier import Classifier
from models.recipe import Recipe
from models.spec import derive_seed, uniforms
from models.training import seeded

__all__ = ["SimCLR", "contrastive_loss"]


def contrastive_loss(z: Tensor, temperature: float, *, symmetric: bool = False) -> Tensor:
    """NT-Xent of pairs: a view of every image must recognise the image's other view among all other embeddings.

    ``-(1/b) sum_i [s(a_i, c_i)/t - log sum_{k != a_i} exp(s(a_i, k)/t)]`` with s the cosine, over the 2b - 1 others. ``a`` are the
    first views alone, as DBD trains (Huang et al., ICLR 2022, arXiv 2202.03423); ``symmetric`` is SimCLR's own eq. 1, the mean over
    both views in that part. They agree in expectation, not on one batch.

    Args:
        z: float (b, 2, d), the two views of every image; need not be normalised.
        temperature: t.
        symmetric: take both views as anchors.
    """
    b = len(z)
    flat = normalize(torch.cat([z[:, 0], z[:, 1]]), dim=1)
    anchors = 2 * b if symmetric else b
    similarity = flat[:anchors] @ flat.T / temperature
    itself = torch.eye(anchors, 2 * b, dtype=torch.bool, device=z.device)
    other_view = (torch.arange(anchors, device=z.device) + b) % (2 * b)
    return cross_entropy(similarity.masked_fill(itself, -torch.inf), other_view)


class SimCLR(Classifier):
    """Contrastive training of the features through a projection, which is not kept; the network's head stays as it is.

    A method that differs overrides :meth:`projected` or :meth:`objective`.

    The projection is DBD's: a hidden layer of the features' size with batch norm and ReLU, then 128 outputs with a bias.

    Args:
        net: the network, trained in place.
        recipe: of the training; its crop and flip should be off, since the views crop and flip.
        width: size of the features.
        temperature: of the loss.
        flip: whether views may be mirrored.
        blur: share of views that are blurred, see :func:`models.augmentations.simclr_view`.
        seed: of the projection's weights, and of the views together with the epoch and the sample.
        symmetric: see :func:`contrastive_loss`.
    """

    def __init__(
        self,
        net: Network,
        recipe: Recipe,
        *,
        width: int,
        temperature: float,
        flip: bool,
        blur: float,
        seed: int,
        symmetric: bool = False,
    ) -> None:
        super().__init__(net, recipe)
        self.temperature, self.flip, self.blur, self.seed, self.symmetric = temperature, flip, blur, seed, symmetric
        with seeded(derive_seed(seed, "projection")):
            self.projection = self.projected(width)

    def projected(self, width: int) -> nn.Sequential:
        """A fresh projection of embeddings float (N, width)."""
        return nn.Sequential(nn.Linear(width, width), nn.BatchNorm1d(width), nn.ReLU(), nn.Linear(width, 128))

    def objective(self, z: Tensor, labels: Tensor, index: Tensor) -> Tensor:
        """Loss of the projections float (B, 2, d) of both views; labels and index int64 (B,)."""
        return contrastive_loss(z, self.temperature, symmetric=self.symmetric)

    def trainable(self) -> list[nn.Parameter]:
        return [*self.net.features.parameters(), *self.projection.parameters()]

    def views(self, images: Tensor, index: Tensor) -> Tensor:
        """Both views of this epoch, float (2 B, C, H, W): all first views before all second ones."""
        keys = [derive_seed(self.seed, "view", number, int(self.current_epoch)) for number in range(2)]
        return torch.cat([simclr_view(images, uniforms(key, index, VIEW_DRAWS), self.flip, self.blur) for key in keys])

    def training_step(self, batch: tuple[Tensor, Tensor, Tensor], batch_idx: int) -> Tensor:
        images, labels, index = batch
        with torch.autocast(images.device.type, enabled=False):  # views and the loss are computed in float32
            views = self.views(images, index)
        first, second = self.projection(self.net.embed(views)).float().chunk(2)
        with torch.autocast(images.device.type, enabled=False):
            return self.objective(torch.stack([first, second], dim=1), labels, index)
