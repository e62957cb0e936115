"""ReLUs with an upper bound: networks whose activations are clipped from above.

The bounds are part of the module tree, so that such a network is copied, saved and run like any other. Its state dict holds one
more tensor for every bounded ReLU, ``<path>.bound``; :func:`with_bounds` rebuilds the network that fits one.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from models.backbone import Network
from models.units import Leaves, Scope

__all__ = ["BoundedReLU", "bounded", "relus", "with_bounds"]


class BoundedReLU(nn.Module):
    """min(max(x, 0), max(bound, 0)).

    Args:
        bound: of an activation, with the shape of one sample's activations, or one that broadcasts to it: (C, H, W), (C, 1, 1),
            or (units,). Infinity = plain ReLU.
    """

    def __init__(self, bound: Tensor) -> None:
        super().__init__()
        self.bound = nn.Parameter(bound)

    def forward(self, x: Tensor) -> Tensor:
        return torch.minimum(torch.relu(x), torch.relu(self.bound))

    def extra_repr(self) -> str:
        return " x ".join(map(str, self.bound.shape))


def relus(net: Network, scope: Scope = Scope.WHOLE) -> tuple[str, ...]:
    """Dotted paths of the ReLU modules, in the order of the forward pass; at scope HEAD the head's alone.

    Raises:
        ValueError: a ReLU cannot be given bounds of its own, because it is a call and no module, or a module that is called at
            several places.
    """
    found: list[str] = []
    for part in ("features", "head") if scope is Scope.WHOLE else ("head",):
        module = net.get_submodule(part)
        for node in Leaves().trace(module).nodes:
            called = str(getattr(node.target, "__name__", node.target))
            if node.op in ("call_function", "call_method") and called in ("relu", "relu_"):
                raise ValueError(f"{part} calls relu as a function: make it a module nn.ReLU, so that it can be bounded")
            if node.op == "call_module" and isinstance(module.get_submodule(called), nn.ReLU):
                found.append(f"{part}.{called}")
    repeated = next((path for path in found if found.count(path) > 1), None)
    if repeated is not None:
        raise ValueError(f"{repeated} is called at several places: give each its own nn.ReLU, so that it can be bounded")
    return tuple(found)


def bounded(net: Network, bounds: Mapping[str, Tensor]) -> Network:
    """A copy of ``net`` with the ReLUs at the paths of ``bounds`` bounded by copies of these; mode and place stay."""
    copied = copy.deepcopy(net)
    for path, bound in bounds.items():
        relu = BoundedReLU(bound.detach().clone())
        copied.set_submodule(path, relu.train(copied.get_submodule(path).training))
    return copied


def with_bounds(net: Network, state: Mapping[str, Tensor]) -> Network:
    """A copy of the plain ``net`` whose ReLUs have bounds wherever ``state`` has some, so that ``state`` fits it; its weights stay.

    For a file of a bounded network: ``load_weights(with_bounds(net, read_state(path)), path)``.

    Raises:
        ValueError: ``state`` has bounds, and not every ReLU of ``net`` can be given one.
    """
    held = {name.removesuffix(".bound"): value for name, value in state.items() if name.endswith(".bound")}
    return bounded(net, {path: held[path] for path in relus(net) if path in held} if held else {})
