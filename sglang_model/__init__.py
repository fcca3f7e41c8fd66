"""LFM2-MoE for SGLang, built from SGLang's own layers around the operators of ``lfm2_plugin``.

- ``model.py``: the model; open it first. ``attention.py``, ``short_conv.py``, ``feed_forward.py``: its layers.
- ``conv_state.py``: the states of the short convolutions in SGLang's pool, and their snapshots for the prefix cache.
- ``config.py``: what SGLang asks a hybrid model's config for; ``defaults.py``: the server's options for this model.
- ``memory.py``: how memory is divided between conv states and keys and values.
- ``weights.py``: loading. ``lora.py``: adapters. ``support.py``: what is refused, and why.
- ``cpu_platform.py``: SGLang on a machine without an accelerator; ``cpu_attention.py``, ``cpu_experts.py``,
  ``cpu_linear.py``: the batched code that it runs there.
- ``engine_api.py``: the one file that imports SGLang. ``entry/``: what SGLang's model registry imports.
"""

SUPPORTED = ("0.5.22", "0.5.23")
"""Lowest and highest release of SGLang that the test suite ran on."""
