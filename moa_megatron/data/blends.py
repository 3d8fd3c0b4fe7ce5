"""Corpora that belong to one run: their manifests, joined with weights."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from moa_megatron.data.checking import check_prefix
from moa_megatron.data.parts import tokenizer_sha256
from moa_megatron.data.publishing import SPLITS, Published, manifest_path, tokenizer_path, weigh


def blend(prefixes: Sequence[Path], weights: Sequence[float]) -> dict[str, list[str] | None]:
    """Weights and pairs by split, for Megatron's `--per-split-data-args-path`.

    A corpus's weight is shared among its pairs by their tokens.

    Raises:
        ValueError: all that keeps the corpora from being one: missing or damaged files, different
            tokenizers, weights that are not positive, no split.
    """
    problems = [
        f"weight {weight} of {prefix}: must be over 0"
        for prefix, weight in zip(prefixes, weights, strict=True)
        if not 0 < weight < float("inf")
    ]
    corpora: list[tuple[Path, float, dict[str, Any]]] = []
    for prefix, weight in zip(prefixes, weights, strict=True):
        try:
            corpora.append((prefix, weight, _read_manifest(prefix)))
        except ValueError as error:
            problems.append(str(error))
    for prefix, _, state in corpora:
        if state["tokenizer_sha256"] != corpora[0][2]["tokenizer_sha256"]:
            problems.append(
                f"{prefix}: made with another tokenizer ({state['tokenizer_sha256'][:12]}, "
                f"vocabulary {state['vocab_size']}) than {corpora[0][0]} "
                f"({corpora[0][2]['tokenizer_sha256'][:12]}, {corpora[0][2]['vocab_size']})"
            )
        problems += _damaged(prefix, state)
        if "" in state["splits"]:
            problems.append(f"{prefix}: not split; prepare it with --split-valid FRACTION")
    if problems:
        raise ValueError("\n".join(problems))
    lists: dict[str, list[str] | None] = {}
    for split in SPLITS:
        words: list[str] = []
        for prefix, weight, state in corpora:
            found = state["splits"].get(split, [])
            words += weigh(prefix, [Published(**item) for item in found], weight)
        lists[split] = words or None
    return lists


def _read_manifest(prefix: Path) -> dict[str, Any]:
    """Raises ValueError where there is none, or another program's."""
    path = manifest_path(prefix)
    try:
        state = json.loads(path.read_text(encoding="utf-8"))
        values = [(state["tokenizer_sha256"], str), (state["vocab_size"], int)]
        for item in (Published(**item) for found in state["splits"].values() for item in found):
            values += [(item.prefix, str), (item.documents, int), (item.tokens, int)]
        foreign = [value for value, kind in values if not isinstance(value, kind)]
        if foreign:
            raise ValueError(f"unexpected value {foreign[0]!r}")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{path}: no manifest of tools/prepare_data.py ({error!r}); give what was its --output"
        ) from error
    return state


def tokenizer_of(prefixes: Sequence[Path]) -> Path | None:
    """The tokenizer that made published corpora, where it lies beside one of them."""
    for prefix in prefixes:
        state = json.loads(manifest_path(prefix).read_text(encoding="utf-8"))
        folder = tokenizer_path(prefix)
        if tokenizer_sha256(folder) == state["tokenizer_sha256"]:
            return folder
    return None


def _damaged(prefix: Path, state: dict[str, Any]) -> list[str]:
    problems = []
    for found in state["splits"].values():
        for item in found:
            name = prefix.parent / item["prefix"]
            try:
                if check_prefix(name, state["vocab_size"]) != item["tokens"]:
                    problems.append(f"{name}: another number of tokens than its manifest says")
            except ValueError as error:
                problems.append(str(error))
    return problems
