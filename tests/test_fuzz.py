"""What reads files that somebody else wrote, fed with nonsense: it reads them, or says in one line why not.

A few seconds in the test run, the same examples every time. ``LEVELFIELD_FUZZ=900`` gives each reader that many seconds of fresh
ones; with ``LEVELFIELD_HOSTILE=FOLDER`` as well, how many there were is written to ``FUZZ.md`` in it (``make hostile`` sets both).
What was ever found stands as a test of its own in ``test_hostile.py``.
"""

from __future__ import annotations

import copy
import io
import json
import os
import pickle
import struct
import time
import tomllib
import warnings
import zipfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, note, settings
from hypothesis import strategies as st

from attacks import ATTACKS
from benchmark.settings.cells import settings_hash
from benchmark.settings.load import find_matrix, load_matrix, matrix_names
from benchmark.storage.rows import Curve, Row, Timing, read, write
from defenses import DEFENSES
from models.extractors import EXTRACTORS
from models.recipe import Recipe
from models.resnet import ResNet8
from models.spec import BadInput
from models.weights import fit_state, read_state, save_weights

SECONDS = float(os.environ.get("LEVELFIELD_FUZZ", "0"))
TRIED: Counter[tuple[str, str]] = Counter()
"""Files read, by reader and by what came of them."""
ENDS = "read", "refused", "unhandled"
fuzz = settings(
    max_examples=250 if SECONDS else 40,
    derandomize=not SECONDS,
    database=None,
    deadline=None,
    suppress_health_check=list(HealthCheck),
)


def refused(reader: str, error: BadInput, path: Path) -> None:
    assert str(path) in str(error)
    assert "\n" not in str(error)
    TRIED[reader, "refused"] += 1


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for files that are written over again and again."""
    return tmp_path_factory.mktemp("fuzz")


# -- settings ------------------------------------------------------------------------------------------------------------------

BASE = """
title = "fuzz"
about = "words"
seeds = [0, 1]
tau = 0.04
plugins = []
dataset = { source = "digits", clean_fraction = 0.2, train_limit = 100, test_limit = 40, size = 16 }
recipe = { preset = "fast", epochs = 2 }
[[backbone]]
name = "resnet8"
width = 4
recipe = { batch = 32 }
attacks = ["badnets"]
frozen = { extractor = "theirs", epochs = 3 }
[[backbone]]
name = "vgg11-bn"
[[extractor]]
name = "self-supervised"
label = "theirs"
on = "clean"
epochs = 1
[[attack]]
name = "badnets"
rates = [0.1, 0.01]
[[attack]]
name = "rescaled"
base = "badnets"
base_settings = { size = 3 }
[[defense]]
name = "none"
[[defense]]
name = "clp"
tracks = ["model"]
scopes = ["head", "whole"]
backbones = ["vgg11-bn-w64"]
u = 2
[[defense]]
name = "fine-tuning"
tracks = ["model+clean"]
preset = "cpu"
budgets = [0.05, 0.1]
[[defense]]
name = "random-pruning"
like = "clp"
like_settings = { u = 2.0 }
[[defense]]
name = "linear-probe"
labels = "train"
extractors = ["theirs"]
"""
WORDS = sorted({
    *(method.name for method in (*ATTACKS, *DEFENSES, *EXTRACTORS)), *(f.name for f in fields(Recipe)),
    *(f.name for method in (*ATTACKS, *DEFENSES, *EXTRACTORS) for f in fields(method)),  # type: ignore[arg-type]
    "name", "label", "rate", "rates", "target", "recipe", "preset", "tracks", "scopes", "extractors", "budgets", "frozen", "model",
    "model+clean", "train", "control", "head", "whole", "paper", "cpu", "..", "/", "folder:/dev", "../x.py", "[/]", "=1+1",
})  # fmt: skip
texts = st.sampled_from(WORDS) | st.text(max_size=8)
scalars = (
    st.booleans() | st.integers() | st.sampled_from([-1, 0, 2**63, 2**64, 10**400]) | st.floats() | texts
    | st.dates() | st.datetimes() | st.times()
)  # fmt: skip
values = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3), max_leaves=6
)
edits = st.lists(st.tuples(st.integers(0, 10_000), st.sampled_from(["put", "drop", "add"]), texts, values), min_size=1, max_size=3)


def toml(value: Any) -> str:
    """A value in TOML, tables inline."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int):
        return str(value)
    if isinstance(value, str):
        return '"' + "".join(c if c.isprintable() and c not in '"\\' else f"\\U{ord(c):08x}" for c in value) + '"'
    if isinstance(value, list):
        return f"[{', '.join(map(toml, value))}]"
    if isinstance(value, dict):
        return f"{{{', '.join(f'{toml(str(key))} = {toml(item)}' for key, item in value.items())}}}"
    return str(value).replace(" ", "T") if not isinstance(value, float) else repr(value)


