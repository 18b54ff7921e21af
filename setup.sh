#!/usr/bin/env bash
# Makes the virtual environment and installs the pins of pyproject.toml; a second call finds all done.
#
#     bash setup.sh              # makes .venv beside this script
#     source setup.sh            # the same; then `python` is the environment's (bash)
#     VENV=/some/where PYTHON=python3.12 bash setup.sh
#
# Has the python3 that makes the environment a torch (ROCm, CUDA)? Then the environment sees it, and it is never
# replaced. Otherwise torch is installed first, alone: in one call with the rest pip may choose another build.
# The stamp is written last, so an install that was interrupted goes on at the next call.

if [ "${BASH_SOURCE[0]}" != "$0" ]; then  # sourced: work in a child, so that this shell's options stay as they are
    bash "${BASH_SOURCE[0]}" || return 1
    VIRTUAL_ENV=$(cd "${VENV:-$(dirname "${BASH_SOURCE[0]}")/.venv}" && pwd) || return 1
    export VIRTUAL_ENV
    case $PATH in "$VIRTUAL_ENV/bin:"*) ;; *) export PATH="$VIRTUAL_ENV/bin:$PATH" ;; esac
    unset PYTHONHOME
    hash -r
    return 0
fi

set -euo pipefail
say() { echo "setup: $*"; }
die() { echo "setup: $*" >&2; exit 1; }

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
venv=${VENV:-$here/.venv}
maker=${PYTHON:-python3}
pins=$here/pyproject.toml
py=$venv/bin/python
stamp=$venv/.stamp
wanted=$(cat "$pins" "${BASH_SOURCE[0]}" | cksum)

check_gl() {  # MuJoCo draws through EGL, or through OSMesa; training needs neither, so it is a warning
    "$py" - <<'PY' || say "warning: no OpenGL for rendering; apt-get install libegl1 libegl-mesa0 libgl1" \
        "libgl1-mesa-dri libopengl0 (or libosmesa6)" >&2
import ctypes
import sys

def loads(*names):
    for name in names:
        try:
            return ctypes.CDLL(name)
        except OSError:
            pass

egl = loads("libEGL.so.1") and loads("libOpenGL.so.0", "libGL.so.1")
sys.exit(not (egl or loads("libOSMesa.so.8", "libOSMesa.so.6", "libOSMesa.so") or sys.platform == "darwin"))
PY
}

if [ -x "$py" ] && [ "$(cat "$stamp" 2>/dev/null)" = "$wanted" ]; then
    check_gl
    exit 0
fi

# ---- the environment
if [ -d "$venv" ] && [ ! -e "$venv/pyvenv.cfg" ] && [ ! -e "$venv/.lock" ] && [ -n "$(ls -A "$venv")" ]; then
    die "$venv is there and is no virtual environment; set VENV to another path"
fi
"$maker" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null ||
    die "needs Python >= 3.11, $maker is $("$maker" --version 2>&1 | tail -1); name another: PYTHON=python3.12 bash setup.sh"
mkdir -p "$venv"
if command -v flock >/dev/null; then  # two calls at once: the second waits, then finds it done
    exec 9>"$venv/.lock"
    flock 9
    [ "$(cat "$stamp" 2>/dev/null)" != "$wanted" ] || exit 0
fi
rm -f "$stamp"
if ! "$py" -m pip --version >/dev/null 2>&1; then
    say "making $venv with $("$maker" --version)"
    own_torch=$("$maker" -c 'import os, torch; print(os.path.dirname(os.path.dirname(torch.__file__)))' 2>/dev/null) ||
        own_torch=
    "$maker" -m venv ${own_torch:+--system-site-packages} "$venv" >"$venv/venv.log" 2>&1 ||
        die "$maker -m venv failed ($venv/venv.log says why); on Debian: apt-get install python3-venv"
    if [ -n "$own_torch" ] && ! "$py" -c 'import torch' 2>/dev/null; then
        # The maker lives in an environment of its own, which --system-site-packages does not reach.
        echo "$own_torch" >"$("$py" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/maker.pth"
    fi
fi

# ---- the packages
requirements() {  # requirements torch | requirements rest
    "$py" - "$pins" "$1" <<'PY'
import re
import sys
import tomllib

with open(sys.argv[1], "rb") as file:
    project = tomllib.load(file)
for pin in project["project"]["dependencies"] + project["dependency-groups"]["dev"]:
    if (re.split("[^A-Za-z0-9_-]", pin)[0] == "torch") == (sys.argv[2] == "torch"):
        print(pin)
PY
}
torch_version() {  # torch_version inside | outside: its version, if torch is there
    "$py" -W ignore - "$1" <<'PY'
import importlib.util
import pathlib
import sys

spec = importlib.util.find_spec("torch")
inside = spec and pathlib.Path(sys.prefix).resolve() in pathlib.Path(spec.origin or "/").resolve().parents
if spec and inside == (sys.argv[1] == "inside"):
    import torch

    print(torch.__version__)
PY
}
install() { xargs "$py" -m pip install -qq "$@" || die "pip failed, see above; the next call goes on from here"; }

# pip writes INSTALLER after a package's files: a package without it is one that an interrupt cut in half,
# and pip would take it for installed.
for info in "$venv"/lib/python*/site-packages/*.dist-info; do
    [ -e "$info/INSTALLER" ] || rm -rf "$info"
done

kept=$(torch_version outside)
if [ -n "$kept" ]; then
    say "torch $kept of $maker is kept"
else
    say "installing $(requirements torch)"
    requirements torch | install
fi
torch=${kept:-$(torch_version inside)}
echo "torch==$torch" >"$venv/torch.txt"
say "installing $(requirements rest | wc -l | tr -d ' ') packages after $SECONDS s"
requirements rest | install --constraint "$venv/torch.txt"
check_gl
echo "$wanted" >"$stamp"
say "done in $SECONDS s; source setup.sh, or source $venv/bin/activate"
