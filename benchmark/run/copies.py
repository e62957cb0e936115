"""The stored stage of canaries: copies of a victim with a backdoor planted by the benchmark; all defenses share them."""

from __future__ import annotations

import copy

from benchmark.rules.canary import Canary, Planted, plant
from benchmark.run.keys import canary_key
from benchmark.run.world import World, defender_seed
from benchmark.settings.cells import Cell
from benchmark.storage.store import Store
from models.backbone import Network
from models.spec import derive_seed
from models.training import Diverged

__all__ = ["read_canary"]


def read_canary(cell: Cell, w: World, model: Network, store: Store, canary: Canary) -> Planted:
    """A stored copy with a canary; planted first where it is missing or damaged.

    Raises:
        Diverged: planting diverged.
    """
    key = canary_key(cell, canary, w.data.fingerprint)
    seed = derive_seed(defender_seed(cell.scenario), "canary", canary.name)

    def compute() -> None:
        try:
            net = plant(canary, model, w.clean, w.validation, cell.scenario.recipe, seed)
        except Diverged as error:
            store.write("canary", key, canary.spec(), {"status": "failed", "reason": str(error)})
            return
        outcome = {"status": "ok", "target": net.target, "forward": net.forward, "backward": net.backward}
        tensors = {f"net.{name}": value for name, value in net.net.state_dict().items()}
        store.write("canary", key, canary.spec(), outcome, {**tensors, "probes": net.probes})

    entry = store.read("canary", key)
    if entry is None:
        store.once("canary", key, compute)
        entry = store.read("canary", key)
    assert entry is not None
    if entry.outcome["status"] != "ok":
        raise Diverged(entry.outcome["reason"])
    net = copy.deepcopy(model)
    net.load_state_dict({name.removeprefix("net."): value for name, value in entry.tensors.items() if name.startswith("net.")})
    stored = entry.outcome
    return Planted(net.eval(), stored["target"], entry.tensors["probes"], stored["forward"], stored["backward"])
