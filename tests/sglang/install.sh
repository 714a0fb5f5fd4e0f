#!/usr/bin/env bash
# Builds an environment in which the real SGLang serves on a CPU, and prints its directory. About two minutes and 2.4 GB, once: it is
# named after the recipe's content and marked complete last, so neither a change nor an interruption leaves a stale one. The link
# `sglang` beside it is where rollout.engine=sglang looks first.
#   usage: install.sh            below $XDG_CACHE_HOME or ~/.cache
#          PYTHON=python3.12 PIP_ARGS="--index-url ..." install.sh
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
python=${PYTHON:-python3}
recipe=$(cat "$here"/{install.sh,requirements.txt,requirements-nodeps.txt,sgl_kernel.py} <("$python" -V) | cksum | cut -d' ' -f1)
root=${XDG_CACHE_HOME:-$HOME/.cache}/areal_like
venv=$root/sglang-$recipe

mkdir -p "$root"
exec 9>"$venv.lock"
flock 9 # two builds of one directory would spoil each other
if [[ ! -e $venv/.complete ]]; then
    echo "building SGLang's environment in $venv (once)" >&2
    rm -rf "$venv"
    "$python" -m venv "$venv"
    read -ra pip_args <<<"${PIP_ARGS:-}"
    pip() { "$venv/bin/python" -m pip install -q -q --disable-pip-version-check --no-compile "${pip_args[@]}" "$@" >&2; }
    # First and alone: a CPU build that is there already satisfies everything that asks for torch later.
    torch=$(grep '^torch==' "$here/requirements.txt")+cpu
    pip "$torch" 2>/dev/null || pip --extra-index-url https://download.pytorch.org/whl/cpu "$torch"
    pip -r "$here/requirements.txt"
    pip --no-deps -r "$here/requirements-nodeps.txt"
    site=$("$venv/bin/python" -c 'import sysconfig; print(sysconfig.get_paths()["purelib"])')
    # The package index's torchvision carries CUDA operators; beside a CPU torch the one import that registers them cannot load.
    sed -i '/^    _meta_registrations,$/d' "$site/torchvision/__init__.py"
    cp "$here/sgl_kernel.py" "$site/"
    # On all cores, where pip would use one. Some packages carry templates that are not Python.
    "$venv/bin/python" -m compileall -q -q -j 0 "$site" || true
    "$venv/bin/python" -c 'import sgl_kernel, torchvision, sglang.srt.server_args' >&2
    touch "$venv/.complete"
fi
ln -sfn "sglang-$recipe" "$root/sglang"
echo "$venv"
