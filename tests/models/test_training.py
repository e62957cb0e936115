"""The one training loop: reproducible, counted, with the schedules it claims; and evaluation."""

from __future__ import annotations

import dataclasses
import math
import signal

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from torch import Tensor

from models import training
from models.backbone import Network
from models.classifier import Classifier
from models.cost import metered
from models.images import ImageSet
from models.recipe import Recipe
from models.resnet import ResNet8
from models.spec import BadInput, canonical, generator
from models.training import Diverged, accuracy, arithmetic, embed, fit, logits, predict, seeded

TINY = Recipe(epochs=2, batch=8, lr=0.05, crop=1)


def some_images(count: int = 21) -> ImageSet:
    draw = generator("training-images", count)
    images = torch.randint(0, 256, (count, 1, 8, 8), dtype=torch.uint8, generator=draw)
    return ImageSet(images, torch.randint(0, 3, (count,), generator=draw), 3)


def tiny(width: int = 2, classes: int = 3) -> Network:
    return ResNet8(width=width, hidden=4).build(classes, (1, 8, 8), [0.5], [0.25], seed=1)


def weights(net: Network) -> list[Tensor]:
    return [value.clone() for value in net.state_dict().values()]


def same(one: list[Tensor], two: list[Tensor]) -> bool:
    return all(map(torch.equal, one, two))


def test_the_same_arguments_give_the_same_weights_bit_for_bit() -> None:
    data = some_images()
    first = fit(Classifier(tiny(), TINY), data, TINY, seed=3)
    with torch.random.fork_rng(devices=[]):
        torch.rand(5)
        second = fit(Classifier(tiny(), TINY), data, TINY, seed=3)
    other = fit(Classifier(tiny(), TINY), data, TINY, seed=4)
    assert same(weights(first.net), weights(second.net))
    assert not same(weights(first.net), weights(other.net))
    assert not first.net.training


def test_a_training_in_a_slurm_job_is_the_plain_one(monkeypatch: pytest.MonkeyPatch) -> None:
    heard = []

    class Listening(Classifier):
        def after_step(self) -> None:
            heard.append(signal.getsignal(signal.SIGUSR1))

    data = some_images()
    expected = weights(fit(Listening(tiny(), TINY), data, TINY, seed=3).net)
    job = {"NTASKS": "2", "NTASKS_PER_NODE": "2", "NNODES": "2", "PROCID": "1", "LOCALID": "1", "NODEID": "1", "JOB_ID": "1234567"}
    for name, value in (job | {"JOB_NAME": "levelfield", "NODELIST": "a,b"}).items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    assert same(weights(fit(Listening(tiny(), TINY), data, TINY, seed=3).net), expected)
    assert set(heard) == {signal.getsignal(signal.SIGUSR1)}


def test_training_leaves_the_surrounding_random_state_alone() -> None:
    before = torch.random.get_rng_state(), np.random.get_state()[1].tolist()  # noqa: NPY002 - watched, not drawn from
    fit(Classifier(tiny(), TINY), some_images(), TINY, seed=3)
    with seeded(5):
        inside = torch.rand(3)
    assert torch.equal(torch.random.get_rng_state(), before[0])
    assert np.random.get_state()[1].tolist() == before[1]  # noqa: NPY002
    with seeded(5):
        assert torch.equal(torch.rand(3), inside)


def test_samples_are_counted_exactly() -> None:
    # 21 samples in batches of 4: five full ones, and the single leftover is dropped.
    recipe = Recipe(epochs=3, batch=4, lr=0.01, crop=0)
    done = fit(Classifier(tiny(), recipe), some_images(21), recipe, seed=0)
    assert (done.samples_forward, done.samples_backward) == (60, 60)
    assert done.seconds > 0


def test_no_epochs_or_a_single_sample_leave_the_network_as_it_is() -> None:
    for recipe, count in ((Recipe(epochs=0), 21), (TINY, 1)):
        net = tiny()
        before = weights(net)
        done = fit(Classifier(net, recipe), some_images(count), recipe, seed=0)
        assert same(weights(done.net), before)
        assert (done.samples_forward, done.samples_backward) == (0, 0)
        assert not done.net.training


