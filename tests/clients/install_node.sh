#!/usr/bin/env bash
# Installs the JavaScript clients of agents (package.json), and prints their directory. The link `clients-node` beside
# it is where the tests look. Where they cannot be installed, its file `skipped` says why, and their tests are skipped.
#   usage: install_node.sh       below $XDG_CACHE_HOME or ~/.cache, from the registry that npm is set to
#          NPM_ARGS="--registry ..." install_node.sh
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
root=${XDG_CACHE_HOME:-$HOME/.cache}/areal_like
recipe=$(cat "$here"/{install_node.sh,package.json} <(node --version 2>&1 || true) | cksum | cut -d' ' -f1)
place=$root/clients-node-$recipe
read -ra npm_args <<<"${NPM_ARGS:-}"

install() { # prints why it cannot
    if ! command -v node >/dev/null || ! command -v npm >/dev/null; then
        echo "Node and npm are not installed"
    elif ! node -e 'process.exit(process.versions.node.split(".")[0] < 20 ? 1 : 0)'; then
        echo "Node $(node --version) is too old: want 20 or later"
    else
        cp "$here/package.json" "$place"
        npm install --prefix "$place" --no-package-lock --no-audit --no-fund --ignore-scripts --fetch-retries=1 \
            "${npm_args[@]}" >"$place/npm.log" 2>&1 ||
            echo "npm cannot install tests/clients/package.json: $(head -n 3 "$place/npm.log" | tr '\n' ' ')"
    fi
}

mkdir -p "$place"
exec 9>"$place.lock"
flock 9 # two installations into one directory would spoil each other
if [[ ! -e $place/.complete ]]; then
    echo "installing JavaScript clients in $place (once)" >&2
    reason=$(install)
    if [[ -n $reason ]]; then
        echo "no JavaScript clients: $reason" | tee "$place/skipped" >&2
    else
        rm -f "$place/skipped"
        touch "$place/.complete"
    fi
fi
ln -sfn "clients-node-$recipe" "$root/clients-node"
echo "$place"
