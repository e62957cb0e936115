"""The readers of :mod:`test_fuzz` fed by a fuzzer that follows the code's branches (atheris, which has to be installed for it).

``python tests/guided_fuzz.py settings|rows|checkpoints FOLDER -max_total_time=900``: whole files, begun from good ones in FOLDER
(they are put there); options are libFuzzer's. It ends at the first file that is neither read nor refused in one line.
"""

from __future__ import annotations

import sys
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["benchmark", "models", "tomllib", "safetensors"]):
    import test_fuzz as fuzz

from benchmark.settings.load import find_matrix, matrix_names
from benchmark.storage.rows import Row, write


def begin(reader: str, folder: Path) -> None:
    """Puts good files into ``folder``."""
    folder.mkdir(parents=True, exist_ok=True)
    if reader == "settings":
        (folder / "base").write_text(fuzz.BASE)
        for name in matrix_names():
            (folder / name).write_bytes(find_matrix(name).read_bytes())
    elif reader == "rows":
        write(folder, [fuzz.ROW, fuzz.ROW], [], [])
        write(folder.parent / "read", [fuzz.ROW, fuzz.ROW], [], [])  # what is joined with the file that is read
    else:
        state = dict(fuzz.NET.state_dict())
        (folder / "archive").write_bytes(fuzz.saved(state, archive=True))
        (folder / "legacy").write_bytes(fuzz.saved(state, archive=False))
        fuzz.save_weights(fuzz.NET, folder / "safetensors")


def main() -> None:
    reader, folder, *options = sys.argv[1:]
    place = Path(folder) / "read"
    place.mkdir(parents=True, exist_ok=True)
    begin(reader, Path(folder) / "good")

    def feed(content: bytes) -> None:
        if reader == "checkpoints":
            fuzz.check_weights(place, content)
            return
        path = place / ("m.toml" if reader == "settings" else "rows.csv")
        path.write_bytes(content)
        if reader == "settings":
            fuzz.check_settings(path)
        else:
            fuzz.check_rows(path, Row)

    corpus = Path(folder) / "corpus"
    corpus.mkdir(exist_ok=True)
    # A leak is no defect here: torch and Arrow keep memory for later.
    atheris.Setup([sys.argv[0], str(corpus), str(Path(folder) / "good"), "-detect_leaks=0", "-rss_limit_mb=8192", *options], feed)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
