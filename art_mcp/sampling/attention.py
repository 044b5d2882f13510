"""Attention over each row's own keys and one shared prefix, and rotary positions: pure functions of tensors."""

from __future__ import annotations

import math
from threading import Lock

import torch
from torch import Tensor
from torch.nn import functional as F

FUSED_FROM = 32
"""New tokens from which the fused kernel is the quicker on a CPU: up to twice for short rows, five times for long ones."""


class WithoutCudnn:
    """Within it, torch computes attention by kernels of its own, forward and backward, on whichever thread.

    Torch 2.11 and later prefer cuDNN's on Hopper. Given a mask, and 64 keys more than a multiple of 128, its backward pass is
    NaN where all scores of a query are below -88 (github.com/pytorch/pytorch/issues/196678), as in some heads of Qwen2.5.
    The switch is the whole process's: the first to enter turns it, the last to leave turns it back.
    """

    def __init__(self) -> None:
        self._lock = Lock()
        self._within = 0
        self._before = True

    def __enter__(self) -> None:
        with self._lock:
            if not self._within:
                self._before = torch.backends.cuda.cudnn_sdp_enabled()
                torch.backends.cuda.enable_cudnn_sdp(False)
            self._within += 1

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._within -= 1
            if not self._within:
                torch.backends.cuda.enable_cudnn_sdp(self._before)


without_cudnn = WithoutCudnn()


def rotary_table(inverse_frequencies: Tensor, positions: int) -> tuple[Tensor, Tensor]:
    """Cosines and sines (positions, width) of rotary position embedding (Su et al. 2021, arXiv:2104.09864)."""
    angles = torch.outer(torch.arange(positions).float(), inverse_frequencies.float())
    angles = torch.cat((angles, angles), dim=-1)
    return angles.cos(), angles.sin()


def rotate(states: Tensor, rotation: tuple[Tensor, Tensor]) -> Tensor:
    first, second = states.chunk(2, dim=-1)
    return states * rotation[0] + torch.cat((-second, first), dim=-1) * rotation[1]


def sight(mask: Tensor, prefix: int) -> Tensor:
    """A mask (rows, new, own) as `attend` wants it in every layer, over a prefix that all see: (rows, 1, new, prefix + own)
    for torch's fused kernel, (rows, 1, 1, new, own) where few tokens are new.

    Scores in half precision would weigh what is seen wrongly by per cents: those are left to the kernel, too."""
    if mask.is_cuda or mask.dtype.itemsize < 4 or mask.shape[1] >= FUSED_FROM:
        return F.pad(mask, (prefix, 0))[:, None]
    return mask[:, None, None]


def attend(query: Tensor, keys: Tensor, values: Tensor, *, shared: tuple[Tensor, Tensor] | None, mask: Tensor) -> Tensor:
    """Attention of (rows, query heads, new, width) over each row's own keys and the shared prefix, with a mask from `sight`.

    One softmax spans both parts, so the result equals attention over the concatenation.
    """
    if mask.dim() == 4:
        return attend_fused(query, keys, values, shared=shared, mask=mask)
    rows, query_heads, new, width = query.shape
    heads = keys.shape[1]
    groups = query_heads // heads
    query = (query * (1.0 / math.sqrt(width))).reshape(rows, heads, groups * new, width)
    own = (query @ keys.transpose(-1, -2)).view(rows, heads, groups, new, -1) + mask
    if shared is None:
        mixed = torch.softmax(own, dim=-1).view(rows, heads, groups * new, -1) @ values
        return mixed.view(rows, query_heads, new, width)
    prefix_keys, prefix_values = shared[0][0], shared[1][0]
    length = prefix_keys.shape[1]
    flat = query.transpose(0, 1).reshape(heads, rows * groups * new, width)
    far = (flat @ prefix_keys.transpose(-1, -2)).view(heads, rows, groups, new, length).transpose(0, 1)
    weights = torch.softmax(torch.cat((far, own), dim=-1), dim=-1)
    far, near = weights.split((length, weights.shape[-1] - length), dim=-1)
    mixed = near.reshape(rows, heads, groups * new, -1) @ values
    away = far.transpose(0, 1).reshape(heads, rows * groups * new, length) @ prefix_values
    return (mixed + away.view(heads, rows, groups * new, width).transpose(0, 1)).reshape(rows, query_heads, new, width)


def attend_fused(query: Tensor, keys: Tensor, values: Tensor, *, shared: tuple[Tensor, Tensor] | None, mask: Tensor) -> Tensor:
    """The same in torch's fused kernel, which keeps no scores in memory and wants the prefix with every row."""
    rows, query_heads = query.shape[:2]
    if shared is not None:
        parts = zip(shared, (keys, values), strict=True)
        keys, values = (torch.cat((far.expand(rows, -1, -1, -1), own), dim=2) for far, own in parts)
    if query.is_cuda:  # no kernel for a GPU takes both a mask and fewer heads of keys
        keys, values = (states.repeat_interleave(query_heads // states.shape[1], dim=1) for states in (keys, values))
    grouped = keys.shape[1] != query_heads
    with without_cudnn:
        return F.scaled_dot_product_attention(query, keys, values, attn_mask=mask.to(query.dtype), enable_gqa=grouped)
