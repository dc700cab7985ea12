"""Length axes: labels that do not run into one another, points that stay where they are."""

from __future__ import annotations

from matplotlib.figure import Figure

from lshv2.axes import length_ticks, short
from lshv2.plots import length_axis

OPERATOR = [1024, 16_384, 32_768, 49_152, 65_536, 98_304, 131_072, 1_048_576]


def test_ticks_are_powers_of_two() -> None:
    assert list(length_ticks(OPERATOR).values()) == ["1k", "16k", "32k", "64k", "128k", "1M"]
    assert length_ticks([300, 160, 160]) == {160: "160", 300: "300"}, "no power of two: what was measured"
    assert length_ticks([1024, 1500]) == {1024: "1k", 1500: "1500"}, "one tick is no scale"
    assert length_ticks([]) == {} and [short(n) for n in (1280, 49_152, 1_572_864)] == ["1.25k", "48k", "1.5M"]


def test_a_picture_keeps_points_that_have_no_tick() -> None:
    axis = Figure().add_subplot()
    (line,) = axis.plot(OPERATOR, range(len(OPERATOR)))
    length_axis(axis, OPERATOR)
    assert [tick.get_text() for tick in axis.get_xticklabels()] == ["1k", "16k", "32k", "64k", "128k", "1M"]
    assert list(line.get_xdata()) == OPERATOR and axis.get_xscale() == "log"
