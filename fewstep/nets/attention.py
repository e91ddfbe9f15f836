"""Self-attention of the pixels of a feature map, as the EDM and EDM2 networks have it.

For every head, with q, k, v the columns of three matrices of c channels by N pixels,

    out = v softmax(q^T k / sqrt(c))^T

(Vaswani et al. 2017, https://arxiv.org/abs/1706.03762), the softmax being taken in float32 at
least.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def split_heads(qkv: Tensor, heads: int) -> Tensor:
    """(B, 3 C, h, w) -> (B, H, C/H, 3, h w): channels run over heads, their channels, q k v."""
    size, channels, *places = qkv.shape
    return qkv.reshape(size, heads, channels // (3 * heads), 3, math.prod(places))


def attend(split: Tensor, like: Tensor) -> Tensor:
    """Softmax attention of all pixels to all: (B, H, C/H, 3, h w) -> (B, C, h, w) as `like` is.

    Small maps are multiplied out, which was measured to be faster; large ones take the fused
    kernel, which saves memory but may need `torch.nn.attention.sdpa_kernel(SDPBackend.MATH)`
    for forward-mode derivatives. One network does not mix two memory formats.
    """
    q, k, v = (part.transpose(2, 3) for part in split.unbind(3))
    if q.shape[2] <= 256:
        weight = q @ (k.transpose(2, 3) / math.sqrt(k.shape[3]))
        wide = torch.promote_types(q.dtype, torch.float32)
        out = v.transpose(2, 3) @ weight.to(wide).softmax(3).to(q.dtype).transpose(2, 3)
    else:
        out = F.scaled_dot_product_attention(q, k, v).transpose(2, 3)
    plain = like.is_contiguous()
    format_ = torch.contiguous_format if plain else torch.channels_last
    return out.reshape(like.shape).contiguous(memory_format=format_)
