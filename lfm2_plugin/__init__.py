"""LFM2-MoE for vLLM and SGLang: everything that is true of the model whatever the engine.

Importing this package imports nothing heavy: not torch, not an engine. Open next:

- ``reference.py``: the whole model in plain torch, the text to read first
- ``arch.py``: the sizes and layer kinds of a checkpoint, and what they must satisfy
- ``ops/``: one folder an operator, each with the naive truth beside the fast path
- ``register.py``: how the engines find us
"""

from lfm2_plugin._version import __version__

__all__ = ["__version__"]
