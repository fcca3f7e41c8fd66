"""Every kind of rotary embedding that a config may ask for is the one that transformers computes."""

import pytest

from tests.engine_common.rotary import KINDS

pytestmark = pytest.mark.engine

BOUND = 1e-6  # float32 angles of up to 2048 radians, made in another order


def test_every_kind(server):
    errors = server.run("rope_jobs:compare").get()
    assert set(errors) == set(KINDS)
    assert {kind: error for kind, error in errors.items() if error > BOUND} == {}
