"""Plots as SVG for a page: without scripts, and without fonts and pictures of other servers."""

from collections.abc import Callable, Mapping, Sequence
from html import escape
from math import ceil, floor, log10
from typing import Final, NamedTuple

# Okabe and Ito's colours, which the colour-blind can tell apart, and a grey for the last entry.
COLOURS: Final = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000", "#999999")

_WIDTH: Final = 760
_LEFT, _RIGHT, _TOP, _BOTTOM = 130, 24, 60, 44


class Point(NamedTuple):
    """A point of a curve: x, a fraction y in [0, 1], and the ends of y's interval (none: no error bar)."""

    x: float
    y: float
    low: float | None = None
    high: float | None = None

    @property
    def ends(self) -> tuple[float, float]:
        """The interval's ends, both y if it has none."""
        return (self.y if self.low is None else self.low), (self.y if self.high is None else self.high)

    @property
    def text(self) -> str:
        """The accuracy and its interval, in %."""
        return f"{100 * self.y:.1f} % ({100 * self.ends[0]:.1f} to {100 * self.ends[1]:.1f})"


def dots(groups: Mapping[str, Mapping[str, Point]], names: Sequence[str], lines: Mapping[str, float],
         label: str) -> str:
    """Returns a plot of accuracies: a band for each group, in it a dot with an error bar for each name.

    Arguments:
        groups: group to name to accuracy (`Point.x` is not used).
        names: all names, in the order of their colours.
        lines: accuracies drawn as vertical lines, with their names.
        label: description of the plot for screen readers.
    """
    values = [point for group in groups.values() for point in group.values()]
    low = _floor_tenth(min([*(point.ends[0] for point in values), *lines.values()]))
    row, gap = 15, 10
    height = _TOP + sum(row * len(group) + gap for group in groups.values()) + _BOTTOM
    x = _Scale(low, 1.0, _LEFT, _WIDTH - _RIGHT)
    parts = _legend(names)
    parts += _x_axis(x, _TOP, height - _BOTTOM, _ticks(low), lambda value: f"{100 * value:.0f}")
    parts.append(_text((_LEFT + _WIDTH - _RIGHT) / 2, height - 8, "accuracy, %", "middle"))
    for i, (name, value) in enumerate(lines.items()):
        parts.append(_line(x(value), _TOP, x(value), height - _BOTTOM, "#555", f"stroke-dasharray='{4 + 4 * i} 3'"))
        parts.append(_text(x(value) + 4, _TOP - 5 - 13 * i, f"{name} {100 * value:.1f}", "end", 11))
    y = _TOP + gap / 2
    for title, group in groups.items():
        parts.append(_text(_LEFT - 8, y + row * len(group) / 2 + 4, title, "end"))
        for name, point in group.items():
            colour = COLOURS[names.index(name) % len(COLOURS)]
            middle = y + row / 2
            mark = _line(x(point.ends[0]), middle, x(point.ends[1]), middle, colour,
                         "stroke-width='2'")
            mark += f"<circle cx='{x(point.y):.1f}' cy='{middle:.1f}' r='4.5' fill='{colour}'/>"
            parts.append(_titled(mark, f"{title}, {name}: {point.text}"))
            y += row
        y += gap
        parts.append(_line(_LEFT, y - gap / 2, _WIDTH - _RIGHT, y - gap / 2, "#eee"))
    return _svg(height, parts, label)


def curves(curves: Mapping[str, Sequence[Point]], x_label: str, label: str) -> str:
    """Returns a plot of accuracies against x, one curve a name, with error bars."""
    points = [point for curve in curves.values() for point in curve]
    height, names = 400, list(curves)
    x = _Scale(min(point.x for point in points), max(point.x for point in points), _LEFT - 70, _WIDTH - _RIGHT)
    y = _Scale(0.0, 1.0, height - _BOTTOM, _TOP)
    ticks = sorted({point.x for point in points})
    parts = _legend(names, _LEFT - 70)
    parts += _x_axis(x, _TOP, height - _BOTTOM, ticks[::ceil(len(ticks) / 12)], lambda value: f"{value:.4g}")
    parts += _y_axis(y, x.start, _WIDTH - _RIGHT)
    parts.append(_text((x.start + _WIDTH - _RIGHT) / 2, height - 8, x_label, "middle"))
    for i, (name, curve) in enumerate(curves.items()):
        colour = COLOURS[i % len(COLOURS)]
        path = " ".join(f"{x(point.x):.1f},{y(point.y):.1f}" for point in curve)
        parts.append(f"<polyline points='{path}' fill='none' stroke='{colour}' stroke-width='2'/>")
        for point in curve:
            low, high = point.ends
            mark = _line(x(point.x), y(low), x(point.x), y(high), colour)
            mark += f"<circle cx='{x(point.x):.1f}' cy='{y(point.y):.1f}' r='3.5' fill='{colour}'/>"
            parts.append(_titled(mark, f"{name} at {point.x:.4g}: {point.text}"))
    return _svg(height, parts, label)


