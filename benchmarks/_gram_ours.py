"""The side of this library in `gram.py`, which starts this file; see `_gram_worker.py`."""

from typing import Any

import _gram_worker
import lazyjax as lj
from _gram_worker import Contender

METHODS: dict[str, Any] = {"ours": "auto", "eager": "auto", "jacobian": "jacobian"}
"""Contenders: `lj.gram`, compiled and as a user calls it; and plain contraction of Jacobians."""


def prepare(kind: str) -> Contender:
    def make(f: Any) -> Any:
        return lambda w, x: lj.gram(f, w, x, method=METHODS[kind])

    return Contender(make, jit=kind != "eager")


if __name__ == "__main__":
    _gram_worker.serve(prepare)
