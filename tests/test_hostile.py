"""Files made to do harm: each ends in one clear error or is read as what it is; nothing runs, nothing is written.

``ATTEMPTS`` is the list of what is tried; with ``LEVELFIELD_HOSTILE=FOLDER`` it is written, with what happened, to
``HOSTILE.md`` in it (``make hostile``).
"""

from __future__ import annotations

import gzip
import io
import os
import pickle
import struct
import sys
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from PIL import Image
from rich.console import Console

from benchmark.data import image_files
from benchmark.data.datasets import DatasetSpec, load
from benchmark.report import text as texts
from benchmark.run import own_model as mymodel
from benchmark.run.progress import RunProgress
from benchmark.settings.load import load_matrix
from benchmark.storage.rows import CELL, SCENARIO, Row, read, write
from models import BACKBONES
from models.backbone import Backbone
from models.resnet import ResNet8
from models.spec import BadInput, lookup
from models.weights import fit_state, read_state, save_weights

NET = ResNet8(width=1, hidden=2).build(2, (1, 4, 4), [0.5], [0.25], 0)
TRAP = Path("trap")


@dataclass(frozen=True)
class Attempt:
    """What is tried on whom. ``act`` gets an empty folder and raises BadInput with ``words`` in it, or says what it made of it."""

    whom: str
    what: str
    act: Callable[[Path], object]
    words: str


# -- checkpoints ---------------------------------------------------------------------------------------------------------------


class Runs:
    """Unpickling this would create the file ``trap``."""

    def __reduce__(self) -> tuple[object, tuple[object, ...]]:
        return Path.touch, (TRAP,)


def checkpoint(content: Callable[[Path], bytes] | bytes) -> Callable[[Path], object]:
    def act(folder: Path) -> object:
        path = folder / "weights.pt"
        path.write_bytes(content if isinstance(content, bytes) else content(folder))
        state = read_state(path)
        fit_state(ResNet8(width=1, hidden=2).build(2, (1, 4, 4), [0.5], [0.25], 1), state, path)
        return f"{len(state)} tensors"

    return act


def saved(content: Any, archive: bool = True) -> bytes:
    out = io.BytesIO()
    torch.save(content, out, _use_new_zipfile_serialization=archive)
    return out.getvalue()


def lying(header: bytes, content: bytes = b"\0" * 8, length: int | None = None) -> bytes:
    return struct.pack("<Q", len(header) if length is None else length) + header + content


def entry(shape: str, offsets: str = "[0,8]") -> bytes:
    return f'{{"w":{{"dtype":"F32","shape":{shape},"data_offsets":{offsets}}}}}'.encode()


def repacked(folder: Path) -> bytes:
    """A checkpoint whose storage is 20 MB of zeros, packed into 20 kB as torch never does."""
    out, small = io.BytesIO(), io.BytesIO(saved({"w": torch.zeros(4)}))
    with zipfile.ZipFile(small) as source, zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as bomb:
        for member in source.infolist():
            content = source.read(member)
            bomb.writestr(member.filename, content if not member.filename.endswith("/data/0") else bytes(20 * 2**20))
    return out.getvalue()


def nested_key(depth: int) -> bytes:
    """A checkpoint of one number, whose name is a tuple in a tuple in a tuple ..."""
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        archive.writestr("a/data.pkl", b"\x80\x02})" + b"\x85" * depth + b"K\x01s.")
        archive.writestr("a/version", "3\n")
        archive.writestr("a/byteorder", "little")
    return out.getvalue()


def device(folder: Path) -> object:
    (folder / "weights.pt").symlink_to("/dev/zero")
    return read_state(folder / "weights.pt")


def named(stem: str) -> Callable[[Path], object]:
    def act(folder: Path) -> object:
        path = folder / f"{stem}.pt"
        save_weights(NET, path)
        console = Console(file=io.StringIO())
        return mymodel.defend_checkpoint(
            path, "resnet8", "digits", None, "my-model", results=folder / "r", cache=folder / "c", console=console
        )

    return act


