"""Documents into the index: rendered, embedded and stored, a document in one step."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from http import HTTPStatus
from itertools import islice

from jina_v4_client import EmbeddingsClient, ImageError
from jina_v4_client.errors import ServerRefusedError
from jina_v4_client.scoring import image_grid

from document_search.documents import Document, Rendered
from document_search.errors import DocumentError
from document_search.store import Page, Source, Store

SCALE = 2.0
MAX_PIXELS = 602112
PAGES_AT_A_TIME = 16  # rendered and in memory: 6 MB each of A4 at 144 dpi
PAGES_A_REQUEST = 4


@dataclass(frozen=True)
class Indexed:
    """What became of a document.

    Attributes:
        n_pages: that were embedded; 0 where all that can be rendered were in the index already.
        broken: why pages of it are not in the index.
    """

    n_pages: int
    broken: tuple[DocumentError, ...] = ()


def index_document(
    client: EmbeddingsClient,
    store: Store,
    document: Document,
    *,
    scale: float = SCALE,
    max_pixels: int = MAX_PIXELS,
    report: Callable[[int], object] = lambda _: None,
) -> Indexed:
    """Embed the pages of a document and store them, all of them at once or none.

    Args:
        client: of a server of the retrieval task.
        store: whose model the server has.
        document: to be indexed.
        scale: pixels a point at which PDF pages are rendered.
        max_pixels: to which the server scales larger pages down.
        report: is called with the number of pages that are done, broken ones too.

    Raises:
        DocumentError: the document cannot be read, none of its pages can be rendered, or the server refuses one.
    """
    source = Source(document.path, document.digest, scale, max_pixels)
    if stored := store.page_numbers(source):
        missing = sorted(set(range(1, document.count() + 1)) - stored)
        still_broken = tuple(error for number in missing if (error := _try_page(document, number, scale)))
        if len(still_broken) == len(missing):
            return Indexed(0, still_broken)
    broken: list[DocumentError] = []
    pages = list(_embedded(client, document, source, broken, report))
    if not pages:
        raise broken[0]
    store.put(source, pages)
    return Indexed(len(pages), tuple(broken))


def _try_page(document: Document, number: int, scale: float) -> DocumentError | None:
    """Return why a page cannot be rendered; None if it can."""
    try:
        document.page(number, scale)
    except DocumentError as error:
        return error
    return None


def _embedded(
    client: EmbeddingsClient,
    document: Document,
    source: Source,
    broken: list[DocumentError],
    report: Callable[[int], object],
) -> Iterator[Page]:
    """Embed the pages that can be rendered; why the others cannot is added to `broken`."""
    pages = document.pages(source.scale)
    n_done = 0
    while part := list(islice(pages, PAGES_AT_A_TIME)):
        broken += [page for page in part if isinstance(page, DocumentError)]
        rendered = [page for page in part if isinstance(page, Rendered)]
        n_before = n_done + len(part) - len(rendered)
        n_done += len(part)
        if not rendered:
            report(n_done)
            continue
        try:
            embedded = client.encode_both(
                [page.sent for page in rendered],
                batch_size=PAGES_A_REQUEST,
                max_pixels=source.max_pixels,
                progress=lambda n, _, n_before=n_before: report(n_before + n),  # type: ignore[misc] # has a default
            )
        except ImageError as error:
            raise DocumentError(f"{document.path}: {error}") from error
        except ServerRefusedError as error:
            if not _is_about_pages(error):
                raise
            raise DocumentError(f"{document.path}: {error}") from error
        for page, both in zip(rendered, embedded, strict=True):
            grid = image_grid(*page.picture.size, source.max_pixels)
            yield Page(page.number, both.dense, both.multivector, grid)


def _is_about_pages(error: ServerRefusedError) -> bool:
    """Tell whether a server refuses what it was sent, such as a file over its limit, and not the way it was asked."""
    return error.status_code == HTTPStatus.REQUEST_ENTITY_TOO_LARGE or (error.param or "").startswith("input[")
