"""A zoo of victims: networks with a known backdoor, each one file with a card, to be loaded in a line or attacked by a matrix."""

from benchmark.zoo.load import ZooWorld, load_victim

__all__ = ["ZooWorld", "load_victim"]
