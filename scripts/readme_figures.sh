#!/usr/bin/env bash
# Make the figures of the paper that the README shows, with their data: a quarter of an hour on two cores. Figure 3(a)
# needs Fashion-MNIST, from Debian's package dataset-fashion-mnist.
set -euo pipefail
cd "$(dirname "$0")/.."
# `reproduce` overwrites no figure of another configuration, so the new ones are made in another folder.
new=$(mktemp -d)
trap 'rm -rf "$new"' EXIT
for figure in fig1c fig2b woodworth fig3a; do
    python -m lazyjax reproduce "$figure" --out "$new"
    mv "$new/$figure".{png,svg,nc} docs/figures/
done
