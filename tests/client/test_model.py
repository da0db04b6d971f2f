"""The facts of the published model that the client holds as well."""

from typing import Any

import pytest
from jina_v4_client._model import count_image_tokens
from PIL import Image


# What smart_resize of transformers 5.19 gives with min_pixels 3136.
@pytest.mark.parametrize(
    ("width", "height", "max_pixels", "n_tokens"),
    [
        (1, 1, 602112, 4),
        (28, 28, 602112, 4),
        (42, 14, 602112, 8),
        (70, 70, 602112, 4),  # 2.5 patches a side are 2: half to even
        (98, 98, 602112, 16),  # and 3.5 are 4
        (200, 1, 602112, 29),
        (5000, 25, 602112, 179),
        (4000, 3000, 602112, 768),
        (4000, 3000, 12845056, 15301),
        (100, 100, 3136, 4),
        (5000, 25, 3136, 28),
    ],
)
def test_image_tokens_are_counted_as_the_image_processor_does(
    width: int, height: int, max_pixels: int, n_tokens: int
) -> None:
    assert count_image_tokens(width, height, max_pixels) == n_tokens


def test_image_tokens_are_counted_as_in_the_golden_rows(golden: Any) -> None:
    for index, path in enumerate(golden.images):
        n_rows = len(golden.rows[f"retrieval/image/{index}/multi"])
        with Image.open(path) as image:
            assert count_image_tokens(image.width, image.height, 602112) + 11 == n_rows
