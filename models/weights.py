"""Weights in files: written as safetensors, read without ever running what a file contains.

A given file may be a torch checkpoint, which is a pickle. It is read by torch's restricted unpickler, which builds tensors and
plain containers and refuses everything else; a checkpoint that needs more is refused.
"""

from __future__ import annotations

import difflib
import io
import pickle
import stat
import struct
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors import torch as safetensors
from torch import Tensor, nn

from models.files import write_bytes
from models.spec import BadInput

__all__ = ["check_state", "fit_state", "halved", "load_weights", "read_state", "round_to_half", "save_weights"]

_NESTED = ("state_dict", "model")
"""Keys under which checkpoints keep the weights: Lightning's and most authors' codes; BackdoorBench's."""
_PREFIXES = ("module.", "net.", "model.", "_orig_mod.")
"""What DataParallel, our own Classifier, other people's wrappers and torch.compile put in front of every name."""
_MOST_PREFIXES = 8
_LONGEST_NAME = 1000
_MOST_NAMES = 5000
"""Names among which the nearest to a wrong one is sought; a comparison takes microseconds."""
_UNREADABLE = (
    ArithmeticError, AssertionError, AttributeError, EOFError, ImportError, LookupError, MemoryError, OSError, RuntimeError,
    TypeError, ValueError, struct.error,
)  # fmt: skip
"""What torch's reader raises on damaged bytes, whichever byte is damaged."""


def save_weights(net: nn.Module | Mapping[str, Tensor], path: Path) -> None:
    """Writes parameters and buffers, or tensors by name, as safetensors, whole or not at all; equal weights give equal bytes.

    Raises:
        BadInput: the file cannot be written.
    """
    state = {name: value.detach().cpu().contiguous().clone() for name, value in _state(net).items()}
    write_bytes(path, safetensors.save(state))


