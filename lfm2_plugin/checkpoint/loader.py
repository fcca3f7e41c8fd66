"""Loading into an engine's model: every tensor through the ledger into its parameter, and nothing left empty.

Both engines hand a model tensors in any order, and call it any number of times, with all or a part of the tensors, as
weight updates of reinforcement learning do. What differs between them is a :class:`Loader`.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping

import torch
from torch import nn

from lfm2_plugin.checkpoint.ledger import Ledger
from lfm2_plugin.checkpoint.placement import Place, place
from lfm2_plugin.checkpoint.report import CheckpointError

_HEAD, _EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
_ADAPTED = ".base_layer."  # what a parameter's name has more within either engine's LoRA layer
_KV_CACHE = ".self_attn.attn."
_HAS_DEFAULT = re.compile(r"\.attn\.\w+_(scale|zero_point)$|g_idx(_sort_indices)?$")


class Loader(ABC):
    """One load into the parameters that a rank has.

    Args:
        model: with ``model.embed_tokens``, and the parameters of ``placement.py``.
        layers: the decoder layers of this pipeline stage.
        kv_is_quantised: whether keys and values are kept in fewer bits than the model's dtype has.

    Attributes:
        modules: modules of the table that the engine names otherwise.
        parameters: the model's, by name without what a LoRA layer adds to it.
    """

    modules: Mapping[str, str]

    def __init__(self, model: nn.Module, layers: range, *, kv_is_quantised: bool) -> None:
        self._written: set[str] = set()
        self.parameters: dict[str, nn.Parameter] = {}
        self._actual: dict[str, str] = {}
        for name, parameter in model.named_parameters(remove_duplicate=False):
            plain = name.replace(_ADAPTED, ".")
            self.parameters[plain], self._actual[plain] = parameter, name
        self._model = model
        self._layers = layers
        self._kv_is_quantised = kv_is_quantised
        self._head: torch.Tensor | None = None

    @property
    def loaded(self) -> set[str]:
        """The parameters that were written to, by their names in the model."""
        return {self._actual[name] for name in self._written}

    @abstractmethod
    def write(self, where: Place, parameter: nn.Parameter, tensor: torch.Tensor) -> bool:
        """Load ``tensor`` into the part of the parameter that it is; False where another rank has that part."""

    def is_unused(self, where: Place) -> bool:
        """Whether the engine has no such parameter because what it does here needs none: a KV cache's scale."""
        return _KV_CACHE in where.parameter and not self._kv_is_quantised

    def load(self, ledger: Ledger, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
        """Load tensors of a checkpoint, under any of its spellings.

        Raises:
            CheckpointError: a tensor that the model doesn't have, or has in another shape or dtype.
        """
        for told, whole in weights:
            for name, tensor in ledger.enter(told, whole):
                if self._load(name, tensor):
                    ledger.settle(name)
        self._check_head()
        ledger.close()

    def unfilled(self) -> list[str]:
        """The parameters that nothing was loaded into, of those that have no default."""
        filled = {id(self.parameters[name]) for name in self._written}  # a tied head is filled too
        return [
            name
            for name, parameter in self.parameters.items()
            if id(parameter) not in filled and not _HAS_DEFAULT.search(name)
        ]

    def _load(self, name: str, tensor: torch.Tensor) -> bool:
        """Load a tensor of the hub; False if there is no place for it, and nothing says why."""
        where = place(name, self.modules)
        if where is None:
            return False
        if where.layer is not None and where.layer not in self._layers:
            return True  # another stage's
        if name == _HEAD and self.parameters.get(_HEAD) is self.parameters.get(_EMBEDDING):
            self._head = tensor  # compared once the embedding is there
            return True
        parameter = self.parameters.get(where.parameter)
        if parameter is None:
            return self._is_another_stages(where) or self.is_unused(where)
        if _kind(tensor.dtype) != _kind(parameter.dtype):
            return False  # copied, codes would be taken for numbers, or numbers for codes
        if self.write(where, parameter, tensor):
            self._written.add(where.parameter)
        return True

    def _is_another_stages(self, where: Place) -> bool:
        """Whether the module is none that this pipeline stage has: the embedding, the last norm, the head."""
        module = where.parameter.rpartition(".")[0]
        here = any(name.startswith(f"{module}.") for name in self.parameters)
        return where.layer is None and not here

    def _check_head(self) -> None:
        """What came as the head of a model whose head is the embedding is the embedding.

        Raises:
            CheckpointError: it differs.
        """
        if self._head is None or _EMBEDDING not in self.parameters:
            return
        embedding = self._model.model.embed_tokens
        rows = embedding.shard_indices
        here = self._head[rows.org_vocab_start_index : rows.org_vocab_end_index]
        held = embedding.weight[: here.shape[0]]
        if not torch.equal(here.to(held), held):
            raise CheckpointError(
                f"{_HEAD} differs from {_EMBEDDING}, but the head is the embedding (tie_word_embeddings). "
                "Set tie_word_embeddings to false in config.json and start again."
            )


def _kind(dtype: torch.dtype) -> str:
    """Whether values of a dtype are numbers of a model, or codes that only mean something with a scale."""
    if dtype.is_floating_point:
        return "float" if dtype.itemsize > 1 else "float8"
    return "integer"
