"""LFM2-MoE's class for SGLang's registry; in case of a failure, a class that says so when it is built.

SGLang only logs what goes wrong while it imports a module of an external package, and then serves its own model. So
nothing may go wrong in here.

A process may have inherited the variable that names this package, while the switch is off or the plugin is left out. It
finds no class in here, and SGLang keeps its own.
"""

from __future__ import annotations

from lfm2_plugin.register import serves_in_sglang, sglang_failure, stub_class

if serves_in_sglang():
    try:
        failure = sglang_failure()
        if failure is not None:
            raise failure
        from sglang_model.model import Lfm2MoeForCausalLM
    except Exception as error:
        Lfm2MoeForCausalLM = stub_class(error)

    EntryClass = Lfm2MoeForCausalLM
