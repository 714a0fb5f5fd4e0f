#!/usr/bin/env bash
# Builds an environment with Harbor, which needs Python 3.12, and prints its directory.
# The link `harbor` beside it is where the tests look.
#   usage: install.sh            below $XDG_CACHE_HOME or ~/.cache
#          PYTHON=python3.12 PIP_ARGS="--index-url ..." install.sh
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
recipe=$(cat "$here"/{install.sh,requirements.txt} <("$python" -V) | cksum | cut -d' ' -f1)
root=${XDG_CACHE_HOME:-$HOME/.cache}/areal_like
venv=$root/harbor-$recipe

mkdir -p "$root"
exec 9>"$venv.lock"
flock 9 # two builds of one directory would spoil each other
if [[ ! -e $venv/.complete ]]; then
    echo "building Harbor's environment in $venv (once)" >&2
    rm -rf "$venv"
    "$python" -m venv "$venv"
    read -ra pip_args <<<"${PIP_ARGS:-}"
    "$venv/bin/python" -m pip install -q -q --disable-pip-version-check "${pip_args[@]}" -r "$here/requirements.txt" >&2
    "$venv/bin/python" -c 'import harbor.trial.trial' >&2
    touch "$venv/.complete"
fi
ln -sfn "harbor-$recipe" "$root/harbor"
echo "$venv"
