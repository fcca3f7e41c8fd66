"""The whole of LFM2-MoE in plain torch: the text to read first, and what everything else is held to.

One sequence, a prefill and then a token at a time, on the naive ops, reading a Hugging Face checkpoint as
it lies on disk. In float32 it equals transformers. It is meant to be read and compared with, not served.

The way of a token: embedding; per layer ``x += mixer(norm(x))`` with attention or the short convolution
as the mixer, then ``x += feed_forward(norm(x))``, dense in the first layers and experts in the others;
a last norm; the head. Dimension letters are those of ``arch.py``.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch.nn import functional as F

from lfm2_plugin.arch import ATTENTION, Lfm2MoeArch
from lfm2_plugin.checkpoint import Ledger, expected_tensors, inspect_files
from lfm2_plugin.conv_batch import ConvBatch
from lfm2_plugin.ops.moe import moe_naive
from lfm2_plugin.ops.router import route_naive
from lfm2_plugin.ops.short_conv import short_conv_naive


@dataclass
class Cache:
    """What a sequence remembers.

    Attributes:
        length: tokens read so far.
        keys, values: per attention layer, (length, G, P).
        states: per conv layer, (1, D, K - 1), the last K - 1 values of B * x, oldest first.
    """

    length: int = 0
    keys: dict[int, torch.Tensor] = field(default_factory=dict)
    values: dict[int, torch.Tensor] = field(default_factory=dict)
    states: dict[int, torch.Tensor] = field(default_factory=dict)


class ReferenceModel:
    """LFM2-MoE for one sequence at a time.

    Args:
        arch: the model's sizes.
        tensors: the checkpoint, by the names on disk.
        dtype: everything is cast to it but the expert bias, which stays float32.

    Raises:
        CheckpointError: a tensor is missing, unexpected or of another shape.
    """

    def __init__(
        self, arch: Lfm2MoeArch, tensors: Mapping[str, torch.Tensor], dtype: torch.dtype
    ) -> None:
        ledger = Ledger(arch)
        pieces = {n: t for told, whole in tensors.items() for n, t in ledger.enter(told, whole)}
        ledger.finish()
        self.arch = arch
        self.dtype = dtype
        self.tensors = {
            name: pieces[name].to(torch.float32 if name.endswith("expert_bias") else dtype)
            for name in expected_tensors(arch)
        }
        self._experts = {layer: self._stack_experts(layer) for layer in arch.moe_layers}
        if arch.rope_parameters["rope_type"] != "default":
            raise ValueError(
                f"the reference has no rotary embedding of type {arch.rope_parameters['rope_type']!r}"
            )
        # Angles per position, one per pair of channels.
        exponents = torch.arange(0, arch.head_dim, 2, dtype=torch.float32) / arch.head_dim
        self._frequencies = 1.0 / arch.rope_theta**exponents

    @classmethod
    def from_folder(cls, folder: Path | str, dtype: torch.dtype = torch.float32) -> ReferenceModel:
        """Read ``config.json`` and the safetensors of a checkpoint."""
        folder = Path(folder)
        arch = Lfm2MoeArch.from_config(json.loads((folder / "config.json").read_text()))
        tensors: dict[str, torch.Tensor] = {}
        for file in sorted({header.file for header in inspect_files(folder).values()}):
            tensors |= load_file(folder / file)
        return cls(arch, tensors, dtype)

    @torch.inference_mode()
    def forward(self, tokens: Sequence[int], cache: Cache) -> torch.Tensor:
        """Read ``tokens`` after what ``cache`` holds; logits (T, V) of each of them. Grows the cache.

        A prompt may come whole or in pieces, and a decode is a piece of one token.
        """
        x = F.embedding(torch.tensor(tokens), self.tensors["model.embed_tokens.weight"])
        for layer, kind in enumerate(self.arch.layer_types):
            mixer = self._attention if kind == ATTENTION else self._short_conv
            x = x + mixer(layer, self._norm(x, f"model.layers.{layer}.operator_norm"), cache)
            x = x + self._feed_forward(layer, self._norm(x, f"model.layers.{layer}.ffn_norm"))
        cache.length += len(tokens)
        x = self._norm(x, "model.embedding_norm")
        tied = self.arch.tie_word_embeddings
        return self._linear(x, "model.embed_tokens" if tied else "lm_head")

    def generate(self, prompt: Sequence[int], new_tokens: int) -> list[int]:
        """The ``new_tokens`` greedy tokens after ``prompt``, whatever they are (no end token)."""
        cache, piece, result = Cache(), list(prompt), []
        for _ in range(new_tokens):
            piece = [int(self.forward(piece, cache)[-1].argmax())]
            result += piece
        return result

    def _short_conv(self, layer: int, x: torch.Tensor, cache: Cache) -> torch.Tensor:
        """(T, D) -> (T, D)."""
        name, arch = f"model.layers.{layer}.conv", self.arch
        bcx = self._linear(x, f"{name}.in_proj")
        fresh = layer not in cache.states
        if fresh:
            cache.states[layer] = bcx.new_zeros(1, arch.hidden_size, arch.state_len)
        T = x.shape[0]
        batch = ConvBatch(
            slots=torch.tensor([0]),
            query_start=torch.tensor([0, T]),
            has_initial_state=torch.tensor([not fresh]),
            num_decodes=0,
            num_decode_tokens=0,
            num_prefills=1,
            num_prefill_tokens=T,
        )
        y = torch.empty_like(x)
        weight = self.tensors[f"{name}.conv.weight"].squeeze(1)
        bias = self.tensors.get(f"{name}.conv.bias")
        short_conv_naive(bcx, weight, bias, cache.states[layer], batch, y)
        return self._linear(y, f"{name}.out_proj")

    def _attention(self, layer: int, x: torch.Tensor, cache: Cache) -> torch.Tensor:
        """(T, D) -> (T, D): causal, over the cached keys and the new ones."""
        name, P = f"model.layers.{layer}.self_attn", self.arch.head_dim
        T = x.shape[0]
        q = self._linear(x, f"{name}.q_proj").view(T, self.arch.num_heads, P)
        k = self._linear(x, f"{name}.k_proj").view(T, self.arch.num_kv_heads, P)
        v = self._linear(x, f"{name}.v_proj").view(T, self.arch.num_kv_heads, P)
        positions = cache.length + torch.arange(T)
        q = self._rotate(self._norm(q, f"{name}.q_layernorm"), positions)
        k = self._rotate(self._norm(k, f"{name}.k_layernorm"), positions)
        if layer in cache.keys:
            k = torch.cat([cache.keys[layer], k])
            v = torch.cat([cache.values[layer], v])
        cache.keys[layer], cache.values[layer] = k, v

        group = self.arch.num_heads // self.arch.num_kv_heads  # query heads to a key head
        k, v = (t.repeat_interleave(group, dim=1).transpose(0, 1) for t in (k, v))  # (H, L, P)
        scores = q.transpose(0, 1) @ k.transpose(1, 2) * P**-0.5  # (H, T, L)
        later = torch.arange(k.shape[1]) > positions[:, None]
        scores = scores.masked_fill(later, float("-inf"))
        mixed = torch.softmax(scores.float(), dim=-1).to(x.dtype) @ v
        return self._linear(mixed.transpose(0, 1).reshape(T, -1), f"{name}.out_proj")

    def _rotate(self, x: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """Rotary embedding of x (T, heads, P): channel i turns with channel i + P/2."""
        angles = positions[:, None, None].float() * self._frequencies
        cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
        a, b = x.chunk(2, dim=-1)
        return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)

    def _feed_forward(self, layer: int, x: torch.Tensor) -> torch.Tensor:
        """(T, D) -> (T, D)."""
        name, arch = f"model.layers.{layer}.feed_forward", self.arch
        if layer < arch.num_dense_layers:
            gate, up = self._linear(x, f"{name}.w1"), self._linear(x, f"{name}.w3")
            return self._linear(F.silu(gate) * up, f"{name}.w2")
        weights, ids = route_naive(
            self._linear(x, f"{name}.gate"),
            self.tensors.get(f"{name}.expert_bias"),
            arch.num_experts_per_tok,
            arch.norm_topk_prob,
            arch.routed_scaling_factor,
            None,
        )
        return moe_naive(x, *self._experts[layer], weights, ids)

    def _stack_experts(self, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        """w13 (E, 2 * F, D) and w2 (E, D, F)."""
        w1, w2, w3 = (
            torch.stack(
                [
                    self.tensors.pop(f"model.layers.{layer}.feed_forward.experts.{e}.{w}.weight")
                    for e in range(self.arch.num_experts)
                ]
            )
            for w in ("w1", "w2", "w3")
        )
        return torch.cat([w1, w3], dim=1), w2

    def _linear(self, x: torch.Tensor, module: str) -> torch.Tensor:
        return F.linear(x, self.tensors[f"{module}.weight"], self.tensors.get(f"{module}.bias"))

    def _norm(self, x: torch.Tensor, module: str) -> torch.Tensor:
        """RMSNorm over the last dimension, in float32; the weight multiplies what was rounded."""
        wide = x.float()
        scale = torch.rsqrt(wide.pow(2).mean(dim=-1, keepdim=True) + self.arch.norm_eps)
        return self.tensors[f"{module}.weight"] * (wide * scale).to(x.dtype)
