"""What vLLM is told while it settles its options, before it starts a process: refusals, and our defaults."""

import pytest

from tests.engine_common.broken import BROKEN, unsaid
from tests.engine_common.checkpoints import checkpoint

pytestmark = pytest.mark.engine

# What the user says, and the largest capture.
CAPTURES = [
    ({"max_num_seqs": 64}, None),
    ({"max_num_seqs": 512}, None),
    ({"max_num_seqs": 600}, 608),
    ({"max_num_seqs": 4096}, 1024),
    ({"max_num_seqs": 1024, "max_cudagraph_capture_size": 256}, 256),
    ({"max_num_seqs": 1024, "cudagraph_capture_sizes": [1, 8]}, None),
]


@pytest.fixture
def job(server):
    """Runs a function of ``options_jobs`` in a child of the process that has vLLM imported."""

    def ask(name: str, model=None, **arguments):
        folder = str(model or checkpoint("small"))
        return server.run(f"options_jobs:{name}", model=folder, **arguments).get()

    return ask


def test_a_broken_checkpoint_is_refused_before_any_process_starts(job, tmp_path):
    make, words = BROKEN["missing tensors"]
    said = job("refusal", make(tmp_path / "model"), given={})
    assert unsaid(words, said["error"]) == []
    assert said["processes"] == 0


def test_so_are_options_that_do_not_fit(job):
    said = job("refusal", given={"data_parallel_size": 2})
    assert "Start one server for each replica" in said["error"]
    assert said["processes"] == 0


def test_so_are_pipelines_without_compilation(job):
    given = {"pipeline_parallel_size": 2, "enforce_eager": True}
    said = job("refusal", checkpoint("staged"), given=given)
    assert "Leave out --enforce-eager" in said["error"]
    assert said["processes"] == 0


def test_what_fits_is_not_refused(job):
    assert job("refusal", given={"max_num_seqs": 8})["error"] is None


def test_wide_decodes_are_captured_on_a_gpu_unless_the_user_says_what_is(job):
    found = job("captures", cases=[case for case, _ in CAPTURES])
    assert found == [largest for _, largest in CAPTURES]


def test_without_a_gpu_nothing_is_captured(job):
    assert not job("captures_on_this_machine")
