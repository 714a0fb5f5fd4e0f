"""The registry: settings of a registered class are checked against its fields."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
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
    sides: Literal[4, 6] = 4
    scale: float | Literal["auto"] = "auto"
    cuts: list[int] | Literal["auto"] = "auto"
    corner: tuple[float, float] | Literal["none"] = "none"
    pattern: Path | Literal["plain"] = "plain"
    limit: float | None = None
    weight: Any | Literal["auto"] = "auto"


def test_section_is_built_with_its_settings() -> None:
    assert SHAPES.build({"name": "box", "width": "1e-3", "fill": "hollow", "depth": 3}) == Box(
        width=1e-3, fill="hollow", depth=3
    )


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("sides", 6, 6),
        ("scale", 1, 1.0),
        ("scale", 0.5, 0.5),
        ("scale", "1e-3", 1e-3),  # YAML 1.1 reads it as a string
        ("scale", "auto", "auto"),
        ("cuts", [1, 2], [1, 2]),
        ("cuts", "auto", "auto"),
        ("corner", [1, 2], [1, 2]),
        ("pattern", "dots.svg", "dots.svg"),
        ("limit", "1e-3", 1e-3),
        ("limit", None, None),
        ("weight", {"x": 1}, {"x": 1}),
    ],
)
def test_value_fits_a_member_of_a_union(key: str, value: Any, expected: Any) -> None:
    built = getattr(SHAPES.build({"name": "box", key: value}), key)
    assert built == expected and type(built) is type(expected)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"name": "ball"}, "choose one of box"),
        ({"name": "box", "widht": 1}, "did you mean width"),
        ({"name": "box", "width": "wide"}, "shape.width: want a number"),
        ({"name": "box", "fill": "holow"}, "shape.fill=holow: did you mean hollow"),
        ({"name": "box", "depth": "deep"}, "shape.depth=deep: use a whole number or auto"),
        ({"name": "box", "sides": 5}, "shape.sides=5: use 4 or 6"),
        ({"name": "box", "sides": True}, "shape.sides=True: use 4 or 6"),
        ({"name": "box", "sides": "4"}, "shape.sides=4: .*use 4 or 6"),
        ({"name": "box", "scale": True}, "shape.scale=True: use a number or auto"),
        ({"name": "box", "scale": "big"}, "shape.scale=big: use a number or auto"),
        ({"name": "box", "cuts": "aut"}, r"shape.cuts=aut: did you mean auto\? use list\[int\] or auto"),
        ({"name": "box", "corner": "left"}, "shape.corner=left: use "),
        ({"_target_": ".shapes.Ball"}, r"shape\._target_=\.shapes\.Ball: write module\.Class"),
    ],
)
def test_wrong_setting_is_refused_by_name(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        SHAPES.build(settings)


@pytest.mark.parametrize("error", ["ValueError", "AttributeError"])
def test_an_error_in_a_module_is_not_hidden(
    error: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / f"broken_{error}.py").write_text(f"raise {error}('of this module')\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises((ValueError, AttributeError), match="of this module"):
        SHAPES.build({"_target_": f"broken_{error}.Ball"})
