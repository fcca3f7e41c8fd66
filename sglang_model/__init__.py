"""LFM2-MoE for SGLang, built from SGLang's own layers around the operators of ``lfm2_plugin``.

- ``model.py``: the model; open it first. ``attention.py``, ``short_conv.py``, ``feed_forward.py``: its layers.
- ``conv_state.py``: the states of the short convolutions in SGLang's pool, and their snapshots for the prefix cache.
- ``config.py``: what SGLang asks a hybrid model's config for; ``defaults.py``: the server's options for this model.
- ``memory.py``: how memory is divided between conv states and keys and values.
- ``weights.py``: loading. ``lora.py``: adapters. ``support.py``: what is refused, and why.
- ``speculation.py``: options of n-gram drafts.
- ``cpu_platform.py``: SGLang on a machine without an accelerator; ``cpu_*.py``: what it runs there in place of SGLang's
  own, among it ``cpu_lora.py`` and ``cpu_speculation.py``, whose drafts ``prompt_lookup.py`` makes.
- ``engine_api.py``: the one file that imports SGLang, by the table of ``engine_names.py``.
  ``entry/``: what SGLang's model registry imports.
"""

SUPPORTED = ("0.5.22", "0.5.23")
"""Lowest and highest release of SGLang that the test suite ran on."""
