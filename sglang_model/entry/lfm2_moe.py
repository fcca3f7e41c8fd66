"""LFM2-MoE's class for SGLang's registry; in case of a failure, a class that says so when it is built.

SGLang only logs what goes wrong while it imports a module of an external package, and then serves its own model. So
nothing may go wrong in here.
"""

from __future__ import annotations

from lfm2_plugin.register import sglang_failure, stub_class

try:
    failure = sglang_failure()
    if failure is not None:
        raise failure
    from sglang_model.model import Lfm2MoeForCausalLM
except Exception as error:
    Lfm2MoeForCausalLM = stub_class(error)

EntryClass = Lfm2MoeForCausalLM
