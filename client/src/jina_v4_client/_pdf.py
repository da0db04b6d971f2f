"""PDF files: read here, rendered by our server, and embedded page by page."""

import os
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from jina_v4_client._calls import Call, PdfFile, PdfPage, as_list, check_count
from jina_v4_client._images import describe
from jina_v4_client._loop import in_thread
from jina_v4_client._progress import Post
from jina_v4_client.errors import ArgumentError
from jina_v4_client.results import Vector

if TYPE_CHECKING:
    from jina_v4_client._send import Core

PdfSource = str | os.PathLike[str] | bytes | bytearray
Pages = list[dict[int, Vector]]  # of each file, by the number of the page


async def embed_files(core: "Core", call: Call, post: Post) -> Pages:
    """Embed pages of files; how many pages a file has is known once its first one is embedded."""
    requests = core.requests()
    pages, _ = as_list("pages", [1] if call.pages is None else call.pages, (int,))
    numbers = sorted({check_count("pages", page, at_least=1) for page in pages})
    files = await in_thread(lambda: [*map(_read, call.items)])
    left = [PdfPage(file, number) for file in files for number in numbers]
    while left:
        vectors, _ = await requests.embed(replace(call, name="pages", items=left), post)
        for place, page in enumerate(left):
            page.file.vectors[page.number] = cast(Vector, vectors[place])
        rest = [(file, range(len(file.vectors) + 1, file.n_pages + 1)) for file in files if call.pages is None]
        left = [PdfPage(file, number) for file, numbers in rest for number in numbers]
    return [file.vectors for file in files]


def _read(source: Any) -> PdfFile:
    try:
        content = bytes(source) if isinstance(source, bytes | bytearray) else Path(source).read_bytes()
        return PdfFile(describe(source), content)
    except (OSError, ValueError, TypeError) as error:
        raise ArgumentError(f"files: {describe(source)} cannot be read ({error}); pass paths or bytes") from error
