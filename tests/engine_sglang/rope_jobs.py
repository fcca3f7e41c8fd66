"""What runs inside the child: SGLang's rotary embeddings, made as our attention makes them."""

from sglang.srt.server_args import ServerArgs, set_global_server_args_for_scheduler

from sglang_model.engine_api import rotary_embedding
from tests.engine_common.rotary import HEAD_DIM, POSITIONS, errors


def compare() -> dict[str, float]:
    """The error of each kind against transformers."""
    set_global_server_args_for_scheduler(ServerArgs(model_path="none"))
    return errors(lambda rope: rotary_embedding(HEAD_DIM, POSITIONS, rope).cos_sin_cache)
