"""What the pages in docs/ show is run, in the order of the page, and their tables name the options that there are.

The server is the small golden one, so the width of the model and one Matryoshka size are smaller than in the pages.
README.md runs against a server of the real width (end_to_end/test_standin.py), docs/other-clients.md with the clients
that it speaks of (end_to_end/one_server/test_clients.py).
"""

import contextlib
import inspect
import io
import json
import os
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator
from enum import Enum
from pathlib import Path
from typing import Any

import numpy as np
import pandas
import polars
import pytest
import safetensors.numpy
from conftest import Golden
from jina_v4_client import EmbeddingsClient
from jina_v4_client.embed.cli import app as embed_app
from jina_v4_merge.cli import app as merge_app
from jina_v4_serve.cli import app as serve_app
from servers import BIN, Server
from typer.main import get_command
from wire import IMAGES, TEXTS, Site

ROOT = Path(__file__).parents[3]
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)
STATED = re.compile(r"^ *print\(.*\)  # (.*)$", re.MULTILINE)
SIZES = {"2048": "256", "512": "128"}  # of the pages to those of the golden model
RUN_ELSEWHERE = {
    "README.md",
    "docs/other-clients.md",
    "docs/evaluation.md",  # test_mteb.py makes that call for tasks of its own: the benchmark is on the hub
    "docs/stores.md",  # tests/stores runs it in the stores
    "docs/merge.md",  # tests/merge/test_export.py does the same with PEFT, and compares the vectors
}

Run = Callable[[str], dict[str, Any]]


def blocks(page: str) -> list[tuple[str, str]]:
    return BLOCK.findall((ROOT / page).read_text())


def options(*commands: Any) -> dict[str, object]:
    """The options of some commands, and their defaults."""
    return {
        name: parameter.default.value if isinstance(parameter.default, Enum) else parameter.default
        for command in commands
        for parameter in command.params
        for name in parameter.opts
        if name.startswith("-")
    }


def arguments(function: Callable[..., Any]) -> dict[str, object]:
    return {parameter.name: parameter.default for parameter in inspect.signature(function).parameters.values()}


def table(page: str, head: str, name: str) -> dict[str, str]:
    """The names in the first column of a table, and what stands for each in the second."""
    rows = (ROOT / page).read_text().split(f"\n| {head} |")[1].partition("\n\n")[0].splitlines()[2:]
    cells: dict[str, str] = {}
    for first, second in (row.split("|")[1:3] for row in rows):
        names = re.findall(rf"`({name})", first)
        seconds = second.split(",")
        cells |= zip(names, seconds if len(names) == len(seconds) else [second] * len(names), strict=True)
    return cells


