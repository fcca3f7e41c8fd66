"""What `make test` leaves out on the lowest release of vLLM; `make test-all` runs it."""

from __future__ import annotations

import pytest


def slow(*values: object):
    """One set of values of a parametrised test, as ``pytest.mark.slow`` is for a whole one."""
    return pytest.param(*values, marks=pytest.mark.slow)
