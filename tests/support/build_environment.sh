#!/usr/bin/env bash
# Builds an environment of its own for a package whose requirements differ from ours, once, and prints its directory.
# The link NAME beside it is where tests and benchmarks look.
#   usage: build_environment.sh NAME MODULE REQUIREMENTS     MODULE: imported at the end, as a check; "" for none
# Below $XDG_CACHE_HOME or ~/.cache; PYTHON=python3.12 PIP_ARGS="--index-url ..." choose interpreter and packages.
set -euo pipefail
name=$1 module=$2 requirements=$3
python=${PYTHON:-python3}
recipe=$(cat "$0" "$requirements" <("$python" -V) | cksum | cut -d' ' -f1)
root=${XDG_CACHE_HOME:-$HOME/.cache}/areal_like
venv=$root/$name-$recipe

mkdir -p "$root"
exec 9>"$venv.lock"
flock 9 # two builds of one directory would spoil each other
if [[ ! -e $venv/.complete ]]; then
    echo "building an environment with $name in $venv (once)" >&2
    rm -rf "$venv"
    "$python" -m venv "$venv"
    read -ra pip_args <<<"${PIP_ARGS:-}"
    "$venv/bin/python" -m pip install -q -q --disable-pip-version-check "${pip_args[@]}" -r "$requirements" >&2
    "$venv/bin/python" -c "${module:+import $module}" >&2
    touch "$venv/.complete"
fi
ln -sfn "$name-$recipe" "$root/$name"
echo "$venv"
