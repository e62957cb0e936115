"""The search loop of trigger inversion. Its results in the attack are tested in tests/attacks/test_natural.py."""

from __future__ import annotations

import math

import numpy as np
import torch

from models.inversion import descend, patched, squashed


def test_a_mask_of_nothing_is_the_identity_and_a_full_one_the_pattern() -> None:
    images = torch.rand(3, 2, 4, 5, generator=torch.Generator().manual_seed(0))
    pattern = torch.randn(2, 4, 5, generator=torch.Generator().manual_seed(1))
    nothing, everything = torch.full((1, 4, 5), -50.0), torch.full((1, 4, 5), 50.0)
    assert torch.equal(patched(images, nothing, pattern), images)
    torch.testing.assert_close(patched(images, everything, pattern), squashed(pattern).expand(3, -1, -1, -1))
    assert torch.equal(patched(images, everything, pattern, torch.zeros(1, 4, 5)), images)
    assert np.allclose(squashed(pattern), 1 / (1 + np.exp(-2 * pattern.double().numpy())), atol=1e-6)


def test_steps_are_adam_on_the_loss_and_end_when_told() -> None:
    """f(z) = (z - mean of the batch)^2 + weight * z on scalars; the twin is Adam as published."""
    batches = [(torch.full((2, 1, 1, 1), value), torch.zeros(2)) for value in (1.0, 3.0, -2.0, 0.5, 4.0, 9.0)]
    seen: list[tuple[int, float, float]] = []

    def after(step: int, z: list[torch.Tensor], weight: float) -> float | None:
        seen.append((step, float(z[0]), weight))
        return None if step == 5 else weight + 1

    start = torch.tensor(0.25, dtype=torch.float64)
    found = descend(
        lambda images, targets, z, weight: (z[0] - images.double().mean()) ** 2 + weight * z[0],
        batches, [start], lr=0.1, betas=(0.5, 0.9), weight=2.0, after=after,
    )  # fmt: skip
    z, first, second, weight = 0.25, 0.0, 0.0, 2.0
    for step, value in enumerate((1.0, 3.0, -2.0, 0.5, 4.0), 1):
        gradient = 2 * (z - value) + weight
        first, second = 0.5 * first + 0.5 * gradient, 0.9 * second + 0.1 * gradient**2
        z -= 0.1 * (first / (1 - 0.5**step)) / (math.sqrt(second / (1 - 0.9**step)) + 1e-8)
        assert seen[step - 1] == (step, np.float64(seen[step - 1][1]), weight)
        assert abs(seen[step - 1][1] - z) < 1e-9
        weight += 1
    assert len(seen) == 5
    assert float(found[0]) == seen[-1][1]
    assert not found[0].requires_grad
    assert float(start) == 0.25
