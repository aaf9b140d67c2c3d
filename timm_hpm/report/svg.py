"""Plots as SVG for a page: without scripts, and without fonts and pictures of other servers."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from html import escape
from math import ceil, floor, log2
from typing import Final, NamedTuple

from .metrics import wilson_interval

# Okabe and Ito's colours, which the colour-blind can tell apart, and a grey.
COLOURS: Final = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#8a6d00", "#999999")
# The same in every report: of attacks, and of inference modes.
_FIXED: Final = {name: colour for names in (
    ("apgd-ce", "apgd-t", "fab-t", "square", "apgd-chain", "joint", "joint-subset"),
    ("batch", "sample", "dataset", "fc", "FC classifier"),
) for name, colour in zip(names, COLOURS, strict=False)} | {"worst": "#000000"}

_WIDTH: Final = 640
_LEFT, _RIGHT, _TOP, _BOTTOM = 130, 24, 60, 48


class Point(NamedTuple):
    """A point of a curve: x, a fraction y in [0, 1], and the ends of y's interval (none: no error bar)."""

    x: float
    y: float
    low: float | None = None
    high: float | None = None

    @classmethod
    def measured(cls, x: float, accuracy: float, num_images: int) -> "Point":
        """Returns the point of an accuracy with its Wilson interval."""
        return cls(x, accuracy, *wilson_interval(accuracy, num_images))

    @property
    def ends(self) -> tuple[float, float]:
        """The interval's ends, both y if it has none."""
        return (self.y if self.low is None else self.low), (self.y if self.high is None else self.high)

    @property
    def text(self) -> str:
        """The accuracy and its interval, in %."""
        return f"{100 * self.y:.1f} % ({100 * self.ends[0]:.1f} to {100 * self.ends[1]:.1f})"


def colours(names: Iterable[str]) -> dict[str, str]:
    """Returns a colour for each name: an attack's own, and for other names the colours that are left, in order."""
    names = list(dict.fromkeys(names))
    taken = {_FIXED[name] for name in names if name in _FIXED}
    free = [colour for colour in COLOURS if colour not in taken] or list(COLOURS)
    others = [name for name in names if name not in _FIXED]
    return {name: _FIXED.get(name) or free[others.index(name) % len(free)] for name in names}


def dots(groups: Mapping[str, Mapping[str, Point]], names: Sequence[str], lines: Mapping[str, float],
         label: str) -> str:
    """Returns a plot of accuracies: a band for each group, in it a dot with an error bar for each of the `names`.

    `lines` are accuracies drawn as vertical lines with their names; `label` is for screen readers.
    """
    values = [point for group in groups.values() for point in group.values()]
    low = _floor_tenth(min([*(point.ends[0] for point in values), *lines.values()]))
    row, gap, colour = 15, 12, colours(names)
    height = _TOP + sum(row * len(group) + gap for group in groups.values()) + _BOTTOM
    x = _Scale(low, 1.0, _LEFT, _WIDTH - _RIGHT)
    parts = _x_axis(x, _TOP, height - _BOTTOM, _ticks(low), lambda value: f"{100 * value:.0f}", "accuracy, %")
    for i, (name, value) in enumerate(lines.items()):
        parts.append(_line(x(value), _TOP, x(value), height - _BOTTOM, "#555", f"stroke-dasharray='{4 + 4 * i} 3'"))
        parts.append(_text(x(value) + 4, _TOP - 6 - 20 * i, f"{name} {100 * value:.1f}", "end"))
    y = _TOP + gap / 2
    for title, group in groups.items():
        parts.append(_text(_LEFT - 8, y + row * len(group) / 2 + 4, title, "end"))
        for name, point in group.items():
            ends = _line(x(point.ends[0]), y + row / 2, x(point.ends[1]), y + row / 2, colour[name], "stroke-width='2'")
            mark = ends + _dot(x(point.y), y + row / 2, colour[name])
            parts.append(_titled(mark, f"{title}, {name}: {point.text}"))
            y += row
        y += gap
        parts.append(_line(_LEFT, y - gap / 2, _WIDTH - _RIGHT, y - gap / 2, "#eee"))
    return _svg(height, parts, label)


