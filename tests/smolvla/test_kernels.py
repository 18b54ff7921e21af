"""The CPU's own kernels compute what the plain ones do, and step aside where a gradient is wanted."""

from __future__ import annotations

import copy
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
import torch
import torch.nn.functional as F

from model import SmolVLA, prefix_inputs
from smolvla import kernels
from smolvla.layers import WorldMask, attend_fused, lay_out


@pytest.fixture(autouse=True)
def small_layers_count_as_large(monkeypatch):
    monkeypatch.setattr(kernels, "LARGE", 0)


def both(freeze: str = "expert", dtype: torch.dtype = torch.float32) -> tuple[SmolVLA, SmolVLA]:
    """A policy with plain kernels and the same one with the CPU's."""
    plain = tiny.policy()
    plain.requires_grad_(False) if freeze == "all" else plain.freeze(freeze)
    plain.set_dtype(dtype)
    return plain, kernels.speed_up(copy.deepcopy(plain), dtype)


def draws(batch: int = 2) -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(3)
    config = tiny.CONFIG
    noise = torch.randn(batch, 1, config.chunk_size, config.max_action_dim, generator=g)
    return noise, torch.rand(batch, 1, generator=g)


@pytest.mark.parametrize(("dtype", "close"), [(torch.float32, 1e-5), (torch.bfloat16, 0.05)])
def test_a_chunk_is_the_plain_policys(dtype, close):
    plain, fast = both("all", dtype)
    inputs, (noise, _) = tiny.inputs(), draws()
    want = plain.predict_chunk(inputs, noise[:, 0])
    torch.testing.assert_close(fast.predict_chunk(inputs, noise[:, 0]), want, atol=close, rtol=0)


@pytest.mark.parametrize("freeze", ["expert", "vision", "none"])
def test_losses_and_gradients_are_the_plain_policys(freeze):
    plain, fast = both(freeze)
    found = []
    for policy in (plain, fast):
        loss = policy(tiny.inputs(), *draws())
        loss.sum().backward()
        found.append([loss.detach()] + [p.grad for p in policy.parameters() if p.requires_grad])
    for got, want in zip(*found, strict=True):
        torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-4)


def test_frozen_layers_are_packed_when_used_and_trained_ones_never():
    _, fast = both("expert")
    fast(tiny.inputs(), *draws())
    packed = {name for name, m in fast.named_modules() if getattr(m.forward, "packed", None)}
    assert "vision.layers.0.self_attn.q_proj" in packed and "text.layers.0.mlp.up_proj" in packed
    assert "lm_head" not in packed  # never used, so it takes no memory
    assert not any(name.startswith(("expert", "action", "state")) for name in packed)


def test_a_weight_that_is_written_to_or_cast_is_packed_anew():
    layer = torch.nn.Linear(8, 4).requires_grad_(False)
    kernels.speed_up(layer)
    x = torch.randn(3, 8)
    layer(x)
    for change in (lambda: layer.weight.mul_(2), lambda: layer.weight.fill_(1), layer.bfloat16):
        change()
        want = F.linear(x.to(layer.weight.dtype), layer.weight, layer.bias)
        torch.testing.assert_close(layer(x.to(layer.weight.dtype)), want)


def test_where_the_processor_has_no_kernel_the_plain_products_run(monkeypatch):
    monkeypatch.setattr(kernels, "has_kernel", lambda dtype: dtype != torch.bfloat16)
    plain, fast = both("all", torch.bfloat16)
    noise = draws()[0][:, 0]
    assert torch.equal(fast.predict_chunk(tiny.inputs(), noise), plain.predict_chunk(tiny.inputs(), noise))
    packed = [m for m in fast.modules() if getattr(m.forward, "packed", None)]
    assert not [m for m in packed if m.weight.dtype == torch.bfloat16]


