"""Base images that stand in for NVIDIA's: Debian, Python 3.12 and small packages of their names.

The stand-in of torch runs the code that a volume lends at /lent, so that Megatron trains on it,
while the file that the image must not lose is the stand-in's own.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

TORCH = "2.11.0a0+nv26.6"
TORCH_NEEDS = ("filelock", "typing-extensions", "sympy", "networkx", "jinja2", "fsspec")
SITE = "usr/local/lib/python3.12/site-packages"
# What CPython's own modules link against.
LIBRARIES = "ca-certificates,libssl3,libffi8,libsqlite3-0,libbz2-1.0,liblzma5,zlib1g"
CONSTRAINTS = """\
# an absent package, one that contradicts our requirements, and the image's own
tqdm==4.67.1
megatron-core==0.17.0
torch=={torch}
"""
_LENT = """\
# Stands in for the base image's own {name}; the code is lent.
import os
__path__ = [os.path.join("/lent", "{name}")]
__file__ = os.path.join(__path__[0], "__init__.py")
exec(compile(open(__file__).read(), __file__, "exec"))
"""
_NOT_HERE = "raise OSError('libcuda.so.1: cannot open shared object file')\n"
_CERTIFICATES = Path("/etc/ssl/certs/ca-certificates.crt")


def debian(folder: Path) -> None:
    """A minimal Debian with this process's Python 3.12 in /usr/local, and pip."""
    release = ["--variant=minbase", f"--include={LIBRARIES}", "bookworm"]
    _run("debootstrap", *release, str(folder))
    stdlib = Path(sysconfig.get_path("stdlib"))
    left_out = shutil.ignore_patterns(
        "test", "idlelib", "tkinter", "config-3.12*", "site-packages", "__pycache__"
    )
    shutil.copytree(stdlib, folder / "usr/local/lib/python3.12", ignore=left_out)
    (folder / SITE).mkdir()
    for library in Path(sysconfig.get_config_var("LIBDIR")).glob("libpython3.12.so*"):
        shutil.copy(library, folder / "usr/local/lib")
    interpreter = getattr(sys, "_base_executable", sys.executable)
    shutil.copy(os.path.realpath(interpreter), folder / "usr/local/bin/python3.12")
    (folder / "usr/local/bin/python").symlink_to("python3.12")
    if _CERTIFICATES.exists():  # of a proxy, perhaps
        shutil.copy(_CERTIFICATES, folder / str(_CERTIFICATES).lstrip("/"))
    _run("chroot", str(folder), "ldconfig")
    _run("chroot", str(folder), "/usr/local/bin/python", "-m", "ensurepip")
    (folder / "lent").mkdir()
    # As in Ubuntu's images, user 1000 has a name already.
    _run("chroot", str(folder), "useradd", "--create-home", "--uid", "1000", "ubuntu")


def nvidia(folder: Path) -> None:
    """What NVIDIA's image adds: torch, Triton, Transformer Engine, Apex and pip's constraints."""
    lent = {f"{name}/__init__.py": _LENT.format(name=name) for name in ("torch", "torchgen")}
    put(folder, "torch", TORCH, lent, TORCH_NEEDS)
    put(folder, "triton", "3.6.0+nv", {"triton/__init__.py": _LENT.format(name="triton")})
    put(folder, "transformer-engine", "2.17.0+nv", {"transformer_engine/__init__.py": _NOT_HERE})
    apex = {"__init__": _NOT_HERE, "normalization/__init__": "", "multi_tensor_apply/__init__": ""}
    put(folder, "apex", "0.1", {f"apex/{name}.py": text for name, text in apex.items()})
    constraints = folder / "etc/pip/constraint.txt"
    constraints.parent.mkdir(parents=True)
    constraints.write_text(CONSTRAINTS.format(torch=TORCH))


def put(
    folder: Path, name: str, version: str, files: dict[str, str], needs: tuple[str, ...] = ()
) -> None:
    """Installs a made-up distribution."""
    site = folder / SITE
    info = f"{name.replace('-', '_')}-{version}.dist-info"
    metadata = f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n"
    metadata += "".join(f"Requires-Dist: {need}\n" for need in needs)
    everything = {**files, f"{info}/METADATA": metadata, f"{info}/INSTALLER": "stand-in\n"}
    listed = "".join(f"{path},,\n" for path in [*everything, f"{info}/RECORD"])
    for path, text in {**everything, f"{info}/RECORD": listed}.items():
        (site / path).parent.mkdir(parents=True, exist_ok=True)
        (site / path).write_text(text)


def _run(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, f"{' '.join(command)}:\n{done.stdout[-2000:]}{done.stderr[-2000:]}"
