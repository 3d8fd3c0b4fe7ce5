"""Chooses what pip installs into an image: only what is missing, in the versions of uv.lock.

    plan_packages.py wanted RECORD FOLDER [--extras NAME...] [--loose] [--unpin NAME...]
        writes FOLDER/wanted.txt and FOLDER/constraints.txt for `pip install --dry-run --report`
    plan_packages.py exact RECORD FOLDER
        reads FOLDER/report.json and writes FOLDER/exact.txt for `pip install --no-deps`

RECORD is check_image.py's. What the image has stays as it is, since the image was tested with it;
what its pip constraints say about absent packages holds too. Only a version outside our own
requirements gives way. --loose lets pip choose versions for absent packages where the locked ones
do not go with the image's; --unpin gives up pins by name. --extras are those
of pyproject.toml; "none" is none.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
import tomllib
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

try:
    from packaging.requirements import InvalidRequirement, Requirement
    from packaging.specifiers import SpecifierSet
except ImportError:  # pip, which has to be here anyway, carries a copy
    from pip._vendor.packaging.requirements import InvalidRequirement, Requirement
    from pip._vendor.packaging.specifiers import SpecifierSet

sys.path.insert(0, str(Path(__file__).parent))
from check_image import canonical, only_of_base  # noqa: E402

ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Image:
    """What the image says about packages: installed versions and its pip constraints' lines."""

    installed: dict[str, str]
    constraints: dict[str, str]
    has_torch: bool

    def alone_brings(self, name: str) -> bool:
        """Whether ``name`` is the image's or nobody's."""
        return self.has_torch and only_of_base(name, self.installed)


def constrain(
    image: Image, needs: list[Requirement], locked: dict[str, str], unpinned: set[str]
) -> tuple[list[str], list[str]]:
    """Lines of pip constraints, and what the user should know about them."""
    lines, said = [], []
    direct = {canonical(need.name): need.specifier for need in needs}
    for name in sorted({*image.installed, *image.constraints, *locked}):
        if name in image.installed:
            pin, whose = f"{name}=={image.installed[name]}", "the image's"
        elif name in image.constraints:
            pin, whose = image.constraints[name], "the image's constraint"
        else:
            lines.append(f"{name}=={locked[name]}")
            continue
        if image.alone_brings(name):
            lines.append(pin)
            if not _fits(direct.get(name), pin):
                said.append(f"{pin} stays; the project is tested with {direct[name]}")
        elif name in unpinned or not _fits(direct.get(name), pin):
            reason = "as asked" if name in unpinned else f"the project needs {name}{direct[name]}"
            said.append(f"{whose} {pin} is given up: {reason}")
            lines += [f"{name}=={locked[name]}"] if name in locked else []
        else:
            lines.append(pin)
    return lines, said


def exact(
    report: dict[str, Any], image: Image, lock: dict[str, Any]
) -> tuple[list[str], list[str]]:
    """Requirements with hashes for what pip's report would install, and what is kept out.

    Raises:
        ValueError: the index offers other files than uv.lock knows of a locked version.
    """
    lines, kept_out = [], []
    for item in report["install"]:
        name, version = canonical(item["metadata"]["name"]), item["metadata"]["version"]
        if image.alone_brings(name):
            kept_out.append(f"{name} {version}")
            continue
        hashes = _hashes(item)
        known = lock["hashes"].get((name, version))
        if known and hashes and not set(hashes) & known:
            raise ValueError(
                f"{name}=={version}: the index offers {hashes[0]}, which is not in uv.lock: use "
                "the index that uv.lock was made with, or lock again"
            )
        chosen = sorted(known or hashes)
        lines.append(" ".join([f"{name}=={version}", *(f"--hash={digest}" for digest in chosen)]))
    return lines, kept_out


def requirements(project: dict[str, Any], extras: list[str]) -> list[Requirement]:
    """What pyproject.toml's table ``project`` requires, with the extras named.

    Raises:
        ValueError: it has no extra of such a name.
    """
    optional = project["optional-dependencies"]
    unknown = sorted(set(extras) - {"none", *optional})
    if unknown:
        known = ", ".join([*optional, "none"])
        raise ValueError(f"EXTRAS={' '.join(extras)}: no extra is called {unknown[0]}: use {known}")
    texts = [text for name in extras for text in optional.get(name, [])]
    return [Requirement(text) for text in [*project["dependencies"], *texts]]