def test_a_gradient_goes_through_a_frozen_layer():
    layer, x = torch.nn.Linear(8, 4).requires_grad_(False), torch.randn(3, 8, requires_grad=True)
    kernels.speed_up(layer)(x).sum().backward()
    torch.testing.assert_close(x.grad, layer.weight.sum(0).expand(3, 8))


@pytest.mark.parametrize("length", [8, 600])  # all heads at once, and one by one
@pytest.mark.parametrize("mask", [None, "bool", "bias", "world"])
def test_attention_in_products_is_sdpas(length, mask):
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 3, length, 16, generator=g) for _ in range(3))
    seen = lay_out(torch.rand(2, 1, length, length, generator=g) > 0.3, 1, torch.float32)
    bias = torch.randn(2, 1, length, length, generator=g)
    mask = {"bool": seen, "bias": bias, "world": WorldMask(seen, bias, torch.tensor(0.3))}.get(mask)
    want = attend_fused(q, k, v, mask)
    torch.testing.assert_close(kernels.attend_in_products(q, k, v, mask), want, atol=1e-5, rtol=1e-5)


def test_small_layers_stay_plain(monkeypatch):
    monkeypatch.setattr(kernels, "LARGE", 100)
    layers = torch.nn.Sequential(torch.nn.Linear(9, 11), torch.nn.Linear(11, 10))
    kernels.speed_up(layers)
    assert [isinstance(layer.forward, kernels.Packed) for layer in layers] == [False, True]


def test_saved_weights_do_not_know_of_it():
    plain, fast = both()
    fast.predict_chunk(tiny.inputs(), draws()[0][:, 0])
    assert fast.state_dict().keys() == plain.state_dict().keys()
    for name, value in plain.state_dict().items():
        assert torch.equal(fast.state_dict()[name], value), name


def test_padded_instructions_do_not_change_the_prefix_that_counts():
    policy, inputs = tiny.policy(), tiny.inputs()
    longer = inputs | {
        "tokens": F.pad(inputs["tokens"], (0, 3)), "token_mask": F.pad(inputs["token_mask"], (0, 3)),
    }  # fmt: skip
    noise, time = draws()
    a, b = (policy(x, noise, time) for x in (inputs, longer))
    torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)
    assert (
        policy.embed_prefix(*prefix_inputs(longer))[2] == policy.embed_prefix(*prefix_inputs(inputs))[2] + 3
    )


def test_patches_that_train_are_embedded_by_a_product_and_frozen_ones_by_the_convolution():
    plain, fast = (policy.vision for policy in both("none"))
    images = torch.rand(2, 3, tiny.CONFIG.image_size, tiny.CONFIG.image_size)
    found = []
    for tower in (plain, fast):
        out = tower.patch_embedding(images)
        out.square().sum().backward()
        found.append((out.detach(), tower.patch_embedding.weight.grad, tower.patch_embedding.bias.grad))
    for got, want in zip(*found, strict=True):
        torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-4)
    assert (
        fast.patch_embedding(images).stride() != plain.patch_embedding(images).stride()
    )  # the other way there
    fast.requires_grad_(False)
    assert torch.equal(fast.patch_embedding(images), plain.patch_embedding(images))


def test_bfloat16_is_native_only_where_products_in_it_run():
    assert not kernels.native_bfloat16() or kernels.has_kernel(torch.bfloat16)


@pytest.mark.skipif(not Path("/sys/kernel/mm/transparent_hugepage").exists(), reason="no large pages here")
def test_memory_is_kept_in_large_pages():
    """The system knows it of the mapping that a large tensor's middle lies in (VmFlags: hg)."""
    code = """
import torch
from smolvla import kernels
kernels.keep_memory()
at, here = torch.empty(2**26).data_ptr() + 2**27, False
for line in open("/proc/self/smaps"):
    if "-" in (place := line.split()[0]):
        first, last = (int(end, 16) for end in place.split("-"))
        here = first <= at < last
    if here and line.startswith("VmFlags"):
        assert "hg" in line.split(), line
        print("large")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "large", done.stderr