@pytest.fixture
def run(
    wire_server: Server,
    pictures: Site,
    folded: Callable[[str], Path],
    golden: Golden,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> Iterator[Run]:
    """Run the blocks of a page, in a folder with all that they name; give the names that its programs leave."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("JINA_V4_API_KEY", raising=False)
    monkeypatch.setenv("PATH", f"{BIN}{os.pathsep}{os.environ['PATH']}")
    for name in ("page.png", "page-1.png"):
        shutil.copyfile(IMAGES[1], name)
    texts = [{"id": i, "text": f"{i}: {TEXTS[i % len(TEXTS)]}"} for i in range(50)]
    Path("corpus.jsonl").write_text("".join(json.dumps(text) + "\n" for text in texts))
    Path("notes.txt").write_text("".join(f"note {i}\n" for i in range(5)))
    Path("articles.csv").write_text("sku,body\n" + "".join(f"{i},article {i}\n" for i in range(5)))
    shutil.copytree(golden.images[0].parent, "pages")
    Path("checkpoints").mkdir()
    Path("checkpoints/jinaai--jina-embeddings-v4").symlink_to(folded("float32"))
    changes = {
        "http://127.0.0.1:8001": wire_server.base_url,
        "http://127.0.0.1:8000": wire_server.base_url,
        "https://example.com/page-2.jpg": f"{pictures.url}/{IMAGES[2].name}",
    }
    namespace: dict[str, Any] = {}

    def localised(text: str) -> str:
        for old, new in (SIZES | changes).items():  # sizes first: a port may hold their digits
            text = text.replace(old, new)
        return text

    def run_page(page: str) -> dict[str, Any]:
        for kind, block in blocks(page):
            if kind == "python":
                run_python(localised(block))
            elif kind == "console":
                run_console(block)
        return namespace

    def run_python(program: str) -> None:
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(program, namespace)  # noqa: S102 - our own pages
        if stated := STATED.findall(program):
            assert printed.getvalue().splitlines() == stated

    def run_console(block: str) -> None:
        for command, stated in re.findall(r"^\$ (.*)\n((?:[^$\n].*\n)*)", block, re.MULTILINE):
            ran = subprocess.run(
                ["bash", "-euo", "pipefail", "-c", localised(command)],
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
            assert ran.returncode == 0, f"{command}\n{ran.stdout}"
            if stated:
                assert without_timings(ran.stdout) == without_timings(stated)

    yield run_page
    for value in namespace.values():
        if isinstance(value, EmbeddingsClient):
            value.close()


def without_timings(text: str) -> str:
    return re.sub(r"[\d.,]+(?= s\b| rows/s)", "N", text)


def test_the_client_s_page_runs(run: Run) -> None:
    found = run("docs/client.md")
    assert found["query"].shape == (256,)
    assert found["tokens"].shape[1] == 128
    assert [page.shape for page in found["pages"]] == [(256,)]  # of the second block; the first asked for 128 of two
    with found["client"] as client:  # of the last block, which names a projector
        assert client.encode_text("coastal cities", return_multivector=True).shape == found["tokens"].shape


def test_the_scoring_page_runs(run: Run) -> None:
    found = run("docs/scoring.md")
    assert sorted(hit.index for hit in found["hits"]) == [0, 1]
    assert [len(pooled) for pooled in found["pooled"]] == [len(rows) // 2 for rows in found["documents"]]
    assert found["maps"].shape == (len(found["query"]), *found["grid"])


def test_the_corpus_page_runs_and_its_outputs_open_as_it_says(run: Run) -> None:
    run("docs/embed.md")
    modules = {"polars": polars, "pandas": pandas, "numpy": np, "safetensors": safetensors}
    programs = re.findall(r"`((?:polars|pandas|numpy|safetensors)\.[^`]*\(.*?)`", (ROOT / "docs/embed.md").read_text())
    opened = {program: eval(program, modules) for program in programs}  # noqa: S307 - our own page
    shapes = {program: found.shape for program, found in opened.items() if not isinstance(found, dict)}
    assert shapes == {
        'polars.read_parquet("corpus.parquet")': (50, 2),
        'pandas.read_parquet("corpus.parquet")': (50, 2),
        'numpy.load("articles.npy")': (5, 256),
        'pandas.read_json("notes.jsonl", lines=True, dtype=False)': (3, 2),
        'polars.read_parquet("corpus.parquet")["vector"].to_numpy()': (50, 256),
        'numpy.stack(pandas.read_parquet("corpus.parquet").vector)': (50, 256),
    }
    (tensors,) = (found for found in opened.values() if isinstance(found, dict))
    assert len(tensors["offsets"]) == len(IMAGES) + 1
    assert tensors["vectors"].shape == (tensors["offsets"][-1], 128)


def test_every_page_with_python_is_run() -> None:
    pages = [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]
    shown = {str(page.relative_to(ROOT)) for page in pages if "```python" in page.read_text()}
    assert shown <= RUN_ELSEWHERE | {"docs/client.md", "docs/scoring.md", "docs/embed.md"}


SERVE = get_command(serve_app).commands
TABLES = {
    "docs/client.md": (arguments(EmbeddingsClient), {}),
    "docs/embed.md": (options(get_command(embed_app)), {}),
    "docs/merge.md": (options(get_command(merge_app).commands["fold"]), {}),
    "docs/serve.md": (options(SERVE["retrieval"]), {}),
    "docs/gateway.md": (
        options(SERVE["all"], SERVE["gateway"]),
        {"--dtype": "as in", "--max-body-bytes": "64 MiB"},
    ),
}


@pytest.mark.parametrize("page", TABLES)
def test_a_table_names_what_there_is_and_the_defaults(page: str) -> None:
    there, worded = TABLES[page]
    head, name = ("argument", r"\w+") if page == "docs/client.md" else ("option", "--?[a-z][a-z-]*")
    stated = table(page, head, name)
    assert stated.keys() == there.keys()
    for option, default in there.items():
        if default not in (None, False, inspect.Parameter.empty):
            text = worded.get(option, f"{default:g}" if isinstance(default, float) else str(default))
            assert re.search(rf"(?<!\w){re.escape(text)}(?!\w)", stated[option]), f"{option}: {default} by default"
