"""Every attack and every defense computes where the default device is, and hands back what is on the CPU.

Three places: CUDA, where there is one; *elsewhere*, a device that is only said to be one; and the CPU under autocast to bfloat16,
which meets the places where types collide. Elsewhere, tensors hold ordinary CPU tensors and refuse to be mixed with those that
were not moved there, by CUDA's own rules: a forgotten ``.to(device)`` fails on any machine, and results are the CPU's, bit for bit.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import importlib.util
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from attacks import ATTACKS
from attacks.base import Attack, Crafted, Plan, Role, poison, poison_test
from defenses.base import Candidate, Defense, Inapplicable, Scope
from models import loop, training
from models.backbone import Network
from models.classifier import Classifier
from models.extractors import SelfSupervised
from models.images import ImageSet, to_float
from models.loop import pl
from models.mixmatch import MixMatch
from models.recipe import Precision, Recipe
from models.resnet import ResNet8
from models.training import accuracy, fit, logits, predict
from models.variants import Variants
from models.vgg import VGG11BN

# -- a device that is only said to be one ---------------------------------------------------------------------------------------

ELSEWHERE = torch.device("meta")
"""What tensors elsewhere give as their device: one that no code here asks for by name, and that autograd knows without a driver."""
aten = torch.ops.aten
INDEXING = {
    aten.index.Tensor, aten.index_put.default, aten.index_put_.default, aten._index_put_impl_.default, aten._unsafe_index.Tensor,
    aten._unsafe_index_put.default,
}  # fmt: skip
"""What takes an index from the CPU, as CUDA does; the values that are put must be there too."""


class Moved(Tensor):
    """A tensor elsewhere; ``held`` is the ordinary one with its data."""

    held: Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, held: Tensor) -> Moved:
        made = Tensor._make_wrapper_subclass(
            cls, held.shape, strides=held.stride(), storage_offset=held.storage_offset(), dtype=held.dtype, device=ELSEWHERE
        )
        made.held = held
        return made

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return dispatched(func, args, kwargs or {})


def here(value: Any) -> Any:
    return value.held if isinstance(value, Moved) else value


def dispatched(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """``func`` on what the tensors hold; refuses a mixture."""
    values = tree_leaves((args, kwargs))
    moved = {id(value.held): value for value in values if isinstance(value, Moved)}
    if func is aten.copy_.default:
        func(here(args[0]), here(args[1]), *args[2:], **kwargs)
        return args[0]
    asked = kwargs.get("device")
    goes = bool(moved) if asked is None else torch.device(asked).type == ELSEWHERE.type
    if func is not aten._to_copy.default:
        if (moved or goes) and any(isinstance(value, torch.Generator) for value in values):
            raise RuntimeError(f"{func}: a generator of the CPU draws nothing elsewhere")
        looked_at = args[2:3] if func in INDEXING and isinstance(args[0], Moved) else values
        left = [one for one in looked_at if isinstance(one, Tensor) and not isinstance(one, Moved) and one.ndim]
        if moved and left:
            raise RuntimeError(f"{func}: a tensor {tuple(left[0].shape)} of the CPU meets one elsewhere")
    if not moved and not goes:
        return func(*args, **kwargs)
    if asked is not None:
        kwargs = {**kwargs, "device": torch.device("cpu")}

    def placed(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        return moved[id(value)] if id(value) in moved else Moved(value) if goes else value

    return tree_map(placed, func(*tree_map(here, args), **tree_map(here, kwargs)))


class Pretended(TorchDispatchMode):
    """While open, tensors can be made elsewhere and moved there."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return dispatched(func, args, kwargs or {})


class Elsewhere(pl.accelerators.CPUAccelerator):  # type: ignore[misc]
    def setup_device(self, device: torch.device) -> None:
        """Nothing to set up."""