CODE = "code would have to run"
CHECKPOINTS = [
    ("a pickle that runs code, in an archive", checkpoint(saved({"w": Runs()})), CODE),
    ("a pickle that runs code, in the old form", checkpoint(saved({"w": Runs()}, archive=False)), CODE),
    ("a bare pickle that runs code", checkpoint(pickle.dumps(Runs())), "refused"),
    ("a safetensors header longer than the file", checkpoint(lying(entry("[2]"), length=2**63)), "safetensors"),
    ("a safetensors shape of 2^124 numbers", checkpoint(lying(entry(f"[{2**62},{2**62}]"))), "safetensors"),
    ("a safetensors shape of no numbers, 10^12 wide", checkpoint(lying(entry(f"[{10**12},0]", "[0,0]"), b"")), "missing"),
    ("a negative shape", checkpoint(lying(entry("[-2]"))), "safetensors"),
    ("offsets beyond the end", checkpoint(lying(entry("[2]", "[8,16]"))), "safetensors"),
    ("a header of 100,000 brackets", checkpoint(lying(b'{"w":' + b"[" * 100_000)), "safetensors"),
    ("20 MB packed into 20 kB", checkpoint(repacked), "torch packs without compression"),
    ("a tensor of 10^12 numbers that are one", checkpoint(saved({"w": torch.ones(1).expand(10**12)})), "missing"),
    ("a tensor without numbers", checkpoint(saved({"w": torch.ones(2, device="meta")})), "torch.float32 on meta"),
    ("a complex tensor", checkpoint(saved({"w": torch.tensor(1j)})), "torch.complex64 on cpu"),
    ("a name nested 400 deep", checkpoint(nested_key(400)), "is not text"),
    ("a name nested 50,000 deep", checkpoint(nested_key(50_000)), "weights.pt: "),
    ("a name of 600 digits", checkpoint(saved({1 << 2000: torch.ones(1)})), "weights.pt: "),
    ("a name of a million letters", checkpoint(saved({"x" * 10**6: torch.ones(1)})), "1,000,000 letters"),
    ("a prefix 100 times over", checkpoint(saved({"module." * 100 + "w": torch.ones(1)})), "missing"),
    ("a checkpoint that is a device without end", device, "a pipe or a device"),
    ("a checkpoint called '..', for its folder of results", named(".."), "cannot be one"),
    ("a checkpoint whose name moves the cursor", named("\x1b[2J"), "cannot be one"),
]

# -- images --------------------------------------------------------------------------------------------------------------------


def picture(kind: str = "PNG", value: int = 0) -> bytes:
    out = io.BytesIO()
    Image.new("L", (8, 8), value).save(out, kind)
    return out.getvalue()


