"""Small corpora, and tools/prepare_data.py as a command on them."""

import json
import os
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
TOOL = ROOT / "tools" / "prepare_data.py"
ENVIRONMENT = {**os.environ, "PYTHONPATH": f"{ROOT}:{os.environ.get('PYTHONPATH', '')}"}


def jsonl(texts: list[str]) -> bytes:
    return "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()


def command(folder: Path, *words: str) -> list[str]:
    return [
        sys.executable, str(TOOL), "a.jsonl", "b.jsonl.gz", "--output", str(folder / "x"),
        "--split-valid", "0.2", "--part-bytes", "60000", "--engine", "tokenizers", *words,
    ]  # fmt: skip


def outputs(folder: Path) -> dict[str, bytes]:
    return {
        path.name: path.read_bytes()
        for path in folder.glob("x*")
        if path.is_file() and path.suffix in (".bin", ".idx", ".json")
    }