def read_lock(text: str) -> dict[str, Any]:
    """Versions, and hashes of each version, of the packages in a uv.lock."""
    packages = [p for p in tomllib.loads(text)["package"] if "registry" in p["source"]]
    versions, hashes = {}, {}
    for package in packages:
        files = [*package.get("wheels", []), *filter(None, [package.get("sdist")])]
        versions[package["name"]] = package["version"]
        hashes[package["name"], package["version"]] = {file["hash"] for file in files}
    return {"versions": versions, "hashes": hashes}


def read_constraints(files: str) -> dict[str, str]:
    """Lines by name of the constraint files in PIP_CONSTRAINT; what has no name is left to pip."""
    found = {}
    for file in files.split():
        if not Path(file).is_file():
            raise ValueError(f"PIP_CONSTRAINT={file} is not there: correct or unset it")
        for line in Path(file).read_text().splitlines():
            text = re.sub(r"(^|\s)#.*", "", line).strip()
            try:
                requirement = Requirement(text)
            except InvalidRequirement:
                continue
            if requirement.marker is None or requirement.marker.evaluate():
                found[canonical(requirement.name)] = text.split(";")[0].strip()
    return found


def read_image(record: Path) -> Image:
    """The image as it stands: only versions that the index's rules allow can be pinned."""
    installed = {}
    for distribution in metadata.distributions():
        name = canonical(distribution.metadata["Name"] or "")
        try:
            Requirement(f"{name}=={distribution.version}")
        except InvalidRequirement:
            continue
        installed.setdefault(name, distribution.version)
    own = {"moa-megatron"}
    return Image(
        {name: version for name, version in installed.items() if name not in own},
        read_constraints(os.environ.get("PIP_CONSTRAINT", "")),
        json.loads(record.read_text())["torch_from"] == "base",
    )


def _fits(specifier: SpecifierSet | None, pin: str) -> bool:
    pinned = re.fullmatch(r"[\w.-]+\s*={2,3}\s*([^\s,]+)", pin)
    if specifier is None or pinned is None:  # ranges are left to pip's resolver
        return True
    return specifier.contains(pinned[1], prereleases=True)


def _hashes(item: dict[str, Any]) -> list[str]:
    archive = item["download_info"].get("archive_info", {})
    if "hashes" in archive:
        return [f"{kind}:{digest}" for kind, digest in archive["hashes"].items()]
    return [archive["hash"].replace("=", ":")] if "hash" in archive else []


def _wanted(args: argparse.Namespace, lock: dict[str, Any]) -> None:
    image = read_image(args.record)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    needs = requirements(project, args.extras)
    locked = {} if args.loose else lock["versions"]
    lines, said = constrain(image, needs, locked, {canonical(name) for name in args.unpin})
    for text in said:
        print(f"plan: {text}")
    wanted = [str(need) for need in needs if not image.alone_brings(need.name)]
    (args.folder / "wanted.txt").write_text("\n".join(wanted) + "\n")
    (args.folder / "constraints.txt").write_text("\n".join(lines) + "\n")


def _exact(args: argparse.Namespace, lock: dict[str, Any]) -> None:
    report = json.loads((args.folder / "report.json").read_text())
    lines, kept_out = exact(report, read_image(args.record), lock)
    (args.folder / "exact.txt").write_text("\n".join(lines) + "\n")
    for text in kept_out:
        print(f"plan: {text} is kept out: only the base image brings it")
    names = ", ".join(line.split()[0] for line in lines)
    print(f"plan: {len(lines)} packages to install: {names or 'none'}")


def main() -> None:
    """Reads the command line and uv.lock."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("step", choices=("wanted", "exact"))
    parser.add_argument("record", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--extras", nargs="*", default=[])
    parser.add_argument("--loose", action="store_true")
    parser.add_argument("--unpin", nargs="*", default=[])
    args = parser.parse_args()
    lock = read_lock((ROOT / "uv.lock").read_text())
    try:
        {"wanted": _wanted, "exact": _exact}[args.step](args, lock)
    except ValueError as error:
        print(f"plan: {error}", file=sys.stderr)
        sys.exit(78)


if __name__ == "__main__":
    main()
