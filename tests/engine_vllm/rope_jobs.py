"""What runs inside the child: vLLM's rotary embeddings, made as our attention makes them."""

from vllm.config import VllmConfig, set_current_vllm_config

from tests.engine_common.rotary import HEAD_DIM, POSITIONS, errors
from vllm_model.engine_api import get_rope


def compare() -> dict[str, float]:
    """The error of each kind against transformers."""
    with set_current_vllm_config(VllmConfig()):
        return errors(
            lambda rope: (
                get_rope(
                    HEAD_DIM, max_position=POSITIONS, rope_parameters=rope, is_neox_style=True
                ).cos_sin_cache
            )
        )
