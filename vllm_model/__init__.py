"""LFM2-MoE for vLLM, built from vLLM's own layers around the operators of ``lfm2_plugin``.

Which file to open:

* ``model.py``: the model, layer by layer, and the interfaces through which vLLM sees it.
* ``short_conv.py``: the short convolution layer: both projections and the call of our operator.
* ``conv_state.py``: the pages of vLLM's cache that hold the convolutions' states, and the metadata of a step.
* ``weights.py``: loading a checkpoint, with a report of every tensor.
* ``lora.py``: adapters, checked before a step and in the form of vLLM's buffers.
* ``engine_api.py``: the only file that imports vLLM. Every name of vLLM that the others use, every probe of what the
  installed version can do, and the translation of a step's metadata.
"""

SUPPORTED = ("0.32.0", "0.33.0")
"""Lowest and highest vLLM release that the whole engine suite ran on."""