def test_it_learns_digits() -> None:
    digits = load_digits()
    images = torch.as_tensor(digits.images * 15.9).to(torch.uint8)[:, None]
    data = ImageSet(images, torch.as_tensor(digits.target).long(), 10)
    train, test = data.subset(torch.arange(800)), data.subset(torch.arange(800, 1200))
    recipe = Recipe(epochs=4, batch=32, lr=0.1, crop=0, flip=False)
    net = ResNet8(width=8, hidden=0).build(10, data.shape, [0.3], [0.35], seed=0)
    assert accuracy(net, test) < 0.3
    assert accuracy(fit(Classifier(net, recipe), train, recipe, seed=0).net, test) > 0.8


class Watched(Classifier):
    """Notes the learning rate of every step, as the optimiser sees it."""

    def __init__(self, net: Network, recipe: Recipe) -> None:
        super().__init__(net, recipe)
        self.rates: list[float] = []
        self.batches: list[int] = []

    def loss(self, logits: Tensor, labels: Tensor, index: Tensor) -> Tensor:
        self.rates.append(self.trainer.optimizers[0].param_groups[0]["lr"])
        self.batches.append(len(index))
        return super().loss(logits, labels, index)


def one_cycle_by_hand(step: int, steps: int, peak: float) -> float:
    """Up to the peak from a 25th over 30 % of the steps, down to a 10,000th of the start; half cosines."""
    top, end = 0.3 * (steps + 1) - 1, float(steps)
    low, start, last = (peak / 25, 0.0, top) if step <= top else (peak / 25 / 1e4, top, end)
    share = (step - start) / (last - start)
    share = 1 - share if step <= top else share
    return low + (peak - low) * (1 + math.cos(math.pi * share)) / 2


