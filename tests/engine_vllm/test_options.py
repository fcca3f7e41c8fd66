"""What vLLM is told while it settles its options, before it starts a process: refusals, and our defaults."""

import pytest

from tests.engine_common.broken import BROKEN, unsaid
from tests.engine_common.checkpoints import altered, checkpoint

pytestmark = pytest.mark.engine

# What the user says; the largest capture, and whether a decode of all sequences has one of its size.
CAPTURES = [
    ({"max_num_seqs": 64}, 128, True),
    ({"max_num_seqs": 512}, 512, True),
    ({"max_num_seqs": 600}, 600, True),
    ({"max_num_seqs": 1000}, 1000, True),
    ({"max_num_seqs": 1024}, 1024, True),
    ({"max_num_seqs": 4096}, 1024, False),
    ({"max_num_seqs": 600, "performance_mode": "interactivity"}, 600, True),
    ({"max_num_seqs": 1024, "max_cudagraph_capture_size": 256}, 256, False),
    ({"max_num_seqs": 1024, "cudagraph_capture_sizes": [1, 8]}, 8, False),
]


def connector(name: str, **extra) -> dict:
    transfer = {"kv_connector": name, "kv_role": "kv_both", "kv_connector_extra_config": extra}
    return {"kv_transfer_config": transfer}


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


def test_so_is_a_drafter_of_the_family(job):
    drafts = {"method": "draft_model", "model": str(checkpoint("small"))}
    said = job("refusal", given={"speculative_config": {**drafts, "num_speculative_tokens": 3}})
    assert "has conv states, and vLLM can't draft with such a model" in said["error"]
    assert said["processes"] == 0


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (connector("ExampleConnector"), "ExampleConnector can't move what LFM2-MoE keeps"),
        (
            connector(
                "MultiConnector", connectors=[connector("ExampleConnector")["kv_transfer_config"]]
            ),
            "MultiConnector, ExampleConnector can't move",
        ),
        (connector("NixlConnector"), "NixlConnector can't move the state of a short convolution"),
        (
            {"kv_offloading_size": 1, "kv_offloading_backend": "lmcache"},
            "LMCacheMPConnector can't move what LFM2-MoE keeps",
        ),
        (
            connector("SimpleCPUOffloadConnector"),
            "SimpleCPUOffloadConnector moves cache blocks from an accelerator's memory",
        ),
        ({"kv_offloading_size": 1}, "OffloadingConnector moves cache blocks"),
    ],
    ids=["example", "multi", "nixl", "lmcache", "offload", "offload size"],
)
def test_so_are_connectors_that_can_not_move_a_conv_state(job, given, words):
    said = job("refusal", given=given)
    assert words in said["error"]
    assert said["processes"] == 0


def test_a_config_without_architecture_is_no_model_for_embeddings_unless_asked(job, tmp_path):
    silent = altered(checkpoint("small"), tmp_path / "model", config={"architectures": None})
    said = job("refusal", silent, given={})
    assert '"architectures": ["Lfm2MoeForCausalLM"]' in said["error"]
    named = {"hf_overrides": {"architectures": ["Lfm2MoeForCausalLM"]}}
    assert job("refusal", silent, given=named)["error"] is None


def test_an_unknown_entry_is_refused_until_it_is_null(job, tmp_path):
    windowed = altered(checkpoint("small"), tmp_path / "model", config={"sliding_window": 256})
    assert "sliding_window is 256" in job("refusal", windowed, given={})["error"]
    null = {"hf_overrides": {"sliding_window": None}}
    assert job("refusal", windowed, given=null)["error"] is None


def test_what_fits_is_not_refused(job):
    assert job("refusal", given={"max_num_seqs": 8})["error"] is None


def test_a_decode_of_all_sequences_is_captured_on_a_gpu_unless_the_user_says_what_is(job):
    found = job("captures", cases=[case for case, _, _ in CAPTURES])
    for (case, largest, full), sizes in zip(CAPTURES, found, strict=True):
        assert (max(sizes), case["max_num_seqs"] in sizes) == (largest, full), case


def test_where_vllm_captures_enough_by_itself_nothing_is_changed(job):
    """On data-centre Blackwell it goes up to 1,024; its largest serves prefills too."""
    cases = [{"max_num_seqs": sequences} for sequences in (600, 1000, 1024, 4096)]
    assert job("left_alone", cases=cases, largest=1024) == [True] * 4
    assert job("left_alone", cases=cases, largest=512) == [False] * 4


def test_the_captures_below_are_those_of_vllm(job):
    """A step that is not full is padded no further than it would be in vLLM's own grid."""
    for mode in ("balanced", "interactivity"):
        cases = [{"max_num_seqs": 512}, {"max_num_seqs": 600}]
        own, ours = job("captures", cases=[case | {"performance_mode": mode} for case in cases])
        assert own == [size for size in ours if size <= 512]


def test_without_a_gpu_nothing_is_captured(job):
    assert not job("captures_on_this_machine")