def halved(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors rounded to the nearest float16, by name; integers stay as they are.

    Raises:
        OverflowError: a value is beyond float16's range.
    """
    half = {name: value.half() if value.is_floating_point() else value for name, value in state.items()}
    for name, value in half.items():
        if not bool(torch.isfinite(value).all()):
            raise OverflowError(f"{name} holds a value beyond float16's range (65,504)")
    return half


def round_to_half(net: nn.Module) -> None:
    """Rounds parameters and buffers to the nearest float16, in place; they stay float32, and integers stay as they are.

    Raises:
        OverflowError: a value is beyond float16's range; ``net`` is then unchanged.
    """
    net.load_state_dict(halved(net.state_dict()))


def load_weights(net: nn.Module, path: Path) -> None:
    """Loads a file into ``net``, in place; every tensor must be there, with its shape, and no other.

    Raises:
        BadInput: as :func:`read_state` and :func:`fit_state`; ``net`` is then unchanged.
    """
    fit_state(net, read_state(path), path)


def read_state(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file or a torch checkpoint by name, on the CPU; recognised by content, not by suffix.

    A checkpoint may hold the weights themselves or keep them under ``state_dict`` or ``model``; a prefix that all names share,
    such as ``module.``, is taken off.

    Raises:
        BadInput: no such file; it is damaged; it holds something other than tensors; it would have to run code to be read.
    """
    try:
        if not stat.S_ISREG(Path(path).stat().st_mode) and not Path(path).is_dir():
            raise BadInput(f"{path}: a pipe or a device, not a file")  # it may never end
        content = Path(path).read_bytes()
    except OSError as error:
        raise BadInput(f"{path}: cannot be read: {error.strerror or error}") from error
    # A safetensors file is the length of its header in 8 bytes, then the header, a JSON object.
    found = _safetensors(content, path) if content[8:9] == b"{" else _checkpoint(content, path)
    for key in _NESTED:
        if isinstance(found, Mapping) and isinstance(found.get(key), Mapping):
            found = found[key]
            break
    if not isinstance(found, Mapping) or not found:
        raise BadInput(f"{path}: holds no weights, but {_kind(found)}; it must hold tensors by name")
    for name, value in found.items():
        if not isinstance(name, str):
            raise BadInput(f"{path}: the name {_shown(name)} is not text; it must hold tensors by name")
        if len(name) > _LONGEST_NAME:
            raise BadInput(f"{path}: a tensor's name has {len(name):,} letters; no network's has")
        if not isinstance(value, Tensor) or not _dense(value):
            raise BadInput(f"{path}: {_shown(name)} is not a dense tensor, but {_kind(value)}")
    return _unprefixed({name: value.detach() for name, value in found.items()})


def fit_state(net: nn.Module, state: Mapping[str, Tensor], path: Path) -> None:
    """Loads ``state`` into ``net``, in place; ``path`` is where it came from, for the messages.

    Raises:
        BadInput: a tensor is missing, unexpected or of the wrong shape: the first one, with the shapes and the nearest name;
            ``net`` is then unchanged.
    """
    check_state(net, state, path)
    net.load_state_dict(dict(state), strict=True)


def check_state(net: nn.Module | Mapping[str, Tensor], state: Mapping[str, Tensor], path: Path) -> None:
    """Checks that ``state`` fits ``net``, a network or its tensors by name, on whatever device: nothing is allocated.

    Raises:
        BadInput: as :func:`fit_state`.
    """
    wanted = _state(net)
    for name, value in wanted.items():
        if name not in state:
            raise BadInput(f"{path}: tensor {name!r} {_shape(value)} is missing{_nearest(name, set(state) - set(wanted), state)}")
        if state[name].shape != value.shape:
            raise BadInput(f"{path}: tensor {name!r} is {_shape(state[name])}, but the network's is {_shape(value)}")
        if state[name].is_floating_point() != value.is_floating_point():
            raise BadInput(f"{path}: tensor {name!r} is {state[name].dtype}, but the network's is {value.dtype}")
    for name, value in state.items():
        if name not in wanted:
            near = _nearest(name, set(wanted), wanted)
            raise BadInput(f"{path}: tensor {_shown(name)} {_shape(value)} is not in the network{near}")


def _state(net: nn.Module | Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    return net.state_dict() if isinstance(net, nn.Module) else net


def _safetensors(content: bytes, path: Path) -> dict[str, Tensor]:
    try:
        found: dict[str, Tensor] = safetensors.load(content)
    except (SafetensorError, *_UNREADABLE) as error:
        raise BadInput(f"{path}: damaged or cut short, not a whole safetensors file: {_first_line(error)}") from error
    return found


def _checkpoint(content: bytes, path: Path) -> object:
    _plain_archive(content, path)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch warns about archives it then refuses
            return torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        # torch's own message advises to read the file with code execution allowed, which is unsafe.
        raise BadInput(
            f"{path}: refused: it is damaged, or code would have to run to read it; save the plain state dict, or safetensors"
        ) from error
    except _UNREADABLE as error:
        raise BadInput(f"{path}: neither a whole safetensors file nor a whole torch checkpoint: {_first_line(error)}") from error


def _plain_archive(content: bytes, path: Path) -> None:
    """Refuses exported modules, which hold code, and archives that unpack to much more than they are, before torch unpacks them; it
    packs its own without compression."""
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            total = sum(member.file_size for member in archive.infolist())
            parts = {name.partition("/")[2].partition("/")[0] for name in archive.namelist()}
    except (zipfile.BadZipFile, *_UNREADABLE):
        return  # no archive, or a damaged one: torch raises an error
    if parts & {"code", "models", "archive_format"}:  # of torch.jit and torch.export
        raise BadInput(f"{path}: refused: an exported module, which holds code; save its state dict, and name its architecture")
    if total > 4 * len(content) + 2**20:
        raise BadInput(f"{path}: refused: {len(content):,} bytes that unpack to {total:,}; torch packs without compression")


def _unprefixed(state: dict[str, Tensor]) -> dict[str, Tensor]:
    for _ in range(_MOST_PREFIXES):
        shared = [one for one in _PREFIXES if all(name.startswith(one) and name != one for name in state)]
        if not shared:
            break
        state = {name.removeprefix(shared[0]): value for name, value in state.items()}
    return state


def _dense(value: Tensor) -> bool:
    """Whether it holds plain numbers on the CPU; what is on ``meta`` holds none."""
    plain = value.device.type == "cpu" and not (value.is_nested or value.is_quantized or value.is_complex())
    return plain and value.layout == torch.strided


def _shown(name: object) -> str:
    """A name in a message: hostile ones are huge, or nested so deep that they cannot be printed."""
    if isinstance(name, str):
        return repr(name if len(name) <= 200 else name[:200] + "...")
    short = isinstance(name, float) or (isinstance(name, int) and name.bit_length() <= 64)
    return repr(name) if short else f"(a {type(name).__name__})"


def _shape(value: Tensor) -> str:
    return " x ".join(map(str, value.shape)) or "scalar"


def _kind(value: object) -> str:
    if isinstance(value, Tensor):
        return f"{value.dtype} on {value.device} ({value.layout})"
    return "an empty mapping" if isinstance(value, Mapping) and not value else f"a {type(value).__name__}"


def _nearest(wrong: str, names: set[str], shapes: Mapping[str, Tensor]) -> str:
    close = difflib.get_close_matches(wrong, sorted(names)[:_MOST_NAMES], n=1, cutoff=0.0)
    return f"; nearest name there: {_shown(close[0])} {_shape(shapes[close[0]])}" if close else ""


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
