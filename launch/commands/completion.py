"""`areal-like completion SHELL`: the words that may follow on a command line; `areal-like version`.

The shells call this command with the words typed so far, so verbs, options, runs and settings are not listed
a second time. If there are no candidates, the shell completes file names.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from areal_like.errors import ConfigError
from launch.cli import COMMANDS, parser_of
from launch.commands.parser import argument, command

_LEAVES_TO_SHELL = ("FILE", "DIR", "CONFIG")


def candidates(words: Sequence[str], *, directory: Path) -> list[str]:
    """Returns candidates for the last of `words`, which may be empty or incomplete.

    `words`: those after `areal-like`. `directory`: contains `runs/`.
    """
    if not words:
        return []
    *before, current = words
    found = _next(before, current, directory) if before else iter([*COMMANDS, "--help"])
    return sorted({word for word in found if word.startswith(current)})


def _next(before: list[str], current: str, directory: Path) -> Iterator[str]:
    verb, *typed = before
    if verb not in COMMANDS:
        return
    parser = parser_of(verb, typed)
    actions = parser._actions
    by_option = {option: action for action in actions for option in action.option_strings}
    waiting = by_option.get(typed[-1]) if typed else None
    if waiting is not None and waiting.nargs != 0:
        yield from map(str, waiting.choices or ())
        if waiting.nargs is None or waiting.metavar in _LEAVES_TO_SHELL or waiting.choices:
            return
    if current.startswith("-"):
        yield from by_option
        return
    given = _positionals(typed, by_option)
    left = [action for action in actions if not action.option_strings]
    if left and (len(given) < len(left) or left[-1].nargs in ("*", "+")):
        yield from _values(left, min(len(given), len(left) - 1), given, current, directory)


def _positionals(typed: Sequence[str], by_option: dict[str, argparse.Action]) -> list[str]:
    """The words that are neither options nor values of options."""
    given, skips = [], False
    for word in typed:
        action = by_option.get(word)
        if skips:
            skips = False
        elif action is not None:
            skips = action.nargs is None
        elif not word.startswith("--"):
            given.append(word)
    return given


def _values(
    actions: list[argparse.Action], position: int, given: list[str], current: str, directory: Path
) -> Iterator[str]:
    action = actions[position]
    named = dict(zip((each.dest for each in actions), given, strict=False))
    if action.choices:
        yield from map(str, action.choices)
    elif action.dest == "run":
        yield from runs(directory)
        if len(actions) > 1 and actions[-1].dest == "settings" and action.nargs == "?":
            yield from settings(current)
    elif action.dest in ("server", "role", "roles"):
        yield from daemons(named.get("run"), kind=action.dest, directory=directory)
    elif action.dest == "settings":
        yield from settings(current)
    elif action.dest == "changes":
        from launch.commands.control import CHANGES

        yield from (f"{key}=" for key in CHANGES)
    elif action.metavar and str(action.metavar).islower() and "=" not in str(action.metavar):
        yield str(action.metavar)


def runs(directory: Path) -> list[str]:
    """Names below runs/."""
    return [path.parent.name for path in (directory / "runs").glob("*/config.yaml")]


def daemons(run: str | None, *, kind: str, directory: Path) -> Iterator[str]:
    """Values of the argument `server`, `role` or `roles` (of logs), from the run's endpoint files."""
    if run is None:  # the job is named by --buffer, and a request would take too long
        return
    root = next((path for path in (directory / run, directory / "runs" / run) if path.is_dir()), None)
    if root is None:
        return
    for path in (root / "endpoints").glob("*.json"):
        try:
            role = json.loads(path.read_text()).get("role")
        except (OSError, ValueError, AttributeError):
            continue
        if role == "rollout" or (role == "buffer" and kind != "server"):
            yield path.stem
    if kind == "role":
        yield "trainer"
    if kind == "roles":
        yield from (path.name.removesuffix(".log") for path in (root / "logs").glob("*.log"))


def settings(current: str) -> Iterator[str]:
    """`key=` of every setting and preset; after `key=`, its values."""
    from launch.settings_help import all_keys, choices

    key, has_value, _ = current.partition("=")
    if not has_value:
        yield from (f"{name}=" for name in (*choices(), *(setting.key for setting in all_keys())))
        return
    yield from (f"{key}={name}" for name in choices().get(key, ()))
    for setting in all_keys():
        if setting.key == key:
            values = ("true", "false") if setting.type == "bool" else setting.choices
            yield from (f"{key}={value}" for value in values)


_SCRIPTS = {
    "bash": r"""# areal-like: completion for bash. In ~/.bashrc:  source <(areal-like completion bash)
_areal_like() {
    # `=` and `:` divide words in bash: the words are read from the line, and what is before them is cut off.
    local line="${COMP_LINE:0:COMP_POINT}" word IFS=$' \t\n'
    local -a words
    read -ra words <<< "$line"
    [[ "$line" == *[[:space:]] ]] && words+=("")
    word="${words[-1]}"
    local cut="${word%"${word##*[=:]}"}"
    IFS=$'\n'
    COMPREPLY=($(areal-like completion --words "${words[@]:1}" 2>/dev/null))
    COMPREPLY=("${COMPREPLY[@]#"$cut"}")
    [[ "${COMPREPLY[0]}" == *= ]] && compopt -o nospace
    return 0
}
complete -o default -F _areal_like areal-like
""",
    "zsh": r"""#compdef areal-like
# areal-like: completion for zsh. In ~/.zshrc, after compinit:  source <(areal-like completion zsh)
_areal_like() {
    local -a found
    found=("${(@f)$(areal-like completion --words "${(@)words[2,CURRENT]}" 2>/dev/null)}")
    found=("${(@)found:#}")
    if (( ! ${#found} )); then _files; return; fi
    compadd -S '' -- "${(@M)found:#*=}"
    compadd -- "${(@)found:#*=}"
}
compdef _areal_like areal-like
""",
    "fish": r"""# areal-like: completion for fish. In config.fish:  areal-like completion fish | source
function __areal_like
    set -l words (commandline -opc) (commandline -ct)
    areal-like completion --words $words[2..-1] 2>/dev/null
end
complete -c areal-like -a '(__areal_like)'
""",
}
SHELLS = tuple(_SCRIPTS)


@command(
    "completion",
    "Print a script that lets a shell complete verbs, options, runs, servers and settings. For bash, put "
    "`source <(areal-like completion bash)` into ~/.bashrc.",
    argument("shell", metavar="SHELL", nargs="?", choices=SHELLS, help=", ".join(SHELLS)),
    argument("--words", nargs=argparse.REMAINDER, help=argparse.SUPPRESS),
    examples=["completion bash"],
)
def completion(args: argparse.Namespace) -> int:
    """Prints the script, or, when the script calls it, the words that may follow those typed so far."""
    if args.words is not None:
        sys.stdout.writelines(f"{word}\n" for word in candidates(args.words, directory=Path()))
    elif args.shell is None:
        raise ConfigError(f"completion: name a shell ({', '.join(SHELLS)})")
    else:
        sys.stdout.write(_SCRIPTS[args.shell])
    return 0


@command("version", "Print the version of the installed package.", examples=["version"])
def version(args: argparse.Namespace) -> int:
    """Prints the version."""
    print(f"areal-like {installed_version()}")
    return 0


def installed_version() -> str:
    """The version of the installed package."""
    import importlib.metadata  # here, because the shells wait for this module at every Tab

    try:
        return importlib.metadata.version("areal-like")
    except importlib.metadata.PackageNotFoundError:
        return "(from a checkout)"
