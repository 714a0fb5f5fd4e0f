"""The registry: settings of a registered class are checked against its fields."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import pytest

from areal_like.errors import ConfigError
from areal_like.registry import Registry


class Shape:
    """Base class of the registered ones."""


SHAPES: Registry[Shape] = Registry("shape", Shape)


@SHAPES.register("box")
@dataclass(frozen=True, kw_only=True)
class Box(Shape):
    """A registered class."""

    width: float = 1.0
    fill: Literal["solid", "hollow"] = "solid"
    depth: int | Literal["auto"] = "auto"


def test_section_is_built_with_its_settings() -> None:
    assert SHAPES.build({"name": "box", "width": "1e-3", "fill": "hollow", "depth": 3}) == Box(
        width=1e-3, fill="hollow", depth=3
    )


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"name": "ball"}, "known are box"),
        ({"name": "box", "widht": 1}, "did you mean width"),
        ({"name": "box", "width": "wide"}, "shape.width: want a number"),
        ({"name": "box", "fill": "holow"}, "shape.fill=holow: did you mean hollow"),
        ({"name": "box", "depth": "deep"}, "shape.depth=deep: use a whole number or auto"),
    ],
)
def test_wrong_setting_is_refused_by_name(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        SHAPES.build(settings)
