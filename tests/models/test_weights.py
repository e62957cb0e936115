"""Weights in files: what is written comes back, and what is not weights is named and never run."""

from __future__ import annotations

import io
import pickle
import re
from pathlib import Path

import pytest
import torch
from torch import Tensor

from models.backbone import Network
from models.resnet import PreActResNet18, ResNet8
from models.spec import BadInput, generator
from models.vgg import VGG11
from models.weights import fit_state, load_weights, read_state, round_to_half, save_weights


def tiny(seed: int = 0, width: int = 2, hidden: int = 4) -> Network:
    return ResNet8(width=width, hidden=hidden).build(3, (3, 8, 8), [0.5] * 3, [0.25] * 3, seed)


def same(one: dict[str, Tensor], two: dict[str, Tensor]) -> bool:
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "weights.bin"


def checkpoint(content: object, path: Path, *, archive: bool = True) -> Path:
    torch.save(content, path, _use_new_zipfile_serialization=archive)
    return path


class Malicious:
    """Unpickling this would create a file."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[object, tuple[object, ...]]:
        return Path.touch, (self.target,)


def test_what_is_saved_is_loaded(path: Path) -> None:
    net, other = tiny(0), tiny(1)
    net(torch.rand(4, 3, 8, 8))
    save_weights(net, path)
    load_weights(other, path)
    assert same(dict(net.state_dict()), dict(other.state_dict()))
    conv = other.get_submodule("features.layer1.0.conv1").weight
    assert isinstance(conv, Tensor)
    assert conv.is_contiguous(memory_format=torch.channels_last)
    assert same(read_state(path), dict(net.state_dict()))


def test_equal_weights_give_equal_bytes_and_no_leftovers(path: Path) -> None:
    save_weights(tiny(), path)
    first = path.read_bytes()
    path.unlink()
    save_weights(tiny().to(memory_format=torch.contiguous_format), path)
    assert path.read_bytes() == first
    save_weights(tiny(1), path)
    assert path.read_bytes() != first
    assert list(path.parent.iterdir()) == [path]


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(BadInput, match=r"file/w\.safetensors: cannot be written"):
        save_weights(tiny(), tmp_path / "file" / "w.safetensors")


@pytest.mark.parametrize("archive", [True, False])
@pytest.mark.parametrize("prefix", ["", "module.", "net.", "module.net.", "_orig_mod."])
@pytest.mark.parametrize("under", [None, "state_dict", "model"])
def test_checkpoints_of_other_codes_are_read(path: Path, archive: bool, prefix: str, under: str | None) -> None:
    state = {prefix + name: value for name, value in tiny().state_dict().items()}
    checkpoint(state if under is None else {under: state, "epoch": 3}, path, archive=archive)
    other = tiny(1)
    load_weights(other, path)
    assert same(dict(other.state_dict()), dict(tiny().state_dict()))


def test_a_prefix_that_not_all_names_share_stays(path: Path) -> None:
    checkpoint({"module.a": torch.ones(1), "b": torch.ones(1)}, path)
    assert list(read_state(path)) == ["module.a", "b"]


def test_code_in_a_pickle_does_not_run(path: Path, tmp_path: Path) -> None:
    trap = tmp_path / "ran"
    for content in ({"weight": Malicious(trap)}, Malicious(trap), {"state_dict": {"w": torch.ones(1)}, "x": [Malicious(trap)]}):
        for archive in (True, False):
            checkpoint(content, path, archive=archive)
            with pytest.raises(BadInput, match=r"weights\.bin: refused: .* code would have to run") as caught:
                read_state(path)
            assert "weights_only" not in str(caught.value)
    path.write_bytes(pickle.dumps(Malicious(trap)))
    with pytest.raises(BadInput, match="refused"):
        read_state(path)
    assert not trap.exists()
    torch.load(io.BytesIO(checkpoint(Malicious(trap), path).read_bytes()), weights_only=False)
    assert trap.exists(), "the trap must work, or the test proves nothing"


def test_a_whole_pickled_network_is_refused(path: Path) -> None:
    with pytest.raises(BadInput, match="save the plain state dict, or safetensors"):
        read_state(checkpoint(tiny(), path))


@pytest.mark.parametrize("kind", ["safetensors", "archive", "legacy"])
def test_cut_short_anywhere_it_is_named(path: Path, kind: str) -> None:
    if kind == "safetensors":
        save_weights(tiny(), path)
    else:
        checkpoint(dict(tiny().state_dict()), path, archive=kind == "archive")
    content = path.read_bytes()
    for size in {0, 1, 7, 8, 9, 20, *range(100, len(content) - 1, len(content) // 12)}:
        path.write_bytes(content[:size])
        with pytest.raises(BadInput, match=r"weights\.bin: "):
            read_state(path)


@pytest.mark.parametrize("kind", ["safetensors", "archive", "legacy"])
def test_a_damaged_byte_never_raises_anything_else(path: Path, kind: str) -> None:
    if kind == "safetensors":
        save_weights(tiny(), path)
    else:
        checkpoint(dict(tiny().state_dict()), path, archive=kind == "archive")
    content = path.read_bytes()
    draw = generator("damage", kind)
    refused = 0
    for position in torch.randint(0, len(content), (60,), generator=draw).tolist() + list(range(0, 300, 5)):
        path.write_bytes(content[:position] + bytes([content[position] ^ 0x55]) + content[position + 1 :])
        try:
            read_state(path)
        except BadInput:
            refused += 1
    assert refused > 10


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"epoch": 3}, "'epoch' is not a dense tensor, but a int"),
        ({"w": torch.ones(2).to_sparse()}, "'w' is not a dense tensor"),
        ({1: torch.ones(2)}, "the name 1 is not text"),
        ([torch.ones(2)], "holds no weights, but a list"),
        ({}, "holds no weights, but an empty mapping"),
        ({"state_dict": {}}, "holds no weights, but an empty mapping"),
    ],
)
def test_what_is_not_tensors_by_name_is_named(path: Path, content: object, message: str) -> None:
    with pytest.raises(BadInput, match=message) as caught:
        read_state(checkpoint(content, path))
    assert str(caught.value).startswith(f"{path}: ")


def test_a_missing_file_or_a_folder_is_named(path: Path, tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=r"weights\.bin: cannot be read: No such file"):
        read_state(path)
    with pytest.raises(BadInput, match="cannot be read: Is a directory"):
        read_state(tmp_path)


def test_the_wrong_backbone_is_named_and_nothing_is_loaded(path: Path) -> None:
    save_weights(tiny(), path)
    wider, linear = tiny(1, width=3), tiny(1, hidden=0)
    before = {name: value.clone() for name, value in wider.state_dict().items()}
    with pytest.raises(BadInput, match=r"'features.conv1.weight' is 2 x 3 x 3 x 3, but the network's is 3 x 3 x 3 x 3"):
        load_weights(wider, path)
    assert same(dict(wider.state_dict()), before)
    with pytest.raises(BadInput, match=r"'head.0.weight' is 4 x 8, but the network's is 3 x 8"):
        load_weights(linear, path)
    vgg = VGG11(width=2, hidden=4).build(3, (3, 8, 8), [0.5] * 3, [0.25] * 3, 0)
    with pytest.raises(BadInput, match=r"'features.0.weight' 2 x 3 x 3 x 3 is missing; nearest name there: 'features"):
        load_weights(vgg, path)
    preact = PreActResNet18(width=2, hidden=4).build(3, (3, 8, 8), [0.5] * 3, [0.25] * 3, 0)
    with pytest.raises(BadInput, match=r"is missing|but the network's is"):
        load_weights(preact, path)


def test_missing_renamed_and_unexpected_tensors_are_named_with_the_nearest() -> None:
    net, where = tiny(), Path("some.pt")
    state = dict(net.state_dict())
    renamed = {name.replace("head.0", "head.fc0"): value for name, value in state.items()}
    with pytest.raises(BadInput, match=r"some.pt: tensor 'head.0.weight' 4 x 8 is missing; nearest .*: 'head.fc0.weight' 4 x 8"):
        fit_state(net, renamed, where)
    with pytest.raises(BadInput, match=r"'head.9.bias' 1 is not in the network; nearest name there: 'head.[02].bias'"):
        fit_state(net, {**state, "head.9.bias": torch.ones(1)}, where)
    count = "features.bn1.num_batches_tracked"
    with pytest.raises(BadInput, match=rf"'{count}' is torch.float32, but the network's is torch.int64"):
        fit_state(net, {**state, count: torch.tensor(1.0)}, where)
    fit_state(net, state, where)


def test_rounded_weights_are_float16_numbers_and_whole_numbers_stay() -> None:
    net = tiny()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    round_to_half(net)
    for name, value in net.state_dict().items():
        assert value.dtype == before[name].dtype
        expected = before[name].numpy().astype("float16").astype("float32") if value.is_floating_point() else before[name].numpy()
        assert value.numpy().tolist() == expected.tolist()


def test_a_value_beyond_float16_is_named_and_nothing_is_rounded() -> None:
    net = tiny()
    name, last = list(net.named_parameters())[-1]
    with torch.no_grad():
        last.view(-1)[0] = 70_000.0
    before = {key: value.clone() for key, value in net.state_dict().items()}
    with pytest.raises(OverflowError, match=rf"{re.escape(name)} holds a value beyond float16's range"):
        round_to_half(net)
    assert all(torch.equal(value, before[key]) for key, value in net.state_dict().items())
