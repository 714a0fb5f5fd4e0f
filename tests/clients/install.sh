#!/usr/bin/env bash
# Builds the environments of clients and frameworks of agents, and prints their directories. There is one for each
# file of requirements here, because their packages contradict one another.
# The links `clients` and `clients-NAME` (of requirements-NAME.txt) beside them are where the tests look.
#   usage: install.sh            below $XDG_CACHE_HOME or ~/.cache
#          PYTHON=python3.12 PIP_ARGS="--index-url ..." install.sh
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
python=${PYTHON:-python3}
root=${XDG_CACHE_HOME:-$HOME/.cache}/areal_like
read -ra pip_args <<<"${PIP_ARGS:-}"

build() { # LINK REQUIREMENTS
    local recipe venv
    recipe=$(cat "$here/install.sh" "$2" <("$python" -V) | cksum | cut -d' ' -f1)
    venv=$root/clients-$recipe
    exec 9>"$venv.lock"
    flock 9 # two builds of one directory would spoil each other
    if [[ ! -e $venv/.complete ]]; then
        echo "building an environment of clients in $venv (once)" >&2
        rm -rf "$venv"
        "$python" -m venv "$venv"
        "$venv/bin/python" -m pip install -q -q --disable-pip-version-check "${pip_args[@]}" -r "$2" >&2
        touch "$venv/.complete"
    fi
    ln -sfn "clients-$recipe" "$root/$1"
    echo "$venv"
}

mkdir -p "$root"
for requirements in "$here"/requirements*.txt; do
    name=$(basename "$requirements" .txt)
    build "clients${name#requirements}" "$requirements"
done