def places(value: Any) -> list[tuple[Any, Any]]:
    """Every (container, key) within a document."""
    keys = list(value) if isinstance(value, dict) else list(range(len(value))) if isinstance(value, list) else []
    return [(value, key) for key in keys] + [place for key in keys for place in places(value[key])]


def check_settings(path: Path) -> bool:
    try:
        matrix = load_matrix(path)
    except BadInput as error:
        refused("settings", error, path)
        return False
    assert len(settings_hash(matrix)) == 64
    TRIED["settings", "read"] += 1
    return True


def test_the_base_of_the_fuzzed_settings_is_good(place: Path) -> None:
    path = place / "m.toml"
    path.write_text("\n".join(f"{toml(key)} = {toml(value)}" for key, value in tomllib.loads(BASE).items()))
    assert check_settings(path)


@fuzz
@given(edits)
def test_settings_with_a_few_values_that_make_no_sense(place: Path, edits: list[tuple[int, str, str, Any]]) -> None:
    document = copy.deepcopy(tomllib.loads(BASE))
    for number, what, key, value in edits:
        found = places(document)
        container, spot = found[number % len(found)] if found else (document, key)
        if what == "drop" and found:
            del container[spot]
        elif what == "add" and isinstance(container, dict):
            container[key] = value
        else:
            container[spot] = value
    text = "\n".join(f"{toml(key)} = {toml(value)}" for key, value in document.items())
    note(text)
    path = place / "m.toml"
    path.write_text(text)
    check_settings(path)


@fuzz
@given(
    st.sampled_from(matrix_names()),
    st.lists(st.tuples(st.integers(0, 10**6), st.integers(0, 6), st.binary(max_size=6)), max_size=3),
)
def test_settings_with_bytes_changed(place: Path, name: str, changes: list[tuple[int, int, bytes]]) -> None:
    path = place / "m.toml"
    path.write_bytes(changed(find_matrix(name).read_bytes(), changes))
    check_settings(path)


def changed(content: bytes, changes: list[tuple[int, int, bytes]]) -> bytes:
    """``content`` with pieces cut out and others put in their place."""
    for where, cut, put in changes:
        at = where % (len(content) + 1)
        content = content[:at] + put + content[at + cut :]
    return content


# -- rows ----------------------------------------------------------------------------------------------------------------------

AXES: dict[str, Any] = {
    "matrix": "m", "dataset": "digits", "backbone": "b", "attack": "a, with comma", "rate": 0.1, "seed": 0, "track": "model",
    "scope": "whole", "defense": "nan", "cell": "0123456789ab",
}  # fmt: skip
ROW = Row(**AXES, target=0, label_mode="all-to-one", realised_rate=0.1, control=True, selection="default", status="ok", acc=1 / 3)
CURVE = Curve(**AXES, dial_name="u", dial=3, is_default=True, strength=1, pruned=2, acc=0.5, asr=0.5, ra=0.5, val_acc=0.5)
TIMING = Timing(**AXES, seconds=1, peak_mib=2, victim_seconds=3)
cells = st.sampled_from(["", "nan", "inf", "-1", "1e400", "true", "maybe", "9" * 30, '"', "\0", "a\nb", ",", "\r", "=1+1"]) | texts


def check_rows(path: Path, kind: type[Any]) -> None:
    try:
        table = read(path, kind)
    except BadInput as error:
        refused("rows", error, path.parent)
        return
    for field in fields(kind):
        column = table[field.name]
        wanted = {"int": int, "float": float, "bool": bool}.get(str(field.type), str)
        assert all(isinstance(value, wanted) for value in column.tolist()), (field.name, column.dtype)
    records: list[dict[str, Any]] = table.to_dict("records")  # type: ignore[assignment]
    for record in records:
        kind(**{field.name: record[field.name] for field in fields(kind)})
    TRIED["rows", "read"] += 1


@fuzz
@given(
    st.sampled_from([Row, Curve, Timing]),
    st.sampled_from(["its own", "cells.csv", "scenarios.csv"]),
    st.lists(st.tuples(st.integers(0, 200), st.integers(0, 60), cells), max_size=4),
)
def test_rows_with_a_few_cells_that_make_no_sense(place: Path, kind: Any, spoiled: str, edits: list[tuple[int, int, str]]) -> None:
    write(place, [ROW, ROW], [CURVE, CURVE], [TIMING, TIMING])
    own = place / f"{kind.__name__.lower()}s.csv"
    path = own if spoiled == "its own" else place / spoiled
    lines = [line.split(",") for line in path.read_text().splitlines()]
    for line, column, text in edits:
        one = lines[line % len(lines)]
        one[column % len(one)] = text
        if column > 50:
            one.append(text)
    path.write_bytes("\n".join(",".join(line) for line in lines).encode(errors="surrogatepass"))
    check_rows(own, kind)


