#!/usr/bin/env bash
# Builds the environments of clients and frameworks of agents, and prints their directories. There is one for each
# file of requirements here, because their packages contradict one another.
# The links `clients` and `clients-NAME` (of requirements-NAME.txt) are where the tests look.
#   usage: install.sh            below $XDG_CACHE_HOME or ~/.cache
#          PYTHON=python3.12 PIP_ARGS="--index-url ..." install.sh
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
for requirements in "$here"/requirements*.txt; do
    name=$(basename "$requirements" .txt)
    "$here/../support/build_environment.sh" "clients${name#requirements}" "" "$requirements"
done
