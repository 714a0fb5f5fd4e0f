#!/usr/bin/env bash
# Builds an environment with clients and frameworks of agents, and prints its directory.
# The link `clients` beside it is where the tests look.
#   usage: install.sh            below $XDG_CACHE_HOME or ~/.cache
#          PYTHON=python3.12 PIP_ARGS="--index-url ..." install.sh
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
python=${PYTHON:-python3}
recipe=$(cat "$here"/{install.sh,requirements.txt} <("$python" -V) | cksum | cut -d' ' -f1)
root=${XDG_CACHE_HOME:-$HOME/.cache}/areal_like
venv=$root/clients-$recipe

mkdir -p "$root"
exec 9>"$venv.lock"
flock 9 # two builds of one directory would spoil each other
if [[ ! -e $venv/.complete ]]; then
    echo "building an environment of clients in $venv (once)" >&2
    rm -rf "$venv"
    "$python" -m venv "$venv"
    read -ra pip_args <<<"${PIP_ARGS:-}"
    "$venv/bin/python" -m pip install -q -q --disable-pip-version-check "${pip_args[@]}" -r "$here/requirements.txt" >&2
    LITELLM_LOCAL_MODEL_COST_MAP=True "$venv/bin/python" -c 'import agents, anthropic, litellm, openai, pydantic_ai' >&2
    touch "$venv/.complete"
fi
ln -sfn "clients-$recipe" "$root/clients"
echo "$venv"
