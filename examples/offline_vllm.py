"""Generate offline with vLLM: ``python examples/offline_vllm.py [MODEL] [options of vllm serve]``.

MODEL is a folder or a Hugging Face name such as LiquidAI/LFM2-8B-A1B; without one, the demo model
of this package. ``--enforce-eager`` starts sooner; on a CPU, ``VLLM_CPU_KVCACHE_SPACE=1`` in the
environment keeps vLLM from asking for 92 % of the memory. Nothing here is specific to the plugin:
installing it is all that it takes.
"""

from vllm import LLM, EngineArgs, SamplingParams
from vllm.utils.argparse_utils import FlexibleArgumentParser

from lfm2_plugin.demo import model_path


def engine_options() -> EngineArgs:
    """vLLM's own options from the command line, with defaults for a small model."""
    parser = EngineArgs.add_cli_args(FlexibleArgumentParser())
    parser.add_argument("checkpoint", nargs="?", metavar="MODEL", default=str(model_path()))
    parser.set_defaults(max_model_len=2048, max_num_seqs=8, seed=0)
    options = parser.parse_args()
    options.model = options.checkpoint
    return EngineArgs.from_cli_args(options)


def main() -> None:
    llm = LLM.from_engine_args(engine_options())
    greedy = SamplingParams(temperature=0, max_tokens=64)

    # Plain text to be continued.
    for output in llm.generate(["apple river star apple river", "star moon fox"], greedy):
        print(f"generate: {output.prompt!r} -> {output.outputs[0].text!r}")

    # Conversations, rendered with the checkpoint's chat template; a list is served as one batch.
    conversations = [
        [{"role": "user", "content": "Repeat: apple river star"}],
        [
            {"role": "user", "content": "Given park = 88, peach = 71, nut = 16. What is nut?"},
            {"role": "assistant", "content": "16"},
            {"role": "user", "content": "What is park?"},
        ],
    ]
    for conversation, output in zip(conversations, llm.chat(conversations, greedy), strict=True):
        print(f"chat: {conversation[-1]['content']!r} -> {output.outputs[0].text!r}")


if __name__ == "__main__":  # vLLM starts its engine in a process that imports this file again
    main()
