#!/usr/bin/env bash
# Builds an environment in which the real SGLang serves on a CPU, and prints its directory. About two minutes and 2.4 GB, once:
# the directory is named after the recipe's content and marked complete last, so neither a change nor an interruption leaves a stale one.
#   usage: install.sh            below $XDG_CACHE_HOME or ~/.cache
#          PYTHON=python3.12 PIP_ARGS="--index-url ..." install.sh
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
python=${PYTHON:-python3}
recipe=$(cat "$here"/{install.sh,requirements.txt,requirements-nodeps.txt,sgl_kernel.py} <("$python" -V) | sha256sum | cut -c1-12)
root=${XDG_CACHE_HOME:-$HOME/.cache}/areal_like
venv=$root/sglang-$recipe

mkdir -p "$root"
exec 9>"$venv.lock"
flock 9 # two builds of one directory would spoil each other
if [[ ! -e $venv/.complete ]]; then
    echo "building SGLang's environment in $venv (once)" >&2
    rm -rf "$venv"
    "$python" -m venv "$venv"
    pip=("$venv/bin/python" -m pip install -q --disable-pip-version-check)
    # On its own and first: a CPU build that is already there satisfies everything that asks for torch later.
    torch=$(grep '^torch==' "$here/requirements.txt")
    # shellcheck disable=SC2086
    {
        "${pip[@]}" ${PIP_ARGS:-} "$torch+cpu" 2>/dev/null || "${pip[@]}" --index-url https://download.pytorch.org/whl/cpu "$torch+cpu"
        "${pip[@]}" ${PIP_ARGS:-} -r "$here/requirements.txt"
        "${pip[@]}" ${PIP_ARGS:-} --no-deps -r "$here/requirements-nodeps.txt"
    } >&2
    site=$("$venv/bin/python" -c 'import sysconfig; print(sysconfig.get_paths()["purelib"])')
    # The package index's torchvision carries CUDA operators; beside a CPU torch the one import that registers them cannot load.
    sed -i '/^    _meta_registrations,$/d' "$site/torchvision/__init__.py"
    cp "$here/sgl_kernel.py" "$site/"
    "$venv/bin/python" -c 'import sgl_kernel, torchvision, sglang.srt.server_args' >&2
    touch "$venv/.complete"
fi
echo "$venv"
