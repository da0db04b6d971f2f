"""From items to token ids: prefixes, the image prompt, truncation, the parts of a late-chunked text.

Special tokens in texts are read as plain characters, so that no text can change the structure of its prompt:
`<|image_pad|>` in a text is never the special token.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass

from PIL import Image
from tokenizers import Tokenizer

from jina_v4_serve.api.errors import ApiError
from jina_v4_serve.pooling import Span

LATE = "input, late-chunked into one text,"
CHUNK_JOINER = " "  # between the parts of a late-chunked text; the hosted service's is not published

OpenImage = Callable[[], AbstractAsyncContextManager[Image.Image]]


@dataclass(frozen=True)
class Prompt:
    """One sequence for the model.

    Attributes:
        token_ids: the whole sequence; an image is one token, which vLLM repeats.
        image: opens the picture of an image prompt. Closing it frees the decoded picture, which has megabytes.
        spans: the spans whose means are the dense vectors; None is the published span.
    """

    token_ids: list[int]
    image: OpenImage | None = None
    spans: tuple[Span, ...] | None = None


class PromptMaker:
    """Makes prompts with one checkpoint's tokenizer."""

    def __init__(self, tokenizer: Tokenizer, max_length: int, image_prompt: str) -> None:
        """Prepare the tokenizer.

        Args:
            tokenizer: the checkpoint's, of which a copy is used.
            max_length: the tokens of the longest sequence that is served.
            image_prompt: the prompt of an image, in which one token stands for the image.
        """
        self.max_length = max_length
        self._plain = Tokenizer.from_str(tokenizer.to_str())
        self._plain.no_truncation()
        self._plain.no_padding()
        self._image_ids: list[int] = self._plain.encode(image_prompt, add_special_tokens=False).ids
        self._plain.encode_special_tokens = True
        # A token covers at most as many characters as it has bytes, and its name has one character per byte.
        self._max_token_chars = max(map(len, tokenizer.get_vocab()))

    def image(self, image: OpenImage) -> Prompt:
        """Make the prompt of an image."""
        return Prompt(self._image_ids, image)

    def texts(
        self, texts: Sequence[str], prefix: str, max_length: int | None, names: Sequence[str] = ()
    ) -> list[Prompt]:
        """Make the prompts of texts.

        Args:
            texts: without prefix.
            prefix: precedes each text.
            names: the name of each text in an error: `input[3]`.
            max_length: longer texts are cut to this many tokens; None refuses texts over the server's limit.

        Raises:
            ApiError: 400 for a text over the limit; the message names the text and says by how much.
        """
        limit = self.max_length if max_length is None else max_length
        bound = limit * self._max_token_chars
        if max_length is None:
            for i, text in enumerate(texts):
                if len(prefix) + len(text) > bound:
                    raise self._too_long(names[i] if names else "input")
        starts = [(prefix + text)[:bound] for text in texts]  # the limit's tokens cover no more characters than these
        encoded = [encoding.ids for encoding in self._plain.encode_batch_fast(starts, add_special_tokens=False)]
        if max_length is None:
            for i, ids in enumerate(encoded):
                if len(ids) > limit:
                    raise self._too_long(names[i] if names else "input", len(ids))
        return [Prompt(ids[:limit]) for ids in encoded]

    def chunks(self, texts: Sequence[str], prefix: str) -> Prompt:
        """Make one prompt of the parts of a text, with a span for each part.

        The prefix comes once and belongs to the first part, so that a single part is embedded like any other text.

        Raises:
            ApiError: 400 when the parts together are over the limit.
        """
        parts = [prefix + texts[0], *(CHUNK_JOINER + text for text in texts[1:])]
        if sum(map(len, parts)) > self.max_length * self._max_token_chars:
            raise self._too_long(LATE)
        token_ids: list[int] = []
        spans: list[Span] = []
        for encoding in self._plain.encode_batch_fast(parts, add_special_tokens=False):
            spans.append(Span(len(token_ids), len(token_ids) + len(encoding.ids)))
            token_ids += encoding.ids
        if len(token_ids) > self.max_length:
            raise self._too_long(LATE, len(token_ids))
        return Prompt(token_ids, spans=tuple(spans))

    def _too_long(self, what: str, n_tokens: int | None = None) -> ApiError:
        has, by = f"over {self.max_length}", ""  # it was not tokenised
        if n_tokens is not None:
            has, by = str(n_tokens), f", {n_tokens - self.max_length} over"
        advice = "Send fewer or shorter parts" if what == LATE else "Shorten it, or send truncate: true"
        message = f"{what} has {has} tokens with its prefix; the limit is {self.max_length}{by}. {advice}"
        return ApiError(400, message, code="INPUT_TOKEN_LIMIT_EXCEEDED", param=what.partition(",")[0])
