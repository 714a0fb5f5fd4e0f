"""The tree of exceptions in the docstring is that of the classes."""

from __future__ import annotations

import inspect

from areal_like import errors


def test_the_tree_names_every_exception_below_its_base() -> None:
    lines = [
        line for line in inspect.getdoc(errors).splitlines() if line.lstrip().split(" ")[0].endswith("Error")
    ]  # type: ignore[union-attr]
    written, path = {}, [""]
    for line in lines:
        depth = (len(line) - len(line.lstrip())) // 4
        name = line.split()[0]
        path = [*path[:depth], name]
        written[name] = path[-2] if depth > 1 else "Exception"
    classes = [
        one for _, one in inspect.getmembers(errors, inspect.isclass) if one.__module__ == errors.__name__
    ]
    assert written == {one.__name__: one.__bases__[0].__name__ for one in classes}
