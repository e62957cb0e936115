from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy

from defenses.base import Scope
from defenses.fine_tuning import Tuned, tune
from defenses.sau import SAU, _Unlearning, divergence, unlearning
from models.cost import metered
from models.images import to_float
from models.recipe import Recipe
from models.resnet import PreActResNet18
from models.spec import BadInput, derive_seed, generator
from models.training import fit
from models.vgg import VGG11

ADAM = Recipe(epochs=2, batch=24, lr=0.01, optimizer="adam", weight_decay=0.0, schedule="constant", crop=0, flip=False)


def only(defense, view):
    (candidate,) = defense.candidates(view)
    return candidate.model


def softmax(values):
    powers = [math.exp(value) for value in values]
    return [power / sum(powers) for power in powers]


def logits(seed, count=5, classes=4):
    return 2 * torch.randn((count, classes), generator=generator(seed, "logits"))


def slow_divergence(a, b):
    total = 0.0
    for row, other in zip(a.tolist(), b.tolist(), strict=True):
        p, q = softmax(row), softmax(other)
        for one, two in zip(p, q, strict=True):
            middle = (one + two) / 2
            total += (one * math.log(one / middle) + two * math.log(two / middle)) / 2
    return total / len(a)


def slow_unlearning(values, labels, victims):
    total = 0.0
    for row, label, victim in zip(values.tolist(), labels.tolist(), victims.tolist(), strict=True):
        total -= math.log(1 - softmax(row)[victim]) if victim != label else 0.0
    return total / len(values)


def test_the_divergence_equals_the_formula_term_by_term():
    a, b = logits(0), logits(1)
    assert divergence(a, b).mean().item() == pytest.approx(slow_divergence(a, b), rel=1e-5)
    torch.testing.assert_close(divergence(a, b), divergence(b, a))
    assert divergence(a, a).abs().max() < 1e-7
    far = torch.tensor([[200.0, 0.0]])
    assert divergence(far, far.flip(1)).item() == pytest.approx(math.log(2))


def test_the_unlearning_loss_equals_the_formula_sample_by_sample():
    values, labels, victims = logits(2), torch.tensor([0, 1, 2, 3, 0]), torch.tensor([1, 1, 0, 2, 0])
    assert unlearning(values, labels, victims).item() == pytest.approx(slow_unlearning(values, labels, victims), rel=1e-5)
    certain = torch.tensor([[500.0, 0.0, 0.0]])
    assert torch.isfinite(unlearning(certain, torch.tensor([1]), torch.tensor([0])))


def nets(net_of):
    return net_of(0).eval(), net_of(1).eval()


def slow_perturbed(net, victim, x, labels, method):
    """Sign steps from the corner of the box, image by image, until both networks mistake every image alike."""
    shifts = [torch.full_like(image, method.bound) for image in x.split(1)]
    for _ in range(method.steps):
        ups, open_ = [], 0
        for image, label, d in zip(x.split(1), labels.split(1), shifts, strict=True):
            d.requires_grad_()
            outputs = [(one(image), one(image + d)) for one in (net, victim)]
            gone = [int(after.argmax()) != int(before.argmax()) for before, after in outputs]
            (_, a), (_, b) = outputs
            alike = all(gone) and int(a.argmax()) == int(b.argmax())
            open_ += not alike
            gain = 0 * (a.sum() + b.sum())
            for changed, after in zip(gone, (a, b), strict=True):
                gain = gain + (0 if changed else method.beta_1 * cross_entropy(after, label) / 2)
            if not alike:
                p, q = a.softmax(1), b.softmax(1)
                gain = gain - method.beta_2 * 0.5 * (p * (2 * p / (p + q)).log() + q * (2 * q / (p + q)).log()).sum()
            ups.append(torch.autograd.grad(gain, d)[0])
        if not open_:
            break
        shifts = [
            torch.from_numpy(np.clip((d.detach() + method.step * up.sign()).numpy(), -method.bound, method.bound))
            for d, up in zip(shifts, ups, strict=True)
        ]
    return torch.cat([image + d.detach() for image, d in zip(x.split(1), shifts, strict=True)])


@pytest.mark.parametrize("bound", [0.1, 0.5])
def test_the_perturbation_equals_projected_sign_steps(net_of, data_of, bound):
    net, victim = nets(net_of)
    data = data_of(1)
    x = to_float(data.images)
    method = SAU(beta_1=0.3, beta_2=2.0, bound=bound, step=0.07, steps=4)
    module = _Unlearning(net, ADAM, method, 1.0, victim)
    moved = module.perturbed(x, data.labels)
    torch.testing.assert_close(moved, slow_perturbed(net, victim, x, data.labels, method), rtol=1e-4, atol=1e-5)
    assert float((moved - x).abs().max()) <= bound + 1e-6
    assert not torch.equal(moved, x + bound), "some pixels moved from where they began"
    assert torch.equal(_Unlearning(net, ADAM, SAU(steps=0), 1.0, victim).perturbed(x, data.labels), x)


def test_no_step_is_taken_once_both_mistake_all_alike(net_of, data_of):
    net, victim = nets(net_of)
    data = data_of(1)
    x = to_float(data.images)

    def bright(z):  # above 1 on average: class 2, else class 0
        mean = z.mean((1, 2, 3))
        return torch.stack([1 - mean, 0 * mean - 9, mean - 1, 0 * mean - 9], 1)

    for one in (net, victim):
        one.forward = bright
    module = _Unlearning(net, ADAM, SAU(bound=1.0), 1.0, victim)
    assert torch.equal(module.perturbed(x, data.labels), x + 1)


