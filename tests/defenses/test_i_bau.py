from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.autograd.functional import jacobian
from torch.nn.functional import cross_entropy

from defenses.base import Inapplicable, Scope
from defenses.i_bau import IBAU, hypergradient
from models.cost import metered
from models.images import ImageSet, to_float
from models.spec import BadInput, generator
from models.training import Diverged


def offered(defense, view):
    return {one.dial: one for one in defense.candidates(view)}


def same(a, b):
    left, right = a.state_dict(), b.state_dict()
    return all(torch.equal(left[name], right[name]) for name in left)


# -- the hypergradient ---------------------------------------------------------------------------------------------------------


class Quadratic:
    """inner = d'Ad/2 + d'B theta, outer = |d - c|^2/2 + (d . e)|theta|^2/2, with A positive definite."""

    def __init__(self):
        draw = generator("quadratic")
        root = torch.randn(4, 4, generator=draw, dtype=torch.float64)
        self.A = root @ root.T / 4 + torch.eye(4, dtype=torch.float64)
        self.B = torch.randn(4, 3, generator=draw, dtype=torch.float64)
        self.c, self.e, self.delta = torch.randn(3, 4, generator=draw, dtype=torch.float64)
        self.theta = torch.randn(3, generator=draw, dtype=torch.float64).requires_grad_()

    def inner(self, d):
        return d @ self.A @ d / 2 + d @ self.B @ self.theta

    def outer(self, d):
        return (d - self.c).square().sum() / 2 + (d @ self.e) * self.theta.square().sum() / 2

    def found(self, iterations, step, delta=None):
        at = self.delta if delta is None else delta
        return hypergradient(self.inner, self.outer, at, [self.theta], iterations, step)[0].numpy()


@pytest.mark.parametrize("iterations", [0, 1, 2, 5, 40])
def test_on_a_quadratic_it_is_the_sum_of_powers(iterations):
    q, step = Quadratic(), 0.1
    A, B, c, e, d, theta = (each.detach().numpy() for each in (q.A, q.B, q.c, q.e, q.delta, q.theta))
    upon = d - c + e * (theta @ theta) / 2
    power, total = np.eye(4), np.zeros((4, 4))
    for _ in range(iterations):
        total, power = total + power, power @ (np.eye(4) - step * A)
    expected = (d @ e) * theta + (-step * B).T @ total.T @ upon
    np.testing.assert_allclose(q.found(iterations, step), expected, rtol=1e-10)


def test_with_many_iterations_it_is_the_gradient_through_the_minimum():
    """At the minimum d* = -inv(A) B theta of inner; the closed form is confirmed by differences of outer(d*(theta), theta)."""
    q = Quadratic()
    A, B = q.A.numpy(), q.B.numpy()

    def value(theta):
        d = -np.linalg.solve(A, B @ theta)
        return np.sum((d - q.c.numpy()) ** 2) / 2 + d @ q.e.numpy() * (theta @ theta) / 2

    theta = q.theta.detach().numpy()
    d = -np.linalg.solve(A, B @ theta)
    upon = d - q.c.numpy() + q.e.numpy() * (theta @ theta) / 2
    closed = d @ q.e.numpy() * theta - B.T @ np.linalg.solve(A.T, upon)
    by_difference = [(value(theta + h) - value(theta - h)) / 2e-6 for h in 1e-6 * np.eye(3)]
    np.testing.assert_allclose(closed, by_difference, rtol=1e-6)
    errors = [np.abs(q.found(count, 0.2, torch.from_numpy(d)) - closed).max() for count in (0, 1, 3, 10, 30, 300)]
    assert errors == sorted(errors, reverse=True)
    assert errors[0] > 0.1
    assert errors[-1] < 1e-10


def test_parameters_that_nothing_depends_on_get_zeros():
    q = Quadratic()
    idle = torch.ones(2, requires_grad=True)
    assert not hypergradient(q.inner, q.outer, q.delta, [q.theta, idle], 3, 0.1)[1].any()


# -- a run against plain loops -------------------------------------------------------------------------------------------------


