"""Generate offline with SGLang: ``python examples/offline_sglang.py [MODEL] [options of its server]``.

MODEL is a folder or a Hugging Face name such as LiquidAI/LFM2-8B-A1B; without one, the demo model
of this package. Nothing here is specific to the plugin: installing it is all that it takes.
"""

import sys

import sglang as sgl
from sglang.srt.server_args import ServerArgs, prepare_server_args

from lfm2_plugin.demo import model_path

# Defaults for a small model; of an option that is given twice, the last one counts.
DEFAULTS = ["--context-length", "2048", "--max-running-requests", "8", "--log-level", "warning"]


def engine_options(arguments: list[str]) -> ServerArgs:
    """The options of SGLang's own server from the command line, which may begin with a model."""
    has_model = bool(arguments) and not arguments[0].startswith("-")
    model = arguments[0] if has_model else str(model_path())
    return prepare_server_args(["--model-path", model, *DEFAULTS, *arguments[has_model:]])


def main() -> None:
    engine = sgl.Engine(server_args=engine_options(sys.argv[1:]))
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
    main()
