#!/usr/bin/env bash
# The figures of the paper that the README shows, with their data: a quarter of an hour on two cores. Figure 3(a) needs
# Fashion-MNIST, of Debian's package dataset-fashion-mnist.
set -euo pipefail
cd "$(dirname "$0")/.."
for figure in fig1c fig2b woodworth fig3a; do
    python -m lazyjax reproduce "$figure" --out docs/figures
done
