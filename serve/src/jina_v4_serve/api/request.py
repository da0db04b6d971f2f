"""The inner request, which every form is read into, with all conflicts settled; and the limits of this server."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

from jina_v4_serve.checkpoint import Prompts

Encoding = Literal["float", "base64", "int8", "uint8", "binary", "ubinary"]
Output = Literal["dense", "multivector"]
FIRST, LAST = 0, 999  # priorities, as vLLM and Cohere have them: the lower is computed first


@dataclass(frozen=True)
class Item:
    """One thing to embed: a text, or where an image or a PDF file comes from.

    Attributes:
        text: without prefix.
        image: URL, data URI or base64.
        pdf: the same; each of its pages is embedded as an image.
        path: its place in the body, for messages.
        pages: ranges of the PDF file's pages, from 1, both ends included; an end that is None is the last page.
    """

    text: str | None = None
    image: str | None = None
    path: str = "input"
    pdf: str | None = None
    pages: tuple[tuple[int, int | None], ...] = ((1, None),)


@dataclass(frozen=True)
class Limits:
    """The limits of this server.

    Attributes:
        tasks: the tasks it serves; of several, each request names its own.
        prompts: of each task, before its items.
        model_names: names beside the model's own that it answers to.
        max_length: the longest sequence in tokens.
        min_pixels: the smallest image area; smaller images are scaled up to it.
        max_pixels: the largest image area.
        max_dimensions: of a dense vector, which may be cut to any size.
        max_items: items of one request.
    """

    tasks: tuple[str, ...]
    prompts: Mapping[str, Prompts]
    model_names: frozenset[str]
    max_length: int
    min_pixels: int
    max_pixels: int
    max_dimensions: int
    max_items: int


@dataclass(frozen=True)
class EmbedRequest:
    """One request, whatever form it came in.

    Attributes:
        task: whose adapter and projector make its vectors.
        items: in order.
        prompt_name: of texts: query, passage or none.
        prefix: what precedes every text.
        outputs: dense, multivector or both.
        encodings: how vectors are written in a JSON reply.
        dimensions: of dense vectors; None for all.
        max_length: texts are cut to so many tokens; None refuses longer ones than the server's limit.
        max_pixels: images are scaled down to so many pixels; None is the server's limit.
        late_chunking: the texts are parts of one.
        priority: FIRST to LAST; what waits is computed in this order.
        ignored: names of fields that are not known here.
        left_out: paths of system instructions, which are not part of the model's prompt.
        pool_factor: so many rows of a multi-vector become one, on average; None leaves them.
    """

    task: str
    model: str
    items: Sequence[Item]
    prompt_name: str
    prefix: str
    outputs: frozenset[Output] = frozenset({"dense"})
    encodings: Sequence[Encoding] = ("float",)
    dimensions: int | None = None
    max_length: int | None = None
    max_pixels: int | None = None
    late_chunking: bool = False
    priority: int = FIRST
    ignored: Sequence[str] = ()
    left_out: Sequence[str] = ()
    pool_factor: int | None = None

    @property
    def parts(self) -> tuple["EmbedRequest", ...]:
        """What is embedded together, each part with a prompt of its own."""
        return (self,)

    @property
    def prompts_used(self) -> list[str]:
        """Name the prompts that its items get: that of its texts, and `image`."""
        of_texts = {item.text is not None for item in self.items}
        return [name for name, used in ((self.prompt_name, True), ("image", False)) if used in of_texts]

    @cached_property
    def prefixed(self) -> list[str]:
        """Name the texts that begin with the prefix already, which is put before them all the same."""
        items = self.items[:1] if self.late_chunking else self.items
        return [item.path for item in items if self.prefix and (item.text or "").startswith(self.prefix)]


@dataclass(frozen=True)
class RankRequest:
    """Queries and the documents that are scored for them, both of one task and with one output, which is compared.

    Attributes:
        queries: one for all documents, or one for each.
        documents: in order.
        top_n: how many of the best documents are returned; None for all.
        return_documents: whether each result holds its document; None for texts only.
    """

    queries: EmbedRequest
    documents: EmbedRequest
    top_n: int | None = None
    return_documents: bool | None = None

    @property
    def task(self) -> str:
        """Whose adapter and projector make its vectors."""
        return self.queries.task

    @property
    def parts(self) -> tuple[EmbedRequest, ...]:
        """What is embedded together, each part with a prompt of its own."""
        return (self.queries, self.documents)