def test_two_steps_equal_the_formula_of_adam(net_of, data_of):
    """m, v and their corrections on CE(x) + weight unlearn(x + d), in evaluation mode; full batches."""
    data, tuned, twin, victim = data_of(1), net_of(), net_of(), net_of()
    method, x = SAU(beta_1=0.5, bound=0.3, step=0.1, steps=2), to_float(data.images)
    fit(_Unlearning(tuned, ADAM, method, 0.7, net_of()), data, ADAM, 0)
    weights = list(twin.parameters())
    first, second = [torch.zeros_like(p) for p in weights], [torch.zeros_like(p) for p in weights]
    for step in (1, 2):
        moved = slow_perturbed(twin.eval(), victim.eval(), x, data.labels, method)
        output = twin(moved)
        theirs = victim(moved).argmax(1)
        shares = output.softmax(1)[torch.arange(24), theirs]
        counted = (theirs != data.labels) & (theirs != victim(x).argmax(1))
        unlearn = -(torch.log(1 - shares) * counted).sum() / 24
        gradients = torch.autograd.grad(cross_entropy(twin(x), data.labels) + 0.7 * unlearn, weights)
        with torch.no_grad():
            for p, g, m, v in zip(weights, gradients, first, second, strict=True):
                m.mul_(0.9).add_(0.1 * g)
                v.mul_(0.999).add_(0.001 * g * g)
                p.sub_(0.01 * (m / (1 - 0.9**step)) / ((v / (1 - 0.999**step)).sqrt() + 1e-8))
    for p, q in zip(tuned.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-3, atol=2e-4)
    assert torch.equal(tuned.features[1].running_mean, victim.features[1].running_mean)


class _Still(Tuned):
    def train(self, mode=True):
        super().train(mode)
        self.net.eval()
        return self


def test_weight_zero_is_fine_tuning_by_the_same_optimiser(view_of, net_of):
    defense = SAU(weight=0.0, weights=(1.0,), rounds=3, batch=8, lr=0.01)
    view = view_of(defense)
    plain, unlearned = (one.model.state_dict() for one in defense.candidates(view))
    recipe = Recipe(epochs=3, batch=8, lr=0.01, optimizer="adam", weight_decay=0.0, schedule="constant", crop=0, flip=False)
    twin = tune(_Still(net_of(), recipe, Scope.WHOLE), view.clean, derive_seed(view.seed, "sau")).state_dict()
    assert all(torch.equal(plain[name], twin[name]) for name in twin)
    assert not all(torch.equal(unlearned[name], twin[name]) for name in twin)


def test_shared_adversarial_examples_become_fewer(net_of, data_of):
    """Of perturbations of the victim as it was, fewer go to a wrong class of the victim afterwards."""
    net, victim = net_of(), net_of()
    data = data_of(1)
    x, method = to_float(data.images), SAU(bound=0.05, step=0.05)
    module = _Unlearning(net, Recipe(epochs=12, batch=24, lr=0.03, optimizer="adam", schedule="constant"), method, 1.0, victim)

    def shared():
        moved = module.perturbed(x, data.labels)
        theirs = victim(moved).argmax(1)
        return unlearning(net(moved), data.labels, theirs).item()

    before = shared()
    fit(module, data, module.recipe, 0)
    assert shared() < before / 2


@pytest.mark.parametrize("backbone", [PreActResNet18(width=2), VGG11(width=2)], ids=lambda b: b.name)
def test_networks_of_the_catalogue(backbone, view_of):
    net = backbone.build(4, (3, 8, 8), [0.5] * 3, [0.25] * 3, 1).eval()
    defense = SAU(rounds=1, batch=12, steps=1, lr=0.01)
    tuned = only(defense, view_of(defense, net))
    moved = {name for name, p in tuned.named_parameters() if not torch.equal(p, net.get_parameter(name))}
    assert "head.2.weight" in moved
    assert any(name.startswith("features") for name in moved)
    assert all(torch.equal(value, dict(net.named_buffers())[name]) for name, value in tuned.named_buffers())


def test_cost_counts_every_pass_of_both_networks(view_of):
    defense = SAU(rounds=2, batch=8, steps=3, bound=1e-4)  # too little to end the steps early
    with metered() as cost:
        only(defense, view_of(defense))
    # Per image and round: both forward once and 3 times forward and backward, the victim forward twice, the network both twice.
    assert (cost.forward, cost.backward) == (48 * (2 + 6 + 2 + 2), 48 * (6 + 2))


def test_an_empty_budget_is_the_identity(view_of, data_of, net_of):
    defense = SAU(rounds=1)
    tuned = only(defense, view_of(defense, clean=data_of(size=0))).state_dict()
    assert all(torch.equal(value, tuned[name]) for name, value in net_of().state_dict().items())


@pytest.mark.parametrize("wrong", [{"weight": -1.0}, {"weights": (-1.0,)}, {"bound": 2.0}, {"steps": -1}, {"rounds": -1}])
def test_settings_out_of_range_are_named(wrong):
    with pytest.raises(BadInput, match=f"sau: {next(iter(wrong))}"):
        SAU(**wrong)
