"""What a CPU's default kernels leave on the table; no formula changes, and no GPU ever comes here.

`speed_up` gives a policy's layers other kernels, once they are where and what they will be:

- Large frozen linear layers are packed once in oneDNN's own layout. Torch's float32 default is MKL, which
  uses half of some processors' width; and short inputs spend most of their time unpacking weights.
- SigLIP's MLP applies its GELU inside the first product, while the numbers are in cache.
- Attention in bfloat16 runs as plain products: SDPA's blocks are small, and miss the processor's bfloat16
  instructions. Scores are then rounded to bfloat16, as eager attention rounds them.
- Patches that train are embedded by a product, whose gradient is three times faster than a convolution's.

`keep_memory` stops the allocator from giving large tensors back to the system and asking for them again.

    python -m bench chunk --size base               # what it brings on this machine, beside the plain path
    pytest tests/smolvla/test_kernels.py

Shapes: B batch, G key/value heads, L queries of all heads that share one, S keys, d head width.
"""

from __future__ import annotations

import ctypes
import sys
from functools import lru_cache
from types import MethodType

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import FunctionCtx

from smolvla.layers import Attention, Mask, VisionAttention, VisionMLP, VisionTower, WorldMask

LARGE = 2**18  # weights from which packing saves more than the longer way to the product costs
HEAP, PAGE = 2**30, 2**21  # bytes that tensors get in large pages, and of such a page
LONG = 2**18  # scores a head from which one head at a time keeps them in cache


@lru_cache
def has_kernel(dtype: torch.dtype) -> bool:
    """Try whether oneDNN multiplies in `dtype` on this processor: bfloat16 needs more than AVX2."""
    x = torch.ones(2, 2, dtype=dtype)
    try:
        packed = torch.ops.mkldnn._reorder_linear_weight(x, None)
        torch.ops.mkldnn._linear_pointwise(x, packed, None, "none", [], "")
    except RuntimeError:
        return False
    return True


@lru_cache
def native_bfloat16() -> bool:
    """Whether this processor has instructions for bfloat16: where it has none, float32 is faster."""
    has = getattr(torch.cpu, "get_capabilities", dict)()
    return bool(has.get("avx512_bf16") or has.get("amx_bf16")) and has_kernel(torch.bfloat16)


def speed_up(module: nn.Module, dtype: torch.dtype = torch.float32) -> nn.Module:
    """Replace the kernels of the large layers inside `module`, which computes in `dtype`; gives it back.

    For a CPU, and not beside compiled blocks. Layers that train keep their plain products, and so do those
    that this processor has no kernel for.
    """
    if not torch.backends.mkldnn.is_available():
        return module
    for part in module.modules():
        if isinstance(part, nn.Linear) and part.weight.numel() >= LARGE:
            part.forward = Packed(part)
        if isinstance(part, VisionMLP) and part.fc1.weight.numel() >= LARGE:
            part.forward = MethodType(fused_mlp, part)
        if isinstance(part, (Attention, VisionAttention)) and dtype == torch.bfloat16 and has_kernel(dtype):
            part.core = attend_in_products
        if isinstance(part, VisionTower):
            part.patch_embedding.forward = MethodType(embed_patches, part.patch_embedding)
    return module


class Packed:
    """A linear layer's `forward` on packed weights; plain where the layer trains.

    Packed at the first call, and again once the weight has been written to, moved or cast.
    """

    def __init__(self, layer: nn.Linear) -> None:
        self.layer, self.packed, self.made_of = layer, {}, None

    def __call__(self, x: Tensor, gelu: bool = False) -> Tensor:
        """Give layer(x), or its tanh-approximated GELU."""
        weight, bias = self.layer.weight, self.layer.bias
        backward = torch.is_grad_enabled() and x.requires_grad
        plain = weight.requires_grad or x.dtype != weight.dtype or not has_kernel(x.dtype)
        if plain or (gelu and backward):
            x = F.linear(x, weight, bias)
            return F.gelu(x, approximate="tanh") if gelu else x
        if backward:
            return ThroughPacked.apply(x, self)
        return self.product(x, bias, *(("gelu", [], "tanh") if gelu else ("none", [], "")))

    def product(
        self, x: Tensor, bias: Tensor | None, *activation: object, transposed: bool = False
    ) -> Tensor:
        """Multiply by the packed weight, or by its transpose, as a gradient is."""
        weight = self.layer.weight
        now = weight._version, weight.data_ptr(), weight.dtype
        if now != self.made_of:
            self.packed, self.made_of = {}, now
        if transposed not in self.packed:
            plain = weight.detach().T.contiguous() if transposed else weight.detach()
            self.packed[transposed] = torch.ops.mkldnn._reorder_linear_weight(plain, None)
        return torch.ops.mkldnn._linear_pointwise(x, self.packed[transposed], bias, *activation)


