"""The command line: `index`, `search` and `sample`.

Exit codes: 0 done; 1 the server, a file or the index failed; 2 the command cannot be run as given; 130 Ctrl-C.
"""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from enum import StrEnum
from itertools import islice
from pathlib import Path
from typing import Annotated

import typer
from jina_v4_client import ArgumentError, EmbeddingsClient, ImageError, JinaV4Error
from jina_v4_client.scoring import image_grid, similarity_map
from PIL import Image

from document_search.documents import Document, find_files, read_document
from document_search.errors import DocumentError, SearchError, UsageError
from document_search.store import PROBE_TEXT, Found, Page, Source, Store
from document_search.words import beginnings, find_words

BASE_URL = "http://127.0.0.1:8001"
FOLDER = Path("document-search")
PAGES_AT_A_TIME = 16  # rendered and in memory: 6 MB each of A4 at 144 dpi
PAGES_A_REQUEST = 4
MAX_MAPS = 11  # words that get a map of their own; with the first map they fill three rows of four

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, help="Search in the pages of PDF files.")

BaseUrl = Annotated[str, typer.Option(help="The address of a server of the retrieval task, or of a gateway.")]
IndexFolder = Annotated[Path, typer.Option("--index", metavar="FOLDER", help="Where the index lies.")]


class By(StrEnum):
    """How pages are found."""

    DENSE = "dense"
    MULTIVECTOR = "multivector"
    BOTH = "both"


@app.command()
def index(
    inputs: Annotated[list[Path], typer.Argument(metavar="PDF...", help="PDF files, or folders of them.")],
    folder: IndexFolder = FOLDER / "index",
    base_url: BaseUrl = BASE_URL,
    scale: Annotated[float, typer.Option(min=0.1, max=20, help="Pixels a point; 1 is 72 dpi.")] = 2.0,
    max_pixels: Annotated[int, typer.Option(min=3136, help="To which the server scales larger pages down.")] = 602112,
) -> None:
    """Embed the pages of PDF files into an index. Files that are in it and have not changed are passed over."""
    n_failed = 0
    with _told_in_a_line(), _client(base_url) as client:
        files = find_files(inputs)
        store = Store.open_or_make(folder, client.encode_text(PROBE_TEXT))
        for file in files:
            try:
                document = read_document(file)
                source = Source(document.path, document.digest, scale, max_pixels)
                if store.has(source):
                    print(f"{_shown(file)}: unchanged")
                    continue
                pages = list(_embedded_pages(client, document, source))
                store.put(source, pages)
                print(f"{_shown(file)}: {len(pages)} pages", flush=True)
            except DocumentError as error:
                _say(f"error: {error}")
                n_failed += 1
        print(f"{folder} holds {len(store)} pages")
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
        query = " ".join(query.split())  # as `words` needs it, and as the model has seen most of its texts
        if not query:
            raise UsageError("the query is empty")
        store = Store.open(folder)
        with _client(base_url) as client:
            dense, probe = client.encode_text([query, PROBE_TEXT])
            store.check_model(probe)
            texts = beginnings(query, MAX_MAPS)
            multivector, *parts = client.encode_text([query, *texts], return_multivector=True)
        if by is By.DENSE:
            found = store.by_dense(dense, top_k)
        elif by is By.MULTIVECTOR:
            found = store.by_multivector(multivector, top_k)
        else:
            found = store.by_both(dense, multivector, top_k, candidates)
        if not found:
            raise UsageError(f"the index in {folder} is empty")
        _print_table(found, by, len(multivector))

        best = found[0]
        maps = similarity_map(multivector, store.multivector(best), best.grid)
        from document_search.picture import draw  # matplotlib takes a second; the table need not wait for it

        page = _page_again(best)
        title = f"{best.source.file.name}, page {best.number}: {query}"
        picture.parent.mkdir(parents=True, exist_ok=True)
        draw(page, maps, find_words(texts, parts), title, picture)
        print(f"wrote {picture}")


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


def _embedded_pages(client: EmbeddingsClient, document: Document, source: Source) -> Iterator[Page]:
    pictures = document.pages(source.scale)
    while part := list(islice(pictures, PAGES_AT_A_TIME)):
        try:
            embedded = client.encode_both(part, batch_size=PAGES_A_REQUEST, max_pixels=source.max_pixels)
        except ImageError as error:
            raise DocumentError(f"{document.path}: {error}") from error
        for picture, both in zip(part, embedded, strict=True):
            yield Page(both.dense, both.multivector, image_grid(*picture.size, source.max_pixels))


def _page_again(page: Found) -> Image.Image:
    """Render a page that was found as it was when it was embedded."""
    document = read_document(page.source.file)
    if document.digest != page.source.digest:
        raise SearchError(f"{document.path} has changed since it was indexed, so there is no picture: index it again")
    return document.page(page.number, page.source.scale)


def _print_table(found: list[Found], by: By, n_tokens: int) -> None:
    what = "cosine" if by is By.DENSE else f"MaxSim of {n_tokens} tokens"
    print(f"{'score':>8}  {'page':>5}  file ({what})")
    for page in found:
        print(f"{page.score:8.3f}  {page.number:5}  {_shown(page.source.file)}")


def _shown(file: Path) -> str:
    """Give a path relative to where we are if it lies below."""
    here = Path.cwd()
    return str(file.relative_to(here) if file.is_relative_to(here) else file)


@contextmanager
def _told_in_a_line() -> Iterator[None]:
    """Say in one line why a command ends, without a traceback."""
    try:
        yield
    except (UsageError, ArgumentError) as error:
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