@fuzz
@given(st.lists(st.tuples(st.integers(0, 10**6), st.integers(0, 40), st.binary(max_size=6)), max_size=4), st.booleans())
def test_rows_with_bytes_changed(place: Path, changes: list[tuple[int, int, bytes]], nothing: bool) -> None:
    path = place / "rows.csv"
    write(place, [ROW, ROW], [], [])
    path.write_bytes(changed(b"" if nothing else path.read_bytes(), changes))
    check_rows(path, Row)


# -- weights -------------------------------------------------------------------------------------------------------------------

NET = ResNet8(width=1, hidden=2).build(2, (1, 4, 4), [0.5], [0.25], 0)


def saved(content: Any, *, archive: bool) -> bytes:
    out = io.BytesIO()
    torch.save(content, out, _use_new_zipfile_serialization=archive)
    return out.getvalue()


def safetensors_of(header: Any, content: bytes) -> bytes:
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + content


@pytest.fixture(scope="module")
def whole(place: Path) -> dict[str, bytes]:
    save_weights(NET, place / "w")
    state = dict(NET.state_dict())
    return {
        "safetensors": (place / "w").read_bytes(),
        "archive": saved(state, archive=True),
        "legacy": saved(state, archive=False),
    }


def check_weights(place: Path, content: bytes) -> None:
    path = place / "weights.bin"
    path.write_bytes(content)
    try:
        state = read_state(path)
        for name, value in state.items():
            assert isinstance(name, str)
            assert value.device.type == "cpu"
            assert value.layout == torch.strided
        fit_state(ResNet8(width=1, hidden=2).build(2, (1, 4, 4), [0.5], [0.25], 1), state, path)
        TRIED["checkpoints", "read"] += 1
    except BadInput as error:
        refused("checkpoints", error, path)


@fuzz
@given(
    st.sampled_from(["safetensors", "archive", "legacy"]),
    st.lists(st.tuples(st.integers(0, 10**6), st.integers(0, 9), st.binary(max_size=9)), min_size=1, max_size=3),
)
def test_weights_with_bytes_changed(place: Path, whole: dict[str, bytes], kind: str, changes: list[tuple[int, int, bytes]]) -> None:
    check_weights(place, changed(whole[kind], changes))


numbers = st.integers(-2, 9) | st.sampled_from([2**31, 2**40, 2**62, 2**63, 2**64, -(2**63)])
tensor_entries = st.fixed_dictionaries({
    "dtype": st.sampled_from(["F32", "F16", "BF16", "I64", "BOOL", "F8_E4M3", "F4", "C64", "X", ""]) | texts,
    "shape": st.lists(numbers, max_size=4),
    "data_offsets": st.lists(numbers, min_size=1, max_size=3),
})  # fmt: skip
plain = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=4)
anything = plain | st.lists(plain, max_size=3) | st.dictionaries(st.text(max_size=4), plain, max_size=3)
tensor_names = st.sampled_from(["", "w", "__metadata__", "state_dict", "model", "net.w", "module.", *list(NET.state_dict())[:4]])


@fuzz
@given(st.dictionaries(tensor_names, tensor_entries | anything, max_size=3), st.binary(max_size=40))
def test_safetensors_whose_header_lies(place: Path, header: dict[str, Any], content: bytes) -> None:
    check_weights(place, safetensors_of(header, content))


tensors = st.sampled_from([
    torch.ones(2), torch.ones(1, 1, 3, 3), torch.ones(1).expand(10**12), torch.empty(0, 10**12), torch.tensor(1 + 1j),
    torch.ones(2).to_sparse(), torch.ones(2, device="meta"), torch.ones(2, dtype=torch.bool), torch.tensor(float("nan")),
    torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.qint8), torch.ones(2, requires_grad=True),
])  # fmt: skip
hashable = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | tensor_names,
    lambda inner: st.tuples(inner, inner),
    max_leaves=3,
)
objects = st.recursive(
    hashable | tensors | st.binary(max_size=4) | st.sets(st.integers(), max_size=2),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(hashable, inner, max_size=3) | st.dictionaries(tensor_names, inner),
    max_leaves=6,
)


