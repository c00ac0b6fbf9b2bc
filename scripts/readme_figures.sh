#!/usr/bin/env bash
# The three figures of the paper that the README shows, with their data: about five minutes on two cores.
set -euo pipefail
cd "$(dirname "$0")/.."
for figure in fig1c fig2b woodworth; do
    python -m lazyjax reproduce "$figure" --out docs/figures
done
