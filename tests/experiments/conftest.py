"""The tiny network of `figures`, known by its name to the figures of deep networks."""

import pytest

from figures import Tiny
from lazyjax.models.deep import NETWORKS


@pytest.fixture(scope="module")
def tiny():
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(NETWORKS, "tiny", Tiny)
        yield "tiny"
