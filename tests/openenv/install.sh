#!/usr/bin/env bash
# Builds an environment with OpenEnv's servers, whose web frameworks the project does not need, and prints its directory.
# The link `openenv` beside it is where the tests look.
#   usage: install.sh            below $XDG_CACHE_HOME or ~/.cache
#          PYTHON=python3.12 PIP_ARGS="--index-url ..." install.sh
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
python=${PYTHON:-python3}
recipe=$(cat "$here"/{install.sh,requirements.txt} <("$python" -V) | cksum | cut -d' ' -f1)
root=${XDG_CACHE_HOME:-$HOME/.cache}/areal_like
venv=$root/openenv-$recipe

mkdir -p "$root"
exec 9>"$venv.lock"
flock 9 # two builds of one directory would spoil each other
if [[ ! -e $venv/.complete ]]; then
    echo "building OpenEnv's environment in $venv (once)" >&2
    rm -rf "$venv"
    "$python" -m venv "$venv"
    read -ra pip_args <<<"${PIP_ARGS:-}"
    "$venv/bin/python" -m pip install -q -q --disable-pip-version-check "${pip_args[@]}" -r "$here/requirements.txt" >&2
    "$venv/bin/python" -c 'import openenv.core.env_server' >&2
    touch "$venv/.complete"
fi
ln -sfn "openenv-$recipe" "$root/openenv"
echo "$venv"
