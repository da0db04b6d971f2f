"""The request that every form is read into, without contradictions; and the limits of this server."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

from jina_v4_serve.checkpoint import Prompts

Encoding = Literal["float", "base64", "int8", "uint8", "binary", "ubinary"]
Output = Literal["dense", "multivector"]
FIRST, LAST = 0, 999  # priorities as in vLLM and Cohere: lower ones are computed first


@dataclass(frozen=True)
class Item:
    """A text, an image or a PDF file to embed.

    Attributes:
        text: without prefix.
        image: URL, data URI or base64.
        pdf: URL, data URI or base64; each page is embedded as an image.
        path: of the item in the body, for messages.
        pages: ranges of the PDF file's pages, from 1, both ends included; None is the last page.
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
        tasks: the served tasks; if there are several, each request must name its task.
        prompts: by task.
        model_names: names that requests may use besides the model's own.
        max_length: the tokens of the longest sequence.
        min_pixels: the smallest image area; smaller images are scaled up to it.
        max_pixels: the largest image area; larger images are scaled down to it.
        max_dimensions: of a dense vector.
        max_items: of one request.
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
    """A request to embed items, the same for all forms.

    Attributes:
        task: selects adapter and projector.
        model: the name in the reply.
        items: in order.
        prompt_name: of texts: query, passage or none.
        prefix: precedes every text.
        outputs: dense, multivector or both.
        encodings: how vectors are written in a JSON reply.
        dimensions: of dense vectors; None for all.
        max_length: longer texts are cut to this many tokens; None refuses texts over the server's limit.
        max_pixels: larger images are scaled down to this area; None is the server's limit.
        late_chunking: whether the texts are parts of one text.
        priority: FIRST to LAST; waiting requests are computed in this order.
        ignored: the names of unknown fields.
        left_out: the paths of system instructions, which the model's prompt does not have.
        pool_factor: how many rows of a multi-vector become one, on average; None keeps all.
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
        """The requests to embed together, each with its own prompt."""
        return (self,)

    @property
    def prompts_used(self) -> list[str]:
        """The names of the prompts of its items: the one of its texts, and `image`."""
        of_texts = {item.text is not None for item in self.items}
        return [name for name, used in ((self.prompt_name, True), ("image", False)) if used in of_texts]

    @cached_property
    def prefixed(self) -> list[str]:
        """The paths of texts that already begin with the prefix, which is added all the same."""
        items = self.items[:1] if self.late_chunking else self.items
        return [item.path for item in items if self.prefix and (item.text or "").startswith(self.prefix)]


@dataclass(frozen=True)
class RankRequest:
    """Queries and documents to score. Both have the same task and the same single output, which is compared.

    Attributes:
        queries: one for all documents, or one for each.
        documents: in order.
        top_n: how many of the best documents to return; None for all.
        return_documents: whether each result holds its document; None for texts only.
    """

    queries: EmbedRequest
    documents: EmbedRequest
    top_n: int | None = None
    return_documents: bool | None = None

    @property
    def task(self) -> str:
        """The task of queries and documents."""
        return self.queries.task

    @property
    def parts(self) -> tuple[EmbedRequest, ...]:
        """The requests to embed together, each with its own prompt."""
        return (self.queries, self.documents)