def claims(width: int, height: int) -> bytes:
    """A PNG that says it is huge and has no pixels."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", b"") + chunk(b"IEND", b"")


GOOD = {f"{part}/{name}/{n}.png": picture(value=n) for part in ("train", "test") for name in "ab" for n in range(2)}


def loaded(path: Path, folder: Path) -> str:
    found = load(DatasetSpec(source=f"folder:{path}"), folder / "cache")
    return f"{len(found.train)} + {len(found.test)} images of classes {', '.join(found.class_names)}"


def images(files: dict[str, bytes]) -> Callable[[Path], object]:
    def act(folder: Path) -> object:
        for name, content in (GOOD | files).items():
            (folder / "set" / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / "set" / name).write_bytes(content)
        return loaded(folder / "set", folder)

    return act


def deep(folder: Path) -> object:
    images({})(folder)
    spot = folder / "set" / "train" / "a"
    for _ in range(600):
        spot = spot / "a"
        os.mkdir(spot)  # noqa: PTH102 - pathlib would resolve it over and over
    return loaded(folder / "set", folder)


def looped(folder: Path) -> object:
    images({})(folder)
    (folder / "set" / "train" / "a" / "loop").symlink_to(folder / "set")
    return loaded(folder / "set", folder)


FOLDERS = [
    ("an image of 100,000 x 100,000 pixels", images({"train/a/9.png": claims(100_000, 100_000)}), "megapixels"),
    ("an image cut short", images({"train/a/9.png": picture()[:-30]}), "cannot be decoded"),
    ("a web page called .jpg", images({"train/a/9.jpg": b"<html><script>x()</script>"}), "cannot be decoded"),
    ("a PostScript program called .png", images({"train/a/9.png": b"%!PS-Adobe-3.0 EPSF-3.0\n"}), "cannot be decoded"),
    ("a PNG called .jpg", images({"train/a/9.jpg": picture()}), ""),
    ("a class folder with control characters", images({"train/\x1b[2J/9.png": picture()}), "cannot be printed"),
    ("a class folder called like a formula and a script", images({
        "train/=1+1<script>/9.png": picture(), "test/=1+1<script>/9.png": picture()}), ""),  # text in memory, printed nowhere
    ("600 folders within each other", deep, "more than 64 deep"),
    ("a link that leads back", looped, "leads back"),
]  # fmt: skip

# -- archives ------------------------------------------------------------------------------------------------------------------


def packed(*extra: tuple[str, bytes, bytes], link: str = "") -> bytes:
    """A good archive, and members (name, type, content) of any kind."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=tarfile.GNU_FORMAT) as archive:
        for name, kind, content in [*((name, tarfile.REGTYPE, content) for name, content in GOOD.items()), *extra]:
            member = tarfile.TarInfo(name)
            member.type, member.size, member.linkname = kind, len(content), link
            archive.addfile(member, io.BytesIO(content))
    return out.getvalue()


def sized(kind: bytes, size: int) -> bytes:
    """An archive that begins with a header of this type which claims this size."""
    member = tarfile.TarInfo("train/a/9.png")
    member.type = kind
    header = bytearray(member.tobuf(tarfile.GNU_FORMAT))
    header[124:136] = tarfile.itn(size, 12, tarfile.GNU_FORMAT)
    header[148:156] = b" " * 8
    header[148:155] = f"{tarfile.calc_chksums(bytes(header))[0]:06o}\0".encode()
    return bytes(header) + packed()


def archive(content: bytes, **limits: int) -> Callable[[Path], object]:
    def act(folder: Path) -> object:
        (folder / "set.tar").write_bytes(content)
        with pytest.MonkeyPatch.context() as patched:
            for name, value in limits.items():
                patched.setattr(image_files, name, value)
            return loaded(folder / "set.tar", folder)

    return act


PLAIN = tarfile.REGTYPE
BOMB = gzip.compress(packed(*((f"{n}.txt", PLAIN, bytes(2**22)) for n in range(8))))
ARCHIVES = [
    ("a member called ../x", archive(packed(("../x.png", PLAIN, picture()))), "points outside"),
    ("a member with an absolute name", archive(packed(("/tmp/x.png", PLAIN, picture()))), "points outside"),
    ("a symbolic link", archive(packed(("train/a/x.png", tarfile.SYMTYPE, b""), link="/etc/passwd")), "link or a device"),
    ("a hard link", archive(packed(("train/a/x.png", tarfile.LNKTYPE, b""), link="../../x")), "link or a device"),
    ("a device", archive(packed(("train/a/x.png", tarfile.CHRTYPE, b""))), "link or a device"),
    ("a pipe", archive(packed(("train/a/x.png", tarfile.FIFOTYPE, b""))), "link or a device"),
    ("a decompression bomb", archive(BOMB, MAX_UNPACKED=2**23, MAX_RATIO=2), "unpacks to more than"),
    ("a member that claims 2^60 bytes", archive(sized(PLAIN, 2**60)), "larger than"),
    ("a member that claims fewer than no bytes", archive(sized(PLAIN, -1024)), "-1024 bytes"),
    ("a long name that claims 2^40 bytes", archive(sized(tarfile.GNUTYPE_LONGNAME, 2**40)), "claims a size out of range"),
    ("a long name that claims fewer than no bytes", archive(sized(tarfile.GNUTYPE_LONGNAME, -1024)), "claims a size out of range"),
    ("extended headers that claim 2^40 bytes", archive(sized(tarfile.XHDTYPE, 2**40)), "claims a size out of range"),
    ("more members than any set has", archive(packed(), MAX_MEMBERS=4), "more than 4 members"),
]

