"""Fixtures of the tests of training."""

import jaxtyping
import pytest


@pytest.fixture
def untyped():
    """As for users: without the types that are checked in tests."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)
