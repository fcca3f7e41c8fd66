"""What `make test` leaves to `make test-all`: further members of a matrix, and the faults of the built-in models."""

from __future__ import annotations

import pytest


def matrix(*values: object, id: str | None = None):
    """One set of values of a parametrised test that `make test-all` alone runs."""
    return pytest.param(*values, marks=pytest.mark.matrix, id=id)
