"""What recipes of images need: DALI, which has to decode one, not only to import."""

from __future__ import annotations

import json
from collections.abc import Iterator

from moa_megatron import packages
from tools.doctor_checks import gpu
from tools.doctor_checks.host import Finding, Host, attempt
from tools.doctor_checks.libraries import names

_LIMIT = 90.0
# How far a pixel may be off: decoders round differently, but do not exchange colours.
_TOLERANCE = 8
_CODE = """
import io, json, numpy
from PIL import Image
from nvidia.dali import Pipeline, fn
colour, file, seen = (200, 100, 50), io.BytesIO(), {}
Image.new("RGB", (32, 32), colour).save(file, "JPEG")
for decoder, device in DECODERS:
    try:
        pipeline = Pipeline(batch_size=1, num_threads=1, device_id=device)
        with pipeline:
            coded = fn.external_source(lambda: [numpy.frombuffer(file.getvalue(), numpy.uint8)])
            pipeline.set_outputs(fn.decoders.image(coded, device=decoder))
        pixels = numpy.asarray(pipeline.run()[0].as_cpu()[0])
        seen[decoder] = int(abs(pixels.astype(int) - colour).max())
    except Exception as error:
        seen[decoder] = str(error).strip().splitlines()[0]
print("\\n" + json.dumps(seen))
"""
_PLACES = {"cpu": "the CPU", "mixed": "the GPU"}


def dali(host: Host) -> Iterator[Finding]:
    """Installed once, in the project's range, and decoding. Only recipes of images need it."""
    found = names(host)
    here = sorted(name for name in found if name.startswith("nvidia-dali-"))
    wanted = host.values.get("moa_model") == "mae"
    level = "error" if wanted else "warning"
    if not here:
        text = "not installed: only recipes of images need it"
        cure = packages.VISION_INSTALL
        yield Finding("error" if wanted else "note", "DALI", text, cure, "none")
        return
    version = found[here[0]]
    if len(here) > 1:
        text = f"{', '.join(here)}: they overwrite each other"
        yield Finding(level, "DALI", text, "pip uninstall all but that of this CUDA")
        return
    problem = packages.dali_version_problem(version)
    if problem is not None:
        text, _, cure = problem.partition(": ")
        yield Finding(level, "DALI", text, cure, version)
    elif not host.imports:
        yield Finding("ok", "DALI", f"{version} (not imported: --quick)", value=version)
    else:
        yield _decodes(version, level, bool(gpu.devices(host)))


def _decodes(version: str, level: str, on_gpu: bool) -> Finding:
    decoders = [("cpu", None), *([("mixed", 0)] if on_gpu else [])]
    probe = attempt(_CODE.replace("DECODERS", repr(decoders)), _LIMIT)
    if not probe.ok:
        cure = f"{packages.VISION_INSTALL}; a newer driver, where it misses a function of CUDA"
        return Finding(
            level, "DALI", f"{version} does not import: {probe.last_line}", cure, version
        )
    seen = json.loads(probe.output.strip().splitlines()[-1])
    wrong = {name: said for name, said in seen.items() if said not in range(_TOLERANCE + 1)}
    if wrong:
        name, said = next(iter(wrong.items()))
        off = f"pixels are off by {said} of 255" if isinstance(said, int) else said
        text = f"{version} decodes no JPEG on {_PLACES[name]}: {off}"
        cure = "a driver for this DALI's CUDA (see GPUs)" if name == "mixed" else "please report it"
        return Finding(level, "DALI", text, cure, version)
    where = " and ".join(_PLACES[name] for name in seen)
    text = f"{version}, decodes JPEG on {where} ({probe.seconds:.0f} s)"
    return Finding("ok", "DALI", text, value=version)


CHECKS = (dali,)
