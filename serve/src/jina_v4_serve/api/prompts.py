"""From items to token ids: prefixes, the image prompt, truncation, the parts of a late-chunked text.

Texts are read as plain text: `<|image_pad|>` in a text is those characters, never the special token, so that no text
can change the structure of its prompt.
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
        token_ids: of the whole sequence; an image is one token in it, which vLLM repeats.
        image: opens the picture of an image prompt. It is let go of when it is closed: decoded, one has megabytes.
        spans: what dense vectors are means of; None is the published span.
    """

    token_ids: list[int]
    image: OpenImage | None = None
    spans: tuple[Span, ...] | None = None


class PromptMaker:
    """Makes prompts with one checkpoint's tokenizer."""

    def __init__(self, tokenizer: Tokenizer, max_length: int, image_prompt: str) -> None:
        """Prepare the tokenizer.

        Args:
            tokenizer: the checkpoint's; it is copied.
            max_length: the longest sequence that is served, in tokens.
            image_prompt: of an image, with one token in its place.
        """
        self.max_length = max_length
        self._plain = Tokenizer.from_str(tokenizer.to_str())
        self._plain.no_truncation()
        self._plain.no_padding()
        self._image_ids: list[int] = self._plain.encode(image_prompt, add_special_tokens=False).ids
        self._plain.encode_special_tokens = True
        # A token covers at most as many characters as it has bytes, and its name has one character for each byte.
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
            prefix: what precedes each.
            names: what each is called in an error: `input[3]`.
            max_length: cut to so many tokens; None refuses what is over the server's limit.

        Raises:
            ApiError: 400 for a text over the limit, naming it and by how much.
        """
        limit = self.max_length if max_length is None else max_length
        bound = limit * self._max_token_chars
        if max_length is None:
            for i, text in enumerate(texts):
                if len(prefix) + len(text) > bound:
                    raise self._too_long(names[i] if names else "input")
        whole = [(prefix + text)[:bound] for text in texts]  # no more can be left of it, so no more is read
        encoded = [encoding.ids for encoding in self._plain.encode_batch_fast(whole, add_special_tokens=False)]
        if max_length is None:
            for i, ids in enumerate(encoded):
                if len(ids) > limit:
                    raise self._too_long(names[i] if names else "input", len(ids))
        return [Prompt(ids[:limit]) for ids in encoded]

    def chunks(self, texts: Sequence[str], prefix: str) -> Prompt:
        """Make one prompt of texts that are parts of one text, with a span for each.

        The prefix comes once, and counts with the first part: a single part is embedded like any other text.

        Raises:
            ApiError: 400 when all of it is over the limit.
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
        has, by = f"over {self.max_length}", ""  # before it is tokenised, no more is known
        if n_tokens is not None:
            has, by = str(n_tokens), f", {n_tokens - self.max_length} over"
        advice = "Send fewer or shorter parts" if what == LATE else "Shorten it, or send truncate: true"
        message = f"{what} has {has} tokens with its prefix; the limit is {self.max_length}{by}. {advice}"
        return ApiError(400, message, code="INPUT_TOKEN_LIMIT_EXCEEDED", param=what.partition(",")[0])
