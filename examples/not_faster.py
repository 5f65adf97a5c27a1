"""A decoder that does not get faster with the radix backend, and a corrected one. docs/inspection.md is about them.

In `slow`, one layer calls attention without `is_causal=True`, so its tokens attend to later tokens.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

WIDTH, HEADS, LAYERS = 256, 4, 6


class Layer(nn.Module):
    def __init__(self, causal: bool) -> None:
        super().__init__()
        self.causal = causal
        self.norm, self.qkv, self.out = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.mlp = nn.Sequential(
            nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH)
        )

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (part.unflatten(-1, (HEADS, -1)).transpose(1, 2) for part in self.qkv(self.norm(x)).chunk(3, dim=-1))
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        x = x + self.out(attended.transpose(1, 2).flatten(2))
        result: Tensor = x + self.mlp(x)
        return result


class Decoder(nn.Module):
    def __init__(self, causal: list[bool]) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(1000, WIDTH), nn.Embedding(512, WIDTH)
        self.layers = nn.ModuleList(map(Layer, causal))

    def forward(self, ids: Tensor) -> Tensor:
        x: Tensor = self.tokens(ids) + self.positions(torch.arange(ids.shape[1], device=ids.device))
        for layer in self.layers:
            x = layer(x)
        return x


def slow() -> Decoder:
    return Decoder([index != 1 for index in range(LAYERS)])


def mended() -> Decoder:
    return Decoder([True] * LAYERS)
