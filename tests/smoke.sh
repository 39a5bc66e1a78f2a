#!/usr/bin/env bash
# Installs a wheel or an sdist into an empty environment and uses it, outside the repository: smoke.sh PYTHON FILE
set -euo pipefail
python=$1 file=$(realpath "$2") smoke=$(realpath "$(dirname "$0")/smoke.py")
directory=$(mktemp -d)
trap 'rm -rf "$directory"' EXIT
"$python" -m venv "$directory/venv"
"$directory/venv/bin/python" -m pip install --quiet --disable-pip-version-check "$file"
cd "$directory"
venv/bin/python -W error "$smoke" "$(basename "$file")"