# -- settings ------------------------------------------------------------------------------------------------------------------

SETTINGS = """
title = "tiny"
seeds = [0]
recipe = { epochs = 2 }
[[backbone]]
name = "resnet8"
[[attack]]
name = "badnets"
[[defense]]
name = "none"
[[defense]]
name = "clp"
tracks = ["model"]
u = 2
"""


def matrix(text: str | bytes, name: str = "m.toml") -> Callable[[Path], object]:
    def act(folder: Path) -> object:
        path = folder / name
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        found = load_matrix(path)
        return f"{len(found.cells)} cells; defenses {', '.join(dict.fromkeys(repr(cell.defense_label) for cell in found.cells))}"

    return act


def setting(old: str, new: str) -> Callable[[Path], object]:
    assert old in SETTINGS
    return matrix(SETTINGS.replace(old, new))


def label(toml: str) -> Callable[[Path], object]:
    return setting('name = "clp"', f'name = "clp"\nlabel = "{toml}"')


def evil_plugin(folder: Path) -> object:
    (folder / "evil.py").write_text(f"from pathlib import Path\nPath({str(TRAP)!r}).touch()\n")
    (folder / "inner").mkdir()
    return matrix('plugins = ["../evil.py"]' + SETTINGS, "inner/m.toml")(folder)


def half_plugin(folder: Path) -> object:
    (folder / "half.py").write_text("def f(:\n")
    return matrix('plugins = ["half.py"]' + SETTINGS)(folder)


MATRICES = [
    ("lists within each other 10,000 deep", setting("u = 2", f"u = {'[' * 10_000}{']' * 10_000}"), "cannot be read"),
    ("lists within each other 50 deep", setting("u = 2", f"u = {'[' * 50}{']' * 50}"), "nested more than"),
    ("a key of 200,000 parts", setting("u = 2", "u" + ".a" * 200_000 + " = 2"), "a key of more than"),
    ("a key of 200,000 parts in an inline table", setting("u = 2", "u = { a" + " . \"a\"" * 100_000 + " = 2 }"), "a key of more"),
    ("tables within each other 17 deep", setting("u = 2", "u.a.a.a.a.a.a.a.a.a = { a.a.a.a.a.a.a.a = 1 }"), "nested more than"),
    ("a number of 5,000 digits", setting("u = 2", f"u = {'9' * 5000}"), "not TOML"),
    ("a hexadecimal number of 5,000 digits", setting("u = 2", f"u = 0x{'f' * 5000}"), "more than 64 bits"),
    ("a seed beyond 64 bits", setting("[0]", "[18446744073709551616]"), "more than 64 bits"),
    ("10,000 seeds", setting("[0]", str(list(range(10_000)))), "seeds"),
    ("a number beyond floats", setting("u = 2", "u = 1e999"), "not a finite number"),
    ("a width of 2^62", setting('"resnet8"', f'"resnet8"\nwidth = {2**62}'), "out of range"),
    ("a list where a name belongs", setting('tracks = ["model"]', 'tracks = [["model"]]'), "should be a string"),
    ("a table where an extractor's name belongs", matrix(
        SETTINGS + '[[defense]]\nname = "linear-probe"\nlabels = "train"\nextractors = [{ a = 1 }]\n'), "should be a string"),
    ("a list where another method's number belongs", setting('name = "clp"\ntracks = ["model"]\nu = 2', (
        'name = "random-pruning"\nlike_settings = { u = [] }')), "like_settings of clp: u = []"),
    ("a list where a base attack's number belongs", setting('"badnets"', (
        '"rescaled"\nbase_settings = [["size", []]]')), "base_settings of badnets: size = []"),
    ("an empty list within a list of numbers", setting("u = 2", "grid = [[]]"), "grid"),
    ("two megabytes", matrix(SETTINGS + "#" * 2**21), "larger than"),
    ("bytes that are no text", matrix(b"\xff\xfe\0" * 99), "cannot be read"),
    ("a file called '..', for its folder of results", matrix(SETTINGS, "...toml"), "cannot be one"),
    ("a file whose name moves the cursor", matrix(SETTINGS, "\x1b[2J.toml"), "cannot be one"),
    ("a plug-in outside the matrix's folder", evil_plugin, "beside the matrix"),
    ("a plug-in that is not Python", half_plugin, "not Python"),
    ("a data set whose name is a formula", matrix('dataset.source = "=1+1"' + SETTINGS), "no formula"),
    ("a label that moves the cursor", label("a\\u001b[2J"), "printable"),
    ("a label of two lines", label("a\\nb"), "printable"),
    ("a label that reads from right to left", label("a\\u202eb"), "printable"),
    ("a label of 10,000 letters", label("a" * 10_000), "1 to 200"),
    ("a label of nothing", label(" "), "1 to 200"),
    ("a label that is a formula", label("=HYPERLINK(1)"), "formula"),
    ("a label that is a formula with a sign", label("@SUM(1)"), "formula"),
    ("a label that is a path", label("../../x"), ""),
    ("a label that is a script", label("<script>x()</script>"), ""),
    ("a label that is markup of the terminal's", label("[/]"), ""),
]  # fmt: skip

