"""Certifies this tree on a machine with a GPU, CUDA's or ROCm's: what holds on the CPU holds there too.

    pytest -m gpu                        # on that machine; one command, no simulator, no network
    GPU_TESTS_ON=cpu pytest -m gpu       # the same bodies on a CPU: do the tests themselves work?

Elsewhere they skip. In float32 without TF32 a GPU adds up in another order, so tolerances are ten times the
CPU's; in bfloat16 they are those of its 8 bits.
"""

from __future__ import annotations

import math
import os
from pathlib import Path

import golden
import pytest
import tiny
import torch
from test_fast import frozen_arm, gradients
from test_sites import VARIANTS, make_arm
from test_train import MEMORY, data, metrics, train  # noqa: F401 (data is a fixture)

from prophet import ROLLOUT_MODES

DEVICE = os.environ.get("GPU_TESTS_ON", "cuda")
GOLDEN = sorted(path.parent for path in (Path(__file__).parent / "golden").glob("*/info.json"))
CLOSE = {"atol": 1e-4, "rtol": 1e-4}
MODES = (*ROLLOUT_MODES, "oracle")
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        DEVICE == "cuda" and not torch.cuda.is_available(),
        reason="no GPU: torch.cuda.is_available() is False",
    ),
]
each_variant = pytest.mark.parametrize("variant", VARIANTS)


@pytest.fixture(autouse=True)
def exact_float32():
    """TF32 off: it keeps 10 bits of a float32's 23. cuDNN's is on unless it is switched off."""
    parts = torch.backends.cuda.matmul, torch.backends.cudnn
    before = [part.allow_tf32 for part in parts]
    for part in parts:
        part.allow_tf32 = False
    yield
    for part, allowed in zip(parts, before, strict=True):
        part.allow_tf32 = allowed


def there(x):
    """Tensors, or lists and dictionaries of them, on the device that is certified."""
    if isinstance(x, dict):
        return {name: there(value) for name, value in x.items()}
    if isinstance(x, list | tuple):
        return type(x)(there(value) for value in x)
    return x.to(DEVICE) if isinstance(x, torch.Tensor) else x


def alike(a: torch.Tensor, b: torch.Tensor) -> float:
    return torch.cosine_similarity(a.float().flatten(), b.float().flatten(), dim=0).item()


# ---- parity -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("folder", GOLDEN, ids=lambda folder: folder.name)
def test_the_policy_equals_lerobots_in_float32(folder):
    rows = golden.compare(folder, DEVICE, slack=1 if DEVICE == "cpu" else 10)
    assert len(rows) > 100
    assert not [row for row in rows if not row.within]


@each_variant
@pytest.mark.parametrize("mode", MODES)
def test_every_mode_at_every_site_gives_the_cpus_loss_and_chunk(variant, mode):
    found = []
    for place in (lambda x: x, there):
        arm = make_arm(variant, memory=mode)
        tiny.open_gates(arm)
        arm = arm.to(DEVICE) if place is there else arm
        inputs, world, (noise, time) = place(tiny.inputs()), place(tiny.world()), place(tiny.flow())
        losses = arm(inputs, world, noise, time)
        with torch.no_grad():
            chunk = arm.eval().act(inputs, noise[:, 0], mode, world)
        found.append({name: x.detach().cpu() for name, x in losses.items()} | {"chunk": chunk.cpu()})
    for name, want in found[0].items():
        torch.testing.assert_close(found[1][name], want, msg=f"{mode} {name}", **CLOSE)


@pytest.mark.parametrize("mode", ["best1", "mean1", "dup", "drop:1"])
def test_every_intervention_on_a_bank_gives_the_cpus_chunk(mode):
    chunks = []
    for place in (lambda x: x, there):
        arm = make_arm("late", num_hypotheses=2, hypothesis_method="ensemble")
        tiny.open_gates(arm)
        arm = (arm.to(DEVICE) if place is there else arm).eval()
        world = place(tiny.world()) | {"noise": place(torch.zeros(2, 2 * tiny.FUTURE, tiny.LATENT))}
        best = place(torch.tensor([1, 0])) if mode == "best1" else None
        with torch.no_grad():
            chunks.append(arm.act(place(tiny.inputs()), place(tiny.flow()[0][:, 0]), mode, world, best).cpu())
    torch.testing.assert_close(chunks[1], chunks[0], **CLOSE)


# ---- bfloat16 -----------------------------------------------------------------------------------------


