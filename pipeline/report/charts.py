"""Numbers → where things stand in a chart, in percent of its area: the template draws them, and CSS colours them.

Lines are drawn in a square of 100 × 100 that is stretched to whatever width there is; texts stand beside it as HTML, so
that they have the same size on a phone.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, NamedTuple

_WANTED_TICKS: Final = 4


class Tick(NamedTuple):
    """A mark on an axis."""

    at: float
    """Percent of the axis, from its start."""
    text: str


class Line(NamedTuple):
    """One curve."""

    name: str
    points: str
    """As an SVG polyline takes them."""
    style: str
    """The CSS class of its colour."""
    dots: tuple[tuple[float, float], ...]
    """Percent from the left and from the bottom; only of curves that are too short for a line."""


class Column(NamedTuple):
    """What a reader sees who points at one place of the horizontal axis."""

    left: float
    width: float
    text: str


@dataclass(frozen=True, kw_only=True, slots=True)
class LineChart:
    """Curves over a common horizontal axis."""

    title: str
    lines: tuple[Line, ...]
    y_ticks: tuple[Tick, ...]
    x_ticks: tuple[Tick, ...]
    x_name: str
    widest: str
    """The longest text on the vertical axis, for which there has to be room."""
    marker: float | None
    """Percent from the left, of a dashed line."""
    marker_text: str
    columns: tuple[Column, ...]
    summary: str
    """For those who do not see the chart."""


def draw_lines(
    title: str,
    xs: Sequence[float],
    curves: Sequence[tuple[str, Sequence[float | None]]],
    *,
    x_name: str,
    unit: str = "",
    from_zero: bool = False,
    top: float | None = None,
    marker: float | None = None,
    marker_text: str = "",
    as_percent: bool = False,
) -> LineChart | None:
    """A chart of the curves that have a value, named, over `xs` in ascending order; None where none has."""
    drawn = [(name, ys) for name, ys in curves if any(_is_number(y) for y in ys)]
    values = [float(y) for _, ys in drawn for y in ys if y is not None and math.isfinite(y)]
    if not values:
        return None
    show = _format_percent if as_percent else _format_number
    low, high = (0.0 if from_zero else min(values)), max(values) if top is None else top
    ticks = find_ticks(low, high)
    low, high = min(low, ticks[0]), max(high, ticks[-1])
    first, last = xs[0], xs[-1]

    def to_x(x: float) -> float:
        return round(100 * (x - first) / (last - first), 3) if last > first else 50.0

    def to_y(y: float) -> float:
        return round(100 * (y - low) / (high - low), 3) if high > low else 50.0

    lines = []
    for number, (name, ys) in enumerate(drawn):
        places = [(to_x(x), to_y(float(y))) for x, y in zip(xs, ys, strict=True) if y is not None and math.isfinite(y)]
        points = " ".join(f"{x:g},{100 - y:g}" for x, y in places)
        lines.append(Line(name, points, f"c{number + 1}", tuple(places) if len(places) == 1 else ()))
    step = 100 / max(len(xs) - 1, 1)
    columns = tuple(
        Column(
            max(to_x(x) - step / 2, 0),
            step,
            "\n".join(
                [
                    f"{x_name} {_format_place(x)}",
                    *(f"{name}: {show(y)}{unit}" for name, ys in drawn if _is_number(y := ys[index])),
                ]
            ),
        )
        for index, x in enumerate(xs)
    )
    ends = (f"{name} from {show(ys[0])} to {show(ys[-1])}" for name, ys in drawn)
    y_ticks = tuple(Tick(to_y(value), f"{show(value)}{unit}") for value in ticks if low <= value <= high)
    return LineChart(
        title=title,
        lines=tuple(lines),
        y_ticks=y_ticks,
        widest=max((tick.text for tick in y_ticks), key=len, default=""),
        x_ticks=tuple(Tick(to_x(x), _format_place(x)) for x in _choose_ends(xs)),
        x_name=x_name,
        marker=None if marker is None else to_x(marker),
        marker_text=marker_text,
        columns=columns,
        summary=f"{title}: {'; '.join(ends)}",
    )


def find_ticks(low: float, high: float) -> list[float]:
    """Round numbers, about four of them, of which the first is not above `low` and the last not below `high`."""
    if not high > low:
        high = low + (abs(low) or 1.0)
    raw = (high - low) / _WANTED_TICKS
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= raw * (1 - 1e-9))
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(number * step, 12) for number in range(first, last + 1)]


def _choose_ends(xs: Sequence[float]) -> list[float]:
    """The first, the middle and the last, as far as they differ."""
    return sorted({xs[0], xs[len(xs) // 2], xs[-1]})


def _format_place(x: float) -> str:
    return f"{x:,.0f}" if x == round(x) or abs(x) >= 100 else f"{x:.3g}"


def _is_number(value: float | None) -> bool:
    return value is not None and math.isfinite(value)


def _format_number(value: float | None) -> str:
    return "-" if value is None else f"{value:,.0f}" if abs(value) >= 1_000 else f"{value:.4g}"


def _format_percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.4g} %"
