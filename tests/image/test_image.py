"""The Dockerfile on a base that stands in for NVIDIA's: what is built, refused, and what runs."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest

from tests.e2e.runs import SMALL_MOE
from tests.image import standin
from tests.image.conftest import ARGUMENTS, BASE, IMAGE
from tests.image.engine import Engine, Result

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1000)]
Volume = tuple[Path, str, str]


def test_the_base_keeps_its_own_and_gets_what_it_lacks(tool: Engine, built: Result) -> None:
    with tool.files(BASE) as before, tool.files(IMAGE) as after:
        for name in ("torch", "triton", "transformer_engine", "apex"):
            file = Path(standin.SITE, name, "__init__.py")
            assert (after / file).read_bytes() == (before / file).read_bytes(), name
        site = after / standin.SITE
        installed = {path.name.split(".dist-info")[0] for path in site.glob("*.dist-info")}
        brought = {
            name.split("-")[0] for name in installed if re.match("nvidia|cuda|pytorch", name)
        }
        codecs = {
            f"nvidia_{name}_cu13" for name in ("nvimgcodec", "nvtiff", "nvjpeg2k", "libnvcomp")
        }
        assert brought == {"nvidia_dali_cuda130", *codecs}, "DALI, and nothing of CUDA's toolkit"
        assert f"torch-{standin.TORCH}" in installed
        # the image's constraint holds, unless our requirements forbid it
        assert {"tqdm-4.67.1", "megatron_core-0.19.2"} <= installed
        assert (after / "usr/bin/g++").exists(), "the base had none"
    for text in (
        "megatron-core==0.17.0 is given up: the project needs megatron-core==0.19.2",
        "4 protected distributions of the base are unchanged",
        "modules of moa_megatron import, from /opt/moa-megatron",
    ):
        assert text in built.output, text


@pytest.mark.usefixtures("built")
def test_labels_user_and_build_info(tool: Engine) -> None:
    config = tool.config(IMAGE)
    assert config["User"] == "1000:1000" and config["WorkingDir"] == "/opt/moa-megatron"
    assert not config.get("Entrypoint") and config["Cmd"] == ["bash"]
    labels = {key.rsplit("image.", 1)[-1]: value for key, value in config["Labels"].items()}
    expected = {
        "version": ARGUMENTS["VERSION"],
        "revision": ARGUMENTS["REVISION"],
        "created": ARGUMENTS["BUILD_DATE"],
        "source": ARGUMENTS["SOURCE"],
        "base.name": BASE,
        "base.digest": ARGUMENTS["BASE_DIGEST"],
        "licenses": "Apache-2.0",
    }
    assert expected.items() <= labels.items()
    with tool.files(IMAGE) as root:
        info = json.loads((root / "opt/moa-megatron/BUILD_INFO").read_text())
        users = (root / "etc/passwd").read_text()
        left = [path for name in ("tmp", "root/.cache") for path in (root / name).glob("*")]
    assert info["revision"] == ARGUMENTS["REVISION"] and info["base_image"] == BASE
    assert info["torch_from"] == "base" and info["versions"]["torch"] == standin.TORCH
    assert info["versions"]["megatron-core"] == "0.19.2"
    assert re.search(r"^moa:x:1000:", users, re.MULTILINE) and "ubuntu:" not in users
    assert not left, "downloads stay out of the layer"


@pytest.mark.usefixtures("built")
def test_training_in_a_read_only_image_as_a_user_without_name_or_home(
    tool: Engine, lent: Volume, tmp_path: Path
) -> None:
    tmp_path.chmod(0o777)
    command = ["./launch/local.sh", "tiny-moe", *SMALL_MOE, "--run-dir", "/mnt/run"]
    volumes = [lent, (tmp_path, "/mnt", "rw")]
    result = tool.run(IMAGE, command, "12345:12345", volumes, OMP_NUM_THREADS="1")
    assert result.code == 0 and "finished at step 6 of 6" in result.output
    assert "validation loss" in result.output
    assert "reference" not in result.output, "the kernels are built under /tmp"
    status = json.loads((tmp_path / "run/status.json").read_text())
    assert status["state"] == "finished" and status["checkpoint"].startswith("/mnt/run/")


@pytest.mark.usefixtures("built")
def test_a_masked_autoencoder_trains_with_the_dali_that_was_added(
    tool: Engine, lent: Volume
) -> None:
    short = ["--train-iters", "2", "--eval-interval", "2", "--eval-iters", "1"]
    command = ["./launch/local.sh", "tiny-mae", *short, "--run-dir", "/tmp/run"]
    result = tool.run(IMAGE, command, "12345:12345", [lent], OMP_NUM_THREADS="1")
    assert result.code == 0 and "finished at step 2 of 2" in result.output
    assert "4,000 images" in result.output


@pytest.mark.usefixtures("built")
def test_a_mounted_checkout_wins_and_caches_go_where_they_are_sent(
    tool: Engine, lent: Volume, tmp_path: Path
) -> None:
    checkout, scratch = tmp_path / "checkout", tmp_path / "scratch"
    for name in ("moa_megatron", "patches", "launch"):
        source = Path(__file__).parents[2] / name
        shutil.copytree(source, checkout / name, symlinks=True)
    scratch.mkdir(mode=0o777)
    scratch.chmod(0o777)
    script = (
        "from moa_megatron import host; host.install();"
        "from moa_megatron import arguments, patches; print('code', arguments.__file__);"
        "print('fixes', patches.__file__); print('cache', arguments.default_cache())"
    )
    # the working folder is the image's own copy, as where a launcher is called by its full path
    launch = ["bash", "-c", '. /srv/launch/env.sh && exec python -c "$0"', script]
    volumes = [lent, (checkout, "/srv", "ro"), (scratch, "/mnt", "rw")]
    result = tool.run(
        *(IMAGE, launch, "1000:1000", volumes),
        PYTHONPATH="/srv",
        XDG_CACHE_HOME="/mnt",
    )
    assert result.code == 0
    for line in ("code /srv/", "fixes /srv/moa_megatron/patches", "cache /mnt"):
        assert f"\n{line}" in f"\n{result.output}", line


def test_the_wrong_apex_stops_the_build_and_names_the_cure(tool: Engine, base: str) -> None:
    container = tool("from", "--pull-never", base).output.split()[-1]
    root = Path(tool("mount", container).output.split()[-1])
    shutil.rmtree(root / standin.SITE / "apex")
    toolkit = {"apex/__init__.py": "", "apex/lib/__init__.py": ""}
    standin.put(root, "apex", "0.9.10.dev0", toolkit)
    tool("umount", container)
    tool("commit", "--rm", container, "localhost/standin:wrong-apex")
    result = tool.build("localhost/standin:wrong-apex", "localhost/never:1", check=False)
    assert result.code != 0
    for text in ("not NVIDIA's Apex", "web toolkit", "pip uninstall apex in the base image"):
        assert text in result.output, text
    assert "never" not in tool("images").output