@pytest.mark.parametrize("schedule", ["cosine", "one-cycle", "multistep", "constant"])
def test_learning_rates_by_hand(schedule: str) -> None:
    recipe = Recipe(epochs=4, batch=8, lr=0.2, crop=0, schedule=schedule)  # type: ignore[arg-type]
    module = Watched(tiny(), recipe)
    fit(module, some_images(21), recipe, seed=0)
    expected = {
        "cosine": [0.1 * (1 + math.cos(math.pi * (step // 3) / 4)) for step in range(12)],
        "one-cycle": [one_cycle_by_hand(step, 12, 0.2) for step in range(12)],
        "multistep": [0.2] * 6 + [0.02] * 3 + [0.002] * 3,
        "constant": [0.2] * 12,
    }[schedule]
    assert module.rates == pytest.approx(expected)
    assert module.batches == [8, 8, 5] * 4


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_fit_is_the_plain_loop(optimizer: str) -> None:
    data = some_images(16)
    recipe = Recipe(
        epochs=3, batch=16, lr=0.01, momentum=0.5, weight_decay=0.1, schedule="constant", crop=0, flip=False,
        optimizer=optimizer,  # type: ignore[arg-type]
    )  # fmt: skip
    done = fit(Classifier(tiny(), recipe), data, recipe, seed=7)
    net = tiny().train()
    velocity = [torch.zeros_like(p) for p in net.parameters()]
    square = [torch.zeros_like(p) for p in net.parameters()]
    for step in range(1, 4):
        net.zero_grad()
        torch.nn.functional.cross_entropy(net(data.images.float() / 255), data.labels).backward()
        with torch.no_grad():
            for p, v, s in zip(net.parameters(), velocity, square, strict=True):
                assert p.grad is not None
                gradient = p.grad + 0.1 * p
                if optimizer == "sgd":
                    v.mul_(0.5).add_(gradient)
                    p -= 0.01 * v
                else:
                    v.mul_(0.9).add_(0.1 * gradient)
                    s.mul_(0.999).add_(0.001 * gradient**2)
                    p -= 0.01 * (v / (1 - 0.9**step)) / ((s / (1 - 0.999**step)).sqrt() + 1e-8)
    for ours, by_hand in zip(done.net.parameters(), net.parameters(), strict=True):
        # Shuffled batches sum in another order, and Adam divides tiny gradients by tiny roots.
        assert torch.allclose(ours, by_hand, atol=1e-4 if optimizer == "sgd" else 5e-3)


class Everything(Classifier):
    """Every hook in use at once."""

    def __init__(self, net: Network, recipe: Recipe) -> None:
        super().__init__(net, recipe)
        self.steps = 0
        self.before_augment = lambda images, labels, index, epoch: (images, (labels + epoch) % 3)
        self.seen: list[list[int]] = []

    def on_batch(self, images: Tensor, labels: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
        self.seen.append(labels.tolist())
        return images * 0, labels * 0

    def loss(self, logits: Tensor, labels: Tensor, index: Tensor) -> Tensor:
        assert (labels == 0).all()
        return super().loss(logits, labels, index)

    def trainable(self) -> list[torch.nn.Parameter]:
        return list(self.net.head.parameters())

    def after_step(self) -> None:
        self.steps += 1
        with torch.no_grad():
            self.net.head.get_parameter("0.bias")[0] = 0


def test_the_hooks_of_a_method_are_called() -> None:
    net = tiny()
    before = [parameter.clone() for parameter in net.features.parameters()]
    data = some_images(16)
    recipe = Recipe(epochs=2, batch=16, lr=0.1)
    module = Everything(net, recipe)
    fit(module, data, recipe, seed=0)
    assert module.steps == 2
    assert all(map(torch.equal, net.features.parameters(), before))
    assert net.head.get_parameter("0.bias")[0] == 0
    first, second = (torch.tensor(labels).bincount(minlength=3) for labels in module.seen)
    assert torch.equal(first, data.labels.bincount(minlength=3))
    assert torch.equal(second, first.roll(1))


def test_a_training_that_blows_up_says_so() -> None:
    # Weight decay alone multiplies every weight by 1 - 10 = -9 a step, past float32's 3e38 well within 60 steps.
    recipe = Recipe(epochs=20, batch=8, lr=10, weight_decay=1, schedule="constant", crop=0)
    with pytest.raises(Diverged, match="not finite after 20 epochs at lr 10"):
        fit(Classifier(tiny(), recipe), some_images(), recipe, seed=0)


class Interrupted(Classifier):
    def loss(self, logits: Tensor, labels: Tensor, index: Tensor) -> Tensor:
        raise KeyboardInterrupt


def test_an_interrupt_reaches_the_caller_as_an_interrupt() -> None:
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        fit(Interrupted(tiny(), TINY), some_images(), TINY, seed=0)
    assert signal.getsignal(signal.SIGINT) is before


def test_prediction_does_not_depend_on_the_batch_size_and_restores_the_mode() -> None:
    net, data = tiny(width=4), some_images(50)
    expected = [int(net.eval()(image[None].float() / 255).argmax()) for image in data.images]
    for mode in (True, False):
        net.train(mode)
        for batch in (1, 7, 50, 500):
            assert predict(net, data.images, batch).tolist() == expected
            assert net.training is mode
    hits = [guess == label for guess, label in zip(expected, data.labels.tolist(), strict=True)]
    assert accuracy(net, data) == pytest.approx(sum(hits) / 50)


class Cramped(torch.nn.Module):
    """Features for which memory suffices up to a number of samples."""

    def __init__(self, features: torch.nn.Module, most: int, error: Exception) -> None:
        super().__init__()
        self.features, self.most, self.error, self.sizes = features, most, error, list[int]()

    def forward(self, x: Tensor) -> Tensor:
        self.sizes.append(len(x))
        if len(x) > self.most:
            raise self.error
        return self.features(x)


CPU_SAYS = "[enforce fail at alloc_cpu.cpp:118] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory."), RuntimeError(CPU_SAYS), MemoryError()])
def test_an_evaluation_for_which_memory_does_not_suffice_goes_on_in_smaller_batches(error: Exception) -> None:
    net, data = tiny(width=4), some_images(150)
    expected = predict(net, data.images), logits(net, data.images), torch.cat(embed(net, data.images))
    with metered() as plenty:
        predict(net, data.images)
    net.features = cramped = Cramped(net.features, 40, error)
    with metered() as cost:
        assert torch.equal(predict(net, data.images, batch=128), expected[0])
    assert cramped.sizes == [128, 64, 32, 32, 32, 32, 22]
    assert cost == plenty, "a batch that did not fit is not charged"
    torch.testing.assert_close(logits(net, data.images), expected[1])
    torch.testing.assert_close(torch.cat(embed(net, data.images)), expected[2])
    assert accuracy(net, data) == float((expected[0] == data.labels).double().mean())


def test_an_evaluation_is_not_halved_without_end_nor_for_other_errors() -> None:
    net, data = tiny(), some_images(50)
    net.features = cramped = Cramped(net.features, 0, MemoryError("none left"))
    with pytest.raises(MemoryError, match="none left"):
        predict(net, data.images)
    assert cramped.sizes[-1] == training.FLOOR
    net.features = other = Cramped(cramped.features, 0, RuntimeError("shapes do not fit"))
    with pytest.raises(RuntimeError, match="shapes do not fit"):
        predict(net, data.images)
    assert other.sizes == [50]


def test_the_ways_to_evaluate_say_the_same() -> None:
    net, data = tiny(width=4), some_images(50)
    expected = predict(net, data.images)
    assert torch.equal(logits(net, data.images).argmax(1), expected)
    assert torch.equal(net.head(torch.cat(embed(net, data.images, batch=7))).argmax(1), expected)


def test_tf32_is_float32_on_the_cpu_but_not_its_key() -> None:
    data, seen = some_images(), {}
    for precision in ("reference", "tf32"):
        recipe = dataclasses.replace(TINY, precision=precision)  # type: ignore[arg-type]
        seen[canonical(recipe)] = weights(fit(Classifier(tiny(), recipe), data, recipe, seed=3).net)
    assert len(seen) == 2
    assert same(*seen.values())
    assert Recipe().spec()["precision"] == "reference", "keys of what was stored before there was a choice stand"


def test_bf16_is_computed_in_bfloat16_on_the_cpu_too() -> None:
    data, recipe, other = some_images(), dataclasses.replace(TINY, precision="bf16"), tiny()
    other.train()
    module = Classifier(other, recipe)
    batches = module.loader(data, 3)
    module.total_steps = len(batches) * recipe.epochs
    configured = module.configure_optimizers()
    for _ in range(recipe.epochs):
        for images, labels, _index in batches:
            configured["optimizer"].zero_grad()
            with torch.autocast("cpu", torch.bfloat16):
                scores = other(images).float()
            torch.nn.functional.cross_entropy(scores, labels).backward()
            configured["optimizer"].step()
            configured["lr_scheduler"]["scheduler"].step()
    net = fit(Classifier(tiny(), recipe), data, recipe, seed=3).net
    assert same(weights(net), weights(other))
    assert not same(weights(net), weights(fit(Classifier(tiny(), TINY), data, TINY, seed=3).net))
    assert {value.dtype for value in net.parameters()} == {torch.float32}


def products() -> tuple[str, bool]:
    return torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32


def test_products_are_rounded_inside_and_what_they_were_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    before = products()
    with arithmetic("tf32"):
        assert products() == before, "nothing changes where there is no GPU"
    monkeypatch.setattr(training, "default_device", lambda: torch.device("cuda"))
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    try:
        with arithmetic("bf16"):
            assert products() == ("high", True)
            with arithmetic("reference"):
                assert products() == ("highest", False)
            assert products() == ("high", True)
        assert products() == ("highest", False)
    finally:
        torch.set_float32_matmul_precision(before[0])


def test_accuracy_of_nothing_is_not_a_number() -> None:
    nothing = some_images().subset(torch.empty(0, dtype=torch.int64))
    assert predict(tiny(), nothing.images).tolist() == []
    assert math.isnan(accuracy(tiny(), nothing))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("epochs", -1), ("batch", 1), ("lr", math.inf), ("lr", 11.0), ("momentum", 1.0), ("weight_decay", -0.1), ("crop", 65),
        ("optimizer", "lion"), ("schedule", "linear"), ("precision", "fp8"),
    ],
)  # fmt: skip
def test_settings_out_of_range_are_named(field: str, value: object) -> None:
    with pytest.raises(BadInput, match=f"recipe: {field} = .* is out of range"):
        Recipe(**{field: value})  # type: ignore[arg-type]