# -- rows, and names in what is written ------------------------------------------------------------------------------------------


ROW = Row(
    matrix="m", dataset="d", backbone="b", attack="a", rate=0.1, seed=0, track="model", scope="whole", defense="none", cell="x",
    target=0, label_mode="all-to-one", realised_rate=0.1, control=True, selection="default", status="ok",
)  # fmt: skip


def rows(text: str, name: str = "rows.csv") -> Callable[[Path], object]:
    """Reads rows where ``text`` is in the place of one of the files; ``{}`` in it is what that file held."""

    def act(folder: Path) -> object:
        write(folder, [ROW], [], [])
        (folder / name).write_text(text.replace("{}", (folder / name).read_text()))
        return len(read(folder / "rows.csv", Row))

    return act


COLUMNS = {f.name: str(f.type) for f in fields(Row) if f.name not in (*SCENARIO, *CELL)}
HEADER = ",".join(["cell", *(name for name in COLUMNS if name != "cell")])
BLANK = {"int": "0", "float": "", "bool": "true"}


def line(**odd: str) -> str:
    return ",".join(odd.get(name, BLANK.get(COLUMNS[name], "x")) for name in HEADER.split(","))


EVIL = "=x|y<script>alert(1)</script>\\input{/etc/passwd}[a](javascript:b)\x1b[2J\nnew\u202e"


def neutral(write: Callable[[object], str], *gone: str) -> Callable[[Path], object]:
    def act(folder: Path) -> object:
        text = write(EVIL)
        assert text.isprintable()
        for piece in gone:
            assert piece not in text, piece
        return text

    return act


