"""What vLLM is told while it settles its options, before it starts a process: refusals, and our defaults."""

import pytest
from broken import BROKEN, unsaid
from checkpoints import checkpoint
from vllm.engine.arg_utils import EngineArgs

from vllm_model import options

pytestmark = pytest.mark.engine


def settled(folder=None, **given):
    """vLLM's options, as every command and class of it settles them."""
    folder = folder or checkpoint("small")
    return EngineArgs(
        model=str(folder), skip_tokenizer_init=True, max_model_len=256, **given
    ).create_engine_config()


def test_a_broken_checkpoint_is_refused_before_any_process_starts(tmp_path):
    make, words = BROKEN["missing tensors"]
    with pytest.raises(ValueError) as refusal:
        settled(make(tmp_path / "model"))
    assert unsaid(words, str(refusal.value)) == []


def test_so_are_options_that_do_not_fit():
    with pytest.raises(ValueError, match="Start one server for each replica"):
        settled(data_parallel_size=2)


@pytest.mark.parametrize(
    ("requests", "said", "largest"),
    [(64, None, None), (512, None, None), (600, None, 608), (4096, None, 1024), (1024, 256, 256)],
)
def test_wide_decodes_are_captured_on_a_gpu(monkeypatch, requests, said, largest):
    config = settled(max_num_seqs=requests, max_num_batched_tokens=8192)
    # On this CPU vLLM has settled on no graphs; here is what it hands over on a GPU.
    config.compilation_config.max_cudagraph_capture_size = said
    config.compilation_config.cudagraph_capture_sizes = None
    monkeypatch.setattr("vllm_model.engine_api.captures_graphs", lambda: True)
    options.capture_wide_decodes(config)
    assert config.compilation_config.max_cudagraph_capture_size == largest


def test_sizes_that_the_user_lists_stay(monkeypatch):
    config = settled(max_num_seqs=1024)
    config.compilation_config.max_cudagraph_capture_size = None
    config.compilation_config.cudagraph_capture_sizes = [1, 8]
    monkeypatch.setattr("vllm_model.engine_api.captures_graphs", lambda: True)
    options.capture_wide_decodes(config)
    assert config.compilation_config.max_cudagraph_capture_size is None


def test_without_a_gpu_nothing_is_captured():
    assert not settled(max_num_seqs=1024).compilation_config.max_cudagraph_capture_size
