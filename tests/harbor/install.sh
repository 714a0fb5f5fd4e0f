#!/usr/bin/env bash
# Builds an environment with Harbor, which needs Python 3.12, as tests/support/build_environment.sh does.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
is_new() { "$1" -c 'import sys; sys.exit(sys.version_info < (3, 12))' 2>/dev/null; }
for python in "${PYTHON:-python3}" python3.13 python3.12 ""; do
    if [[ -n $python ]] && is_new "$python"; then break; fi
done
if [[ -z $python ]]; then
    echo "Harbor needs Python 3.12 or later: install it, or name it with PYTHON=/path/to/python3.12" >&2
    exit 2
fi
PYTHON=$python exec "$here/../support/build_environment.sh" harbor harbor.trial.trial "$here/requirements.txt"