def slow_run(net, data, method, seed, scope):
    """The rounds in plain loops: its own Adam, the Jacobian written out; yields the parameters after every round."""
    order = torch.randperm(len(data), generator=generator(seed, "i-bau", "batches")).tolist()
    parts = [order[start : start + method.batch] for start in range(0, len(order), method.batch)]
    batches = [(data.images[part].double() / 255, data.labels[part]) for part in parts]
    draw = generator(seed, "i-bau", "perturbed")
    net = net.double()
    theta = list((net if scope is Scope.WHOLE else net.head).parameters())
    m, v = [torch.zeros_like(p) for p in theta], [torch.zeros_like(p) for p in theta]
    steps = 0
    for _ in range(method.rounds):
        delta = torch.zeros(1, *data.shape, dtype=torch.float64)
        for x, _ in batches:
            own = torch.stack([row.argmax() for row in net(x)])
            d = delta.clone().requires_grad_()
            picked = torch.log_softmax(net(x + d), 1)[range(len(x)), own]
            (picked.mean() + method.penalty * (d**2).sum()).backward()
            delta = delta - method.search_lr * d.grad
        if method.radius is not None and float(delta.norm()) > method.radius:
            delta = delta / delta.norm() * method.radius
        x0, y0 = batches[0]

        def phi(d, x0=x0, y0=y0):
            energy = -cross_entropy(net(x0 + d), y0) + method.penalty * (d**2).sum()
            return d - method.step * torch.autograd.grad(energy, d, create_graph=True)[0]

        for x, y in batches:
            chosen = torch.randperm(len(x), generator=draw).tolist()[: max(1, int(method.portion * len(x)))]
            d = delta.clone().requires_grad_()
            shown = torch.stack([image + d[0] if i in chosen else image for i, image in enumerate(x)])
            *gradients, upon = torch.autograd.grad(cross_entropy(net(shown), y), [*theta, d])
            if method.iterations:
                J = jacobian(phi, delta.clone().requires_grad_()).reshape(delta.numel(), -1)
                vector = torch.zeros(delta.numel(), dtype=torch.float64)
                for _ in range(method.iterations):
                    vector = J.T @ vector + upon.flatten()
                d = delta.clone().requires_grad_()
                more = torch.autograd.grad((phi(d).flatten() * vector).sum(), theta, allow_unused=True)
                gradients = [g if h is None else g + h for g, h in zip(gradients, more, strict=True)]
            steps += 1
            with torch.no_grad():
                for p, g, first, second in zip(theta, gradients, m, v, strict=True):
                    first.mul_(0.9).add_(0.1 * g)
                    second.mul_(0.999).add_(0.001 * g**2)
                    p -= method.lr * (first / (1 - 0.9**steps)) / ((second / (1 - 0.999**steps)).sqrt() + 1e-8)
        yield [p.detach().clone() for p in theta]


@pytest.mark.parametrize(
    ("settings", "scope"),
    [
        ({"iterations": 3, "penalty": 0.05}, Scope.WHOLE),
        ({"iterations": 3, "radius": 0.5, "portion": 0.3}, Scope.HEAD),
        ({"iterations": 0, "portion": 1.0}, Scope.WHOLE),
        ({"iterations": 1, "step": 0.5}, Scope.WHOLE),
    ],
)
def test_rounds_equal_plain_loops(settings, scope, net_of, data_of, view_of):
    method = IBAU(rounds=2, batch=10, lr=0.01, **settings)
    data = ImageSet(data_of(1).images[..., 2:5, :3].contiguous(), data_of(1).labels, 4)  # small: a Jacobian has 27 x 27 entries
    found = offered(method, view_of(method, scope=scope, clean=data))
    for done, theta in enumerate(slow_run(net_of(), data, method, 3, scope), 1):
        model = found[float(done)].model
        parameters = list((model if scope is Scope.WHOLE else model.head).parameters())
        moved = 0.0
        start = list((net_of() if scope is Scope.WHOLE else net_of().head).parameters())
        for p, q, s in zip(parameters, theta, start, strict=True):
            # Adam divides by the gradient's size: where that is rounding alone, its sign is anybody's guess.
            torch.testing.assert_close(p.double(), q, rtol=1e-3, atol=2e-3)
            moved = max(moved, float((p - s).detach().abs().max()))
        assert moved > 0.005 * done


def test_without_iterations_it_is_plain_adversarial_fine_tuning(net_of):
    """The gradient is that of the cross-entropy at a fixed perturbation; the inner problem is not evaluated."""
    net, method = net_of(), IBAU(iterations=0)
    draw = generator("x")
    x, y, delta = torch.rand((6, 3, 8, 8), generator=draw), torch.arange(6) % 4, torch.rand((1, 3, 8, 8), generator=draw)
    theta = list(net.parameters())
    found = hypergradient(
        lambda d: pytest.fail("inner was evaluated"), lambda d: cross_entropy(net(x + d), y), delta, theta, 0, 0.1
    )
    plain = torch.autograd.grad(cross_entropy(net(x + delta), y), theta)
    assert all(torch.equal(one, other) for one, other in zip(found, plain, strict=True))
    other = hypergradient(lambda d: method.inner(net, x, y, d), lambda d: cross_entropy(net(x + d), y), delta, theta, 2, 0.1)
    assert not all(torch.allclose(one, two) for one, two in zip(other, plain, strict=True))