class ThroughPacked(torch.autograd.Function):
    """A frozen layer's product that a gradient goes through, on its way to what trains before it."""

    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor, layer: Packed) -> Tensor:
        ctx.layer = layer
        return layer.product(x, layer.layer.bias, "none", [], "")

    @staticmethod
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor, None]:
        return ctx.layer.product(grad.contiguous(), None, "none", [], "", transposed=True), None


def embed_patches(self: nn.Conv2d, images: Tensor) -> Tensor:
    """Stand in for a convolution that strides by its own size: (B, 3, S, S) -> (B, W, n, n)."""
    if not self.weight.requires_grad:
        return self._conv_forward(images, self.weight, self.bias)
    if torch.is_autocast_enabled("cpu"):
        images = images.to(torch.get_autocast_dtype("cpu"))  # here, before each pixel is moved
    (p, q), n = self.kernel_size, images.shape[-1] // self.kernel_size[1]
    x = images.unflatten(3, (-1, q)).unflatten(2, (-1, p))  # (B, 3, S, S) -> (B, 3, n, p, n, q)
    x = x.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)  # -> (B, n*n, 3*p*q)
    x = F.linear(x, self.weight.flatten(1), self.bias)
    return x.transpose(1, 2).unflatten(2, (-1, n))  # (B, n*n, W) -> (B, W, n, n), a view


def fused_mlp(self: VisionMLP, x: Tensor) -> Tensor:
    return self.fc2(self.fc1.forward(x, gelu=True))


def attend_in_products(q: Tensor, k: Tensor, v: Tensor, mask: Mask | None = None) -> Tensor:
    """Stand in for layers.attend_fused: q (B, G, L, d), k, v (B, G, S, d), mask (B, 1, L, S), added.

    Beside world tokens both products serve both attentions, whose weights alone are mixed.
    """
    q = q * q.shape[-1] ** -0.5
    if q.requires_grad or q.shape[2] * k.shape[2] < LONG or mask is not None:
        scores = q @ k.transpose(2, 3)  # (B, G, L, S)
        if isinstance(mask, WorldMask):
            without, shown = (torch.softmax(scores + part, -1) for part in (mask.hidden, mask.shown))
            return torch.lerp(without, shown, mask.strength.to(q.dtype)) @ v
        return torch.softmax(scores if mask is None else scores + mask, -1) @ v
    out = torch.empty_like(q)
    for b in range(q.shape[0]):
        for h in range(q.shape[1]):
            torch.mm(torch.softmax(q[b, h] @ k[b, h].T, -1), v[b, h], out=out[b, h])
    return out


def keep_memory() -> None:
    """Let glibc keep freed memory, in large pages.

    By default each large tensor is mapped and zeroed anew, page by page of 4 kB.
    """
    if sys.platform == "linux":
        libc = ctypes.CDLL(None)
        libc.mallopt(-4, 0)  # M_MMAP_MAX: no tensor gets a mapping of its own
        libc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD: 2 GB may stay free
        libc.mallopt(-2, 2**28)  # M_TOP_PAD: grow by 256 MB
        libc.malloc.restype = ctypes.c_void_p
        if heap := libc.malloc(ctypes.c_size_t(HEAP)):  # untouched, so it takes no memory yet
            first = -(-heap // PAGE) * PAGE
            libc.madvise(ctypes.c_void_p(first), ctypes.c_size_t(HEAP - PAGE), 14)  # MADV_HUGEPAGE
            libc.free(ctypes.c_void_p(heap))
