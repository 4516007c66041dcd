"""Charts as SVG elements. A chart names classes and no colour: those are the page's, light or dark.

The markup is built as a tree, so that no name in a report can become markup. It has a title and a
description, which a screen reader tells in place of the drawing.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from xml.etree import ElementTree as ET

from wasi_export.report_page.quantities import shorten

Point = tuple[float, float]


@dataclass(frozen=True)
class Scale:
    """Places values between two positions; what lies outside is put on the edge."""

    low: float
    high: float
    start: float
    end: float

    def __call__(self, value: float) -> float:
        """Returns the position of a value."""
        if not self.high > self.low or math.isnan(value):
            return self.start
        share = min(1.0, max(0.0, (value - self.low) / (self.high - self.low)))
        return self.start + share * (self.end - self.start)

    def ticks(self, count: int = 5) -> tuple[float, ...]:
        """Returns about so many round values of the range; none where it has no end."""
        if not (math.isfinite(self.low) and math.isfinite(self.high)):
            return ()
        step = self.step(count)
        first = math.ceil(self.low / step - 1e-9)
        last = math.floor(self.high / step + 1e-9)
        return tuple(index * step for index in range(first, last + 1))

    def step(self, count: int = 5) -> float:
        """Returns the distance of these values: 1, 2 or 5 times a power of ten."""
        rough = (self.high - self.low) / count
        if not (0 < rough < math.inf):
            return 1.0
        unit = 10.0 ** math.floor(math.log10(rough))
        return next((factor * unit for factor in (1, 2, 5) if factor * unit >= rough * 0.999), 10 * unit)


class Chart:
    """A drawing of fixed size in its own units, which the page scales to the room that it has."""

    def __init__(self, key: str, title: str, summary: str, *, width: float, height: float) -> None:
        """Begins an empty chart.

        Args:
            key: an identifier, of which the page has no other.
            title: what is shown.
            summary: what is to be seen, in words.
            width: in units of the drawing.
            height: the same.
        """
        names = {"role": "img", "aria-labelledby": f"{key}-title {key}-desc"}
        self.root = ET.Element("svg", {"viewBox": f"0 0 {width:g} {height:g}", "class": "chart"} | names)
        ET.SubElement(self.root, "title", id=f"{key}-title").text = title
        ET.SubElement(self.root, "desc", id=f"{key}-desc").text = summary

    def line(self, start: Point, end: Point, css: str) -> None:
        """Draws a straight line."""
        ends = {"x1": start[0], "y1": start[1], "x2": end[0], "y2": end[1]}
        self._add("line", css, **ends)

    def curve(self, points: Sequence[Point], css: str) -> None:
        """Draws a line through the points."""
        text = " ".join(f"{_number(x)},{_number(y)}" for x, y in points)
        ET.SubElement(self.root, "polyline", {"class": css, "points": text})

    def area(self, points: Sequence[Point], css: str) -> None:
        """Fills what the points enclose."""
        text = " ".join(f"{_number(x)},{_number(y)}" for x, y in points)
        ET.SubElement(self.root, "polygon", {"class": css, "points": text})

    def bar(self, corner: Point, width: float, height: float, css: str, hint: str = "") -> None:
        """Draws a rectangle from its upper left corner; the hint is shown where a mouse rests on it."""
        element = self._add("rect", css, x=corner[0], y=corner[1], width=width, height=max(0.0, height))
        if hint:
            ET.SubElement(element, "title").text = hint

    def dot(self, centre: Point, radius: float, css: str, hint: str = "") -> None:
        """Draws a circle."""
        element = self._add("circle", css, cx=centre[0], cy=centre[1], r=radius)
        if hint:
            ET.SubElement(element, "title").text = hint

    def text(
        self, place: Point, words: str, css: str = "", *, anchor: str = "start", upwards: bool = False
    ) -> None:
        """Writes words on a base line, which begin, end or have their middle at the place."""
        element = self._add("text", css, x=place[0], y=place[1])
        element.set("text-anchor", anchor)
        if upwards:
            element.set("transform", f"rotate(-90 {_number(place[0])} {_number(place[1])})")
        element.text = shorten(words, 60)

    def markup(self) -> str:
        """Returns the element as text."""
        return ET.tostring(self.root, encoding="unicode")

    def _add(self, tag: str, css: str, **numbers: float) -> ET.Element:
        attributes = {name: _number(value) for name, value in numbers.items()}
        return ET.SubElement(self.root, tag, ({"class": css} if css else {}) | attributes)


def _number(value: float) -> str:
    return f"{value:.1f}".removesuffix(".0")