# -- what a run gives ----------------------------------------------------------------------------------------------------------


def test_a_rate_of_zero_and_no_rounds_are_the_identity(net_of, view_of):
    still = IBAU(lr=0.0, rounds=2, batch=8)
    found = offered(still, view_of(still))
    assert list(found) == [1.0, 2.0]
    assert all(same(one.model, net_of()) for one in found.values())
    none = IBAU(rounds=0)
    (only,) = none.candidates(view_of(none))
    assert (only.dial, only.is_default) == (0.0, True)
    assert same(only.model, net_of())


def test_a_model_is_offered_after_every_round_and_keeps_its_statistics(net_of, view_of):
    method = IBAU(rounds=3, batch=8)
    found = offered(method, view_of(method))
    assert [(one.dial, one.is_default, one.strength) for one in found.values()] == [(1, False, 1), (2, False, 2), (3, True, 3)]
    assert not same(found[1.0].model, found[2.0].model)
    shorter = IBAU(rounds=1, batch=8)
    assert same(offered(shorter, view_of(shorter))[1.0].model, found[1.0].model)
    before = dict(net_of().named_buffers())
    assert all(torch.equal(value, before[name]) for name, value in found[3.0].model.named_buffers())
    assert all(parameter.grad is None for parameter in found[3.0].model.parameters())


def test_the_perturbation_leads_away_from_what_the_network_says_and_stays_in_its_ball(net_of, data_of):
    net, data = net_of().requires_grad_(False), data_of(1)
    method = IBAU(batch=8)
    batches = method.batches(data, 0)
    assert sorted(len(labels) for _, labels in batches) == [8, 8, 8]
    x = to_float(data.images)
    own, delta = net(x).argmax(1), method.search(net, batches)
    assert delta.shape == (1, 3, 8, 8)
    assert float(cross_entropy(net(x + delta), own)) > float(cross_entropy(net(x), own)) + 0.1
    size = float(delta.norm())
    for radius in (size / 3, size * 3):
        projected = IBAU(batch=8, radius=radius).search(net, batches)
        torch.testing.assert_close(projected, delta * min(1.0, radius / size))


@pytest.mark.parametrize(("portion", "count"), [(0.0, 1), (0.01, 1), (0.25, 2), (1.0, 8)])
def test_at_least_one_image_of_a_batch_is_perturbed(portion, count, net_of, view_of, monkeypatch):
    method, net, shown = IBAU(rounds=1, iterations=0, batch=8, portion=portion), net_of(), []
    monkeypatch.setattr(IBAU, "search", lambda self, net, batches: torch.ones(1, 3, 8, 8))
    forward = type(net).forward
    monkeypatch.setattr(type(net), "forward", lambda self, x: shown.append(x.detach()) or forward(self, x))
    list(method.candidates(view_of(method, net)))
    assert len(shown) == 3
    for x in shown:
        assert int((x.flatten(1).amax(1) > 1).sum()) == count


def test_passes_are_counted(view_of):
    """24 images in batches of 8: labels, search and steps; then a pass on the first batch per step, K + 1 times backward."""
    for iterations, forward, backward in ((0, 72, 48), (1, 96, 96), (3, 96, 144)):
        method = IBAU(rounds=1, iterations=iterations, batch=8)
        with metered() as cost:
            list(method.candidates(view_of(method)))
        assert (cost.forward, cost.backward) == (forward, backward)


def test_weights_that_are_not_finite_and_an_empty_budget_are_refused(view_of, data_of, net_of):
    net = net_of()
    with torch.no_grad():
        net.head[0].weight[0, 0] = torch.inf
    method = IBAU(rounds=1, batch=8)
    with pytest.raises(Diverged, match=r"after round 1 at lr 0\.0001"):
        list(method.candidates(view_of(method, net)))
    with pytest.raises(Inapplicable, match="clean budget is empty"):
        list(method.candidates(view_of(method, clean=data_of(size=0))))


@pytest.mark.parametrize(
    "wrong",
    [{"rounds": -1}, {"iterations": -1}, {"lr": 11.0}, {"batch": 1}, {"portion": 1.1}, {"step": 0.0}, {"search_lr": 0.0},
     {"penalty": -1.0}, {"radius": 0.0}],
)  # fmt: skip
def test_settings_out_of_range_are_named(wrong):
    with pytest.raises(BadInput, match=f"i-bau: {next(iter(wrong))}"):
        IBAU(**wrong)
