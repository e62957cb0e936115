"""One definition of robust accuracy, and whether the rows keep to it."""

from __future__ import annotations

import pandas as pd

from benchmark.report.exhibits import evidence as ev

figure = ev.no_figure
COLUMNS = (*ev.text(metric="Metric", images="Images", share="Share"), *ev.share(least="Least in the rows", most="Most"))
_DEFINITIONS = (
    ("ACC", "clean test images, all", "classified as their true class"),
    ("ASR", "triggered test images whose true class is not the target", "classified as the target"),
    ("RA", "the same triggered images", "classified as their true class"),
)


def frame(source: ev.Source) -> pd.DataFrame:
    rows = source.rows[(source.rows["status"] == "ok") & source.rows["asr"].notna()]
    if rows.empty:
        raise ev.Missing("no finished row has an ASR")
    third = 1 - rows["asr"] - rows["ra"]
    lines = [
        {"metric": metric, "images": images, "share": share, "least": float(rows[metric.lower()].min()),
         "most": float(rows[metric.lower()].max())}
        for metric, images, share in _DEFINITIONS
    ]  # fmt: skip
    return ev.table_of(lines, rows=len(rows), over=int((third < -1e-6).sum()), third=float(third.mean()), most=float(third.max()))
