"""Predictions of many networks that differ from one network from some layer on.

A pruning defense offers tens of candidates, which are the victim up to the first layer that they edit. What they compute before
that layer is computed once, and the same weights are never run twice. The predictions are those of
:func:`models.training.predict`, bit for bit: the same modules read the same batches in the same order.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from models.backbone import Network, unrolled
from models.images import to_float
from models.training import in_batches, on_device, predict

__all__ = ["Variants"]

ROOM = 512 * 2**20
"""Bytes of activations that are kept at most."""
KNOWN = 256
"""Networks and sets of images whose predictions are kept at most."""


class Variants:
    """Predicts with variants of a network on some sets of images.

    Args:
        net: the network, in evaluation mode; its weights are copied.
        images: uint8 (N, C, H, W), by name.
        room: bytes of activations that are kept at most. Those of the last layers are kept first: they are the smallest and spare
            the most.
    """

    def __init__(self, net: Network, images: Mapping[str, Tensor], room: int = ROOM) -> None:
        self.images = images
        self._own = [
            (repr(step), {name: value.detach().cpu().clone() for name, value in step.state_dict().items()}) for step in _steps(net)
        ]
        self._places: set[int] | None = None
        self._room = room
        self._kept: dict[str, dict[int, list[Tensor]]] = {name: {} for name in images}
        self._known: dict[tuple[str, str], Tensor] = {}

    def predict(self, net: Network, which: str) -> Tensor:
        """Predicted classes int64 (N,) of the images ``which`` by ``net``. The pass is not tallied (:mod:`models.cost`)."""
        images = self.images[which]
        hooked = any(part._forward_hooks or part._forward_pre_hooks for part in net.modules())
        if type(net) is not Network or hooked or not len(images):
            return predict(net, images)
        steps = _steps(net)
        first = self._first_edited(steps)
        key = which, _fingerprint(first, steps)
        if key not in self._known:
            if len(self._known) == KNOWN:
                del self._known[next(iter(self._known))]
            self._known[key] = self._run(net, steps, first, which)
        return self._known[key].clone()

    def _first_edited(self, steps: Sequence[nn.Module]) -> int:
        """Position of the first step that is not the network's own; ``len(steps)`` where all are."""
        for position, (step, (words, state)) in enumerate(zip(steps, self._own, strict=False)):
            mine = step.state_dict()
            if repr(step) != words or mine.keys() != state.keys():
                return position
            if not all(torch.equal(value.cpu(), state[name]) for name, value in mine.items()):
                return position
        return min(len(steps), len(self._own))

    @torch.no_grad()
    def _run(self, net: Network, steps: Sequence[nn.Module], first: int, which: str) -> Tensor:
        """Runs ``steps``, of which those before ``first`` are the network's own, from the last place that is kept."""
        images, kept = self.images[which], self._kept[which]
        with on_device(net) as device:
            if self._places is None:
                self._places = self._chosen(steps, to_float(images[:1].to(device)))
            start = max((place for place in kept if place <= first), default=0)
            new: dict[int, list[Tensor]] = {place: [] for place in self._places if start < place <= first}

            def through(x: Tensor) -> Tensor:
                passed: dict[int, Tensor] = {}
                for place in range(start, len(steps)):
                    if place in new:
                        passed[place] = x.clone()  # a step may write into what it reads
                    x = steps[place](x)
                classes = x.argmax(1).cpu()
                for place, read in passed.items():  # only now: a batch that memory does not suffice for is tried again
                    new[place].append(read)
                return classes

            parts = [through(x.clone()) for x in kept[start]] if start else in_batches(through, images, None, device)
        kept |= new
        return torch.cat(parts)

    def _chosen(self, steps: Sequence[nn.Module], x: Tensor) -> set[int]:
        """The steps whose input is kept, from the last on: those with weights, as many as there is room for. ``x``: one image."""
        count, sizes = sum(map(len, self.images.values())), []
        for step in steps:
            sizes.append(x.nbytes * count)
            x = step(x)
        found: set[int] = set()
        for place in range(min(len(steps), len(self._own)) - 1, 0, -1):
            if self._own[place][1]:
                self._room -= sizes[place]
                if self._room < 0:
                    break
                found.add(place)
        return found


def _steps(net: Network) -> list[nn.Module]:
    """The modules that ``net`` runs one after the other."""
    return [net.normalise, *unrolled(net.features), *unrolled(net.head)]


def _fingerprint(first: int, steps: Sequence[nn.Module]) -> str:
    """What the steps from ``first`` on compute: their structure and the bits of their weights and statistics."""
    found = hashlib.sha256(str(first).encode())
    for step in steps[first:]:
        found.update(repr(step).encode())
        for name, value in step.state_dict().items():
            found.update(name.encode())
            found.update(memoryview(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()))
    return found.hexdigest()
