"""Drawing without a display: which GL library MuJoCo draws with, and what a GL context draws differently.

The backend must be chosen before MuJoCo is imported: EGL where a device answers (a GPU's driver or Mesa),
else OSMesa. For `draw="fast"` the GL context gets meshes of fewer faces, their vertices clustered in a grid;
the model keeps its own, and with them physics and ray casts. MuJoCo from 3.3.3 on decodes textures that are
marked sRGB, which darkens LIBERO's floors; they can be set back to linear.

    python -c "import render; print(render.setup_gl())"
    pytest tests/simulator/test_render.py

Shapes: V vertices, F faces, K faces that are kept; G shapes of a scene.
Sources: EGL_EXT_device_enumeration; MuJoCo's mjtColorSpace, whose effect was measured on LIBERO's scenes;
vertex clustering as in Rossignac and Borrel 1993.
"""

import contextlib
import ctypes
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np

from files import Refused

FAST_CELLS = 20  # vertex clustering of `draw="fast"`: cells along a mesh's longest side
FAST_MIN_FACES = 300  # smaller meshes stay as they are
APT_LINE = "apt-get install libegl1 libegl-mesa0 libgl1 libgl1-mesa-dri libopengl0"


def setup_gl() -> str:
    """Choose a headless GL backend before MuJoCo is imported and return its name.

    MUJOCO_GL set by the user stays, and PYOPENGL_PLATFORM follows it. Raises Refused with the line that
    installs a backend for want of one, and for an EGL device that is not there.
    """
    chosen = os.environ.get("MUJOCO_GL") or _available_gl()
    os.environ["MUJOCO_GL"] = chosen
    if chosen in ("egl", "osmesa"):
        os.environ["PYOPENGL_PLATFORM"] = chosen
    device = os.environ.get("MUJOCO_EGL_DEVICE_ID", "0")
    count = _egl_devices() if chosen == "egl" else 0
    if count and not (device.isdecimal() and int(device) < count):
        raise Refused(f"MUJOCO_EGL_DEVICE_ID={device}: EGL has devices 0..{count - 1} here; leave it out")
    return chosen


def check_gl(backend: str) -> None:
    """Raise Refused, with the line that installs it, where a backend's library is missing here."""
    missing = ""
    if backend == "egl" and _egl_devices() == 0:
        missing = APT_LINE
    elif backend == "osmesa" and not _has_osmesa():
        missing = "apt-get install libosmesa6"
    if missing:
        raise Refused(f"MUJOCO_GL={backend}, but its library is not there: run `{missing}`")


def free_egl_device() -> None:
    """Let a drawing process forget CUDA_VISIBLE_DEVICES where EGL has no device of that number, or where
    MUJOCO_EGL_DEVICE_ID names one.

    robosuite takes those ids for EGL's, of which Mesa has just one. Not for a process that computes on a GPU.
    """
    if os.environ.get("MUJOCO_GL") == "egl" and _device_out_of_range():
        os.environ.pop("CUDA_VISIBLE_DEVICES")


def _available_gl() -> str:
    if "mujoco" in sys.modules:
        raise Refused("mujoco was imported before a GL backend was chosen: set MUJOCO_GL=egl")
    if _egl_devices() > 0:
        return "egl"
    if _has_osmesa():
        return "osmesa"
    raise Refused(f"no headless GL library was found (tried EGL, OSMesa): run `{APT_LINE}`")


def _has_osmesa() -> bool:
    with contextlib.suppress(OSError):
        return bool(ctypes.CDLL("libOSMesa.so.8"))
    return False


def _egl_devices() -> int:
    """Count the devices EGL can draw on; 0 without the library or without a driver behind it."""
    try:
        egl = ctypes.CDLL("libEGL.so.1")
        ctypes.CDLL("libOpenGL.so.0")
    except OSError:
        return 0
    egl.eglGetProcAddress.restype = ctypes.c_void_p
    address = egl.eglGetProcAddress(b"eglQueryDevicesEXT")
    if not address:
        return 0
    count = ctypes.c_int(0)
    signature = ctypes.CFUNCTYPE(ctypes.c_uint, ctypes.c_int, ctypes.c_void_p, ctypes.POINTER(ctypes.c_int))
    query = signature(address)
    return count.value if query(0, None, ctypes.byref(count)) else 0


def _device_out_of_range() -> bool:
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    if not visible or "MUJOCO_EGL_DEVICE_ID" in os.environ:
        return bool(visible)
    ids = visible.split(",")
    return not all(i.strip().isdigit() for i in ids) or int(ids[0]) >= max(_egl_devices(), 1)


def describe_gl() -> dict[str, str]:
    """Return what draws in this process's current GL context, in GL's own strings, and its loaded library."""
    from OpenGL import GL

    names = {"renderer": GL.GL_RENDERER, "vendor": GL.GL_VENDOR, "version": GL.GL_VERSION}
    found = {name: (GL.glGetString(key) or b"").decode(errors="replace") for name, key in names.items()}
    maps = Path("/proc/self/maps")
    return found | {"library": gl_library(maps.read_text()) if maps.exists() else ""}


