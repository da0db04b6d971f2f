"""Two PDF files to try the search with: a report with a chart, and a timetable. All figures in them are made up."""

import textwrap
from pathlib import Path

from matplotlib.backends.backend_pdf import PdfPages
from matplotlib.figure import Figure

A5 = (5.83, 8.27)  # inches
_NO_DATE = {"CreationDate": None}  # the same files each time, so that they are indexed once

_REPORT = """\
The sea at our coast stands 99 mm higher than in 1993, when the measurements began. For ten years it rose by about \
3 mm a year, since then by nearly 5.

Spring tides now reach the quay of the old harbour four or five times a year. The council has the wall raised by \
60 cm until 2027; the fish market moves behind it.

Houses on the north beach are no longer insured against floods. Their owners may sell to the town, which leaves the \
land to the dunes."""
_LEVELS_MM = {1995: 8, 2000: 24, 2005: 39, 2010: 52, 2015: 78, 2020: 99}
_FERRIES = [
    ["Harbour", "North island", "Lighthouse", "Harbour"],
    ["06:40", "07:25", "07:50", "08:35"],
    ["09:10", "09:55", "10:20", "11:05"],
    ["12:30", "13:15", "13:40", "14:25"],
    ["15:45", "16:30", "16:55", "17:40"],
    ["19:00", "19:45", "—", "20:30"],
]
_FARES = """\
Adults pay 14 there and back, children under 12 travel free. A bicycle costs 5. Dogs are welcome on deck.

In a gale the boats stay in the harbour; tickets are then valid on the next day."""


def write_samples(folder: Path) -> list[Path]:
    """Write the files; give their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    pages = {"sea-level.pdf": [_report(), _chart()], "ferries.pdf": [_timetable(), _fares()]}
    for name, figures in pages.items():
        with PdfPages(folder / name, metadata=_NO_DATE) as file:
            for figure in figures:
                file.savefig(figure)
    return [folder / name for name in pages]


def _sheet(title: str) -> Figure:
    figure = Figure(figsize=A5)
    figure.text(0.1, 0.91, title, fontsize=18, weight="bold")
    return figure


def _write(figure: Figure, text: str, top: float) -> None:
    paragraphs = ["\n".join(textwrap.wrap(paragraph, 42)) for paragraph in text.split("\n\n")]
    figure.text(0.1, top, "\n\n".join(paragraphs), fontsize=12, va="top", linespacing=1.6)


def _report() -> Figure:
    figure = _sheet("The sea comes closer")
    _write(figure, _REPORT, 0.86)
    return figure


def _chart() -> Figure:
    figure = _sheet("Sea level, mm above 1993")
    axes = figure.add_axes((0.13, 0.3, 0.77, 0.55))
    bars = axes.bar([str(year) for year in _LEVELS_MM], list(_LEVELS_MM.values()), color="#28649f")
    axes.bar_label(bars, fontsize=10)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=10)
    figure.text(0.1, 0.22, "Gauge at the old harbour, mean of each year.", fontsize=10)
    return figure


def _timetable() -> Figure:
    figure = _sheet("Ferries, every day")
    axes = figure.add_axes((0.1, 0.45, 0.8, 0.42))
    axes.axis("off")
    table = axes.table(_FERRIES[1:], colLabels=_FERRIES[0], loc="upper center", cellLoc="center")
    table.auto_set_font_size(False)
    table.set_fontsize(10)
    table.scale(1, 2.6)
    for column in range(len(_FERRIES[0])):
        table[0, column].set_facecolor("#dce6f0")
    return figure


def _fares() -> Figure:
    figure = _sheet("Fares and rules")
    _write(figure, _FARES, 0.86)
    return figure
