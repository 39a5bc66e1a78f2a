"""Draws SVG pictures: those of docs/ideas.md, and the charts of `page.py`. Imports only the standard library."""

from __future__ import annotations

import math
from html import escape

BLUE, ORANGE, GRAY, INK = "#3b6ea5", "#d1702f", "#8a8a8a", "#333333"
GREEN, PURPLE = "#3f8f5f", "#8a5fb0"
LIGHT = {BLUE: "#d8e4f0", ORANGE: "#f8e0d0", GRAY: "#ececec", GREEN: "#d9ecdf", PURPLE: "#e8dcf2"}


class Drawing:
    """An SVG picture with a white background, so that it can be read on pages of any color."""

    def __init__(self, width: int, height: int, title: str) -> None:
        head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" role="img"'
        self.lines = [
            f'{head} font-family="system-ui, sans-serif" font-size="17">',
            f"<title>{escape(title)}</title>",
            f'<rect width="{width}" height="{height}" rx="6" fill="white"/>',
        ]

    def box(self, x: float, y: float, width: float, height: float, color: str, *, solid: bool = False) -> None:
        """Draws a rectangle with its corner at (x, y)."""
        fill = color if solid else LIGHT[color]
        self.lines.append(
            f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" rx="3" fill="{fill}" stroke="{color}"/>'
        )

    def text(self, x: float, y: float, text: str, *, color: str = INK, at: str = "middle", bold: bool = False) -> None:
        """Writes a line of text; `at` says which part of it is at x."""
        weight = ' font-weight="600"' if bold else ""
        self.lines.append(f'<text x="{x:g}" y="{y:g}" fill="{color}" text-anchor="{at}"{weight}>{escape(text)}</text>')

    def arrow(self, *points: tuple[float, float], color: str = INK, dashed: bool = False) -> None:
        """Draws a line through the points, with a head at the last."""
        path = " ".join(f"{x:g},{y:g}" for x, y in points)
        dash = ' stroke-dasharray="5 4"' if dashed else ""
        self.lines.append(f'<polyline points="{path}" fill="none" stroke="{color}" stroke-width="1.5"{dash}/>')
        (x0, y0), (x1, y1) = points[-2:]
        angle = math.atan2(y1 - y0, x1 - x0)
        sides = [(x1 - 9 * math.cos(angle + turn), y1 - 9 * math.sin(angle + turn)) for turn in (-0.4, 0.4)]
        corners = " ".join(f"{x:.1f},{y:.1f}" for x, y in [(x1, y1), *sides])
        self.lines.append(f'<polygon points="{corners}" fill="{color}"/>')

    def line(self, x0: float, y0: float, x1: float, y1: float, *, color: str = INK) -> None:
        """Draws a thin line."""
        self.lines.append(f'<line x1="{x0:g}" y1="{y0:g}" x2="{x1:g}" y2="{y1:g}" stroke="{color}"/>')

    def curve(self, *points: tuple[float, float], color: str) -> None:
        """Draws a line through points, which it marks."""
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
        self.lines.append(f'<polyline points="{path}" fill="none" stroke="{color}" stroke-width="2"/>')
        self.lines += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3.5" fill="{color}"/>' for x, y in points]

    def circle(self, x: float, y: float, text: str) -> None:
        """Draws a small circle with a sign in it."""
        self.lines.append(f'<circle cx="{x:g}" cy="{y:g}" r="15" fill="white" stroke="{INK}" stroke-width="1.5"/>')
        self.text(x, y + 6, text)

    def __str__(self) -> str:
        return "\n".join([*self.lines, "</svg>", ""])


def bars(title: str, panels: dict[str, dict[str, dict[str, float]]], own: tuple[str, ...]) -> Drawing:
    """Returns ratios as bars: a panel for each figure, in it groups of labelled bars, and a line at 1.

    Args:
      title: for readers who cannot see it.
      panels: ratios by panel, group and bar; all panels have the same groups and bars.
      own: the bars of this library, which are drawn in a color.
    """
    groups = next(iter(panels.values()))
    named, line, width = len(groups) > 1, 22, 720
    labels = 24 + 9.4 * max(len(bar) for rows in groups.values() for bar in rows)
    height = 58 + sum(line * (len(rows) + 1.8 * named) for rows in groups.values())
    picture = Drawing(width, round(height), title)
    space = (width - labels) / len(panels)
    for number, (name, found) in enumerate(panels.items()):
        left, most = labels + number * space, max(1.0, *(value for rows in found.values() for value in rows.values()))
        scale = (space - 60) / most
        picture.text(left + (space - 60) / 2, 28, name, bold=True)
        picture.line(round(left + scale, 1), 40, round(left + scale, 1), height - 12, color="#bbbbbb")
        y = 42.0
        for group, rows in found.items():
            y += 1.3 * line * named
            if named and number == 0:
                picture.text(14, y - 6, group, at="start", color=GRAY)
            for bar, value in rows.items():
                color = BLUE if bar in own else GRAY
                if number == 0:
                    picture.text(labels - 10, y + 16, bar.replace("`", ""), at="end", bold=color == BLUE)
                picture.box(left, y + 3, round(value * scale, 1), line - 6, color, solid=True)
                picture.text(round(left + value * scale + 5, 1), y + 16, f"{value:.2f}", at="start")
                y += line
            y += 0.5 * line * named
    return picture


def lines(title: str, x: list[float], y: dict[str, list[float]], names: tuple[str, str]) -> Drawing:
    """Returns series of values against x, both from zero; `names` are those of the axes."""
    picture = Drawing(720, 370 + 24 * ((len(y) + 1) // 2), title)
    left, bottom, width, height = 80, 300, 600, 250
    most, last = max(max(values) for values in y.values()), max(x)
    step = 10 ** math.floor(math.log10(most))
    step *= 0.5 if most / step < 2 else 2 if most / step > 6 else 1
    for number in range(int(most / step) + 1):
        level = bottom - height * number * step / most
        picture.line(left, level, left + width, level, color="#dddddd")
        picture.text(left - 10, level + 6, f"{number * step:g}", at="end")
    for value in x:
        picture.text(left + width * value / last, bottom + 24, f"{value:g}")
    picture.text(left - 60, 26, names[1], at="start", color=GRAY)
    picture.text(left + width / 2, bottom + 48, names[0], color=GRAY)
    for number, ((name, values), color) in enumerate(zip(y.items(), (GRAY, BLUE, ORANGE, GREEN, PURPLE), strict=False)):
        points = [(left + width * a / last, bottom - height * b / most) for a, b in zip(x, values, strict=True)]
        picture.curve(*points, color=color)
        at, level = left + 300 * (number % 2), bottom + 78 + 24 * (number // 2)
        picture.curve((at, level - 5), (at + 26, level - 5), color=color)
        picture.text(at + 36, level, name, at="start")
    return picture
