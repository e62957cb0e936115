"""Classifiers of torchvision and timm as a :class:`models.backbone.Network`.

A module is traced by ``torch.fx`` and cut before its last linear layers: what comes before is ``features``, the rest is ``head``.
The network computes what the module computes, bit for bit, with three changes that show in hooks alone: every ReLU becomes a module
of its own, nothing is computed in place (a defense may keep an activation that a later step would overwrite), and an auxiliary
classifier, which only training reads, is left out. :attr:`Adapted.names` leads back to the module's own names, so that a defended
network is saved as the file it came from.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from torch import Tensor, fx, nn

from models.backbone import Backbone, Network, Normalise
from models.spec import BadInput, nearest
from models.units import Leaves

__all__ = ["LIBRARIES", "Adapted", "Library", "adapt", "library_model"]

LIBRARIES = ("torchvision", "timm")
"""Libraries whose networks are known by name: ``torchvision:resnet18``, ``timm:resnet18d``."""
_IN_PLACE: Mapping[Any, Any] = {operator.iadd: operator.add, operator.isub: operator.sub, operator.imul: operator.mul,
                                operator.itruediv: operator.truediv}  # fmt: skip
_HEAD = (nn.Linear, nn.ReLU, nn.Dropout, nn.Identity)
"""What a head may hold; it begins with a linear layer."""


class Adapted(NamedTuple):
    """A foreign classifier as a network.

    Attributes:
        net: the network; it shares the module's tensors.
        names: name of each of its tensors -> the module's own name; those of ``normalise`` have none.
        unused: the module's tensors that the network does not have: of auxiliary classifiers.
    """

    net: Network
    names: dict[str, str]
    unused: frozenset[str]


class _Tracer(Leaves):
    """Knows in which module tracing stopped."""

    def __init__(self) -> None:
        super().__init__()
        self.inside: list[str] = []

    def call_module(self, m: nn.Module, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        self.inside.append(self.path_of_module(m))
        found = super().call_module(m, forward, args, kwargs)
        self.inside.pop()  # not where it raised: the path is kept
        return found


# -- by name -------------------------------------------------------------------------------------------------------------------


def library_model(name: str, classes: int, channels: int = 3) -> nn.Module:
    """A freshly initialised classifier by name, ``torchvision:<model>`` or ``timm:<model>``.

    Args:
        classes: how many logits it has. channels: of its images; torchvision's have three.

    Raises:
        BadInput: unknown library or model, with the nearest name; timm is not installed; not three channels, for torchvision's.
    """
    library, _, model = name.partition(":")
    if library == "torchvision":
        return _torchvision(model, classes, channels)
    if library == "timm":
        return _timm(model, classes, channels)
    raise BadInput(f"unknown library {library!r} in {name!r}{nearest(library, LIBRARIES)}")


def _torchvision(model: str, classes: int, channels: int) -> nn.Module:
    from torchvision import models

    known = models.list_models(module=models)
    if model not in known:
        raise BadInput(f"torchvision has no classifier {model!r}{nearest(model, known)}")
    if channels != 3:
        raise BadInput(f"torchvision:{model} reads images of three channels, these have {channels}")
    more = {"init_weights": False} if model in ("googlenet", "inception_v3") else {}  # without it they warn
    found: nn.Module = models.get_model(model, weights=None, num_classes=classes, **more)
    return found


def _timm(model: str, classes: int, channels: int) -> nn.Module:
    try:
        import timm
    except ImportError as error:
        raise BadInput(f"timm:{model}: timm is not installed here: pip install -c constraints.txt -e '.[timm]'") from error
    if not timm.is_model(model):
        raise BadInput(f"timm has no model {model!r}{nearest(model, timm.list_models())}")
    found: nn.Module = timm.create_model(model, pretrained=False, num_classes=classes, in_chans=channels)
    return found


# -- any module ----------------------------------------------------------------------------------------------------------------


def adapt(module: nn.Module, normalise: Normalise, name: str = "the network") -> Adapted:
    """A classifier as a network, in evaluation mode. ``module`` gives its tensors and is not to be used afterwards.

    Args:
        module: images (N, C, H, W), normalised -> logits (N, classes).
        normalise: brings images in [0, 1] into its range.
        name: for messages.

    Raises:
        BadInput: it cannot be traced, does not end in a linear layer, or returns something other than one tensor; the message names
            the part.
    """
    own = list(module.state_dict())
    module.eval()
    traced = _plain(module, _traced(module, name))
    graph = traced.graph
    end = next(node for node in graph.nodes if node.op == "output")
    chain = _chain(traced, end.args[0], name)
    paths = [str(node.target) for node in chain]
    head = nn.Sequential(*(traced.get_submodule(path) for path in paths))
    end.args = (chain[0].all_input_nodes[0],)
    graph.eliminate_dead_code()
    traced.delete_all_unused_submodules()
    traced.recompile()
    net = Network(normalise, traced, head).eval()
    names = {}
    for key in net.state_dict():
        part, _, rest = key.partition(".")
        if part == "features":
            names[key] = rest
        elif part == "head":
            place, _, tensor = rest.partition(".")
            names[key] = f"{paths[int(place)]}.{tensor}"
    return Adapted(net, names, frozenset(own) - frozenset(names.values()))


def _traced(module: nn.Module, name: str) -> fx.Graph:
    tracer = _Tracer()
    try:
        return tracer.trace(module)
    except Exception as error:  # foreign code runs here, and raises whatever it likes
        place = f"its module {tracer.inside[-1]!r}" if tracer.inside else "it"
        why = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise BadInput(f"{name}: {place} cannot be traced by torch.fx, so its units cannot be found: {why}") from error


def _plain(module: nn.Module, graph: fx.Graph) -> fx.GraphModule:
    """The traced module with a ReLU of its own at every place, and with nothing computed in place."""
    traced = fx.GraphModule(module, graph)
    for node in list(traced.graph.nodes):
        _split(traced, node)
    for node in filter(partial(_in_place, traced), traced.graph.nodes):
        # What a step overwrites is read by those after it as that step leaves it.
        written, every = node.all_input_nodes[0], list(traced.graph.nodes)
        for later in every[every.index(node) + 1 :]:
            later.replace_input_with(written, node)
    parts: list[Any] = [part for part in traced.modules() if getattr(part, "inplace", False) is True]
    for part in parts:
        part.inplace = False
    taken: set[str] = set()
    for node in traced.graph.nodes:
        if _is_relu(traced, node):
            _give_relu(traced, node, taken)
        elif node.op == "call_function":
            node.target = _IN_PLACE.get(node.target, node.target)
            node.kwargs = {name: False if name == "inplace" else value for name, value in node.kwargs.items()}
        elif _method_in_place(node):
            node.target = str(node.target)[:-1]
    traced.recompile()
    return traced


def _give_relu(traced: fx.GraphModule, node: fx.Node, taken: set[str]) -> None:
    """Makes a ReLU, whatever it was, a module that is called here alone; ``taken``: paths of those before."""
    path, number = str(node.target) if node.op == "call_module" else node.name, 1
    place = path
    while place in taken or (node.op != "call_module" and hasattr(traced, place)):
        number += 1
        place = f"{path}_{number}"
    taken.add(place)
    traced.add_submodule(place, nn.ReLU())
    node.op, node.target, node.args, node.kwargs = "call_module", place, tuple(node.all_input_nodes[:1]), {}


def _method_in_place(node: fx.Node) -> bool:
    return node.op == "call_method" and str(node.target).endswith("_") and not str(node.target).endswith("__")


def _in_place(traced: fx.GraphModule, node: fx.Node) -> bool:
    """Whether a step overwrites what it reads."""
    if node.op == "call_module":
        return getattr(traced.get_submodule(str(node.target)), "inplace", False) is True
    if node.op == "call_function":
        return node.target in _IN_PLACE or node.target in (torch.relu_, nn.functional.relu_) or bool(node.kwargs.get("inplace"))
    return _method_in_place(node)


def _split(traced: fx.GraphModule, node: fx.Node) -> None:
    """Runs the activation inside timm's norm with activation as a module of its own after it."""
    if node.op != "call_module":
        return
    path = str(node.target)
    norm: Any = traced.get_submodule(path)
    inner = getattr(norm, "act", None)
    if not isinstance(norm, nn.BatchNorm2d) or not isinstance(inner, nn.Module) or list(inner.parameters()):
        return
    norm.act = nn.Identity()
    traced.add_submodule(f"{path}_act", inner)
    with traced.graph.inserting_after(node):
        after = traced.graph.call_module(f"{path}_act", (node,))
    node.replace_all_uses_with(after, lambda user: user is not after)


