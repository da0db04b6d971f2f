"""What is embedded: texts of an exact number of tokens, images of three sizes. Made on the spot, none like another."""

import io
import math
import random
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageDraw, ImageFilter, ImageFont
from tokenizers import Tokenizer

PREFIX = "Query: "
TEXT_TOKENS = (16, 128, 512, 4096, 32000)  # the prefix included
MIXED = "mixed"
MIXED_MEDIAN, MIXED_SIGMA = 150, 1.0  # of the lognormal law
MIXED_BLOCK = 16  # texts have all lengths once: 23 to 966 tokens, 233 in the mean
PIXELS_PER_TOKEN_SIDE = 28
IMAGE_PROMPT_TOKENS = 11
# Width and height; 640 x 480 is scaled to 644 x 476 by every side, 391 image tokens.
IMAGES = {"thumbnail": (224, 224), "photo": (640, 480), "page": (672, 896)}
WORDS = """
the of and to in a is that for it as was with be by on not he his but at are this have from or had an they which one you
were her all their there been if more when will would who so no out up into than them only some time year river valley
glacier station harbour ledger morning evidence quarter measure pressure winter letter engine garden contract invoice
figure table chapter section appendix method result sample signal frequency current voltage
""".split()  # noqa: SIM905 - shorter so


@dataclass(frozen=True)
class Inputs:
    """Items of one kind.

    Attributes:
        name: "512", "mixed", "page".
        kind: "text" or "image".
        items: texts without prefix, or the bytes of image files.
        n_tokens: of each item's whole prompt.
        grids: of each image its patches, down and across; None for a text.
    """

    name: str
    kind: str
    items: Sequence[str] | Sequence[bytes]
    n_tokens: Sequence[int]
    grids: Sequence[tuple[int, int] | None]

    def first(self, n_items: int) -> "Inputs":
        """Return so many of them, from the start again where there are fewer."""
        places = [i % len(self.items) for i in range(n_items)]
        items, n_tokens, grids = ([each[i] for i in places] for each in (self.items, self.n_tokens, self.grids))
        return Inputs(self.name, self.kind, items, n_tokens, grids)


def make_inputs(checkpoint: Path, name: str, n_items: int, start: int = 0) -> Inputs:
    """Make items by the name of their size; other ones for another `start`."""
    if name in IMAGES:
        width, height = IMAGES[name]
        grid = (2 * round(height / PIXELS_PER_TOKEN_SIDE), 2 * round(width / PIXELS_PER_TOKEN_SIDE))
        n_tokens = grid[0] * grid[1] // 4 + IMAGE_PROMPT_TOKENS
        items = [make_image(name, start + i) for i in range(n_items)]
        return Inputs(name, "image", items, [n_tokens] * n_items, [grid] * n_items)
    lengths = mixed_lengths(n_items) if name == MIXED else [int(name)] * n_items
    return Inputs(name, "text", make_texts(checkpoint, lengths, start), lengths, [None] * n_items)


def mixed_lengths(n_items: int) -> list[int]:
    """Give lengths as texts of a real corpus have them, many short ones and a few long ones, always in the same order.

    Whole blocks have one mean, so that sides which embed different numbers of texts can be compared.
    """
    law = statistics.NormalDist(math.log(MIXED_MEDIAN), MIXED_SIGMA)
    block = [round(math.exp(law.inv_cdf((i + 0.5) / MIXED_BLOCK))) for i in range(MIXED_BLOCK)]
    random.Random(0).shuffle(block)  # noqa: S311 - no secret
    return [block[i % MIXED_BLOCK] for i in range(n_items)]


def make_texts(checkpoint: Path, lengths: Sequence[int], seed: int = 0) -> list[str]:
    """Make a text of each length in tokens, prefix included, in the checkpoint's own vocabulary.

    Raises:
        ValueError: no such text was found.
    """
    tokenizer = Tokenizer.from_file(str(checkpoint / "tokenizer.json"))
    drawn = random.Random(seed)  # noqa: S311 - no secret

    def count(text: str) -> int:
        return len(tokenizer.encode(PREFIX + text, add_special_tokens=False).ids)

    return [_make_text(tokenizer, count, length, drawn) for length in lengths]


def _make_text(tokenizer: Tokenizer, count: Callable[[str], int], n_tokens: int, drawn: random.Random) -> str:
    for _ in range(20):
        words = " ".join(drawn.choices(WORDS, k=n_tokens))
        offsets = tokenizer.encode(PREFIX + words, add_special_tokens=False).offsets
        text = words[: offsets[min(n_tokens, len(offsets)) - 1][1] - len(PREFIX)]
        for _ in range(2 * n_tokens):  # a cut within a word may have made other tokens of it
            n_found = count(text)
            if n_found == n_tokens:
                return text
            text = text[:-1] if n_found > n_tokens else text + drawn.choice(" .,;")
    raise ValueError(f"no text of {n_tokens} tokens was found")


def make_image(name: str, number: int) -> bytes:
    """Make an image file: a page of lines of text as PNG, or shapes and noise as JPEG; another one for each number."""
    width, height = IMAGES[name]
    drawn = random.Random(number)  # noqa: S311 - no secret
    file = io.BytesIO()
    if name == "page":
        _draw_page(width, height, drawn).save(file, "PNG", compress_level=3)
    else:
        _draw_photo(width, height, drawn).save(file, "JPEG", quality=90)
    return file.getvalue()


def _draw_page(width: int, height: int, drawn: random.Random) -> Image.Image:
    image = Image.new("RGB", (width, height), "white")
    draw, font = ImageDraw.Draw(image), ImageFont.load_default(13)
    draw.text((48, 40), " ".join(drawn.choices(WORDS, k=5)).title(), "black", ImageFont.load_default(24))
    for top in range(90, height - 250, 18):
        draw.text((48, top), " ".join(drawn.choices(WORDS, k=14)), "black", font)
    for number in range(12):  # a chart
        left = 60 + 46 * number
        draw.rectangle((left, height - 40 - drawn.randrange(20, 160), left + 30, height - 40), _colour(drawn))
    return image


def _draw_photo(width: int, height: int, drawn: random.Random) -> Image.Image:
    image = Image.new("RGB", (width, height), _colour(drawn))
    draw = ImageDraw.Draw(image)
    for _ in range(25):
        left, top = drawn.randrange(width), drawn.randrange(height)
        draw.ellipse((left, top, left + drawn.randrange(20, 200), top + drawn.randrange(20, 200)), _colour(drawn))
    noise = Image.frombytes("L", (width, height), drawn.randbytes(width * height)).convert("RGB")
    return Image.blend(image.filter(ImageFilter.GaussianBlur(2)), noise, 0.12)


def _colour(drawn: random.Random) -> tuple[int, int, int]:
    red, green, blue = (drawn.randrange(256) for _ in range(3))
    return red, green, blue
