"""The picture: a page, and where on it each word of the query was found."""

import math
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.figure import Figure
from PIL import Image, ImageOps

from document_search.searching import Map, WordMap

DPI = 100
_PAGE_AREA = 40.0  # square inches: about 5.3 x 7.5 of an A4 page
_BAR_WIDTH, _TITLES_HEIGHT = 1.0, 0.8  # inches
_COLORS = colormaps["YlOrRd"]
_MAX_TITLE, _MAX_NAME = 100, 20  # letters


def draw(page: Image.Image, maps: Sequence[WordMap], title: str, path: Path) -> None:
    """Draw a page beside the similarity maps of a query.

    Each map is coloured from its own lowest to its own highest value, which stand above it: the colours show where, the
    numbers how much.

    Args:
        page: as it was embedded, of any size.
        maps: from `find_on_page`.
        title: of the picture.
        path: of the PNG file.
    """
    n_rows, n_columns = _arrangement(len(maps))
    aspect = page.width / page.height
    height = math.sqrt(_PAGE_AREA / aspect)  # inches
    width = height * aspect
    maps_width = n_columns * width / n_rows + _BAR_WIDTH
    figure = Figure(figsize=(width + maps_width, height + _TITLES_HEIGHT), dpi=DPI, layout="constrained")
    subfigures: Any = figure.subfigures(1, 2, width_ratios=[width, maps_width])  # typed as one, is an array of them
    left, right = subfigures
    axes = left.subplots()
    axes.imshow(page)
    _frame(axes)
    grid = right.subplots(n_rows, n_columns, squeeze=False)
    pale = ImageOps.grayscale(page)
    for i, axes in enumerate(grid.flat):
        if i >= len(maps):
            axes.axis("off")
            continue
        name, values = maps[i].name, maps[i].values
        _overlay(axes, pale, values)
        _frame(axes)
        bounds = f"{values.min():.2f} to {values.max():.2f}"
        axes.set_title(f"{_short(name, _MAX_NAME)}\n{bounds}", fontsize=9, parse_math=False)
    bar = right.colorbar(ScalarMappable(cmap=_COLORS), ax=grid, shrink=0.4, ticks=[0, 1])
    bar.ax.set_yticklabels(["lowest", "highest"], fontsize=9)
    figure.suptitle(_short(title, _MAX_TITLE), fontsize=11, parse_math=False)
    with warnings.catch_warnings():
        # Letters that the font lacks are drawn as boxes.
        warnings.filterwarnings("ignore", "Glyph .* missing from font", UserWarning)
        figure.savefig(path, format="png")


def _arrangement(n_panels: int) -> tuple[int, int]:
    """Give the rows and columns of the maps beside the page."""
    n_rows = 1 if n_panels == 1 else 2 if n_panels <= 6 else 3
    return n_rows, math.ceil(n_panels / n_rows)


def _overlay(axes: Axes, page: Image.Image, values: Map) -> None:
    """Lay a map (rows, columns) over a page: the higher a value, the more colour and the less page."""
    spread = float(np.ptp(values))
    share = (values - values.min()) / (spread or 1.0)  # (rows, columns), 0 to 1
    axes.imshow(page, cmap="gray", vmin=0, vmax=255)
    # Patches have sharp edges: nothing is known of what lies within one.
    extent = (-0.5, page.width - 0.5, page.height - 0.5, -0.5)
    axes.imshow(share, cmap=_COLORS, vmin=0, vmax=1, alpha=0.7 * share, extent=extent, interpolation="nearest")


def _frame(axes: Axes) -> None:
    axes.set_xticks([])
    axes.set_yticks([])
    for spine in axes.spines.values():
        spine.set_color("#bbbbbb")


def _short(text: str, n_letters: int) -> str:
    text = "".join(letter if letter.isprintable() else "\N{REPLACEMENT CHARACTER}" for letter in text)
    return text if len(text) <= n_letters else text[: n_letters - 1] + "…"