def _is_relu(traced: fx.GraphModule, node: fx.Node) -> bool:
    if node.op == "call_module":
        return type(traced.get_submodule(str(node.target))) is nn.ReLU
    if node.op == "call_method":
        return node.target in ("relu", "relu_")
    return node.op == "call_function" and node.target in (torch.relu, torch.relu_, nn.functional.relu, nn.functional.relu_)


def _chain(traced: fx.GraphModule, logits: object, name: str) -> list[fx.Node]:
    """The last layers of a classifier, from the first linear one on, as nodes."""
    if not isinstance(logits, fx.Node):
        raise BadInput(f"{name}: returns a {type(logits).__name__}, not one tensor of logits")
    chain: list[fx.Node] = []
    node = logits
    while node.op == "call_module" and isinstance(traced.get_submodule(str(node.target)), _HEAD) and len(node.users) == 1:
        chain.insert(0, node)
        node = node.all_input_nodes[0]
    while chain and not isinstance(traced.get_submodule(str(chain[0].target)), nn.Linear):
        del chain[0]
    if not chain:
        last = traced.get_submodule(str(node.target)) if node.op == "call_module" else None
        what = f"{node.target!r} ({type(last).__name__})" if last is not None else f"the operation {node.name!r}"
        raise BadInput(f"{name}: its logits come from {what}, not from a linear layer")
    return chain


