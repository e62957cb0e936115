"""Networks that several cells share: trained once, stored, and read by all."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from benchmark.storage.store import Entry, Store
from models.backbone import Network
from models.training import Diverged

__all__ = ["stored_network"]

Trained = tuple[Network, Mapping[str, Any], Mapping[str, Tensor]]


def stored_network(
    store: Store, stage: str, key: str, settings: Any, empty: Callable[[], Network], train: Callable[[], Trained]
) -> tuple[Network, Entry]:
    """A stored network in evaluation mode and its entry; trained and stored first where it is missing or damaged.

    Args:
        store: the store.
        stage: kind of entry.
        key: of the entry.
        settings: what it is, for people who look into the store.
        empty: gives a network of the right shapes, whose values are overwritten.
        train: gives the network, what to store as its outcome, and further tensors by name.

    Raises:
        Diverged: its training diverged, now or when it was stored.
        Busy: another process is training it, and the store is not patient.
    """

    def compute() -> None:
        try:
            net, outcome, tensors = train()
        except Diverged as error:
            store.write(stage, key, settings, {"status": "failed", "reason": str(error)})
            return
        weights = {f"net.{name}": value for name, value in net.state_dict().items()}
        store.write(stage, key, settings, {"status": "ok", **outcome}, {**weights, **tensors})

    entry = store.read(stage, key)
    if entry is None:
        store.once(stage, key, compute)
        entry = store.read(stage, key)
    assert entry is not None
    if entry.outcome["status"] != "ok":
        raise Diverged(entry.outcome["reason"])
    net = empty()
    net.load_state_dict({name.removeprefix("net."): value for name, value in entry.tensors.items() if name.startswith("net.")})
    return net.eval(), entry