@pytest.mark.filterwarnings("ignore")  # torch's words about quantized tensors
@fuzz
@given(st.dictionaries(tensor_names | hashable, objects, max_size=3) | objects, st.booleans())
def test_checkpoints_of_anything_that_torch_can_save(place: Path, content: Any, archive: bool) -> None:
    check_weights(place, saved(content, archive=archive))


OPCODES = [getattr(pickle, name) for name in dir(pickle) if name.isupper() and isinstance(getattr(pickle, name), bytes)]
NAMES = [b"torch\nFloatStorage\n", b"torch._utils\n_rebuild_tensor_v2\n", b"collections\nOrderedDict\n", b"os\nsystem\n",
         b"builtins\neval\n", b"torch\nSize\n", b"torch.serialization\n_get_layout\n", b"__builtin__\nset\n"]  # fmt: skip
pieces = (
    st.sampled_from(OPCODES) | st.sampled_from([b"c" + name for name in NAMES]) | st.sampled_from([b"(", b"}", b"]", b")", b"N"])
    | st.integers(0, 255).map(lambda n: b"K" + bytes([n])) | st.integers(0, 255).map(lambda n: b"h" + bytes([n]))
    | st.binary(max_size=5) | st.text(max_size=4).map(lambda t: pickle.dumps(t, 2)[2:-1])
)  # fmt: skip


def archived(stream: bytes) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        archive.writestr("a/data.pkl", stream)
        archive.writestr("a/version", "3\n")
        archive.writestr("a/byteorder", "little")
        archive.writestr("a/data/0", bytes(64))
    return out.getvalue()


@fuzz
@given(st.lists(pieces, max_size=12), st.booleans())
def test_pickles_of_any_operations(place: Path, parts: list[bytes], archive: bool) -> None:
    stream = b"\x80\x02" + b"".join(parts) + b"."
    check_weights(place, archived(stream) if archive else stream)


# -- for as long as somebody asks ----------------------------------------------------------------------------------------------

READERS: dict[str, list[Any]] = {
    "settings": [test_settings_with_a_few_values_that_make_no_sense, test_settings_with_bytes_changed],
    "rows": [test_rows_with_a_few_cells_that_make_no_sense, test_rows_with_bytes_changed],
    "checkpoints": [
        test_weights_with_bytes_changed, test_safetensors_whose_header_lies, test_checkpoints_of_anything_that_torch_can_save,
        test_pickles_of_any_operations,
    ],
}  # fmt: skip


@pytest.fixture(scope="module")
def lasted() -> Iterator[dict[str, float]]:
    """How long each reader was fed; written as a page where somebody asks for it."""
    found: dict[str, float] = {}
    yield found
    if found and "LEVELFIELD_HOSTILE" in os.environ:
        lines = [
            "# Fuzzing\n\n",
            "What reads other people's files, fed with nonsense that [hypothesis](https://hypothesis.readthedocs.io) draws\n",
            "(`tests/test_fuzz.py`): each file has to be read, or refused in one line that names it. Anything else ends the "
            "test.\n\n",
            "| reader | kinds of nonsense | minutes | files | read | refused | unhandled exceptions |\n",
            "| :-- | --: | --: | --: | --: | --: | --: |\n",
        ]
        for reader, seconds in found.items():
            good, bad, odd = (TRIED[reader, what] for what in ENDS)
            cells = (reader, len(READERS[reader]), f"{seconds / 60:.1f}", good + bad + odd, good, bad, odd)
            lines.append(f"| {' | '.join(map(str, cells))} |\n")
        lines.append(f"\nDrawn by `make hostile SECONDS={SECONDS:g}`; see [HOSTILE.md](HOSTILE.md) for what is tried by name.\n")
        (Path(os.environ["LEVELFIELD_HOSTILE"]) / "FUZZ.md").write_text("".join(lines))


@pytest.mark.skipif(not SECONDS, reason="LEVELFIELD_FUZZ says for how many seconds")
@pytest.mark.parametrize("reader", READERS)
def test_a_reader_for_as_long_as_somebody_asks(
    reader: str, place: Path, whole: dict[str, bytes], lasted: dict[str, float]
) -> None:
    for what in ENDS:  # what the tests above tried is none of these seconds
        del TRIED[reader, what]
    begun = time.monotonic()
    try:
        while time.monotonic() - begun < SECONDS:
            for feed in READERS[reader]:
                more = {"whole": whole} if feed is test_weights_with_bytes_changed else {}
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")  # torch's words about quantized tensors
                    feed(place=place, **more)
    except Exception:
        TRIED[reader, "unhandled"] += 1
        raise
    finally:
        lasted[reader] = time.monotonic() - begun