FILES = [
    ("a row longer than the header", rows(f"{HEADER}\n{line()},more\n"), "longer than the header"),
    ("a row cut short", rows(f"{HEADER}\n{line()}\nx,y\n"), "not a rows file"),
    ("neither true nor false", rows(f"{HEADER}\n{line(kept='maybe')}\n"), "neither true nor false"),
    ("a count of 30 digits", rows(f"{HEADER}\n{line(pruned='9' * 30)}\n"), "not a rows file"),
    ("an infinite count", rows(f"{HEADER}\n{line(pruned='inf')}\n"), "not a rows file"),
    ("a cell that cells.csv does not have", rows(f"{HEADER}\n{line(cell='y')}\n"), "is not in cells.csv"),
    ("a cell twice", rows("{}x,,,,,,,,,,,,\n", "cells.csv"), "cells.csv"),
    ("a scenario that scenarios.csv does not have", rows("scenario\n", "scenarios.csv"), "scenarios.csv"),
    ("an open quote", rows(f'{HEADER}\n"{line()}\n'), "not a rows file"),
    ("nothing", rows(""), "not a rows file"),
    ("a name of everything evil in Markdown", neutral(texts.markdown, "<script", "x|y", "[a]("), ""),
    ("a name of everything evil in LaTeX", neutral(texts.latex, "\\input"), ""),
    ("a name of everything evil in CSV", neutral(
        lambda name: texts.csv_text(pd.DataFrame({"n": [name]})).splitlines()[1], "\x1b"), ""),
]  # fmt: skip

ATTEMPTS = [
    Attempt(whom, what, act, words)
    for whom, attempts in (
        ("checkpoint", CHECKPOINTS), ("image folder", FOLDERS), ("archive", ARCHIVES), ("settings", MATRICES), ("rows", FILES),
    )
    for what, act, words in attempts
]  # fmt: skip


@pytest.fixture(scope="module")
def outcomes() -> Iterator[dict[str, str]]:
    """What happened, by attempt; written as a table where somebody asks for it."""
    found: dict[str, str] = {}
    yield found
    if "LEVELFIELD_HOSTILE" in os.environ:
        told = [(a.whom, texts.markdown(a.what), texts.markdown(found.get(a.what, "NOT as it should be"))) for a in ATTEMPTS]
        lines = [
            "# Hostile files\n\n",
            "What a stranger's file may try, and what happens (`tests/test_hostile.py`): it is refused in one line, or harmless.\n",
            "After each, nothing may have been written outside the folder it was given, where the trap of the code-executing\n",
            "pickles would leave its mark, too; a test of its own shows that the trap works.\n\n",
            f"**{len(ATTEMPTS)} attempts: {len(found)} as it should be, among them "
            f"{sum(text.startswith('refused') for text in found.values())} refused; the rest did no harm. "
            f"{len(ATTEMPTS) - len(found)} executed code, wrote elsewhere or failed otherwise.**\n\n",
        ]
        lines += [f"| {' | '.join(cells)} |\n" for cells in [("read as", "what", "what happened"), (":--",) * 3, *told]]
        lines.append("\nDrawn by `make hostile`; see [FUZZ.md](FUZZ.md) for files drawn at random.\n")
        (Path(os.environ["LEVELFIELD_HOSTILE"]) / "HOSTILE.md").write_text("".join(lines))


@pytest.mark.parametrize("attempt", ATTEMPTS, ids=[f"{attempt.whom}: {attempt.what}" for attempt in ATTEMPTS])
def test_attempts(attempt: Attempt, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, outcomes: dict[str, str]) -> None:
    inside, outside = tmp_path / "inside", tmp_path / "outside"
    inside.mkdir()
    outside.mkdir()
    monkeypatch.chdir(outside)  # what is written to a relative path, the trap among it, lands here
    if not attempt.words:
        told = f"harmless: {str(attempt.act(inside))[:200]}"
    else:
        with pytest.raises(BadInput) as caught:
            attempt.act(inside)
        message = str(caught.value)
        assert attempt.words in message
        assert message.isprintable()
        assert len(message) < 2000
        told = f"refused: {message.replace(str(inside) + '/', '')[:200]}"
    assert sorted(tmp_path.iterdir()) == [inside, outside]
    assert list(outside.iterdir()) == []
    outcomes[attempt.what] = told


def test_every_attempt_stands_in_the_committed_table() -> None:
    page = (Path(__file__).resolve().parents[1] / "results" / "proof" / "HOSTILE.md").read_text()
    missing = [a.what for a in ATTEMPTS if f"| {a.whom} | {texts.markdown(a.what)} | " not in page]
    assert not missing, "make hostile"
    assert f"{len(ATTEMPTS)} attempts" in page


