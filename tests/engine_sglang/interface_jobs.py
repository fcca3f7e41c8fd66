"""What the tests of interfaces run inside the child, beside the steps that all tests have."""

from pathlib import Path

from sglang.srt.managers.io_struct import GenerateReqInput

from tests.engine_sglang import engine_jobs


def generate_from_embeddings(llm, prompts: list[list[int]], folder: str, tokens: int) -> list[dict]:
    """Generates after vectors instead of ids: the prompts' rows of the checkpoint's embedding."""
    from safetensors import safe_open

    (file,) = Path(folder).glob("*.safetensors")
    with safe_open(file, "pt") as tensors:
        table = tensors.get_tensor("model.embed_tokens.weight").float()
    wanted = engine_jobs.request(max_new_tokens=tokens)
    # Only the HTTP route and this request object know vectors, not Engine.generate.
    request = GenerateReqInput(
        input_embeds=[table[prompt].tolist() for prompt in prompts],
        **engine_jobs.together([wanted] * len(prompts)),
    )
    outs = llm.loop.run_until_complete(anext(llm.tokenizer_manager.generate_request(request, None)))
    return [engine_jobs.describe([out]) for out in outs]


def hidden_states_of_prompts(llm, prompts: list[list[int]]) -> list[list[list[float]]]:
    """The hidden states that the model hands on, one list a prompt, one vector a token."""
    sampling = {"temperature": 0.0, "max_new_tokens": 1}
    outs = llm.generate(input_ids=prompts, sampling_params=sampling, return_hidden_states=True)
    return [out["meta_info"]["hidden_states"][0] for out in outs]


def capture(model, method: str, layers: list[int] | None) -> list[int]:
    """Inside the scheduler: asks the model for layers as a drafter does."""
    getattr(model, method)(layers)
    return sorted(model.model.captured_layers)


def shared_with_a_drafter(model) -> list[list[int]]:
    """Inside the scheduler: the shapes of the embedding and the head that a drafter is given."""
    return [list(weight.shape) for weight in model.get_embed_and_head()]


def run_engine(model: str, engine: dict, steps: list[dict]) -> dict:
    """As in ``engine_jobs``, with these steps: "embeddings" and "hidden_states"."""
    engine_jobs.STEPS |= {
        "embeddings": generate_from_embeddings,
        "hidden_states": hidden_states_of_prompts,
    }
    return engine_jobs.run_engine(model, engine, steps)