def curves(curves: Mapping[str, Sequence[Point]], x_label: str, label: str) -> str:
    """Returns a plot of accuracies against x, one curve a name, with error bars and a legend."""
    points = [point for curve in curves.values() for point in curve]
    height, colour, left = 400, colours(curves), _LEFT - 70
    x = _Scale(min(point.x for point in points), max(point.x for point in points), left, _WIDTH - _RIGHT)
    y = _Scale(0.0, 1.0, height - _BOTTOM, _TOP)
    ticks = sorted({point.x for point in points})
    parts = _x_axis(x, _TOP, y.start, ticks[::ceil(len(ticks) / 12)], lambda value: f"{value:.4g}", x_label)
    parts += _y_axis(y, left, _WIDTH - _RIGHT)
    place, line = float(left), 12
    for name in curves:
        if place > left and place + 14 + 8 * len(name) > _WIDTH:
            place, line = left, line + 16
        parts += [_dot(place + 5, line, colour[name]), _text(place + 14, line + 4, name)]
        place += 30 + 8 * len(name)
    for name, curve in curves.items():
        parts.append(_path([(x(point.x), y(point.y)) for point in curve], colour[name]))
        for point in curve:
            low, high = point.ends
            mark = _line(x(point.x), y(low), x(point.x), y(high), colour[name]) + _dot(
                x(point.x), y(point.y), colour[name])
            parts.append(_titled(mark, f"{name} at {point.x:.4g}: {point.text}"))
    return _svg(height, parts, label)


class Step(NamedTuple):
    """A step of `stairs`: its place x, the fraction y after it, and the names of its colour and under the mouse."""

    x: float
    y: float
    name: str
    text: str


def stairs(start: float, points: Sequence[Step], x_label: str, label: str) -> str:
    """Returns a plot of an accuracy that falls from `start`, against doublings of x > 0; the last one is shaded."""
    height, left, right, top = 300, _LEFT - 70.0, _WIDTH - _RIGHT, _TOP - 40
    low, last = _floor_tenth(points[-1].y), points[-1].x
    first = min(points[0].x, last / 2) / 2
    scale = _Scale(log2(first), log2(last), left, right)
    y = _Scale(low, 1.0, height - _BOTTOM, top)
    places, colour = [scale(log2(point.x)) for point in points], colours(point.name for point in points)
    shade = scale(log2(last / 2))
    parts = [f"<rect x='{shade:.1f}' y='{top}' width='{right - shade:.1f}' height='{y.start - top:.1f}' "
             "fill='#f0f0f0'/>"]
    tens = [10.0 ** power * factor for power in range(-3, 16) for factor in (1, 3)]
    parts += _x_axis(lambda value: scale(log2(value)), top, y.start, [x for x in tens if first <= x <= last],
                     lambda value: f"{value:,.6g}", x_label)
    parts += _y_axis(y, left, right)
    path = [(left, y(start))]
    for place, point in zip(places, points, strict=True):
        path += [(place, path[-1][1]), (place, y(point.y))]
    parts.append(_path(path, "#555"))
    parts += [_titled(_dot(place, y(point.y), colour[point.name]), point.text)
              for place, point in zip(places, points, strict=True)]
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


def _path(points: Iterable[tuple[float, float]], colour: str) -> str:
    places = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
    return f"<polyline points='{places}' fill='none' stroke='{colour}' stroke-width='2'/>"


def _dot(x: float, y: float, colour: str) -> str:
    return f"<circle cx='{x:.1f}' cy='{y:.1f}' r='4.5' fill='{colour}'/>"


def _text(x: float, y: float, text: str, anchor: str = "start") -> str:
    return f"<text x='{x:.1f}' y='{y:.1f}' font-size='12' text-anchor='{anchor}'>{escape(text)}</text>"


def _titled(mark: str, title: str) -> str:
    return f"<g><title>{escape(title)}</title>{mark}</g>"


def _x_axis(x: Callable[[float], float], top: float, bottom: float, ticks: Sequence[float],
            text: Callable[[float], str], label: str) -> list[str]:
    parts = [_text((_LEFT + _WIDTH - _RIGHT) / 2, bottom + 40, label, "middle")]
    for tick in ticks:
        parts += [_line(x(tick), top, x(tick), bottom, "#ddd"), _text(x(tick), bottom + 18, text(tick), "middle")]
    return parts


def _y_axis(y: _Scale, left: float, right: float) -> list[str]:
    return [part for tick in _ticks(y.low) for part in (
        _line(left, y(tick), right, y(tick), "#ddd"), _text(left - 6, y(tick) + 4, f"{100 * tick:.0f} %", "end"))]


def _floor_tenth(value: float) -> float:
    return min(0.9, max(0.0, floor(10 * value - 1e-9) / 10))


def _ticks(low: float) -> list[float]:
    """Returns round fractions from `low`, a tenth, to 1."""
    parts = 10 if low < 0.9 else 50
    return [i / parts for i in range(round(parts * low), parts + 1)]
