"""The pictures of a report, as SVG: their text can be selected, and they need no other file.

Each is narrow enough for a phone held upright. An arm has the same colour in all pictures; plain decoding is
grey. Needs matplotlib, which the extra `bench` installs.
"""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping, Sequence
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from .arm import PLAIN

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Figures = Mapping[str, Any]
# Okabe and Ito's colours, which colour-blind readers and grey print can tell apart; GREY is plain decoding's.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000", "#8C6D1F")
GREY = "#767676"
WIDTH = 4.9  # inches
ROW = 0.26  # inches of a row in a chart of rows
LETTERS = 28  # of an arm's name, at most: adapters can be long paths
STYLE: Any = {
    "svg.fonttype": "none",
    "svg.hashsalt": "selfdraft",
    "font.family": "sans-serif",
    "font.sans-serif": ["system-ui", "Helvetica Neue", "Arial", "DejaVu Sans"],
    "font.size": 9,
    "text.parse_math": False,  # names of suites and arms may have dollars
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.6,
    "xtick.major.width": 0.6,
    "ytick.major.width": 0.6,
}


def available() -> bool:
    """Is matplotlib installed?"""
    return find_spec("matplotlib") is not None


def pictures(record: Figures) -> dict[str, str]:
    """All pictures of a report by name, each an <svg> element."""
    import matplotlib

    matplotlib.use("Agg")
    arms = list(dict.fromkeys(name for suite in record["suites"].values() for name in suite["arms"]))
    drawn = iter(COLOURS * (1 + len(arms) // len(COLOURS)))
    colours = {name: GREY if name.partition(":")[0] == PLAIN else next(drawn) for name in arms}
    with matplotlib.rc_context(STYLE):
        return {
            "speed": _svg(_speed(record, colours)),
            "tokens": _svg(_tokens(record, colours)),
            "depth": _svg(_depth(record, colours)),
            "rows": _svg(_rows(record["bound"])),
        }


def parts(record: Figures) -> Iterator[tuple[str, Figures]]:
    """Every suite's arms, and behind it those of its groups."""
    for name, suite in record["suites"].items():
        yield name, suite["arms"]
        for group, arms in suite["groups"].items():
            yield f"{name} / {group}", arms


def _speed(record: Figures, colours: Mapping[str, str]) -> Figure:
    """Each arm against plain decoding, on a scale where twice as fast and half as fast are as far from 1."""
    drawn = [
        (part, {name: one["cut"]["against_plain"] for name, one in arms.items() if _ratio(one)})
        for part, arms in parts(record)
    ]
    figure, axes, places = _chart([(part, list(found)) for part, found in drawn])
    values = []
    for part, found in drawn:
        for name, ratio in found.items():
            y, colour = places[part, name], colours[name]
            low, high = ratio["interval"] or (ratio["median"],) * 2
            axes.plot([low, high], [y, y], color=colour, linewidth=3, alpha=0.4, solid_capstyle="butt")
            axes.plot(ratio["median"], y, "o", color=colour, markersize=5)
            axes.plot(ratio["p10"], y, "|", color=colour, markersize=8)
            values += [low, high, ratio["median"], ratio["p10"]]
    axes.axvline(1, color=GREY, linewidth=0.8)
    _doubling(axes, values)
    axes.set_xlabel("times plain decoding")
    return figure


def _label(name: str) -> str:
    """The name of an arm, without its middle where there is no room for all of it."""
    return name if len(name) <= LETTERS else f"{name[:10]}…{name[11 - LETTERS :]}"


def _ratio(figures: Figures) -> bool:
    return figures["cut"].get("against_plain", {}).get("median") is not None


def _doubling(axes: Axes, values: Sequence[float]) -> None:
    """A scale of halves and doubles that holds the values."""
    import matplotlib.ticker

    axes.set_xscale("log", base=2)
    low, high = min([0.7, *values]), max([1.5, *values])
    axes.set_xlim(low * 0.93, high * 1.07)
    axes.xaxis.set_major_formatter(matplotlib.ticker.FuncFormatter(lambda x, _: f"{x:g}"))
    axes.xaxis.set_minor_locator(matplotlib.ticker.NullLocator())


def _tokens(record: Figures, colours: Mapping[str, str]) -> Figure:
    """Tokens per forward: a bar per step, a ring per request."""
    drawn = [
        (part, {name: one for name, one in suite["arms"].items() if name != one["plain"]})
        for part, suite in record["suites"].items()
    ]
    figure, axes, places = _chart([(part, list(arms)) for part, arms in drawn])
    for part, arms in drawn:
        for name, one in arms.items():
            y, cut = places[part, name], one["cut"]
            axes.barh(y, cut["tokens_per_forward_step"], height=0.6, color=colours[name], alpha=0.75)
            axes.plot(cut["tokens_per_forward_request"], y, "o", mfc="white", mec="black", markersize=4)
    axes.axvline(1, color=GREY, linewidth=0.8)
    axes.set_xlim(left=0)
    axes.set_xlabel("tokens per forward")
    return figure


def _depth(record: Figures, colours: Mapping[str, str]) -> Figure:
    """Acceptance by depth: how many forwards yielded more than d tokens; a panel a suite."""
    import matplotlib.pyplot as plt

    suites = record["suites"]
    lines = (len(suites) + 1) // 2
    figure, grid = plt.subplots(
        lines, 2 if len(suites) > 1 else 1, figsize=(WIDTH, 1.9 * lines + 0.3), sharey=True, squeeze=False
    )
    named: dict[str, Any] = {}
    for axes, (title, suite) in zip(grid.flat, suites.items(), strict=False):
        for name, one in suite["arms"].items():
            shares = one["cut"]["acceptance_by_depth"]
            if shares:
                (named[name],) = axes.plot(
                    range(1, len(shares) + 1), shares, ".-", color=colours[name], linewidth=1, markersize=4
                )
        axes.set_title(title, fontsize=9, loc="left")
        axes.set_ylim(0, 1)
        axes.set_xlabel("d")
    for axes in list(grid.flat)[len(suites) :]:
        axes.set_visible(False)
    grid[0][0].set_ylabel("share of forwards\nwith more than d tokens")
    figure.legend(
        list(named.values()),
        [_label(name) for name in named],
        loc="outside upper center",
        ncols=2,
        frameon=False,
    )
    figure.set_layout_engine("constrained")
    return figure


def _rows(bound: Figures) -> Figure:
    """T(n): what a step of n rows takes, over what reading the weights once takes at best."""
    import matplotlib.pyplot as plt

    once = bound["rows"]["seconds"] * 1e3
    counts = [int(n) for n in bound["rows"]["ratio"]]
    figure, axes = plt.subplots(figsize=(WIDTH, 2.4), layout="constrained")
    times = [once * ratio for ratio in bound["rows"]["ratio"].values()]
    axes.plot(counts, times, "o-", color=COLOURS[0], markersize=4, linewidth=1)
    limit = bound["weight_bytes"] / bound["bandwidth"] * 1e3
    axes.axhline(limit, color=COLOURS[1], linestyle="--", linewidth=1)
    axes.annotate(
        f"bandwidth limit of one forward, {limit:.2g} ms",
        (counts[-1], limit),
        ha="right",
        va="bottom",
        color=COLOURS[1],
    )
    axes.set_xscale("log", base=2)
    axes.set_xticks(counts, [str(n) for n in counts])
    axes.minorticks_off()
    axes.set_ylim(bottom=0)
    axes.set_xlabel("rows of a step, n")
    axes.set_ylabel("T(n), ms")
    return figure


def _chart(
    drawn: Sequence[tuple[str, Sequence[str]]],
) -> tuple[Figure, Axes, Mapping[tuple[str, str], float]]:
    """Axes with a row for each arm of each part, under the part's name; where each row is."""
    import matplotlib.pyplot as plt

    places: dict[tuple[str, str], float] = {}
    marks: list[tuple[float, str]] = []
    y = 0.0
    for part, arms in drawn:
        marks.append((y, part))
        for name in arms:
            y += 1
            places[part, name] = y
        y += 1.2
    figure, axes = plt.subplots(figsize=(WIDTH, ROW * y + 0.6), layout="constrained")
    axes.set_yticks(list(places.values()), [_label(name) for _, name in places])
    axes.tick_params(axis="y", length=0)
    axes.set_ylim(y - 0.6, -0.7)
    axes.spines["left"].set_visible(False)
    for at, part in marks:
        axes.annotate(part, (0, at), xycoords=("axes fraction", "data"), weight="bold", va="center")
    return figure, axes, places


def _svg(figure: Figure) -> str:
    """The element alone, without a size of its own, so that the page decides."""
    import matplotlib.pyplot as plt

    out = io.StringIO()
    figure.savefig(out, format="svg", metadata={"Date": None, "Creator": None})
    plt.close(figure)
    text = out.getvalue()
    text = text[text.index("<svg") :]
    head, rest = text.split(">", 1)
    kept = [part for part in head.split("\n") if part]
    sized = " ".join(kept).replace('width="', 'data-width="', 1).replace('height="', 'data-height="', 1)
    return f"{sized}>{rest}"
