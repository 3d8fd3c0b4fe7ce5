"""The README tells the truth about the tree, and its commands exist."""

import os
import re
import shlex
from pathlib import Path

from moa_megatron import recipes

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_every_module_stands_in_the_tree_and_every_name_exists() -> None:
    tree = README.split("## Files")[1].split("```")[1]
    named = set(re.findall(r"[\w/]+\.py", tree.split("launch/ ")[0]))
    modules = {path.name for path in (ROOT / "moa_megatron").glob("*.py")} - {"__init__.py"}
    assert named == modules
    for script in re.findall(r"\w+\.(?:sh|sbatch|py)", tree.split("launch/ ")[1].splitlines()[0]):
        assert (ROOT / "launch" / script).is_file(), script
    tools = {path.stem for path in (ROOT / "tools").glob("*.py")}
    assert tools == set(re.search(r"tools/\s+(.+)", tree).group(1).split())  # type: ignore[union-attr]
    for folder in re.findall(r"^(\w+)/ ", tree, flags=re.MULTILINE):
        assert (ROOT / folder).is_dir(), folder


def test_commands_name_existing_files_recipes_and_targets() -> None:
    makefile = (ROOT / "Makefile").read_text()
    for block in re.findall(r"```bash\n(.*?)```", README, flags=re.DOTALL):
        for line in block.replace("\\\n", " ").splitlines():
            words = [w for w in shlex.split(line, comments=True) if not re.match(r"[A-Z_]+=", w)]
            if not words:
                continue
            if words[0] == "make":
                assert f"\n{words[1]}:" in makefile, line
            elif words[0] == "./launch/local.sh":
                assert words[1] in recipes.available(), line
            elif words[0].startswith("./"):
                assert os.access(ROOT / words[0], os.X_OK), line
            else:
                assert (ROOT / words[1]).is_file(), line


def test_readme_is_short_and_says_first_what_this_is() -> None:
    lines = README.splitlines()
    assert len(lines) <= 150
    assert "Mixture of Activations" in "\n".join(lines[:10])
    assert "./launch/local.sh tiny-moe" in "\n".join(lines[:12])


def test_recipes_of_the_readme_ship() -> None:
    listed = re.search(r"`launch/recipes`: ([^)]+)\)", README)
    assert listed is not None
    assert {name.strip() for name in listed.group(1).split(",")} == set(recipes.available())
