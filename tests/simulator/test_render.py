"""Drawing without a display: which GL library is chosen, and what decimation leaves of a mesh."""

import sys
from types import SimpleNamespace

import numpy as np
import pytest

from files import Refused
from simulator import render


def test_decimation_keeps_the_outline_and_drops_collapsed_faces():
    vertices = np.random.default_rng(0).uniform(-1, 1, (500, 3))
    faces = np.random.default_rng(1).integers(0, 500, (900, 3))
    merged, kept = render.decimated_mesh(vertices, faces, 4)
    assert len(merged) == kept.sum() <= 900 and set(merged.ravel()) <= set(range(500))
    assert all(len(set(face)) == 3 for face in merged.tolist())
    assert np.abs(vertices[merged] - vertices[faces[kept]]).max() <= 2 / 4 + 1e-9  # no vertex leaves its cell


SCENE = """<mujoco><asset><mesh name="m" vertex="-1 -1 -1  1 -1 -1  0 1 -1  0 0 1" scale=".1 .1 .1"/></asset>
<worldbody><camera name="down" pos="0 0 2" fovy="90"/><geom name="ball" size=".1" pos="9 0 0"/>
<geom name="under" type="mesh" mesh="m"/> <geom name="edge" type="mesh" mesh="m" pos="2.05 0 0"/>
<geom name="beside" type="mesh" mesh="m" pos="2.4 0 0"/> <geom name="far" type="mesh" mesh="m" pos="0 -9 0"/>
<geom name="behind" type="mesh" mesh="m" pos="0 0 2.3"/></worldbody></mujoco>"""


def test_meshes_wholly_beside_or_behind_the_view_are_out_of_sight():
    mujoco = pytest.importorskip("mujoco")
    model = mujoco.MjModel.from_xml_string(SCENE)
    data = mujoco.MjData(model)
    mujoco.mj_forward(model, data)
    found = render.out_of_sight(model, data, 0)
    assert [model.geom(number).name for number in found] == ["beside", "far", "behind"]


def test_a_missing_gl_library_names_the_line_that_installs_it(monkeypatch):
    monkeypatch.delenv("MUJOCO_GL", raising=False)
    monkeypatch.delitem(sys.modules, "mujoco", raising=False)
    monkeypatch.setattr(render, "_egl_devices", lambda: 0)
    monkeypatch.setattr(render.ctypes, "CDLL", lambda _: (_ for _ in ()).throw(OSError("no library")))
    with pytest.raises(Refused, match="apt-get install libegl1"):
        render.setup_gl()


@pytest.mark.parametrize(("backend", "package"), [("osmesa", "libosmesa6"), ("egl", "libegl1")])
def test_a_chosen_backend_without_its_library_names_the_line_that_installs_it(monkeypatch, backend, package):
    monkeypatch.setattr(render, "_egl_devices", lambda: 0)
    monkeypatch.setattr(render.ctypes, "CDLL", lambda _: (_ for _ in ()).throw(OSError("no library")))
    with pytest.raises(Refused, match=f"MUJOCO_GL={backend}.*apt-get install {package}"):
        render.check_gl(backend)
    monkeypatch.setattr(render, "_egl_devices", lambda: 1)
    monkeypatch.setattr(render.ctypes, "CDLL", lambda _: object())
    render.check_gl(backend)


def test_a_users_gl_backend_stays(monkeypatch):
    monkeypatch.setenv("MUJOCO_GL", "osmesa")
    monkeypatch.setenv("PYOPENGL_PLATFORM", "osmesa")
    assert render.setup_gl() == "osmesa"


def test_only_a_drawing_process_forgets_gpus_that_egl_does_not_know(monkeypatch):
    monkeypatch.setenv("MUJOCO_GL", "egl")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5")
    monkeypatch.delenv("MUJOCO_EGL_DEVICE_ID", raising=False)
    monkeypatch.setattr(render, "_egl_devices", lambda: 1)
    render.setup_gl()
    assert render.os.environ["CUDA_VISIBLE_DEVICES"] == "5"  # a policy may be about to compute there
    render.free_egl_device()
    assert "CUDA_VISIBLE_DEVICES" not in render.os.environ


def test_an_egl_device_that_is_named_goes_before_the_gpus_and_must_be_there(monkeypatch):
    monkeypatch.setenv("MUJOCO_GL", "egl")
    monkeypatch.setenv("PYOPENGL_PLATFORM", "osmesa")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3")
    monkeypatch.setenv("MUJOCO_EGL_DEVICE_ID", "0")
    monkeypatch.setattr(render, "_egl_devices", lambda: 1)
    render.setup_gl()
    assert render.os.environ["PYOPENGL_PLATFORM"] == "egl"
    render.free_egl_device()
    assert "CUDA_VISIBLE_DEVICES" not in render.os.environ
    for device in ("1", "x", ""):
        monkeypatch.setenv("MUJOCO_EGL_DEVICE_ID", device)
        with pytest.raises(render.Refused, match=rf"_ID={device}: EGL has devices 0..0 here"):
            render.setup_gl()


MAPS = """7f10-7f20 r-xp 00000000 08:01 12 /usr/lib/x86_64-linux-gnu/libc.so.6
7f20-7f30 r--p 00000000 08:01 13 /usr/lib/libEGL.so.1.1.0
7f30-7f40 r-xp 00000000 08:01 13 /usr/lib/libEGL.so.1.1.0
7f40-7f50 rw-p 00000000 00:00 0 [heap]
"""


def test_the_loaded_gl_library_is_the_drivers_own_where_it_is_loaded():
    assert render.gl_library(MAPS) == "/usr/lib/libEGL.so.1.1.0"
    driver = "7f50-7f60 r-xp 00000000 08:01 14 /opt/my driver/libEGL_nvidia.so.0\n"
    assert render.gl_library(MAPS + driver) == "/opt/my driver/libEGL_nvidia.so.0"
    assert render.gl_library("7f-8f r-xp 0 08:01 15 /usr/lib/libOSMesa.so.8.0.0\n").endswith("so.8.0.0")
    assert render.gl_library("") == ""


@pytest.fixture
def mujoco(monkeypatch):
    """A MuJoCo as from 3.3.3 on, which remembers the textures that it was told to upload."""
    uploaded = []
    space = SimpleNamespace(mjCOLORSPACE_LINEAR=1, mjCOLORSPACE_SRGB=2)
    module = SimpleNamespace(
        mjtColorSpace=space, mjr_uploadTexture=lambda *a: uploaded.append(a[2]), uploaded=uploaded
    )
    monkeypatch.setitem(sys.modules, "mujoco", module)
    return module


def test_textures_marked_srgb_are_counted_set_to_linear_and_uploaded(mujoco):
    model = SimpleNamespace(tex_colorspace=np.array([1, 2, 0, 2]), ntex=4)
    assert render.count_srgb_textures(model) == 2
    render.upload_linear_textures(model, None)
    assert model.tex_colorspace.tolist() == [1, 1, 1, 1] and mujoco.uploaded == [0, 1, 2, 3]
    assert render.count_srgb_textures(model) == 0


def test_a_mujoco_without_colour_spaces_is_left_alone(mujoco):
    del mujoco.mjtColorSpace
    assert render.count_srgb_textures(SimpleNamespace()) is None
    render.upload_linear_textures(SimpleNamespace(), None)
    assert mujoco.uploaded == []