# -- as an architecture ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Library(Backbone):
    """A classifier of torchvision or timm as an architecture. ``width`` and ``hidden`` are the library's own and not read.

    Attributes:
        model: ``torchvision:<model>`` or ``timm:<model>``.
        stem: ``small images``: the first conv of a ResNet is 3x3 without stride and its max-pool is left out, as everyone does for
            images of 32x32.
    """

    name: ClassVar[str] = "library"

    model: str = "torchvision:resnet18"
    stem: Literal["as it is", "small images"] = "as it is"

    @classmethod
    def of(cls, model: str, state: Mapping[str, Tensor]) -> Library:
        """The architecture of weights by the module's own names: with the stem for small images where theirs is one.

        Raises:
            BadInput: as :func:`library_model`.
        """
        with torch.device("meta"):
            own: Any = library_model(model, 2)
        first, kernel = getattr(own, "conv1", None), state.get("conv1.weight", torch.empty(0)).shape[2:]
        small = isinstance(first, nn.Conv2d) and hasattr(own, "maxpool") and first.kernel_size != (3, 3) == tuple(kernel)
        return cls(model=model, stem="small images" if small else "as it is")

    def trunk(self, shape: tuple[int, int, int]) -> tuple[nn.Module, int]:
        net = self.adapted(2, shape, (0.0,) * shape[0], (1.0,) * shape[0]).net
        return net.features, net.width

    def build(
        self, num_classes: int, shape: tuple[int, int, int], mean: Sequence[float], std: Sequence[float], seed: int
    ) -> Network:
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            net = self.adapted(num_classes, shape, mean, std).net
        return net.to(memory_format=torch.channels_last)  # type: ignore[no-any-return, call-overload]

    def adapted(
        self, num_classes: int, shape: tuple[int, int, int], mean: Sequence[float], std: Sequence[float]
    ) -> Adapted:
        """The network and its names, with weights drawn from torch's generator.

        Args:
            num_classes: logits.
            shape: (C, H, W) of the images.
            mean, std: of every channel, by which the model's images are normalised.

        Raises:
            BadInput: as :func:`library_model` and :func:`adapt`; it is no network for images of that shape.
        """
        module = library_model(self.model, num_classes, shape[0]).eval()
        if self.stem == "small images":
            _small_stem(module, self.model)
        image = torch.linspace(0, 1, math.prod(shape)).reshape(1, *shape).to(next(module.parameters()).device)
        try:
            with torch.no_grad():
                logits = module(image)
        except (AssertionError, RuntimeError) as error:
            why = (str(error).strip().splitlines() or ["no reason given"])[0]
            raise BadInput(f"{self.model}: cannot read images of {' x '.join(map(str, shape))}: {why}") from error
        found = adapt(module, Normalise(mean, std), self.model)
        with torch.no_grad():
            embedding = found.net.features(image)
            same = torch.equal(found.net.head(embedding), logits) if logits.device.type != "meta" else True
        if embedding.ndim != 2:
            raise BadInput(f"{self.model}: its classifier reads a tensor of {embedding.ndim} dimensions, not one vector per image")
        if not same:
            raise BadInput(f"{self.model}: cut in two for pruning, it computes other logits than the whole, so it is not used")
        return found


def _small_stem(module: Any, name: str) -> None:
    first = getattr(module, "conv1", None)
    if not isinstance(first, nn.Conv2d) or not hasattr(module, "maxpool"):
        raise BadInput(f"{name}: has no stem 'conv1', 'maxpool' that could be replaced by one for small images")
    module.conv1 = nn.Conv2d(first.in_channels, first.out_channels, 3, 1, 1, bias=first.bias is not None)
    module.maxpool = nn.Identity()


