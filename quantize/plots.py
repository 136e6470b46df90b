"""Pictures of a comparison, as SVG: the error of each layer's matrices, and quality by size of several models.

Written by hand, so that no plotting library is needed; readable on light and on dark ground. Only draws.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape

from .compare import Comparison

_WIDTH, _HEIGHT = 760, 420
_LEFT, _RIGHT, _TOP, _BOTTOM = 80, 150, 40, 50
_COLORS = ("#1f77b4", "#d62728", "#2ca02c", "#9467bd", "#ff7f0e", "#17a2b8", "#8c564b", "#e377c2")
_GREY = "#808080"

Points = Sequence[tuple[float, float]]


def svg_of(compared: Sequence[Comparison]) -> str:
    """Of one model: relative error by layer and kind of matrix. Of several: divergence by bits per weight.

    A model whose divergence is no number has no place.
    """
    if len(compared) == 1:
        return _errors_by_layer(compared[0])
    placed = [c for c in compared if math.isfinite(c.divergence.kl_mean)]
    points = [(c.bits_per_weight, max(c.divergence.kl_mean, 1e-7)) for c in placed]
    names = [c.model.rstrip("/").rsplit("/", 1)[-1] for c in placed]
    return _chart(
        "Divergence from the reference by size",
        "bits per weight",
        "mean KL, nats",
        [("", _frontier(points))],
        labels=list(zip(names, points, strict=True)),
    )


def _frontier(points: Points) -> Points:
    """Those that no other of the same size or smaller is better than."""
    best: list[tuple[float, float]] = []
    for point in sorted(points):
        if not best or point[1] < best[-1][1]:
            best.append(point)
    return best


def _errors_by_layer(compared: Comparison) -> str:
    lines: dict[str, list[tuple[float, float]]] = {}
    for tensor in compared.tensors:
        parts = tensor.name.split(".")
        if len(parts) == 3 and tensor.relative > 0:
            lines.setdefault(parts[2], []).append((float(parts[1]), tensor.relative))
    return _chart(
        f"Error of the weights, {compared.model.rstrip('/').rsplit('/', 1)[-1]}",
        "layer",
        "relative squared error",
        list(lines.items()),
    )


def _chart(
    title: str,
    x_name: str,
    y_name: str,
    lines: Sequence[tuple[str, Points]],
    labels: Sequence[tuple[str, tuple[float, float]]] = (),
) -> str:
    """Lines over a linear x and a logarithmic y."""
    points = [point for _, line in lines for point in line] + [at for _, at in labels]
    if not points:
        return _document([_text(_WIDTH / 2, _HEIGHT / 2, "nothing to show", "middle")])
    x_low, x_high = _widened(min(x for x, _ in points), max(x for x, _ in points))
    y_low, y_high = _decades(min(y for _, y in points), max(y for _, y in points))

    def place(point: tuple[float, float]) -> tuple[float, float]:
        x = _LEFT + (point[0] - x_low) / (x_high - x_low) * (_WIDTH - _LEFT - _RIGHT)
        share = (math.log10(point[1]) - y_low) / (y_high - y_low)
        return x, _HEIGHT - _BOTTOM - share * (_HEIGHT - _TOP - _BOTTOM)

    parts = [_text(_LEFT, _TOP - 16, title, "start", 15)]
    parts += _axes(place, (x_low, x_high), (y_low, y_high), x_name, y_name)
    for i, (name, line) in enumerate(lines):
        color = _COLORS[i % len(_COLORS)]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in map(place, line))
        parts.append(f'<polyline points="{path}" fill="none" stroke="{color}" stroke-width="1.5"/>')
        parts += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="2.5" fill="{color}"/>' for x, y in map(place, line)]
        if name:
            parts.append(_text(_WIDTH - _RIGHT + 14, _TOP + 12 + 18 * i, name, "start", 12, color))
    for name, at in labels:
        x, y = place(at)
        parts += [
            f'<circle cx="{x:.1f}" cy="{y:.1f}" r="2.5" fill="{_COLORS[0]}"/>',
            _text(x + 6, y - 6, name, "start", 11),
        ]
    return _document(parts)


def _axes(
    place: object, x_range: tuple[float, float], y_range: tuple[float, float], x_name: str, y_name: str
) -> list[str]:
    assert callable(place)
    parts = []
    for decade in range(math.floor(y_range[0]), math.ceil(y_range[1]) + 1):
        for digit in (1, 2, 5) if y_range[1] - y_range[0] > 1 else (1, 1.5, 2, 3, 4, 5, 6, 8):
            value = digit * 10.0**decade
            if not y_range[0] <= math.log10(value) <= y_range[1]:
                continue
            _, y = place((x_range[0], value))
            parts.append(_line(_LEFT, y, _WIDTH - _RIGHT, y))
            parts.append(_text(_LEFT - 8, y + 4, f"{value:.3g}", "end"))
    for value in _steps(*x_range):
        x, _ = place((value, 10 ** y_range[0]))
        parts.append(_line(x, _HEIGHT - _BOTTOM, x, _HEIGHT - _BOTTOM + 5))
        parts.append(_text(x, _HEIGHT - _BOTTOM + 19, f"{value:g}", "middle"))
    parts.append(_text((_LEFT + _WIDTH - _RIGHT) / 2, _HEIGHT - 10, x_name, "middle"))
    parts.append(
        f'<text transform="translate(16 {(_TOP + _HEIGHT - _BOTTOM) / 2:.0f}) rotate(-90)" text-anchor="middle" '
        f'font-size="12" fill="{_GREY}">{escape(y_name)}</text>'
    )
    return parts


def _widened(low: float, high: float) -> tuple[float, float]:
    return (low - 0.5, high + 0.5) if low == high else (low - 0.03 * (high - low), high + 0.03 * (high - low))


def _decades(low: float, high: float) -> tuple[float, float]:
    """In powers of ten, with some room."""
    below, above = math.log10(low), math.log10(high)
    room = max(0.05 * (above - below), 0.1)
    return below - room, above + room


def _steps(low: float, high: float) -> list[float]:
    """Round numbers, some six of them."""
    rough = (high - low) / 6
    unit = 10.0 ** math.floor(math.log10(rough))
    step = next(unit * m for m in (1, 2, 5, 10) if unit * m >= rough)
    first = math.ceil(low / step)
    return [i * step for i in range(first, math.floor(high / step) + 1)]


def _line(x1: float, y1: float, x2: float, y2: float) -> str:
    return (
        f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" stroke="{_GREY}" stroke-opacity="0.4" '
        'stroke-width="1"/>'
    )


def _text(x: float, y: float, text: str, anchor: str, size: int = 12, color: str = _GREY) -> str:
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" font-size="{size}" fill="{color}">{escape(text)}</text>'
    )


def _document(parts: Sequence[str]) -> str:
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {_HEIGHT}" width="{_WIDTH}" height="{_HEIGHT}" '
        'font-family="sans-serif">\n' + "\n".join(parts) + "\n</svg>\n"
    )
