"""Options of a command line that are made from the fields of a dataclass, so that each is stated once."""

from __future__ import annotations

import argparse
import dataclasses
import typing
from collections.abc import Collection
from dataclasses import MISSING
from typing import Any

from areal_like.config.common import choices_of, field_texts, members_of


def add_arguments(
    parser: argparse._ActionsContainer, cls: type[Any], *, leaves_out: Collection[str] = ()
) -> None:
    """Adds `--max-failures N` for a field `max_failures: int`, with its docstring as the text of --help.

    The value of an option that is not given is None: the dataclass has the default. `leaves_out`: names of
    fields without an option.
    """
    section: type = cls
    hints, texts = typing.get_type_hints(section), field_texts(section)
    for field in dataclasses.fields(cls):
        if field.name in leaves_out:
            continue
        hint, text = hints[field.name], texts[field.name]
        if field.default not in (MISSING, None, "", (), False):
            text += f" Default: {field.default}."
        settings: dict[str, Any] = {"help": text, "required": field.default is MISSING}
        if hint is bool:
            settings |= {"action": "store_const", "const": True}
        elif typing.get_origin(hint) is tuple:
            settings |= {"action": "append", "metavar": "VALUE"}
        elif choices := choices_of(hint):
            settings["choices"] = choices
        else:
            kind = next(kind for kind in (str, float, int) if kind in members_of(hint))
            settings |= {
                "type": kind,
                "metavar": field.name.rpartition("_")[2].upper() if kind is str else "N",
            }
        parser.add_argument(f"--{field.name.replace('_', '-')}", **settings)
