"""The feature cache: the very tokens that the tower gives, whole or refused, and the same training."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import zlib
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from test_data import write_task
from test_train import TWO_RANKS, metrics

import train
from arm import Arm, ArmConfig, Summary
from data import Source
from latents import blocks, tower, world
from latents.blocks import MARKS, part_of
from latents.tower import CHECKS, ROWS, SIDECAR, Features
from readers.demos import Demos, StoredPictures
from readers.libero_hdf5 import CAMERAS
from readers.load import load
from train import TrainConfig
from training import start

ROOT = Path(__file__).resolve().parents[2]
CPU = torch.device("cpu")
FRAMES, TOKENS, WIDTH = 45, 16, 128  # of the data below, and of the preset `tiny`
SHORT = {"total_samples": 20, "batch_size": 8, "log_every": 1, "lr": 1e-4, "freeze": "expert"}
MEMORY = {"fusion": ("late",), "memory": "pred", "future": 3, "world_dim": 8, "world_resolution": 8}
MEMORY |= {"world_camera": ("image",)}


@pytest.fixture(autouse=True)
def random_trunks_will_do(monkeypatch):
    monkeypatch.setattr(train, "check_trunk", lambda _: None)  # weights do not matter here


def make_data(folder: Path) -> Path:
    """Two task files of three episodes; no block of frames ends where an episode does."""
    write_task(folder / "soup_demo.hdf5", lengths=(9, 24), size=16)
    write_task(folder / "can_demo.hdf5", lengths=(12,), size=16, seed=1)
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def exact(folder):
    """A finished cache in float32."""
    return cache(folder)


@pytest.fixture
def small_blocks(monkeypatch):
    monkeypatch.setattr(tower, "BLOCK", 8)  # six blocks, the last of five frames


def config_of(folder: Path, **fields) -> TrainConfig:
    """A training that reads tokens from beside the data, where `features` says no other place."""
    named = zlib.crc32(repr(sorted(fields.items())).encode())
    place = folder / f"tokens_{named:08x}"
    return TrainConfig(data=folder, **{"dtype": "float32", "freeze": "expert", "features": place} | fields)


def cache(folder: Path, **fields) -> Path:
    """Write or check a cache; give its folder."""
    [done] = start.make_caches(config_of(folder, **fields), 0, 1, CPU)
    return Path(re.fullmatch(r"(?:wrote|checked) (.*): \d+ frames in .* s", done)[1])


def frozen_policy(folder: Path, demos: Demos, dtype: str = "float32", **fields):
    policy, processor = start.start_policy(config_of(folder, **fields), demos)
    tower.freeze(policy, demos, getattr(torch, dtype), CPU)
    return policy, processor


def content(path: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in path.iterdir()}


def run(folder: Path, out: Path, **fields) -> Path:
    train.main(TrainConfig(data=folder, out=out, **SHORT | fields))
    return out


def weights(out: Path) -> dict[str, torch.Tensor]:
    return load_file(out / "last" / "model.safetensors") | load_file(out / "last" / "world.safetensors")


# ---- content ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_row_is_what_the_tower_makes_of_that_frame_and_camera(folder, dtype, tmp_path):
    demos = load(folder)
    policy, processor = frozen_policy(folder, demos, dtype)
    opened = Features.open(cache(folder, dtype=dtype, features=tmp_path / "f"))
    assert opened.rows.shape == (FRAMES, 2, TOKENS, WIDTH) and isinstance(opened.rows, np.memmap)
    for index in (np.arange(32), np.arange(32, FRAMES), np.array([44, 0, 31])):
        images, _ = processor.cameras({name: demos.frames(index, name) for name in CAMERAS})
        with torch.no_grad():
            wanted = dict(zip(CAMERAS, policy.embed_images(images)))
        got = opened.batch(index)
        assert list(got) == list(CAMERAS)
        for name, tokens in got.items():
            assert tokens.dtype == getattr(torch, dtype) and tokens.shape == (len(index), TOKENS, WIDTH)
            if len(index) == tower.BLOCK:  # the same shape: the same bits
                assert torch.equal(tokens, wanted[name])
            close = {"atol": 1e-5, "rtol": 1e-5} if dtype == "float32" else {"atol": 0.02, "rtol": 0.02}
            torch.testing.assert_close(tokens, wanted[name], **close)


def test_a_batch_has_its_own_memory_and_leaves_the_map_as_it_is(exact):
    opened = Features.open(exact)
    before = (exact / ROWS).read_bytes()
    for tokens in opened.batch(np.array([3, 3])).values():
        assert torch.equal(tokens[0], tokens[1])
        tokens.zero_()
    assert (exact / ROWS).read_bytes() == before and opened.rows[3].any()


def test_the_size_is_said_before_anything_is_written(folder, tmp_path, capsys):
    cache(folder, features=tmp_path / "f", dtype="bfloat16")
    said = "features: 45 frames x 2 cameras x 16 tokens x 128 in bfloat16 = 0.000369 GB\n"
    assert capsys.readouterr().out == said
    assert (tmp_path / "f" / ROWS).stat().st_size == 45 * 2 * 16 * 128 * 2
    libero = {"rows": 273_465, "cameras": ["a", "b"], "tokens": 64, "width": 960, "dtype": "bfloat16"}
    try:
        blocks.check_space(tmp_path / "big", tower.layout_of(libero))
    except ValueError as error:
        assert "features need 67.2 GB more" in str(error)  # where this disk is smaller
    said = "features: 273,465 frames x 2 cameras x 64 tokens x 960 in bfloat16 = 67.2 GB\n"
    assert capsys.readouterr().out == said


def test_the_command_line_writes_once_and_then_checks(folder, tmp_path, capsys):
    config = config_of(folder, features=tmp_path / "f", prepare=True)
    for word in ("wrote", "checked"):
        train.main(config)
        assert f"{word} {tmp_path / 'f'}: 45 frames in" in capsys.readouterr().out
    with pytest.raises(ValueError, match=r"^no folder './nowhere'"):
        train.main(dataclasses.replace(config, init="./nowhere"))


def test_progress_is_said_with_rate_and_time_left(folder, tmp_path, small_blocks, monkeypatch, capsys):
    monkeypatch.setattr(blocks, "PROGRESS", 0.0)
    cache(folder, features=tmp_path / "f")
    lines = capsys.readouterr().out.splitlines()[1:]
    assert [line.split()[1] for line in lines] == ["8", "16", "24", "32", "40", "45"]
    assert all(re.search(r"of 45 frames +[\d,.]+ frames/s +[\d.]+ min left$", line) for line in lines)


# ---- kills, ranks, company ----------------------------------------------------------------------------

KILLED = """
import os, signal, sys
from pathlib import Path
sys.path.insert(0, {root!r})
import torch
from latents import tower
from train import TrainConfig
from training.start import make_caches
tower.BLOCK, real, calls = 8, os.fsync, []
def fsync(number):
    calls.append(number)
    if len(calls) == 4:  # the first brings the sidecar
        os.kill(os.getpid(), signal.SIGKILL)  # rows of the third block are written, its mark is not
    real(number)
