#!/usr/bin/env bash
# Run the tests on the lowest versions that pyproject.toml allows, in a fresh environment.
# Arguments go to pytest: scripts/lowest.sh -x tests/flow
set -euo pipefail
cd "$(dirname "$0")/.."

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

"${PYTHON:-python3}" -m venv "$work/uv"
"$work/uv/bin/python" -m pip install --quiet uv
uv="$work/uv/bin/uv"

"$uv" venv --quiet --python 3.11 "$work/lowest"
"$uv" pip install --quiet --python "$work/lowest/bin/python" --resolution lowest-direct -e ".[test]"
"$uv" pip list --python "$work/lowest/bin/python"
"$work/lowest/bin/python" -m pytest "$@"