def gl_library(maps: str) -> str:
    """Return the path of the EGL or OSMesa library among a process's mapped files; '' where there is none.

    libEGL.so.1 only hands on to a vendor's library (libEGL_mesa, libEGL_nvidia), which is named where loaded.
    """
    files = dict.fromkeys(line.split(maxsplit=5)[-1] for line in maps.splitlines() if ".so" in line)
    for prefix in ("libOSMesa.", "libEGL_", "libEGL."):
        for file in files:
            if Path(file).name.startswith(prefix):
                return file
    return ""


def count_srgb_textures(model: Any) -> int | None:
    """Count the textures that this MuJoCo decodes from sRGB; None where it knows no such mark (to 3.3.2)."""
    import mujoco

    if not hasattr(mujoco, "mjtColorSpace") or not hasattr(model, "tex_colorspace"):
        return None
    return int((model.tex_colorspace == int(mujoco.mjtColorSpace.mjCOLORSPACE_SRGB)).sum())


def upload_linear_textures(model: Any, context: Any) -> None:
    """Take every texture's values as they are, as MuJoCo did up to 3.3.2; does nothing to such a version.

    The GL context must be current.
    """
    import mujoco

    if not count_srgb_textures(model):
        return
    model.tex_colorspace[:] = int(mujoco.mjtColorSpace.mjCOLORSPACE_LINEAR)
    for i in range(model.ntex):
        mujoco.mjr_uploadTexture(model, context, i)


def decimated_mesh(vertices: np.ndarray, faces: np.ndarray, cells: int) -> tuple[np.ndarray, np.ndarray]:
    """Cluster a mesh's vertices in a grid and drop the faces that collapse.

    vertices (V, 3), faces (F, 3) of vertex numbers. Returns the kept faces renumbered to one vertex a cell
    (K, 3) and which faces were kept (F,) bool.
    """
    low, high = vertices.min(0), vertices.max(0)
    cell = np.floor((vertices - low) * (cells / max((high - low).max(), 1e-9))).astype(np.int64)
    key = cell @ np.array([1, 1 << 20, 1 << 40])
    _, first, inverse = np.unique(key, return_index=True, return_inverse=True)
    merged = first[inverse.ravel()][faces]
    a, b, c = merged.T
    kept = (a != b) & (b != c) & (a != c)
    return merged[kept], kept


def upload_decimated(model: Any, context: Any, cells: int = FAST_CELLS) -> None:
    """Hand decimated meshes to the GL context; the model, hence physics and ray casts, stays untouched."""
    import mujoco

    for k in np.flatnonzero(model.mesh_facenum >= FAST_MIN_FACES):
        start, count = int(model.mesh_faceadr[k]), int(model.mesh_facenum[k])
        vert = slice(int(model.mesh_vertadr[k]), int(model.mesh_vertadr[k] + model.mesh_vertnum[k]))
        arrays = [
            a[start : start + count]
            for a in (model.mesh_face, model.mesh_facenormal, model.mesh_facetexcoord)
        ]
        before = [a.copy() for a in arrays]
        merged, kept = decimated_mesh(model.mesh_vert[vert], before[0], cells)
        for array, old in zip(arrays, [None, *before[1:]], strict=True):
            array[: len(merged)] = merged if old is None else old[kept]
        model.mesh_facenum[k] = len(merged)
        mujoco.mjr_uploadMesh(model, context, int(k))
        model.mesh_facenum[k] = count
        for array, old in zip(arrays, before, strict=True):
            array[:] = old


def out_of_sight(model: Any, data: Any, camera: int, margin: float = 0.01) -> np.ndarray:
    """Return the numbers of the meshes whose boxes lie beside or behind a fixed camera's square view.

    Leaving them out changes no pixel where nothing is reflected and no light casts shadows. margin: metres.
    """
    import mujoco

    right, up, back = data.cam_xmat[camera].reshape(3, 3).T
    half = np.tan(np.deg2rad(model.cam_fovy[camera]) / 2)
    inward = np.stack([side - half * back for side in (right, -right, up, -up)] + [-back])  # (5, 3)
    inward /= np.linalg.norm(inward, axis=1, keepdims=True)
    axes = data.geom_xmat.reshape(-1, 3, 3)  # of all G shapes
    centres = data.geom_xpos + (axes @ model.geom_aabb[:, :3, None])[..., 0]  # (G, 3)
    reach = np.abs(inward @ axes) @ model.geom_aabb[:, 3:, None]  # (G, 5, 1), of the box towards each plane
    beyond = (centres - data.cam_xpos[camera]) @ inward.T < -reach[..., 0] - margin
    return np.flatnonzero(beyond.any(1) & (model.geom_type == mujoco.mjtGeom.mjGEOM_MESH))
