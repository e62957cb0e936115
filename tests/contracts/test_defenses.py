"""What every defense of the catalogue must keep, whoever wrote it. A new one is tested here by being listed.

``QUICK`` holds the settings that make a slow method tiny, and nothing else.
"""

from __future__ import annotations

import copy
import functools
import json
from collections.abc import Callable, Mapping

import pytest
import torch
from torch import nn

from defenses import DEFENSES
from defenses.base import Candidate, DefenderView, Defense, Inapplicable, Knowledge, Scope, Withheld
from models import BACKBONES
from models.backbone import Network, Normalise
from models.extractors import Extractor, SelfSupervised, Supervised
from models.images import ImageSet
from models.recipe import Recipe
from models.spec import canonical, derive_seed, generator
from models.units import EMBEDDING, Writer, embedding_layer, prune

QUICK: Mapping[str, Mapping[str, object]] = {
    "random-pruning": {"like_settings": (("u", 1.0),)},
    "training-from-scratch": {"epochs": 1},
    "linear-probe": {"epochs": 1, "batch": 8},
    "fine-tuning": {"epochs": 1, "batch": 8},
    "fine-pruning": {"epochs": 1, "batch": 8, "shares": (0.5,)},
    "anp": {"iterations": 3, "batch": 8, "lr": 0.5},
    "rnp": {"unlearning_epochs": 2, "recovery_epochs": 2, "batch": 8, "grid": (0.2, 0.9)},
    "fmp": {"epochs": 1, "batch": 8, "p": 2, "points": (4,), "map_batch": 4},
    "neural-cleanse": {"epochs": 1, "batch": 8, "search_epochs": 3, "search_batch": 8, "grid": (0.1, 0.5)},
    "i-bau": {"rounds": 2, "iterations": 2, "batch": 8},
    "unit": {"iterations": 5, "lr": 0.05, "weight": 1.0, "patience": 1, "tolerances": (0.0, 0.2)},
    "ft-sam": {"epochs": 1, "batch": 8, "rhos": (0.5,)},
    "nad": {"epochs": 2, "teacher_epochs": 1, "batch": 8, "factors": (0.0,)},
    "fst": {"epochs": 1, "batch": 8, "alphas": (1.0,)},
    "sau": {"rounds": 1, "batch": 8, "steps": 1, "weights": (0.0,)},
    "npd": {"epochs": 1, "batch": 8, "steps": 1, "factors": (0.0,)},
    "benign-salience": {"epochs": 1, "batch": 8},
    "hid": {"ssl_epochs": 1, "ssl_batch": 8, "rounds": 1, "hidden": (8,), "head_epochs": 1, "semi_epochs": 1, "semi_batch": 8},
    "holder-pruning": {"estimator": "pixel-fgsm"},  # defined at both scopes
    "abl": {
        "rate": 0.2, "isolation_epochs": 1, "epochs": 3, "batch": 8, "hole": 1, "unlearning_epochs": 2, "points": (0, 1),
    },
    "dbd": {"ssl_epochs": 1, "ssl_batch": 16, "head_epochs": 1, "semi_epochs": 1, "iterations": 2, "semi_batch": 8},
    "cbd": {"biased_epochs": 1, "epochs": 2, "batch": 8, "hole": 1, "points": (2,)},
    "trap-and-replace": {"epochs": 1, "batch": 8, "head_epochs": 1, "head_batch": 8, "points": (0,)},
    "d-br": {"probe_epochs": 1, "intra_epochs": 1, "probe_batch": 16, "poisoned_share": 0.2, "epochs": 2, "points": (1,)},
    "d-st": {
        "probe_epochs": 1, "intra_epochs": 1, "probe_batch": 16, "poisoned_share": 0.2, "ssl_epochs": 1, "ssl_batch": 16,
        "head_epochs": 1,
    },
    "asd": {"aware_epochs": 1, "agnostic_epochs": 1, "meta_epochs": 1, "iterations": 1, "batch": 8, "meta_batch": 16},
    "ct": {
        "base_epochs": 1, "pretrain_epochs": (1, 1), "iterations": (2, 2), "rates": (0.1, 0.1), "weights": (2.0, 2.0),
        "every": (2, 2), "kept": (0.5,), "pretrain_batch": 8, "epochs": 1, "batch": 8, "threshold": 0.0,
    },
}

ALL = ~Knowledge.NONE


def fresh(seed: int) -> Network:
    with torch.random.fork_rng(devices=[]):
        return built(seed)


