"""buildah without a daemon, and a container as strict as a cluster's: read-only, any user."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
# Everything is read-only but the named folders and /tmp, as enroot and Apptainer have it.
_ENTER = """
set -e
root=$1 user=$2 folder=$3; shift 3
mount --bind "$root" "$root"
while [ "$1" != -- ]; do
  mount --bind "$1" "$root$2"
  [ "$3" = rw ] || mount -o remount,bind,ro "$root$2"
  shift 3
done
shift
mount -t tmpfs -o mode=1777 tmpfs "$root/tmp"
mount -t proc proc "$root/proc"
mount --rbind /dev "$root/dev"
mount -o remount,bind,ro "$root"
exec chroot --userspec="$user" --groups= "$root" env --chdir "$folder" -i "$@"
"""


@dataclass(frozen=True)
class Result:
    code: int
    output: str


@dataclass(frozen=True)
class Engine:
    """buildah with a storage folder of its own."""

    storage: Path
    driver: str

    def __call__(self, *words: str, check: bool = True) -> Result:
        places = ["--root", str(self.storage / "root"), "--runroot", str(self.storage / "run")]
        command = ["buildah", *places, "--storage-driver", self.driver, *words]
        isolation = {**os.environ, "BUILDAH_ISOLATION": "chroot"}
        result = _run(command, isolation)
        assert not check or result.code == 0, f"{' '.join(words)}:\n{result.output[-6000:]}"
        return result

    def build(self, base: str, tag: str, *options: str, check: bool = True) -> Result:
        """The repository's Dockerfile on `base`; one layer, since each copy of it takes time."""
        fixed = ["--network", "host", "--layers=false", "--build-arg", f"BASE_IMAGE={base}"]
        return self("bud", *fixed, *options, "--tag", tag, str(ROOT), check=check)

    def config(self, image: str) -> dict[str, Any]:
        """The image's configuration as a runtime reads it."""
        whole = json.loads(self("inspect", "--type", "image", image).output)
        return whole["OCIv1"]["config"]  # type: ignore[no-any-return]

    @contextlib.contextmanager
    def files(self, image: str) -> Iterator[Path]:
        """The file system of a container of `image`; what is changed in it is lost."""
        container = self("from", "--pull-never", image).output.split()[-1]
        try:
            yield Path(self("mount", container).output.split()[-1])
        finally:
            self("umount", container)
            self("rm", container)

    def run(
        self,
        image: str,
        command: list[str],
        user: str,
        volumes: list[tuple[Path, str, str]],
        **variables: str,
    ) -> Result:
        """`command` in a read-only container of `image`, with the image's environment."""
        config = self.config(image)
        environment = [*config["Env"], *(f"{key}={value}" for key, value in variables.items())]
        mounts = [word for volume in volumes for word in map(str, volume)]
        with self.files(image) as root:
            words = [str(root), user, config["WorkingDir"], *mounts, "--", *environment, *command]
            result = _run(["unshare", "--mount", "sh", "-c", _ENTER, "sh", *words])
        print(result.output)
        return result


@contextlib.contextmanager
def engine(storage: Path) -> Iterator[Engine]:
    """An engine whose images are removed at the end.

    The overlay driver where the kernel lets us mount it: vfs copies the whole image per step.
    """
    overlay, vfs = Engine(storage, "overlay"), Engine(storage, "vfs")
    chosen = overlay if _works(overlay) else vfs
    try:
        yield chosen
    finally:
        # Removing image by image would take half a minute; a killed build may leave mounts.
        for mount in reversed(Path("/proc/self/mounts").read_text().splitlines()):
            if mount.split()[1].startswith(f"{storage}/"):
                subprocess.run(["umount", mount.split()[1]], check=True)
        shutil.rmtree(storage, ignore_errors=True)


def _works(candidate: Engine) -> bool:
    container = candidate("from", "scratch", check=False)
    if container.code != 0:
        return False
    name = container.output.split()[-1]
    mounted = candidate("mount", name, check=False).code == 0
    candidate("rm", name, check=False)
    return mounted


def _run(command: list[str], environment: dict[str, str] | None = None) -> Result:
    """A command and all it starts: a build that is given up must not go on in its chroot."""
    process = subprocess.Popen(
        command,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        output, _ = process.communicate()
    except BaseException:
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        raise
    return Result(process.returncode, output)
