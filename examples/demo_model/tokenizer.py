"""The demo model's tokenizer: byte-level BPE of a small vocabulary, with the special tokens of LFM2.5."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

VOCAB_SIZE = 1024
# In the order of their ids, which are those of the published models (pad 0, start 1, end of turn 7).
SPECIAL_TOKENS = (
    *("<|pad|>", "<|startoftext|>", "<|endoftext|>", "<|fim_pre|>", "<|fim_mid|>", "<|fim_suf|>"),
    *("<|im_start|>", "<|im_end|>", "<|tool_list_start|>", "<|tool_list_end|>"),
    *(
        "<|tool_call_start|>",
        "<|tool_call_end|>",
        "<|tool_response_start|>",
        "<|tool_response_end|>",
    ),
)
THINKING = ("<think>", "</think>")  # plain text to a reader, one token each to the model


def build_tokenizer(corpus: Iterable[str], template: Path) -> PreTrainedTokenizerFast:
    """Learn the merges from ``corpus``; ``template`` is the chat template's file.

    Capital letters and digits stand alone, and a word never takes in the space before it: whatever is to be copied or
    recalled has the same tokens wherever it stands.
    """
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r"\p{Lu}|\p{N}|\p{Ll}+"), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=[*SPECIAL_TOKENS, *THINKING],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator(corpus, trainer)
    core.post_processor = processors.TemplateProcessing(
        single="<|startoftext|> $A",
        special_tokens=[("<|startoftext|>", SPECIAL_TOKENS.index("<|startoftext|>"))],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        bos_token="<|startoftext|>",
        eos_token="<|im_end|>",
        pad_token="<|pad|>",
        additional_special_tokens=[
            t for t in SPECIAL_TOKENS if t not in ("<|startoftext|>", "<|im_end|>", "<|pad|>")
        ],
        chat_template=template.read_text(encoding="utf-8"),
        clean_up_tokenization_spaces=False,
        model_max_length=4096,
    )
