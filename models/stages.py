"""Feature maps by image size: where a network's stages end, found by running it once.

A stage ends at the last module that puts out maps of its size. Modules are taken whole, except for chains of modules: of a residual
block only the sum counts, not what is computed inside.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from models.backbone import Network
from models.training import on_device

__all__ = ["maps", "stages"]


def _steps(module: nn.Module, path: str) -> Iterator[tuple[str, nn.Module]]:
    for name, child in module.named_children():
        if isinstance(child, nn.Sequential) and type(child).forward is nn.Sequential.forward:
            yield from _steps(child, f"{path}.{name}")
        elif not isinstance(child, nn.Identity):
            yield f"{path}.{name}", child


@torch.no_grad()
def stages(net: Network, shape: tuple[int, int, int]) -> tuple[str, ...]:
    """Dotted paths of the modules that end a stage, in forward order; maps of a single position are left out.

    The mode and place of ``net`` and its running statistics stay. The pass is not tallied (:mod:`models.cost`).

    Args:
        net: the network.
        shape: of an image, (C, H, W).
    """
    ends: dict[torch.Size, str] = {}

    def note(path: str) -> Callable[[nn.Module, object, object], None]:
        def hook(_module: nn.Module, _inputs: object, output: object) -> None:
            if isinstance(output, Tensor) and output.ndim == 4 and output.shape[2:].numel() > 1:
                ends[output.shape[2:]] = path

        return hook

    handles = [step.register_forward_hook(note(path)) for path, step in _steps(net.features, "features")]
    try:
        with on_device(net) as device:
            net.features(net.normalise(torch.zeros((1, *shape), device=device)))
    finally:
        for handle in handles:
            handle.remove()
    return tuple(ends.values())


@contextmanager
def maps(net: Network, paths: Sequence[str]) -> Iterator[dict[str, Tensor]]:
    """While open, every forward pass leaves the outputs of the modules ``paths``, as they are, by path."""
    seen: dict[str, Tensor] = {}

    def keep(path: str) -> Callable[[nn.Module, object, Tensor], None]:
        def hook(_module: nn.Module, _inputs: object, output: Tensor) -> None:
            seen[path] = output

        return hook

    handles = [net.get_submodule(path).register_forward_hook(keep(path)) for path in paths]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()
