"""One role on a node of Ray: `python -m launch.ray.node ROLE RUN PLACE`, from its actor. PLACE is JSON."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence

from launch.nodes.start import ROLES, Place, exit_code_of, open_run, start


def main(argv: Sequence[str]) -> int:
    """Becomes the daemon; returns an exit code only without one."""
    if len(argv) != 3 or argv[0] not in ROLES:
        sys.stderr.write(f"usage: python -m launch.ray.node {'|'.join(ROLES)} RUN PLACE\n")
        return 2
    role, run, place = argv

    def body() -> None:
        paths, config = open_run(run)
        start(role, config, paths, Place(**json.loads(place)))

    return exit_code_of(role, body)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
