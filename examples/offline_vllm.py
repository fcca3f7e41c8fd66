"""Generate offline with vLLM: ``python examples/offline_vllm.py [MODEL]``.

MODEL is a folder or a Hugging Face name such as LiquidAI/LFM2-8B-A1B; without one, the demo model
of this package. Nothing here is specific to the plugin: installing it is all that it takes.
"""

import sys

from vllm import LLM, SamplingParams

from lfm2_plugin.demo import model_path


def main(model: str) -> None:
    llm = LLM(model=model, max_model_len=2048, max_num_seqs=8, seed=0)
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
    main(sys.argv[1] if len(sys.argv) > 1 else str(model_path()))
