"""What limits `jina-v4-embed --ray`, on paper: `python benchmarks/corpus.py`, with `--measure` after measuring here.

A simulation by rates: of each stage what one core does, of a GPU the ceiling (docs/operations.md; none was measured).
It says how many cores keep 1, 8 and 64 GPUs busy, what goes in and out, and how busy the driver is, which schedules
each block. CPU time is measured, so that other work on the machine does not count; disks and networks are not.
"""

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow
from jina_v4_client.embed.output import PARQUET_OPTIONS, vector_column
from jina_v4_client.embed.places import list_files
from jina_v4_client.embed.ray import Plan
from jina_v4_client.embed.ray.corpus import Corpus, read_contents
from PIL import Image, ImageDraw
from pyarrow import parquet

TEXT_BYTES = 2048  # about 512 tokens
PAGE_BYTES = 400_000
GPUS = (1, 8, 64)
DRIVER_S = 0.025  # of CPU a block: 16, 157 and 469 blocks took the driver 3.2, 6.3 and 14.1 s


@dataclass(frozen=True)
class Case:
    """A corpus: what a GPU does at its ceiling, rows a block, bytes a row in and out, CPU seconds a row."""

    name: str
    rows_s: float
    block_rows: int
    in_bytes: int
    out_bytes: int
    list_s: float
    read_s: float
    write_s: float


# CPU seconds a row by `--measure` on a core of an EPYC (Zen 4): to list and to read it, to write its vector.
MEASURED = {"text": (1.9e-5, 1.0e-5), "page": (1.0e-5, 0.120), "dense": 2.5e-5, "multi": 2.5e-3}


def cases(measured: dict[str, object]) -> list[Case]:
    """Put rates together."""
    text, page, dense, multi = (measured[name] for name in ("text", "page", "dense", "multi"))
    return [
        Case("texts of 512 tokens", 250, 1024, TEXT_BYTES, 8192, *text, dense),
        Case("PDF pages", 88, 128, PAGE_BYTES, 8192, *page, dense),
        Case("PDF pages, multi-vectors", 88, 128, PAGE_BYTES, 779 * 128 * 4, *page, multi),
    ]


def cpu_s(act: Callable[[], object], n: int) -> float:
    """Measure the CPU seconds of one of n rows, after a first time."""
    act()
    start = time.process_time()
    act()
    return (time.process_time() - start) / n


def measure() -> dict[str, object]:
    """Measure each stage on this machine, in one process."""
    options = {"text-column": "text", "image-column": None, "id-column": None, "input-format": None, "pdf-scale": 2.0}
    plan = Plan(
        inputs=[],
        output="",
        address="local",
        n_workers=None,
        urls=[],
        server=[],
        client={},
        batch_sizes={},
        options=options,
        skip=False,
        quiet=True,
    )
    found: dict[str, object] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        line = json.dumps({"text": "some words " * (TEXT_BYTES // 11)})
        (folder / "texts.jsonl").write_text(f"{line}\n" * 4096)
        page = Image.new("L", (1240, 1754), "white")
        draw = ImageDraw.Draw(page)
        for y in range(60, 1700, 28):
            draw.text((80, y), "the quick brown fox jumps over the lazy dog " * 4, fill="black", font_size=20)
        (folder / "pages").mkdir()
        page.save(folder / "pages/all.pdf", save_all=True, append_images=[page] * 31, resolution=150)  # A4
        for kind, path, n_rows in (("text", folder / "texts.jsonl", 4096), ("page", folder / "pages", 32)):
            files, filesystems, _ = list_files([str(path)], f"{path}.out")
            (task,) = Corpus(files, filesystems, plan).tasks
            tables = list(task())
            read = partial(read_contents, filesystems=filesystems, plan=plan)
            found[kind] = (
                cpu_s(lambda task=task: list(task()), n_rows),
                cpu_s(lambda tables=tables, read=read: [read(table) for table in tables], n_rows),
            )
        for kind, rows, width, lengths in (("dense", 1024, 2048, None), ("multi", 128 * 779, 128, [779] * 128)):
            vectors = np.ones((rows, width), np.float32)

            def write(vectors: np.ndarray = vectors, lengths: list[int] | None = lengths) -> None:
                table = pyarrow.table({"vector": vector_column(vectors, lengths)})
                parquet.write_table(table, folder / "part.parquet", **PARQUET_OPTIONS)

            found[kind] = cpu_s(write, rows if lengths is None else len(lengths))
    return found


def limit(case: Case, n_gpus: int) -> str:
    """Name what limits: the driver, or the GPUs where enough cores and files are there."""
    return "driver" if case.rows_s * n_gpus / case.block_rows * DRIVER_S > 1 else "GPUs"


def main() -> None:
    """Print a table in Markdown."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--measure", action="store_true", help="measure the rates here first")
    measured = measure() if parser.parse_args().measure else MEASURED
    print(json.dumps(measured))
    print("| corpus, GPUs | rows/s | cores: list, read, write | MB/s in, out | blocks/s | driver busy | limit |")
    print("|---|---|---|---|---|---|---|")
    for case in cases(measured):
        for n_gpus in GPUS:
            rate = case.rows_s * n_gpus
            cores = ", ".join(f"{rate * each:.1f}" for each in (case.list_s, case.read_s, case.write_s))
            bandwidth = f"{rate * case.in_bytes / 1e6:,.1f}, {rate * case.out_bytes / 1e6:,.1f}"
            blocks = rate / case.block_rows
            print(
                f"| {case.name}, {n_gpus} | {rate:,.0f} | {cores} | {bandwidth} | {blocks:.1f} |"
                f" {blocks * DRIVER_S:.0%} | {limit(case, n_gpus)} |"
            )


if __name__ == "__main__":
    main()
