#!/usr/bin/env bash
# The environment of the peer in gram.py: neural-tangents 0.6.5, which is archived, on the newest jax it runs with.
# PYTHON chooses the interpreter (3.11 or newer, up to 3.13).
#
#     benchmarks/peer_env.sh           # in benchmarks/.peer
#     benchmarks/peer_env.sh FOLDER
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
folder=${1:-$here/.peer}

"${PYTHON:-python3}" -m venv "$folder"
python="$folder/bin/python"
"$python" -m pip install --quiet --disable-pip-version-check \
    jax==0.5.3 jaxlib==0.5.3 numpy==2.4.6 scipy==1.17.1 'frozendict>=2.3' 'typing_extensions>=4.0.1'
# Without what it asks for beside these: TensorFlow serves its experimental part, which is not timed.
"$python" -m pip install --quiet --disable-pip-version-check --no-deps neural-tangents==0.6.5
(cd "$here" && "$python" -W ignore -c 'import _gram_peer; print(_gram_peer.prepare("AUTO").versions)')
