"""Generate offline with SGLang: ``python examples/offline_sglang.py [MODEL]``.

MODEL is a folder or a Hugging Face name such as LiquidAI/LFM2-8B-A1B; without one, the demo model
of this package. Nothing here is specific to the plugin: installing it is all that it takes.
"""

import sys

import sglang as sgl

from lfm2_plugin.demo import model_path


def main(model: str) -> None:
    engine = sgl.Engine(
        model_path=model,
        context_length=2048,
        max_running_requests=8,
        log_level="warning",
    )
    greedy = {"temperature": 0, "max_new_tokens": 64}
    try:
        # Plain text to be continued; a list is served as one batch.
        prompts = ["apple river star apple river", "star moon fox"]
        for prompt, output in zip(prompts, engine.generate(prompts, greedy), strict=True):
            print(f"generate: {prompt!r} -> {output['text']!r}")

        # Conversations, rendered with the checkpoint's chat template.
        tokenizer = engine.tokenizer_manager.tokenizer
        conversations = [
            [{"role": "user", "content": "Repeat: apple river star"}],
            [
                {"role": "user", "content": "Given park = 88, peach = 71, nut = 16. What is nut?"},
                {"role": "assistant", "content": "16"},
                {"role": "user", "content": "What is park?"},
            ],
        ]
        rendered = [
            tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
            for turns in conversations
        ]
        for turns, output in zip(conversations, engine.generate(rendered, greedy), strict=True):
            print(f"chat: {turns[-1]['content']!r} -> {output['text']!r}")
    finally:
        engine.shutdown()


if __name__ == "__main__":  # SGLang starts its processes anew, and they import this file again
    main(sys.argv[1] if len(sys.argv) > 1 else str(model_path()))
