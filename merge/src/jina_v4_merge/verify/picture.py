"""The picture of the canary, drawn here, and what becomes of its pixels before the model sees them.

Resizing is torch's, as in the published code's image processor. The rest is written out, so that a mistake in an image
processor that the server uses is not made twice.
"""

import struct
import zlib
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812 - torch's own name for it
from numpy.typing import NDArray

Pixels = NDArray[np.uint8]

WIDTH, HEIGHT = 352, 275
# With this limit the picture is scaled down to 252 x 196: 9 x 7 tokens, and two by three windows of at most 4 x 4.
MAX_PIXELS = 50176
SCALED = (196, 252)


def draw() -> Pixels:
    """Return the picture, (height, width, 3): colours that change in both directions, a disc, and lines.

    The lines are so narrow that every way of resizing makes something else of them.
    """
    y, x = np.mgrid[:HEIGHT, :WIDTH]
    picture = np.stack([x // 8 * 5, y // 8 * 6, 255 - y // 8 * 4], axis=-1).astype(np.uint8)
    picture[(x - 90) ** 2 + (y - 140) ** 2 < 70**2] = (250, 240, 20)
    picture[(x > 190) & (y > 150) & (x % 7 < 3)] = (20, 0, 40)
    picture[(x > 190) & (y < 130) & (y % 5 < 2)] = (240, 250, 255)
    return picture


def png(picture: Pixels) -> bytes:
    """Return a picture, (height, width, 3), as a PNG file."""
    height, width, _ = picture.shape
    rows = np.diff(picture.reshape(height, -1), axis=0, prepend=np.uint8(0))  # the filter "up", number 2
    lines = np.concatenate([np.full((height, 1), 2, np.uint8), rows], axis=1)
    chunks = (
        (b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)),  # 8 bits a colour, RGB
        (b"IDAT", zlib.compress(lines.tobytes(), 9)),
        (b"IEND", b""),
    )
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in chunks
    )


def patches(picture: Pixels, size: tuple[int, int], settings: Mapping[str, Any]) -> torch.Tensor:
    """Return the model's input for a picture, (n_patches, values of a patch), patches of one token side by side.

    Args:
        picture: (height, width, 3).
        size: Height and width to which it is scaled; multiples of the side of a token.
        settings: Of the checkpoint's image processor, as of `reading.configs.pixel_settings`.
    """
    side, merge = settings["patch_size"], settings["merge_size"]
    scaled = F.interpolate(torch.from_numpy(picture).permute(2, 0, 1)[None], size, mode="bicubic", antialias=True)
    mean, std = (torch.tensor(settings[f"image_{name}"]).view(3, 1, 1) for name in ("mean", "std"))
    values: torch.Tensor = (scaled[0] * settings["rescale_factor"] - mean) / std  # (3, height, width)
    height, width = (n_pixels // side // merge for n_pixels in size)  # in tokens
    values = values.reshape(3, height, merge, side, width, merge, side)
    values = values.permute(1, 4, 2, 5, 0, 3, 6)  # (height, width, merge, merge, 3, side, side)
    frames = values[:, :, :, :, :, None].expand(-1, -1, -1, -1, -1, settings["temporal_patch_size"], -1, -1)
    return frames.reshape(height * width * merge**2, -1)


def positions(n_before: int, height: int, width: int, n_after: int) -> torch.Tensor:
    """Return time, row and column of every token of a prompt with one image, (3, 1, n_tokens).

    Args:
        n_before: Tokens before the image.
        height: Of the image in tokens.
        width: Of the image in tokens.
        n_after: Tokens after the image.
    """
    before = torch.arange(n_before).expand(3, -1)
    image = n_before + torch.stack(torch.meshgrid(*map(torch.arange, (1, height, width)), indexing="ij")).flatten(1)
    after = n_before + max(height, width) + torch.arange(n_after).expand(3, -1)
    return torch.cat([before, image, after], dim=1)[:, None]