def built(seed: int) -> Network:
    features = nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4), nn.ReLU(),
        nn.Conv2d(4, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
    )  # fmt: skip
    head = nn.Sequential(nn.Linear(6, 12), nn.ReLU(), nn.Linear(12, 4))
    net = Network(Normalise([0.5] * 3, [0.25] * 3), features, head)
    draw = generator(seed, "contract")
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=draw) * 0.4)
    return net.eval()


def data(seed: int, size: int) -> ImageSet:
    draw = generator(seed, "contract data")
    labels = torch.arange(size) % 4
    images = torch.randint(0, 120, (size, 3, 8, 8), generator=draw) + 30 * labels.view(-1, 1, 1, 1)
    return ImageSet(images.to(torch.uint8), labels, 4)


VICTIM = fresh(0)


def view_for(
    defense: Defense,
    scope: Scope,
    granted: Knowledge = ALL,
    victim: Network = VICTIM,
    built: Callable[[Extractor], Network] | None = None,
) -> DefenderView:
    sources: dict[Knowledge, Callable[[], object]] = {
        Knowledge.MODEL: lambda: victim,
        Knowledge.CLEAN: lambda: (data(1, 24), data(2, 12)),
        Knowledge.TRAIN: lambda: data(3, 32),
        Knowledge.EXTRACTOR: lambda: victim,
        Knowledge.ROLES: lambda: data(4, 28),
        Knowledge.SEEDS: lambda: torch.arange(32) % 3 == 0,
    }
    return DefenderView(
        granted=granted, declared=defense.needs, sources=sources, fresh=fresh, num_classes=4, seed=7, scope=scope,
        recipe=Recipe(epochs=1, batch=8, crop=1), built=built,
    )  # fmt: skip


TINY = [kind(**QUICK.get(kind.name, {})) for kind in DEFENSES]
EACH = [pytest.param(defense, id=defense.name) for defense in TINY]
CASES = [
    pytest.param(defense, scope, id=f"{defense.name}-{scope.value}") for defense in TINY for scope in defense.scopes
]


def run(defense: Defense, scope: Scope) -> tuple[list[Candidate], DefenderView, Network]:
    """All candidates, the view and the victim they came from; a documented refusal skips the case."""
    victim = copy.deepcopy(VICTIM)
    view = view_for(defense, scope, victim=victim)
    try:
        return list(defense.candidates(view)), view, victim
    except Inapplicable as reason:
        pytest.skip(str(reason))


first_run = functools.cache(run)


def same(a: nn.Module, b: nn.Module) -> bool:
    left, right = a.state_dict(), b.state_dict()
    return list(left) == list(right) and all(torch.equal(left[name], right[name]) for name in left)


def test_names_are_unique_and_the_table_of_quick_settings_is_not_stale():
    names = [kind.name for kind in DEFENSES]
    assert len(set(names)) == len(names)
    assert set(QUICK) <= set(names)


@pytest.mark.parametrize("kind", DEFENSES, ids=lambda kind: kind.name)
def test_defaults_are_complete_and_speak_json(kind):
    defense = kind()
    spec = defense.spec()
    assert json.loads(canonical(spec)) == spec
    assert spec["name"] == kind.name
    assert spec["revision"] >= 1
    assert defense == kind()
    assert kind.scopes
    assert kind.__doc__


@pytest.mark.parametrize("defense", EACH)
def test_what_is_not_granted_is_withheld(defense):
    for scope in defense.scopes:
        if defense.needs:
            with pytest.raises(Withheld):
                list(defense.candidates(view_for(defense, scope, granted=Knowledge.NONE)))


@pytest.mark.parametrize(("defense", "scope"), CASES)
def test_candidates_keep_the_contract(defense, scope):
    offered, view, victim = first_run(defense, scope)
    assert view.used in defense.needs
    assert sum(candidate.is_default for candidate in offered) == 1
    assert same(victim, VICTIM), "the victim itself was changed"
    dials = [candidate.dial for candidate in offered]
    if len(offered) > 1 or defense.dial_name:
        assert defense.dial_name, "a defense with a dial names it"
        assert None not in dials
        assert len(set(dials)) == len(dials), "each point of the dial once"
    else:
        assert dials == [None]
    images = torch.rand((5, 3, 8, 8), generator=generator(0, "images"))
    for candidate in offered:
        model = candidate.model
        assert not any(module.training for module in model.modules())
        assert all(parameter.requires_grad for parameter in model.parameters())
        assert {parameter.device.type for parameter in model.parameters()} == {"cpu"}
        with torch.no_grad():
            logits = model(images)
        assert logits.shape == (5, 4)
        assert torch.isfinite(logits).all()
        for name, mask in candidate.masks.items():
            assert mask.dtype == torch.bool
            assert len(mask) == (model.head[0].in_features if name == EMBEDDING else len(model.get_submodule(name).weight))
        if candidate.masks:
            assert candidate.strength == candidate.pruned
            assert not candidate.pruned or not same(model, VICTIM)
        if scope is Scope.HEAD:
            assert same(model.features, VICTIM.features), "scope HEAD edits the head alone, running statistics included"


