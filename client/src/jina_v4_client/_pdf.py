"""PDF files: read here, rendered by a server of ours, and embedded page by page."""

import base64
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from jina_v4_client._calls import Call, as_list, check_count
from jina_v4_client._images import describe
from jina_v4_client._loop import in_thread
from jina_v4_client._progress import Post
from jina_v4_client.errors import ArgumentError
from jina_v4_client.results import Vector

if TYPE_CHECKING:
    from jina_v4_client._send import Core

PdfSource = str | os.PathLike[str] | bytes
Pages = list[dict[int, Vector]]  # of each file, by the number of the page


@dataclass(eq=False)
class PdfFile:
    """A PDF file, with what a server has said of it so far: how many pages it has, and vectors by page."""

    name: str
    content: bytes
    n_pages: int = 0
    vectors: dict[int, Vector] = field(default_factory=dict)

    def item(self, pages: Sequence["PdfPage"]) -> dict[str, str]:
        """Write some of its pages as the item of a request."""
        content = base64.b64encode(self.content).decode("ascii")
        return {"pdf": content, "pages": ",".join(str(page.number) for page in pages)}


@dataclass(frozen=True)
class PdfPage:
    """A page of a file; the first is number 1."""

    file: PdfFile
    number: int


async def embed_files(core: "Core", call: dict[str, Any], files: Any, pages: Sequence[int] | None, post: Post) -> Pages:
    """Embed pages of files; how many pages a file has is known once its first one is embedded."""
    requests = core.requests()
    requested, _ = as_list("pages", [1] if pages is None else pages, (int,))
    numbers = sorted({check_count("pages", page, at_least=1) for page in requested})
    sources, _ = as_list("files", files, (str, os.PathLike, bytes))
    read = await in_thread(lambda: [*map(_read, sources)])
    left = [PdfPage(file, number) for file in read for number in numbers]
    while left:
        vectors, _ = await core.embed(Call(items=[*left], **call), post, requests)
        for place, page in enumerate(left):
            page.file.vectors[page.number] = cast(Vector, vectors[place])
        rest = [(file, range(len(file.vectors) + 1, file.n_pages + 1)) for file in read if pages is None]
        left = [PdfPage(file, number) for file, numbers in rest for number in numbers]
    return [file.vectors for file in read]


def _read(source: Any) -> PdfFile:
    try:
        return PdfFile(describe(source), source if isinstance(source, bytes) else Path(source).read_bytes())
    except (OSError, ValueError, TypeError) as error:
        raise ArgumentError(f"files: {describe(source)} cannot be read ({error}); pass paths or bytes") from error
