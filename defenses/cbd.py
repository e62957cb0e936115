"""CBD, causality-inspired backdoor defense: Zhang, Liu, Wang, Lu and Hu, "Backdoor Defense via Deconfounded Representation
Learning", CVPR 2023, arXiv 2303.06818.

Backdoors are learned faster than the task, so a network trained for a few epochs holds little but the backdoor. A second network is
trained from scratch with weights that come from the two losses: what the first one fits well (the poisoned samples) counts little,
what it does not fit counts much. With ``disentangle`` the second network's features are also made independent of the first one's.

Needs: poisoned training set. Edits: everything; the model is new, of the victim's architecture.
Dial: epochs of the first, biased network; default = ``biased_epochs``. Each further point costs both trainings again.
Deviations from the paper: as in the authors' code, there is no information bottleneck, and disentangling is off by default. With
it, the critic's weights are divided by their largest singular value (the code: by its square root, biases included), the critic is
trained on features in evaluation mode, and it is without dropout while the network is trained. The crop is the victim's.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from defenses.abl import CutOut
from defenses.base import Candidate, DefenderView, Defense, Inapplicable, Knowledge
from models.backbone import Network
from models.images import ImageSet
from models.loop import Epochs
from models.recipe import Recipe
from models.spec import BatchSize, EpochCount, Ge, Le, LearningRate, derive_seed
from models.training import fit, seeded

__all__ = ["CBD", "Critic", "sample_weights"]

DROPPED, SCALE, DECAY_EPOCHS = 0.2, 0.01, 20
"""Of the critic (authors' code): dropout, factor on the estimate, epochs between two divisions of its rate by ten."""


def sample_weights(biased: Tensor, clean: Tensor) -> Tensor:
    """Weights of a batch, float (B,), of mean 1: ``CE_B / (CE_C + CE_B)`` times B over the sum of them.

    Args:
        biased: CE_B, every sample's cross-entropy under the biased network, float (B,).
        clean: CE_C, under the network that is trained, float (B,).
    """
    share = biased / (clean + biased + 1e-8)
    return share * len(share) / share.sum().clamp(min=1e-8)


class Critic(nn.Module):
    """Estimates how much two embeddings of the same images tell about each other, as a Wasserstein distance.

    Args:
        width: size d of each embedding.
        seed: of its weights.
    """

    def __init__(self, width: int, seed: int) -> None:
        super().__init__()
        with seeded(seed):
            self.net = nn.Sequential(
                nn.Dropout(DROPPED), nn.Linear(2 * width, width), nn.LeakyReLU(), nn.Dropout(DROPPED), nn.Linear(width, 1)
            )

    def forward(self, r: Tensor, z: Tensor) -> Tensor:
        """``0.01 (mean T(r_i, z_i) - mean T(r_i, z_(i+1)))``, the last sample followed by the first; r and z float (B, d)."""
        joint, apart = (self.net(torch.cat([r, other], dim=1)).mean() for other in (z, z.roll(-1, 0)))
        found: Tensor = SCALE * (joint - apart)
        return found

    @torch.no_grad()
    def normalise(self) -> None:
        """Divides every weight matrix by its largest singular value, so that the critic is Lipschitz."""
        for module in self.net:
            if isinstance(module, nn.Linear):
                module.weight /= torch.linalg.matrix_norm(module.weight, 2).clamp(min=1e-12)


class _Deconfounded(CutOut):
    """Training under :func:`sample_weights`, with a frozen biased network beside it, and a critic if there is one.

    Every epoch starts with a pass over all samples that trains the critic.
    """

    def __init__(
        self, net: Network, recipe: Recipe, hole: int, seed: int, biased: Network, critic: Critic | None, critic_lr: float
    ) -> None:
        super().__init__(net, recipe, hole, seed)
        self.biased, self.critic, self.critic_lr = biased.requires_grad_(False), critic, critic_lr
        self.rate_factor = lambda done: 1.0 if done < 0.2 * recipe.epochs else 0.1 if done < 0.7 * recipe.epochs else 0.01

    def train(self, mode: bool = True) -> _Deconfounded:
        super().train(mode)
        self.biased.eval()
        if self.critic is not None:
            self.critic.eval()
        return self

    def loader(self, data: ImageSet, seed: int) -> Epochs:
        self.passes = super().loader(data, derive_seed(seed, "critic"))
        return super().loader(data, seed)

    def on_train_epoch_start(self) -> None:
        if self.critic is None:
            return
        epoch = int(self.current_epoch)
        if not epoch:
            self.ascent = torch.optim.Adam(self.critic.parameters())
        self.ascent.param_groups[0]["lr"] = self.critic_lr * 0.1 ** (epoch // DECAY_EPOCHS)
        self.eval()
        self.critic.train()
        for images, labels, index in self.passes:
            images, _ = self.on_batch(images, labels, index)
            with torch.no_grad():
                r, z = self.biased.embed(images), self.net.embed(images)
            self.ascent.zero_grad()
            (-self.critic(r, z)).backward()
            self.ascent.step()
            self.critic.normalise()
        self.train()

    def training_step(self, batch: tuple[Tensor, Tensor, Tensor], batch_idx: int) -> Tensor:
        images, labels, index = batch
        images, labels = self.on_batch(images, labels, index)
        with torch.no_grad():
            r = self.biased.embed(images)
            biased = cross_entropy(self.biased.head(r).float(), labels, reduction="none")
        z = self.net.embed(images)
        clean = cross_entropy(self.net.head(z).float(), labels, reduction="none")
        loss = (sample_weights(biased, clean.detach()) * clean).mean()
        return loss if self.critic is None else loss + self.critic(r, z)


@dataclass(frozen=True)
class CBD(Defense):
    """Settings of the two trainings. Both use SGD with Nesterov momentum 0.9, and the victim's crop and flip.

    Attributes:
        biased_epochs: default of the dial (authors' code: 5).
        epochs: of the second network: a fifth at ``lr``, half at a tenth, the rest at a hundredth of it (authors' code: 100).
        lr: of both; constant for the biased network (authors' code: 0.1).
        batch: samples per step of both (authors' code: 64).
        weight_decay: of both (authors' code: 1e-4).
        hole: side of Cutout's square in pixels, 0 = none (authors' code: 2, see :class:`defenses.abl.ABL`).
        disentangle: add the estimate of the mutual information to the loss (authors' code: no; the paper: yes).
        critic_lr: of Adam for the critic, a tenth of it after every 20 epochs (authors' code: 0.2).
        points: further epochs of the biased network at which models are trained (ours: none).

    >>> CBD(points=(2, 10)).needs.words
    'train'
    >>> sample_weights(torch.tensor([0.01, 4.0]), torch.tensor([2.0, 0.1]))  # fitted by the biased network, and not
    tensor([0.0101, 1.9899])
    """

    name: ClassVar[str] = "cbd"
    family: ClassVar[str] = "training anew"
    cost: ClassVar[str] = "{biased_epochs} and {epochs} epochs on the training set"
    dial_name: ClassVar[str] = "epochs of the biased network"

    biased_epochs: EpochCount = 5
    epochs: EpochCount = 100
    lr: LearningRate = 0.1
    batch: BatchSize = 64
    weight_decay: Annotated[float, Ge(0), Le(1)] = 1e-4
    hole: Annotated[int, Ge(0), Le(64)] = 2
    disentangle: bool = False
    critic_lr: LearningRate = 0.2
    points: tuple[EpochCount, ...] = ()

    @property
    def needs(self) -> Knowledge:
        return Knowledge.TRAIN

    def recipe(self, epochs: int, victims: Recipe) -> Recipe:
        """Of either training; crop, flip and precision are the victim's."""
        return Recipe(
            epochs=epochs, batch=self.batch, lr=self.lr, momentum=0.9, nesterov=True, weight_decay=self.weight_decay,
            schedule="constant", crop=victims.crop, flip=victims.flip, precision=victims.precision,
        )  # fmt: skip

    def biased(self, view: DefenderView, data: ImageSet, epochs: int) -> Network:
        """The network that has learned little but the backdoor."""
        net, recipe = view.fresh(derive_seed(view.seed, "cbd", "biased")), self.recipe(epochs, view.recipe)
        seed = derive_seed(view.seed, "cbd", "shortcut")
        return fit(CutOut(net, recipe, self.hole, seed), data, recipe, seed).net.eval()

    def candidates(self, view: DefenderView) -> Iterator[Candidate]:
        data = view.train
        if len(data) < 2:
            raise Inapplicable(f"the poisoned training set holds {len(data)} samples; at least 2 are needed")
        recipe, seed = self.recipe(self.epochs, view.recipe), derive_seed(view.seed, "cbd", "training")
        for epochs in sorted({self.biased_epochs, *self.points}):
            biased, net = self.biased(view, data, epochs), view.fresh(derive_seed(view.seed, "cbd", "weights"))
            critic = Critic(net.width, derive_seed(seed, "critic")) if self.disentangle else None
            module = _Deconfounded(net, recipe, self.hole, seed, biased, critic, self.critic_lr)
            fit(module, data, recipe, seed)
            yield Candidate(net.requires_grad_(True).eval(), float(epochs), epochs == self.biased_epochs, float(epochs))
