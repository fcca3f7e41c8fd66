"""How a class of vLLM's is replaced by ours where there is no seam for it; docs/decisions/0017 says which and why."""

from __future__ import annotations

import importlib
import inspect
from operator import attrgetter

from .engine_api import vllm_version


def replace_in_engine(module: str, user: str, theirs: type, ours: type) -> None:
    """Have vLLM's function ``user`` in ``module`` take our subclass of a class; see docs/decisions/0017.

    Raises:
        RuntimeError: this vLLM's function doesn't take that class, so that nothing would come of it.
    """
    place = importlib.import_module(module)
    names = inspect.unwrap(attrgetter(user)(place)).__code__.co_names
    if theirs.__name__ not in names or getattr(place, theirs.__name__, None) not in (theirs, ours):
        raise RuntimeError(
            f"In vLLM {vllm_version} {module}.{user} takes no {theirs.__name__} that could be replaced, so that LoRA "
            "adapters would not be checked. Serve without LoRA, or set LFM2_PLUGIN=off for vLLM's own model."
        )
    setattr(place, theirs.__name__, ours)