def steps(start: float, points: Mapping[str, Point], x_label: str, label: str) -> str:
    """Returns a plot of accuracies that follow each other: a stair from `start` at 0, with a step at each point's x."""
    height, names = 300, list(points)
    values, last = [point.y for point in points.values()], max(point.x for point in points.values())
    low = _floor_tenth(min(values))
    x = _Scale(0, last, _LEFT - 70, _WIDTH - _RIGHT)
    y = _Scale(low, 1.0, height - _BOTTOM, _TOP - 20)
    parts = _legend(names, x.start)
    parts += _x_axis(x, _TOP - 20, y.start, _round_ticks(last), lambda value: f"{value:,.6g}")
    parts += _y_axis(y, x.start, _WIDTH - _RIGHT)
    parts.append(_text((x.start + _WIDTH - _RIGHT) / 2, height - 8, x_label, "middle"))
    path = f"{x(0):.1f},{y(start):.1f} " + " ".join(
        f"{x(point.x):.1f},{y(value):.1f}"
        for before, point in zip([start, *values[:-1]], points.values(), strict=True) for value in (before, point.y))
    parts.append(f"<polyline points='{path}' fill='none' stroke='#555' stroke-width='2'/>")
    for i, (name, point) in enumerate(points.items()):
        mark = f"<circle cx='{x(point.x):.1f}' cy='{y(point.y):.1f}' r='4.5' fill='{COLOURS[i % len(COLOURS)]}'/>"
        parts.append(_titled(mark, f"after {name}, at {point.x:,.1f}: {point.text}"))
    return _svg(height, parts, label)


def bars(values: Mapping[str, float], unit: str, label: str) -> str:
    """Returns a plot of amounts of a unit, one horizontal bar a name."""
    row = 24
    height = 10 + row * len(values)
    x = _Scale(0, max([*values.values(), 1e-9]), _LEFT, _WIDTH - 100)
    parts = []
    for i, (name, value) in enumerate(values.items()):
        y = 5 + row * i
        parts.append(_text(_LEFT - 8, y + 15, name, "end"))
        parts.append(f"<rect x='{_LEFT}' y='{y + 3}' width='{max(x(value) - _LEFT, 1):.1f}' height='{row - 8}' "
                     f"fill='{COLOURS[i % len(COLOURS)]}'/>")
        parts.append(_text(x(value) + 6, y + 15, f"{value:,.1f} {unit}"))
    return _svg(height, parts, label)


class _Scale:
    """A linear map from values in [low, high] to places from `start` to `end`."""

    def __init__(self, low: float, high: float, start: float, end: float):
        self.low, self.start = low, start
        self.factor = (end - start) / (high - low if high > low else 1.0)

    def __call__(self, value: float) -> float:
        return self.start + (value - self.low) * self.factor


def _svg(height: float, parts: Sequence[str], label: str) -> str:
    return (f"<svg role='img' aria-label='{escape(label, quote=True)}' viewBox='0 0 {_WIDTH} {height:.0f}' "
            f"width='{_WIDTH}' height='{height:.0f}' font-family='sans-serif'>{''.join(parts)}</svg>")


def _line(x1: float, y1: float, x2: float, y2: float, colour: str, more: str = "") -> str:
    return f"<line x1='{x1:.1f}' y1='{y1:.1f}' x2='{x2:.1f}' y2='{y2:.1f}' stroke='{colour}' {more}/>"


def _text(x: float, y: float, text: str, anchor: str = "start", size: int = 12) -> str:
    return f"<text x='{x:.1f}' y='{y:.1f}' font-size='{size}' text-anchor='{anchor}'>{escape(text)}</text>"


def _titled(mark: str, title: str) -> str:
    """Returns a mark that shows its numbers under the mouse."""
    return f"<g><title>{escape(title)}</title>{mark}</g>"


def _legend(names: Sequence[str], left: float = _LEFT) -> list[str]:
    parts, x = [], left
    for i, name in enumerate(names):
        parts.append(f"<circle cx='{x + 5:.0f}' cy='12' r='5' fill='{COLOURS[i % len(COLOURS)]}'/>")
        parts.append(_text(x + 14, 16, name))
        x += 30 + 7.2 * len(name)
    return parts


def _x_axis(x: _Scale, top: float, bottom: float, ticks: Sequence[float],
            text: Callable[[float], str]) -> list[str]:
    return [part for tick in ticks for part in (
        _line(x(tick), top, x(tick), bottom, "#ddd"), _text(x(tick), bottom + 16, text(tick), "middle"))]


def _y_axis(y: _Scale, left: float, right: float) -> list[str]:
    return [part for tick in _ticks(y.low) for part in (
        _line(left, y(tick), right, y(tick), "#ddd"), _text(left - 6, y(tick) + 4, f"{100 * tick:.0f} %", "end"))]


def _floor_tenth(value: float) -> float:
    return min(0.9, max(0.0, floor(10 * value - 1e-9) / 10))


def _ticks(low: float) -> list[float]:
    """Returns round fractions from `low`, a tenth, to 1."""
    parts = 10 if low < 0.7 else 20 if low < 0.9 else 50
    return [i / parts for i in range(round(parts * low), parts + 1)]


def _round_ticks(high: float) -> list[float]:
    """Returns round numbers from 0 to `high`, at most eleven."""
    if high <= 0:
        return [0.0]
    power = 10.0 ** floor(log10(high))
    step = power / 5 if high < 2 * power else power / 2 if high < 5 * power else power
    return [i * step for i in range(floor(high / step) + 1)]