@each_variant
def test_bfloat16_is_float32_but_for_rounding(variant):
    memory, (noise, time) = there(torch.randn(2, tiny.FUTURE, tiny.LATENT)), there(tiny.flow())
    losses, grads, chunks = [], [], []
    for dtype in (torch.float32, torch.bfloat16):
        policy = frozen_arm(variant).to(DEVICE).policy
        policy.set_dtype(dtype)
        loss = policy(there(tiny.inputs()), noise, time, memory).mean()
        loss.backward()
        losses.append(loss.item())
        grads.append(torch.cat([g.flatten() for g in gradients(policy).values()]))
        with torch.no_grad():
            chunks.append(policy.eval().predict_chunk(there(tiny.inputs()), noise[:, 0], memory))
    assert 0 < abs(losses[1] - losses[0]) < 0.02 * losses[0]
    assert alike(*grads) > 0.99 and alike(*chunks) > 0.999
    assert not torch.equal(*chunks)


# ---- compiled -----------------------------------------------------------------------------------------


@each_variant
def test_compiled_blocks_and_loop_give_the_eager_policys_values(variant):
    torch._dynamo.reset()
    options = {"backend": "aot_eager"} if DEVICE == "cpu" else {}  # a CPU's compiler takes minutes
    memory, (noise, time) = there(torch.randn(2, tiny.FUTURE, tiny.LATENT)), there(tiny.flow())
    inputs, found = there(tiny.inputs()), []
    for compiled in (False, True):
        policy = frozen_arm(variant).to(DEVICE).policy
        if compiled:
            policy.compile_blocks(**options)
            policy.compile_denoise(**options)
        loss = policy(inputs, noise, time, memory)
        loss.mean().backward()
        with torch.no_grad():
            chunk = policy.eval().predict_chunk(inputs, noise[:, 0], memory)
        found.append({"loss": loss.detach(), "chunk": chunk, **gradients(policy)})
    for name, want in found[0].items():
        torch.testing.assert_close(found[1][name], want, msg=name, **CLOSE)


# ---- training -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(data, tmp_path_factory):  # noqa: F811
    """A run of 28 samples in float32, a checkpoint after each step."""
    out = tmp_path_factory.mktemp("runs") / "run"
    flags = ("--dtype", "float32", "--total-samples", "28", "--save-every", "8")
    said = train(data, out, *MEMORY, *flags).stdout
    assert f"({DEVICE})" in said, said
    return out, flags


def assert_same_run(a: list[dict], b: list[dict], rel: float) -> None:
    assert [line["samples"] for line in a] == [line["samples"] for line in b]
    for one, other in zip(a, b, strict=True):
        for name in ("action_loss", "world_loss", "grad_norm"):
            assert math.isclose(one[name], other[name], rel_tol=rel), (name, one[name], other[name])


def test_a_short_training_is_finite_and_takes_the_cpus_losses(data, trained, tmp_path, monkeypatch):  # noqa: F811
    """The same sample numbers are the same frames, noise and times, whatever the device."""
    out, flags = trained
    lines = metrics(out)
    assert all(math.isfinite(value) for line in lines for value in line.values())
    for name in ("CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES"):
        monkeypatch.setenv(name, "")
    assert "(cpu)" in train(data, tmp_path / "cpu", *MEMORY, *flags).stdout
    wanted = metrics(tmp_path / "cpu")
    assert_same_run(lines[:1], wanted[:1], rel=1e-4)
    assert_same_run(lines, wanted, rel=1e-2)  # Adam's first steps are signs: rounding may flip one


def test_a_training_that_is_killed_goes_on(data, trained):  # noqa: F811
    out, flags = trained
    lines = metrics(out)
    (out / "last").unlink()
    (out / "last").symlink_to("step_000003")  # the newest two can be gone on from
    assert "resumed at 24 samples" in train(data, out, *MEMORY, *flags).stdout
    assert_same_run(metrics(out), lines, rel=1e-3)


def test_a_training_in_bfloat16_with_compiled_blocks_is_finite(data, tmp_path):  # noqa: F811
    flags = () if DEVICE == "cpu" else ("--compile",)  # a CPU's compiler takes minutes
    flags += ("--dtype", "bfloat16", "--total-samples", "28")
    flags += ("--init", tiny.golden() / "checkpoint", "--cameras", "camera1=image", "camera2=image2")
    train(data, tmp_path / "run", *MEMORY, *flags)
    lines = metrics(tmp_path / "run")
    assert len(lines) == 4 and all(math.isfinite(value) for line in lines for value in line.values())