@pytest.mark.parametrize(("defense", "scope"), CASES)
def test_the_same_view_gives_the_same_candidates(defense, scope):
    first, _, _ = first_run(defense, scope)
    torch.rand(17)  # the state of the global generator must not matter, and must be left alone
    before = torch.random.get_rng_state()
    second, _, _ = run(defense, scope)
    assert torch.equal(before, torch.random.get_rng_state())
    assert len(first) == len(second)
    for a, b in zip(first, second, strict=True):
        assert (a.dial, a.is_default, a.strength) == (b.dial, b.is_default, b.strength)
        assert same(a.model, b.model)


@pytest.mark.parametrize("defense", EACH)
def test_an_extractor_of_its_own_is_named_beforehand_and_left_as_it_was(defense):
    """So that it can be trained once for everybody who asks for the same."""
    asked: list[Extractor] = []
    theirs = fresh(5)

    def built(extractor: Extractor) -> Network:
        asked.append(extractor)
        return theirs

    view = view_for(defense, defense.scopes[0], built=built)
    try:
        list(defense.candidates(view))
    except Inapplicable as reason:
        pytest.skip(str(reason))
    assert asked == ([] if defense.extractor is None else [defense.extractor])
    assert same(theirs, fresh(5))
    assert view.trained or not asked


def test_an_extractor_of_ones_own_reads_the_poisoned_images_and_needs_them():
    defense = next(defense for defense in TINY if defense.extractor is not None)
    view = view_for(defense, Scope.WHOLE)
    own = SelfSupervised("poisoned", epochs=1, batch=8)
    net = view.extract(own)
    assert same(net, view.extract(own)), "the same request gives the same weights"
    direct = own.build(fresh, data(3, 32), view.recipe, derive_seed(view.seed, "extractor")).net
    assert same(net, direct)
    for other in (SelfSupervised("clean", epochs=1), Supervised()):
        with pytest.raises(ValueError, match="holds the poisoned images only"):
            view.extract(other)
    with pytest.raises(Withheld):
        view_for(defense, Scope.WHOLE, granted=Knowledge.MODEL).extract(own)


def test_building_a_network_anew_is_recorded():
    defense = TINY[0]
    view = view_for(defense, Scope.WHOLE)
    assert not view.trained
    view.fresh(0)
    assert view.trained


@pytest.mark.parametrize("hidden", [0, 8])
@pytest.mark.parametrize("backbone", BACKBONES, ids=[backbone.name for backbone in BACKBONES])
def test_a_unit_cut_at_the_default_site_has_no_path_to_the_logits(backbone, hidden):
    """Pruning's default site, on every network of the catalogue: whatever the channel holds, through shortcuts or not."""
    from defenses.pruning import Pruning, last_layers

    net = backbone(width=2, hidden=hidden).build(4, (3, 16, 16), [0.5] * 3, [0.25] * 3, 3).eval()
    (layer,) = last_layers(net, Scope.WHOLE, Pruning().site)
    assert layer == embedding_layer(net)
    mask = torch.zeros(layer.size, dtype=torch.bool)
    mask[::2] = True
    pruned = prune(net, {layer.name: mask}, Writer.OUTPUT)
    z = pruned.embed(torch.rand((3, 3, 16, 16), generator=generator(0, "images"))).detach().requires_grad_()
    logits = pruned.head(z)
    gradient = torch.autograd.grad(logits.square().sum(), z)[0]
    assert not gradient[:, mask].any()
    assert gradient[:, ~mask].any()
    other = z.detach().clone()
    other[:, mask] += 1000 * torch.rand(other[:, mask].shape, generator=generator(1, "noise"))
    assert torch.equal(pruned.head(other), logits)
    assert not torch.equal(net.head(other), net.head(z))