os.fsync = fsync
config = TrainConfig(data=Path({folder!r}), dtype="float32", freeze="expert", features=Path({out!r}))
make_caches(config, 0, 1, torch.device("cpu"))
"""


def test_a_killed_run_goes_on_to_the_same_bytes(folder, tmp_path, small_blocks, monkeypatch):
    whole = cache(folder, features=tmp_path / "whole")
    script = KILLED.format(root=str(ROOT), folder=str(folder), out=str(tmp_path / "f"))
    assert subprocess.run([sys.executable, "-c", script]).returncode == -signal.SIGKILL
    part = part_of(tmp_path / "f")
    assert (part / MARKS).read_bytes() == b"\1\1\0\0\0\0" and not (tmp_path / "f").exists()
    with (part / ROWS).open("r+b") as rows:  # what was not marked may be torn
        rows.seek(tower.row_bytes(tower.read_sidecar(part, ""), 16))
        rows.write(b"\x55" * 3000)
    encoded = []
    encode = tower.encode
    monkeypatch.setattr(tower, "encode", lambda *given: encoded.append(1) or encode(*given))
    cache(folder, features=tmp_path / "f")
    assert len(encoded) == 4 and not part.exists()
    assert content(tmp_path / "f") == content(whole) and set(content(whole)) == {ROWS, SIDECAR, CHECKS}


@pytest.mark.parametrize("lost", [SIDECAR, ROWS, MARKS])
def test_an_unfinished_cache_that_lost_a_file_still_ends_whole(
    lost, folder, tmp_path, small_blocks, monkeypatch
):
    whole = cache(folder, features=tmp_path / "whole")
    with monkeypatch.context() as patch:
        patch.setattr(tower, "finish", lambda *_: None)
        cache(folder, features=tmp_path / "f")
    (part_of(tmp_path / "f") / lost).unlink()
    cache(folder, features=tmp_path / "f")
    assert content(tmp_path / "f") == content(whole)


def test_blocks_shared_out_over_ranks_make_the_same_bytes(folder, tmp_path, small_blocks, monkeypatch):
    whole = cache(folder, features=tmp_path / "whole")
    demos = blocks.with_checks(load(folder, in_memory=False))
    policy, processor = frozen_policy(folder, demos)
    wanted = tower.tower_identity(policy, "float32") | tower.data_identity(demos)
    tower.open_part(tmp_path / "f.part", wanted)
    for rank in (2, 0, 1):
        tower.write_blocks(tmp_path / "f.part", policy, processor, demos, rank, 3)
    tower.seal(tmp_path / "f.part")
    blocks.finish(tmp_path / "f.part", tmp_path / "f")
    assert content(tmp_path / "f") == content(whole)


@pytest.mark.slow
def test_two_ranks_write_the_same_bytes_as_one(folder, tmp_path):
    whole = cache(folder, features=tmp_path / "whole")
    command = [
        *TWO_RANKS,
        ROOT / "train.py",
        "--prepare",
        "--data",
        folder,
        "--dtype",
        "float32",
        "--freeze",
        "expert",
        "--features",
        tmp_path / "f",
    ]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    for word in ("wrote", "checked"):
        done = subprocess.run([str(c) for c in command], capture_output=True, text=True, env=env, cwd=ROOT)
        assert done.returncode == 0 and done.stdout.count(word) == 1, done.stderr[-2000:]
    assert content(tmp_path / "f") == content(whole)


def test_two_runs_may_write_one_cache_at_once(folder, tmp_path, small_blocks, monkeypatch):
    whole, encode, inner = cache(folder, features=tmp_path / "whole"), tower.encode, []

    def encode_beside_another_run(*given):
        if not inner:
            inner.append(1)
            cache(folder, features=tmp_path / "f")  # while the outer run is at its first block
        return encode(*given)

    monkeypatch.setattr(tower, "encode", encode_beside_another_run)
    cache(folder, features=tmp_path / "f")
    assert content(tmp_path / "f") == content(whole) and not part_of(tmp_path / "f").exists()
    tower.open_part(part_of(tmp_path / "f"), json.loads((whole / SIDECAR).read_text()))
    blocks.finish(part_of(tmp_path / "f"), tmp_path / "f")  # one that began before the other had ended
    assert content(tmp_path / "f") == content(whole) and not part_of(tmp_path / "f").exists()


# ---- refusals -----------------------------------------------------------------------------------------

FIELDS = {
    "format": 3, "pictures": 2, "tower": "0123456789abcdef", "image_size": 64, "vision_size": 32,
    "patch_size": 8, "scale_factor": 4, "vision_heads": 8, "vision_eps": 1e-5, "dtype": "bfloat16",
    "cameras": list(CAMERAS)[::-1], "tokens": 4, "width": 64, "rows": 44, "light_fingerprint": "0" * 16,
    "fingerprint": "0" * 16, "checks": {name: [1, 2, 3] for name in CAMERAS},
}  # fmt: skip


@pytest.mark.parametrize("field", FIELDS)
def test_a_sidecar_that_disagrees_in_any_field_is_refused(field, folder, exact, tmp_path):
    shutil.copytree(exact, tmp_path / "f")
    stored = json.loads((exact / SIDECAR).read_text())
    assert set(stored) == set(FIELDS)
    (tmp_path / "f" / SIDECAR).write_text(json.dumps(stored | {field: FIELDS[field]}))
    with pytest.raises(ValueError) as error:
        run(folder, tmp_path / "run", features=tmp_path / "f")
    resized = field in ("dtype", "tokens", "width", "rows")
    named = "fingerprint" if field == "checks" else field
    message = (
        r"damaged \(features.bin has" if resized else f", {named}: cache has .*, run wants .*: write other"
    )
    assert re.search(message, str(error.value)) and "\n" not in str(error.value)
    assert str(tmp_path / "f") in str(error.value) and not (tmp_path / "run").exists()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_another_tower_or_type_is_refused(dtype, folder, tmp_path):
    cache(folder, dtype=dtype, features=tmp_path / "f")
    opened = Features.open(tmp_path / "f")
    policy, _ = frozen_policy(folder, load(folder), dtype)
    opened.check_policy(policy)
    other, _ = frozen_policy(folder, load(folder), dtype, seed=1)
    with pytest.raises(ValueError, match=r", tower: cache has \w{16}, run wants \w{16}: .*--init, --seed"):
        opened.check_policy(other)
    with torch.no_grad():
        policy.connector.proj.weight[0, 0] *= 1.02
    with pytest.raises(ValueError, match=r", tower: cache has"):
        opened.check_policy(policy)
    other_type = "bfloat16" if dtype == "float32" else "float32"
    retyped, _ = frozen_policy(folder, load(folder), other_type)
    with pytest.raises(ValueError, match=f", dtype: cache has {dtype}, run wants {other_type}: .*--dtype"):
        opened.check_policy(retyped)
    policy.freeze("vision")
    with pytest.raises(ValueError, match=r"a tower that trains: .* use --freeze expert"):
        opened.check_policy(policy)


def test_a_tower_that_is_held_and_saved_in_bfloat16_keeps_its_name(folder):
    policy, _ = frozen_policy(folder, load(folder))
    exact, rounded = (tower.tower_fingerprint(policy, dtype) for dtype in ("float32", "bfloat16"))
    policy.set_dtype(torch.bfloat16)
    assert tower.tower_fingerprint(policy, "bfloat16") == rounded != exact
    policy.set_dtype(torch.float32)
    assert tower.tower_fingerprint(policy, "bfloat16") == rounded
    assert tower.tower_fingerprint(policy, "float32") not in (exact, rounded)


def compress(folder: Path) -> None:
    """Store pictures as simulator/record.py does."""
    for path in folder.glob("*.hdf5"):
        with h5py.File(path, "a") as file:
            for demo in file["data"].values():
                for name in CAMERAS.values():
                    images = demo[f"obs/{name}"][()]
                    del demo[f"obs/{name}"]
                    packed = {"compression": "gzip", "compression_opts": 1, "chunks": (1, *images.shape[1:])}
                    demo.create_dataset(f"obs/{name}", data=images, **packed)


def change(folder: Path, name: str, value: object) -> None:
    with h5py.File(folder / "soup_demo.hdf5", "a") as file:
        file[f"data/demo_1/{name}"][7] = value


@pytest.mark.parametrize("name", ["actions", "obs/ee_pos"])
def test_other_actions_or_states_are_refused(name, tmp_path):
    made = cache(make_data(tmp_path / "d"))
    change(tmp_path / "d", name, 0.5)
    with pytest.raises(ValueError, match=r"light_fingerprint: cache has .*, run wants"):
        run(tmp_path / "d", tmp_path / "run", features=made)


def test_the_light_fingerprint_sees_other_pictures_where_they_are_compressed_the_full_one_anywhere(tmp_path):
    for packed in (True, False):
        folder = make_data(tmp_path / f"packed{packed}")
        if packed:
            compress(folder)
        made = cache(folder)
        opened, before = Features.open(made), load(folder, in_memory=False)
        opened.vouch(before), opened.vouch(before, full=True)
        change(folder, "obs/eye_in_hand_rgb", 77)  # one frame of one camera
        after = load(folder, in_memory=False)
        assert (after.light_fingerprint != before.light_fingerprint) == packed
        with pytest.raises(ValueError, match=r"fingerprint: cache has .*, run wants"):
            opened.vouch(after, full=True)
        shutil.copytree(made, part_of(made))  # left behind, say: what is finished counts
        with pytest.raises(
            ValueError, match=r"fingerprint: cache has .*, run wants .*: delete .* and run again"
        ):
            cache(folder)  # `checked` means every pixel


def test_a_row_that_is_not_as_it_was_written_is_named_when_it_is_read(folder, exact, tmp_path):
    for at, value in ((5, b"\x01"), (30, np.float32("nan").tobytes())):
        shutil.copytree(exact, tmp_path / f"{at}")
        opened = Features.open(tmp_path / f"{at}")
        with (tmp_path / f"{at}" / ROWS).open("r+b") as rows:
            rows.seek(tower.row_bytes(opened.stored, at) + 1)
            rows.write(value)
        opened.batch(np.array([at - 1, at + 1]))
        said = rf"damaged \(frame {at} of features.bin has other bytes"
        with pytest.raises(ValueError, match=said):
            opened.batch(np.array([3, at]))
        with pytest.raises(ValueError, match=said):
            cache(folder, features=tmp_path / f"{at}")  # `checked` means every row


@pytest.mark.parametrize("name", [ROWS, SIDECAR, CHECKS])
def test_a_cache_with_a_truncated_or_missing_file_is_refused(name, folder, exact, tmp_path):
    file = tmp_path / "f" / name
    shutil.copytree(exact, tmp_path / "f")
    file.write_bytes(file.read_bytes()[:-20])
    with pytest.raises(ValueError, match=r"damaged .*run the same command with --prepare"):
        Features.open(tmp_path / "f")
    file.unlink()
    with pytest.raises(ValueError, match=r"damaged .*run the same command with --prepare"):
        Features.open(tmp_path / "f")
    with pytest.raises(ValueError, match=r"nowhere are missing .*: run the same command with --prepare"):
        Features.open(tmp_path / "nowhere")


def test_an_unfinished_cache_is_refused_by_either_name(folder, tmp_path, small_blocks, monkeypatch):
    monkeypatch.setattr(tower, "finish", lambda *_: None)
    cache(folder, features=tmp_path / "f")
    part = part_of(tmp_path / "f")
    with pytest.raises(ValueError, match=r"f are not finished: run the same command with --prepare"):
        Features.open(tmp_path / "f")
    (part / MARKS).write_bytes(b"\1\1\1\1\0\1")
    with pytest.raises(ValueError, match=r"f.part are not finished"):
        Features.open(part)


def test_an_unfinished_cache_of_other_data_or_another_tower_is_refused(tmp_path, monkeypatch):
    folder = make_data(tmp_path / "d")
    with monkeypatch.context() as patch:
        patch.setattr(tower, "finish", lambda *_: None)
        cache(folder, features=tmp_path / "f")
    with pytest.raises(
        ValueError, match=r"unfinished features .*f\.part, tower: .*: delete .*f\.part and run"
    ):
        cache(folder, features=tmp_path / "f", seed=1)
    change(folder, "actions", 0.5)
    with pytest.raises(ValueError, match=r"unfinished features .*f\.part, light_fingerprint: cache has"):
        cache(folder, features=tmp_path / "f")


def test_a_full_disk_is_said_before_anything_is_written(folder, tmp_path, small_blocks, monkeypatch):
    usage, need = shutil.disk_usage(tmp_path), FRAMES * 2 * TOKENS * WIDTH * 4
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=need - 1))
    with pytest.raises(
        ValueError, match=r"features need 0.000737 GB more, the disk has 0.000737 GB left: free"
    ):
        cache(folder, features=tmp_path / "f")
    assert not list(tmp_path.iterdir())
    with monkeypatch.context() as patch:  # half of it is there already
        patch.setattr(shutil, "disk_usage", lambda _: usage)
        patch.setattr(tower, "encode", lambda *given: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            cache(folder, features=tmp_path / "f")
    with (part_of(tmp_path / "f") / ROWS).open("r+b") as rows:
        rows.write(b"\1" * (need // 2))
    cache(folder, features=tmp_path / "f")


def test_a_policy_with_a_camera_that_the_data_lack_is_refused(folder, monkeypatch):
    policy, processor = frozen_policy(folder, load(folder))
    strange = dataclasses.replace(policy.config, cameras=("observation.images.camera1",))
    monkeypatch.setattr(policy, "config", strange)
    monkeypatch.setattr(start, "build_policy", lambda *_: (policy, processor))
    with pytest.raises(
        ValueError, match=r"the policy's camera observation.images.camera1 is not in the data"
    ):
        cache(folder)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"freeze": "vision"}, "--features with --freeze vision: .* use --freeze expert"),
        ({"freeze": "none"}, "--features with --freeze none"),
        ({"freeze": "expert", "blind": True}, "--features with --blind"),
    ],
)
def test_runs_whose_pictures_change_or_are_averaged_take_no_features(fields, message):
    with pytest.raises(ValueError, match=message):
        TrainConfig(features=Path("f"), **fields)


# ---- training -----------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    ("dtype", "fields"),
    [("float32", {}), ("float32", MEMORY | {"val_every": 8, "val_share": 0.34}), ("bfloat16", {})],
    ids=["float32", "memory", "bfloat16"],
)
def test_training_from_features_equals_training_from_pictures(dtype, fields, folder, tmp_path, monkeypatch):
    fields, made = fields | {"dtype": dtype}, cache(folder, dtype=dtype)
    seen, fingerprint = run(folder, tmp_path / "pictures", **fields), load(folder).fingerprint
    monkeypatch.setattr(StoredPictures, "__getitem__", lambda *_: pytest.fail("decoded a picture"))
    read = run(folder, tmp_path / "features", features=made, **fields)
    # The tower runs over a block at once, in training over a batch: another shape, and where kernels choose
    # by it another order of sums, of which Adam's first steps, signs, make a share of the learning rate. On
    # the processors that this was written on, both come out the same to the bit.
    close = {"atol": 1e-5, "rtol": 1e-5} if dtype == "float32" else {"atol": 1e-3, "rtol": 1e-2}
    a, b = weights(seen), weights(read)
    assert a.keys() == b.keys()
    for name in a:
        torch.testing.assert_close(a[name], b[name], **close)
    losses = 0
    for one, other in zip(metrics(seen), metrics(read), strict=True):
        assert one.keys() == other.keys()
        for key in one.keys() - {"samples_per_second"}:
            assert one[key] == pytest.approx(other[key], rel=10 * close["rtol"], abs=close["atol"]), key
            losses += key == "action_loss" or key.startswith("val_loss")
    assert losses == (15 if fields.get("val_every") else 3)
    config, before = (json.loads((out / "config.json").read_text()) for out in (read, seen))
    assert config.pop("feature_cache") == Features.open(made).facts and before.pop("feature_cache") is None
    assert config.pop("data_facts") == before.pop("data_facts") | {"sketches": {}}
    assert config["flops_per_sample"] < before["flops_per_sample"]
    differ = {name for name in config if config[name] != before[name]}
    assert differ == {"out", "features", "flops_per_sample"}
    assert config["data_fingerprint"] == fingerprint


def sources(folder: Path, path: Path, dtype: str) -> list[Source]:
    """The same arm and data, from pictures and from features."""
    demos = load(folder)
    policy, processor = frozen_policy(folder, demos, dtype)
    arm = Arm(ArmConfig(), policy, None, Summary.none(ArmConfig()), {})
    return [
        Source(arm, processor, demos, None, CPU, seed=0, features=found)
        for found in (None, Features.open(path))
    ]


def test_losses_and_gradients_from_bfloat16_features_equal_those_of_the_tower_held_in_bfloat16(
    folder, tmp_path
):
    pictures, tokens = sources(folder, cache(folder, dtype="bfloat16", features=tmp_path / "f"), "bfloat16")
    for index, exact in ((np.arange(32), True), (np.array([40, 3, 17, 9]), False)):
        found = []
        for source in (pictures, tokens):
            assert source.arm.policy.connector.proj.weight.dtype == torch.bfloat16
            loss = source.arm(source.observe(index), {}, *source.flow(index))["action"]
            source.arm.zero_grad()
            loss.mean().backward()
            grads = [p.grad.clone() for p in source.arm.parameters() if p.requires_grad]
            found.append((loss.detach(), grads))
        (a, grads_a), (b, grads_b) = found
        if exact:  # the tower saw the same frames in one pass of the same shape
            assert torch.equal(a, b) and all(torch.equal(x, y) for x, y in zip(grads_a, grads_b))
        else:  # a different shape: roundings of bfloat16, 2^-8 each
            torch.testing.assert_close(a, b, atol=0.05, rtol=0.05)
    images = tokens.observe(np.arange(4))["images"]
    assert [(x.dtype, tuple(x.shape)) for x in images] == [(torch.bfloat16, (4, TOKENS, WIDTH))] * 2


def test_pictures_that_are_gone_are_not_missed(tmp_path):
    folder = make_data(tmp_path / "d")
    made = cache(folder)
    before = weights(run(folder, tmp_path / "before", features=made))
    for path in folder.glob(
        "*.hdf5"
    ):  # zeros in place: not compressed, so that the light fingerprint is the same
        with h5py.File(path, "a") as file:
            for demo in file["data"].values():
                for name in CAMERAS.values():
                    demo[f"obs/{name}"][...] = 0
    after = weights(run(folder, tmp_path / "after", features=made))
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_world_latents_that_are_not_cached_yet_are_made_from_pictures_checked_in_full(tmp_path, capsys):
    folder = make_data(tmp_path / "d")
    made, latents = cache(folder), world.cache_path(folder, TrainConfig(**MEMORY))
    run(folder, tmp_path / "run", features=made, **MEMORY)
    assert "there are no world latents yet: pictures are read once" in capsys.readouterr().out
    from_features = content(latents)
    shutil.rmtree(latents)
    world.prepare(folder, load(folder), TrainConfig(**MEMORY))
    assert content(latents) == from_features
    shutil.rmtree(latents)
    change(folder, "obs/agentview_rgb", 77)
    with pytest.raises(ValueError, match=r"fingerprint: cache has .*, run wants"):
        run(folder, tmp_path / "again", features=made, **MEMORY)
    assert not latents.exists()


def test_a_run_goes_on_from_its_checkpoint_with_its_features_only(folder, exact, tmp_path):
    straight = run(folder, tmp_path / "straight", features=exact)
    out = run(folder, tmp_path / "run", features=exact, save_every=8)
    shutil.rmtree(out / "step_000003")
    (out / "last").unlink()
    (out / "last").symlink_to("step_000002")
    moved = shutil.copytree(exact, tmp_path / "moved")
    with pytest.raises(ValueError, match=r"holds another run: feature_cache is .*, not None"):
        run(folder, out)
    run(folder, out, features=moved)
    a, b = weights(straight), weights(out)
    assert all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.slow
def test_features_of_a_checkpoint_serve_the_runs_that_start_from_it(folder, exact, tmp_path):
    first = run(folder, tmp_path / "first", features=exact, **MEMORY)
    made = cache(folder, init=str(first), features=tmp_path / "f")
    assert content(made) == content(exact)  # the tower was frozen
    loose = run(folder, tmp_path / "loose", freeze="none")
    with pytest.raises(ValueError, match=r", tower: cache has"):
        run(folder, tmp_path / "run", features=exact, init=str(loose))
    made = cache(folder, init=str(loose), out=tmp_path / "loose_features")
    run(folder, tmp_path / "run", features=made, init=str(loose))


def test_the_processor_lets_tokens_pass_as_they_are(folder, tmp_path):
    _, tokens = sources(folder, cache(folder, dtype="bfloat16", features=tmp_path / "f"), "bfloat16")
    batch = tokens.features.batch(np.arange(5))
    images, masks = tokens.processor.cameras(batch)
    assert masks == [None, None]
    assert all(image is batch[name] for image, name in zip(images, CAMERAS, strict=True))
    del batch["observation.images.image2"]
    tokens.processor.config = dataclasses.replace(tokens.processor.config, empty_cameras=1)
    images, masks = tokens.processor.cameras(batch)
    assert images[0].ndim == 3 and images[1].shape == (1, 3, 128, 128) and not masks[1].any()
    embedded = tokens.arm.policy.embed_images(images)
    assert torch.equal(embedded[0], images[0]) and embedded[1].shape == (1, TOKENS, WIDTH)