def test_the_trap_works(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.load(io.BytesIO(saved(Runs())), weights_only=False)
    assert TRAP.exists(), "or the attempts prove nothing"


def test_a_tiny_file_that_claims_a_wide_network_allocates_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A few kB that name a VGG of 1024 channels a stage: its shapes are compared before any of its weights exist."""
    built: list[str] = []
    vgg = lookup("backbone", BACKBONES, "vgg11-bn")
    build = vgg.build

    def watched(self: Backbone, *arguments: Any) -> Any:
        built.append(torch.get_default_device().type)
        assert built == ["meta"]
        return build(self, *arguments)

    monkeypatch.setattr(vgg, "build", watched)
    claim = {"features.0.weight": torch.ones(1).expand(1024, 1, 3, 3), "head.0.weight": torch.ones(1).expand(10, 8192)}
    torch.save(claim, tmp_path / "wide.pt")
    assert (tmp_path / "wide.pt").stat().st_size < 4000
    with pytest.raises(BadInput, match=r"wide\.pt: tensor 'features\.\S+' \S.* is missing"):
        mymodel.defend_checkpoint(
            tmp_path / "wide.pt", "vgg11-bn", "digits", None, "my-model", results=tmp_path / "r", cache=tmp_path / "c",
            console=Console(file=io.StringIO()),
        )  # fmt: skip
    assert built == ["meta"]


NAMED = """
title = "odd labels"
seeds = [0]
dataset = { source = "digits", clean_fraction = 0.2, train_limit = 100, test_limit = 40 }
recipe = { epochs = 0 }
[[backbone]]
name = "resnet8"
width = 1
[[attack]]
name = "badnets"
[[defense]]
name = "clp"
label = "[/]"
tracks = ["model+clean"]
[[defense]]
name = "clp"
label = "(/)"
tracks = ["model+clean"]
[[defense]]
name = "clp"
label = "../../x"
tracks = ["model+clean"]
grid = [0.5]
"""


@pytest.mark.slow
def test_labels_that_are_markup_or_paths_are_text_on_the_terminal_and_in_file_names(tmp_path: Path) -> None:
    path, inside = tmp_path / "inside" / "mine.safetensors", tmp_path / "inside"
    save_weights(ResNet8(width=1, hidden=0).build(10, (1, 16, 16), [0.5], [0.25], 0), path)
    (inside / "odd.toml").write_text(NAMED)
    out = io.StringIO()
    folder = mymodel.defend_checkpoint(
        path, "resnet8", "digits", None, str(inside / "odd.toml"), results=inside / "r", cache=inside / "c",
        console=Console(file=out, width=200),
    )  # fmt: skip
    assert "[1/3] [/] (whole)" in out.getvalue()
    assert "[3/3] ../../x (whole)" in out.getvalue()
    names = [f"{name}.safetensors" for name in ("..-..-x-whole", "whole-1", "whole-2")]  # no two defenses share a file
    assert sorted(file.name for file in folder.iterdir()) == sorted([*names, "defenses.csv"])
    assert list(tmp_path.iterdir()) == [inside]


def test_the_screens_words_are_no_markup() -> None:
    out = io.StringIO()
    RunProgress(Console(file=out, width=200), {"cell": 1}).note("damaged entry in /data/[/]")
    assert "damaged entry in /data/[/]" in out.getvalue()


def test_a_broken_plugin_is_not_taken_for_a_whole_one_the_next_time(tmp_path: Path) -> None:
    (tmp_path / "half.py").write_text("raise RuntimeError('no luck')\n")
    (tmp_path / "m.toml").write_text('plugins = ["half.py"]' + SETTINGS)
    before = set(sys.modules)
    for _ in range(2):
        with pytest.raises(RuntimeError, match="no luck"):
            load_matrix(tmp_path / "m.toml")
    assert not {name for name in set(sys.modules) - before if "plugin" in name}
