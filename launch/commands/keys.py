"""`areal-like keys ACTION DIR`: makes, shows, adds, rotates and revokes the keys of a job.

Secrets are never passed as arguments or printed. A running job rereads the directory by itself; each machine
reads its own copy.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from rich.console import Console

from areal_like.errors import ConfigError
from areal_like.security.administration import (
    add_key,
    fingerprint,
    has_secret,
    init_keys,
    revoke_key,
    rotate_keys,
)
from areal_like.security.keys import AllowedKey, KeyDirectory, KeyRole
from launch.commands.parser import argument, command
from launch.formatting import duration
from launch.view.status import plain_table

_ROLES = [role.value for role in KeyRole]
_GRACE_S = 3600.0


def _init(args: argparse.Namespace) -> str:
    roles = [KeyRole(role) for role in args.roles or _ROLES]
    names = ", ".join(key.name for key in init_keys(args.directory, roles))
    return (
        f"{args.directory} has the keys {names}; run a job with security.keys={args.directory}\n"
        "another machine needs public.json and the secrets of its own daemons only\n"
    )


def _add(args: argparse.Namespace) -> str:
    if not (args.name and args.role):
        raise ConfigError("keys add: give DIR, NAME and --role ROLE")
    key = add_key(args.directory, args.name, KeyRole(args.role))
    return (
        f"added {key.name} ({key.role.value}, {fingerprint(key.public)}); "
        f"a daemon uses it with security.identity={key.name}\n" + _copy_hint(args.directory)
    )


def _rotate(args: argparse.Namespace) -> str:
    grace_s = _GRACE_S if args.grace is None else args.grace
    if not 0 <= grace_s < float("inf"):
        raise ConfigError(f"--grace {grace_s:g}: give seconds, 0 or more")
    renewed = rotate_keys(args.directory, args.name, grace_s=grace_s)
    names = ", ".join(key.name for key in renewed)
    return (
        f"renewed {names}; the old keys are valid for another {duration(grace_s)}\n"
        + _copy_hint(args.directory)
        + "on another machine copy public.json first, then the new secrets\n"
    )


def _revoke(args: argparse.Namespace) -> str:
    if not args.name:
        raise ConfigError("keys revoke: give DIR and NAME")
    revoke_key(args.directory, args.name)
    return f"revoked {args.name}\n" + _copy_hint(args.directory)


def _show(args: argparse.Namespace) -> str:
    now_s = time.time()
    rows = [
        (
            key.name,
            key.role.value,
            fingerprint(key.public),
            duration(round(now_s - key.added_unix_s)),
            _expiry(key, now_s),
            "yes" if has_secret(args.directory, key) else "no",
        )
        for key in sorted(
            KeyDirectory(args.directory).allowed.keys, key=lambda key: (key.name, key.added_unix_s)
        )
    ]
    console = Console(highlight=False, markup=False)
    with console.capture() as capture:
        console.print(plain_table(("name", "role", "fingerprint", "age", "expires", "secret here"), rows))
    return capture.get()


def _expiry(key: AllowedKey, now_s: float) -> str:
    if key.expires_unix_s is None:
        return "never"
    left_s = round(key.expires_unix_s - now_s)
    return f"in {duration(left_s)}" if left_s > 0 else "expired"


def _copy_hint(directory: Path) -> str:
    return f"running daemons reread {directory} within 2 s; copy public.json to other machines\n"


class _Action(NamedTuple):
    run: Callable[[argparse.Namespace], str]
    """Returns what is printed."""
    options: tuple[str, ...] = ()
    """The arguments that it takes, out of NAME and the options."""


_ACTIONS = {
    "add": _Action(_add, ("role", "name")),
    "init": _Action(_init, ("roles",)),
    "revoke": _Action(_revoke, ("name",)),
    "rotate": _Action(_rotate, ("grace", "name")),
    "show": _Action(_show),
}


@command(
    "keys",
    "Make, show and change the keys with which daemons authenticate each other (security.keys=DIR). A "
    f"running job rereads the directory by itself. The roles: {', '.join(_ROLES)}.",
    argument("action", metavar="ACTION", choices=sorted(_ACTIONS), help=", ".join(sorted(_ACTIONS))),
    argument("directory", metavar="DIR", type=Path, help="the directory of the keys"),
    argument(
        "name", metavar="NAME", nargs="?", default="", help="one key (add, revoke; rotate: by default all)"
    ),
    argument("--roles", nargs="+", choices=_ROLES, metavar="ROLE", help="init: by default all"),
    argument("--role", choices=_ROLES, metavar="ROLE", help="add: the new key's role"),
    argument("--grace", type=float, metavar="SECONDS", help="rotate: how long old keys stay valid (3600)"),
    examples=[
        "keys init keys",
        "keys show keys",
        "keys add keys alice --role agent",
        "keys rotate keys --grace 600",
        "keys revoke keys alice",
    ],
)
def main(args: argparse.Namespace) -> int:
    """Performs the action; returns 0."""
    args.directory = args.directory.expanduser()
    for option in ("roles", "role", "grace", "name"):
        given = getattr(args, option) not in (None, "")
        if given and option not in _ACTIONS[args.action].options:
            raise ConfigError(f"keys {args.action} takes no {'NAME' if option == 'name' else f'--{option}'}")
    sys.stdout.write(_ACTIONS[args.action].run(args))
    return 0
