"""The command line: `index`, `search`, `page` and `sample`.

Exit codes: 0 done; 1 the server, a file or the index failed; 2 the command cannot be run as given; 130 Ctrl-C.
"""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer
from jina_v4_client import ArgumentError, EmbeddingsClient, JinaV4Error
from jina_v4_client.embed import errors as embed_errors

from document_search.documents import find_files, read_document
from document_search.errors import DocumentError, SearchError, UsageError
from document_search.indexing import MAX_PIXELS, SCALE, index_document
from document_search.searching import By, embed_text, find, find_on_page, render_found
from document_search.store import PROBE_TEXT, Found, Store

BASE_URL = "http://127.0.0.1:8001"
FOLDER = Path("document-search")
MAX_MAPS = 11  # words that get a map of their own; with the first map they fill three rows of four

app = typer.Typer(
    add_completion=False, pretty_exceptions_enable=False, help="Search in the pages of PDF files, and in pictures."
)

BaseUrl = Annotated[str, typer.Option(help="The address of a server of the retrieval task, or of a gateway.")]
IndexFolder = Annotated[Path, typer.Option("--index", metavar="FOLDER", help="The folder of the index.")]


@app.command()
def index(
    inputs: Annotated[list[Path], typer.Argument(metavar="FILE...", help="PDF files, pictures, or folders.")],
    folder: IndexFolder = FOLDER / "index",
    base_url: BaseUrl = BASE_URL,
    scale: Annotated[float, typer.Option(min=0.1, max=20, help="Pixels a point; 1 is 72 dpi.")] = SCALE,
    max_pixels: Annotated[
        int, typer.Option(min=3136, help="To which the server scales larger pages down.")
    ] = MAX_PIXELS,
) -> None:
    """Embed PDF files and pictures into an index. Files that are in it and have not changed are left as they are."""
    n_failed = 0
    with _told_in_a_line(), _client(base_url) as client:
        files, left_out = find_files(inputs, folder)
        store = Store.open_or_make(folder, client.encode_text(PROBE_TEXT))
        for file in files:
            try:
                indexed = index_document(client, store, read_document(file), scale=scale, max_pixels=max_pixels)
            except DocumentError as error:
                _say(f"error: {error}")
                n_failed += 1
                continue
            print(f"{_shown(file)}: {f'{indexed.n_pages} pages' if indexed.n_pages else 'unchanged'}", flush=True)
            for broken in indexed.broken:
                _say(f"error: {broken}")
            n_failed += len(indexed.broken)
        print(f"{folder} holds {len(store)} pages")
        for line in left_out:
            _say(f"left out: {line}")
    if n_failed:
        raise typer.Exit(1)


@app.command()
def search(
    query: Annotated[str, typer.Argument(help="What is looked for, in words.")],
    folder: IndexFolder = FOLDER / "index",
    base_url: BaseUrl = BASE_URL,
    by: Annotated[
        By, typer.Option(help="dense: cosine; multivector: MaxSim of all pages; both: MaxSim of the best by cosine.")
    ] = By.BOTH,
    top_k: Annotated[int, typer.Option(min=1, help="Pages to list.")] = 5,
    candidates: Annotated[int, typer.Option(min=1, help="Pages that --by both takes by cosine.")] = 50,
    picture: Annotated[Path, typer.Option(help="A PNG file: the best page, and where the words were found.")] = FOLDER
    / "best-page.png",
) -> None:
    """Find the pages that answer a query; draw where on the best one its words were found."""
    with _told_in_a_line():
        store = Store.open(folder)
        with _client(base_url) as client:
            embedded = embed_text(client, store, query, MAX_MAPS)
        found = find(store, embedded, by, top_k, candidates)
        if not found:
            raise UsageError(f"the index in {folder} is empty")
        _print_table(found, by, len(embedded.multivector))

        best = found[0]
        maps = find_on_page(store, embedded, best)
        from document_search.picture import draw  # matplotlib takes a second; the table need not wait for it

        page = render_found(best)
        title = f"{best.source.file.name}, page {best.number}: {query}"
        picture.parent.mkdir(parents=True, exist_ok=True)
        draw(page, maps, title, picture)
        print(f"wrote {picture}")


@app.command()
def page(
    folder: IndexFolder = FOLDER / "index",
    base_url: BaseUrl = BASE_URL,
    uploads: Annotated[
        Path, typer.Option(metavar="FOLDER", help="Where files that are dropped on the page are kept.")
    ] = (FOLDER / "uploads"),
    port: Annotated[int, typer.Option(min=0, max=65535, help="On 127.0.0.1; 0 for any that is free.")] = 8010,
) -> None:
    """Serve a page to index and search with, for a browser on this machine."""
    with _told_in_a_line(), _client(base_url) as client:
        from document_search.page import serve  # FastAPI takes a second, which the other commands need not wait for

        serve(client, base_url, folder, uploads, port)


@app.command()
def sample(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="Where they are written.")] = FOLDER / "sample",
) -> None:
    """Write two PDF files of two pages to try the search with."""
    with _told_in_a_line():
        from document_search.sample import write_samples

        for path in write_samples(folder):
            print(f"wrote {path}")


def _client(base_url: str) -> EmbeddingsClient:
    return EmbeddingsClient(base_url, task="retrieval")


def _print_table(found: list[Found], by: By, n_tokens: int) -> None:
    what = "cosine" if by is By.DENSE else f"MaxSim of {n_tokens} tokens"
    print(f"{'score':>8}  {'page':>5}  file ({what})")
    for page in found:
        score = page.dense if page.maxsim is None else page.maxsim
        print(f"{score:8.3f}  {page.number:5}  {_shown(page.source.file)}")


def _shown(file: Path) -> str:
    """Give a path relative to where we are if it lies below."""
    here = Path.cwd()
    return str(file.relative_to(here) if file.is_relative_to(here) else file)


@contextmanager
def _told_in_a_line() -> Iterator[None]:
    """Say in one line why a command ends, without a traceback."""
    try:
        yield
    except (UsageError, ArgumentError, embed_errors.UsageError) as error:
        _end(f"error: {error}", 2)
    except (SearchError, JinaV4Error) as error:
        _end(f"error: {error}", 1)
    except OSError as error:
        _end(f"error: {error.filename or 'a file'} cannot be read or written: {error.strerror or error}", 1)
    except KeyboardInterrupt:
        _end("interrupted; files that are indexed stay so", 130)


def _end(line: str, code: int) -> None:
    _say(line)
    raise typer.Exit(code)


def _say(line: str) -> None:
    sys.stderr.write(" ".join(line.split()) + "\n")


def main() -> None:
    """Run the command line."""
    app(prog_name="document_search")