# -- the three places ----------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def trained_elsewhere(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Trainings whose trainer works there."""

    class Changed:
        def Trainer(self, **settings: Any) -> Any:
            strategy = pl.strategies.SingleDeviceStrategy(ELSEWHERE)
            return pl.Trainer(**{**settings, "accelerator": Elsewhere(), "strategy": strategy})

    with monkeypatch.context() as patched:
        patched.setattr(loop, "pl", Changed())
        yield


def made_here_then_moved(make: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def made(*arguments: Any, device: Any = None, **settings: Any) -> Tensor:
        return make(*arguments, **settings).to(device or "cpu")

    return made


@contextlib.contextmanager
def elsewhere(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    with trained_elsewhere(monkeypatch), monkeypatch.context() as patched:
        for module in list(sys.modules.values()):
            package = getattr(module, "__name__", "").split(".")[0]
            if package in ("models", "attacks", "defenses", "benchmark") and "default_device" in vars(module):
                patched.setattr(module, "default_device", lambda: ELSEWHERE)
        patched.setattr(training, "_products", lambda precision: None)
        patched.setattr(torch, "tensor", made_here_then_moved(torch.tensor))  # on this device torch makes it without data
        patched.setattr(torch, "autocast", lambda *arguments, **settings: contextlib.nullcontext())
        torch.__future__.set_swap_module_params_on_conversion(True)  # a module that moves keeps its parameters, as on CUDA
        try:
            with Pretended():
                yield
        finally:
            torch.__future__.set_swap_module_params_on_conversion(False)


@contextlib.contextmanager
def bfloat16(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    yield


@contextlib.contextmanager
def cuda(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    with warnings.catch_warnings():
        # Told once per operation that has no deterministic form; which ones, models.training says.
        warnings.filterwarnings("default", message=".*does not have a deterministic implementation.*")
        yield


without = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")
unless = pytest.mark.skipif(torch.cuda.is_available(), reason="the CPU is not the default device here")


@dataclasses.dataclass(frozen=True)
class Where:
    """``open`` enters the place; results there are the CPU's bit for bit where ``exact``."""

    open: Callable[[pytest.MonkeyPatch], contextlib.AbstractContextManager[None]]
    precision: Precision
    exact: bool


@pytest.fixture(
    params=[
        pytest.param(Where(elsewhere, "reference", True), id="elsewhere", marks=unless),
        pytest.param(Where(bfloat16, "bf16", False), id="bfloat16", marks=unless),
        pytest.param(Where(cuda, "reference", False), id="cuda", marks=without),
        pytest.param(Where(cuda, "bf16", False), id="cuda-bf16", marks=without),
    ]
)
def where(request: pytest.FixtureRequest) -> Where:
    place: Where = request.param
    return place


def sibling(name: str) -> ModuleType:
    """The module of a neighbouring test file, for its catalogue of tiny settings."""
    spec = importlib.util.spec_from_file_location(f"{name}_beside", Path(__file__).with_name(f"{name}.py"))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


of_attacks, of_defenses = sibling("test_attacks"), sibling("test_defenses")
SHAPE = (3, 16, 16)


def on_the_cpu(*modules: torch.nn.Module) -> bool:
    return all(type(value) is Tensor and value.device.type == "cpu" for one in modules for value in one.state_dict().values())


def same(one: torch.nn.Module, other: torch.nn.Module) -> bool:
    return all(map(torch.equal, one.state_dict().values(), other.state_dict().values()))


def network(seed: int = 0) -> Network:
    return ResNet8(width=2, hidden=4).build(5, SHAPE, [0.5] * 3, [0.25] * 3, seed)


# -- the pretence itself -------------------------------------------------------------------------------------------------------


@unless
def test_what_was_not_moved_meets_nothing_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    with elsewhere(monkeypatch):
        x, mine = torch.arange(6.0).view(2, 3).to(ELSEWHERE), torch.ones(3)
        assert x.device == ELSEWHERE
        assert x.sum().item() == 15
        assert torch.equal((x + mine.to(x.device)).cpu(), torch.arange(6.0).view(2, 3) + 1)
        assert (x * torch.tensor(2.0)).device == ELSEWHERE, "a scalar goes anywhere"
        assert torch.equal(x[torch.tensor([1])].cpu(), torch.tensor([[3.0, 4.0, 5.0]])), "an index comes from anywhere"
        for mixed in (
            lambda: x + mine, lambda: torch.cat([x, x.cpu()]), lambda: mine[x[0].long()], lambda: torch.where(x > 1, x, mine),
            lambda: torch.rand(3, generator=torch.Generator(), device=ELSEWHERE), lambda: x.index_put((torch.tensor([0]),), mine),
        ):  # fmt: skip
            with pytest.raises(RuntimeError, match="of the CPU"):
                mixed()
        x[0] = mine.to(ELSEWHERE)
        assert torch.equal(x[0].cpu(), mine)
    assert torch.equal(torch.rand(2), torch.rand(2)) is False
    assert training.default_device().type == "cpu"


# -- training and evaluation ---------------------------------------------------------------------------------------------------


def apart(one: Network, two: Network) -> float:
    """Euclidean distance of the weights."""
    pairs = zip(one.parameters(), two.parameters(), strict=True)
    return float(sum(float((a - b).detach().square().sum()) for a, b in pairs) ** 0.5)


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_training_and_evaluation(where: Where, optimizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    data = of_attacks.pictures(SHAPE)
    recipe = Recipe(epochs=2, batch=16, lr=0.05, crop=2, optimizer=optimizer, precision=where.precision)
    plain = fit(Classifier(network(), recipe), data, recipe, seed=1).net
    with where.open(monkeypatch):
        done = fit(Classifier(network(), recipe), data, recipe, seed=1)
        again = fit(Classifier(network(), recipe), data, recipe, seed=1)
        said, scores = predict(done.net, data.images), logits(done.net, data.images)
        variants = Variants(plain, {"all": data.images})
        for net in (plain, done.net, plain):
            assert torch.equal(variants.predict(net, "all"), predict(net, data.images))
        share = accuracy(done.net, data)
    assert on_the_cpu(done.net)
    assert same(done.net, again.net), "the same arguments, the same bits"
    assert {value.dtype for value in done.net.parameters()} == {torch.float32}
    assert type(said) is type(scores) is Tensor
    assert torch.equal(scores.argmax(1), said)
    assert share == float((said == data.labels).double().mean())
    assert (done.samples_forward, done.samples_backward) == (120, 120)
    if where.exact:
        assert same(done.net, plain)
        assert torch.equal(said, predict(plain, data.images))
    else:
        assert apart(done.net, plain) < 0.75 * apart(plain, network()), "other arithmetic ends near where float32 does"


def test_backbones_with_pooling_train_the_same_twice(where: Where, monkeypatch: pytest.MonkeyPatch) -> None:
    data, recipe = of_attacks.pictures(SHAPE), Recipe(epochs=2, batch=16, precision=where.precision)
    with where.open(monkeypatch):
        nets = [VGG11BN(width=2, hidden=0).build(5, SHAPE, [0.5] * 3, [0.25] * 3, 0) for _ in range(2)]
        one, two = (fit(Classifier(net, recipe), data, recipe, seed=1).net for net in nets)
    assert same(one, two)


def test_what_learns_without_labels(where: Where, monkeypatch: pytest.MonkeyPatch) -> None:
    data, recipe = of_attacks.pictures(SHAPE), Recipe(batch=16, precision=where.precision)
    method = SelfSupervised(epochs=2, batch=16)

    def trained() -> tuple[Network, Network]:
        features = method.build(network, data, recipe, seed=3).net
        module = MixMatch(
            copy.deepcopy(features), recipe_of_two, lambda net, images: torch.arange(len(images)) % 2 == 0,
            iterations=2, sharpen=0.5, mixup=0.75, weight=15, ramp=2,
        )  # fmt: skip
        return features, fit(module, data, recipe_of_two, seed=4).net

    recipe_of_two = dataclasses.replace(recipe, epochs=2)
    plain = trained()
    with where.open(monkeypatch):
        found = trained()
    assert on_the_cpu(*found)
    assert not where.exact or all(map(same, found, plain))


# -- the catalogues ------------------------------------------------------------------------------------------------------------


def attacked(attack: Attack, data: ImageSet, precision: Precision) -> tuple[Network, Crafted, list[Tensor]]:
    """What the pipeline does with an attack: the victim, its triggers, and the images it poisons."""
    surrogate = of_attacks.trained(SHAPE, 5)
    plan = of_attacks.allowed(attack, Plan(rate=0.2, target=1))
    recipe = Recipe(epochs=2, batch=16, lr=0.05, crop=1, precision=precision)
    crafted = attack.craft(data, plan, 0, surrogate if attack.needs_surrogate else None)
    module = attack.victim(network(), recipe, crafted, plan, 0)
    visible = data if attack.poisons_batches else poison(data, attack, crafted, plan, 0).visible
    net = fit(module, visible, recipe, seed=0).net
    crafted = attack.finished(module, crafted)
    poisoned = poison(data, attack, crafted, plan, 0)
    assert attack.name in of_attacks.INJECTS_NOTHING or (poisoned.role == Role.POISON).any()
    last = attack.recraft(net, crafted, data, plan, 0)
    return net, last, [poisoned.visible.images, poisoned.visible.labels, poison_test(data, last, plan).images]


@pytest.mark.parametrize("kind", ATTACKS, ids=lambda kind: kind.name)
def test_attacks(where: Where, kind: type[Attack], monkeypatch: pytest.MonkeyPatch) -> None:
    attack, data = of_attacks.made(kind), of_attacks.pictures(SHAPE)
    index = torch.arange(7)
    plain = attacked(attack, data, where.precision) if where.exact else None
    with where.open(monkeypatch):
        net, crafted, made = attacked(attack, data, where.precision)
        device = training.default_device()
        images = to_float(data.images[:7].to(device))
        shown = [trigger(images, index.to(device)) for trigger in of_attacks.triggers(crafted)]
        assert all(one.device.type == device.type for one in shown)
        shown = [one.cpu() for one in shown]
    assert on_the_cpu(net)
    assert all(type(one) is Tensor and one.device.type == "cpu" for one in made)
    assert all(one.dtype == torch.float32 for one in shown)
    if plain is not None and attack.name == "rescaled":  # torch takes another way to singular values while it is watched
        assert all(torch.allclose(a, b, rtol=1e-4) for a, b in zip(net.parameters(), plain[0].parameters(), strict=True))
        assert all(map(torch.equal, made, plain[2]))
    elif plain is not None:
        assert same(net, plain[0])
        assert all(map(torch.equal, made, plain[2]))


def offered(defense: Defense, scope: Scope, precision: Precision) -> list[Candidate]:
    view = of_defenses.view_for(defense, scope, victim=copy.deepcopy(of_defenses.VICTIM))
    view.recipe = dataclasses.replace(view.recipe, precision=precision)
    return list(defense.candidates(view))


@pytest.mark.parametrize(("defense", "scope"), of_defenses.CASES)
def test_defenses(where: Where, defense: Defense, scope: Scope, monkeypatch: pytest.MonkeyPatch) -> None:
    try:
        plain = offered(defense, scope, where.precision) if where.exact else []
        with where.open(monkeypatch):
            found = offered(defense, scope, where.precision)
            shares = [accuracy(candidate.model, of_defenses.data(2, 12)) for candidate in found]
    except Inapplicable as reason:
        pytest.skip(str(reason))
    assert found
    assert all(0 <= share <= 1 for share in shares)
    for candidate in found:
        assert on_the_cpu(candidate.model)
        assert all(type(mask) is Tensor and mask.device.type == "cpu" for mask in candidate.masks.values())
        assert candidate.isolated is None or type(candidate.isolated) is Tensor
    if where.exact:
        assert [candidate.dial for candidate in found] == [candidate.dial for candidate in plain]
        assert all(same(one.model, other.model) for one, other in zip(found, plain, strict=True))
