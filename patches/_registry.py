"""What a patch is, and how one is put in place, checked and taken away again."""

import hashlib
import importlib
import inspect
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib import metadata
from typing import Any

from packaging.specifiers import SpecifierSet

logger = logging.getLogger(__name__)

MakeReplacement = Callable[[Any], Any]


def _always() -> bool:
    return True


@dataclass(frozen=True, kw_only=True)
class Patch:
    """One upstream defect and its repair.

    Symbols are written `package.module:Class.attribute`. `replace` maps each rebound symbol to a
    function from the original to its replacement. `pins` maps the sources the repair was written
    against to the start of their sha256: what the replacement wraps or relies on as well as what
    it rebinds.
    """

    name: str
    defect: str
    versions: str
    replace: Mapping[str, MakeReplacement]
    pins: Mapping[str, str]
    applicable: Callable[[], bool] = field(default=_always)


_originals: dict[str, dict[str, Any]] = {}
_reported: set[str] = set()


def locate(symbol: str) -> tuple[Any, str]:
    """The object that holds a symbol, and the symbol's last name."""
    module_name, _, path = symbol.partition(":")
    *parents, name = path.split(".")
    owner: Any = importlib.import_module(module_name)
    for parent in parents:
        owner = getattr(owner, parent)
    return owner, name


def source_hash(symbol: str) -> str:
    """Start of the sha256 of a symbol's source, of the original where a patch is in its place."""
    owner, name = locate(symbol)
    found = getattr(owner, name)
    for originals in _originals.values():
        found = originals.get(symbol, found)
    return hashlib.sha256(inspect.getsource(inspect.unwrap(found)).encode()).hexdigest()[:16]


def _obstacle(patch: Patch) -> str | None:
    """Why the patch must not touch this Megatron, if it must not."""
    version = metadata.version("megatron-core")
    if version not in SpecifierSet(patch.versions):
        return f"megatron-core {version} is outside {patch.versions}"
    for symbol, pinned in patch.pins.items():
        try:
            changed = source_hash(symbol) != pinned
        except (AttributeError, ImportError, OSError):
            return f"{symbol} is gone"
        if changed:
            return f"the source of {symbol} has changed"
    return None


def put(patch: Patch) -> bool:
    """Apply one patch; True when it is in place afterwards. Reports each outcome once."""
    if patch.name in _originals:
        return True
    obstacle = _obstacle(patch)
    if obstacle is not None:
        _report(logging.WARNING, patch, f"not applied: {obstacle}. Without it: {patch.defect}")
        return False
    if not patch.applicable():
        return False
    originals: dict[str, Any] = {}
    for symbol, make in patch.replace.items():
        owner, name = locate(symbol)
        originals[symbol] = getattr(owner, name)
        setattr(owner, name, make(originals[symbol]))
    _originals[patch.name] = originals
    _report(logging.INFO, patch, "applied")
    return True


def take(patch: Patch) -> bool:
    """Undo one patch; True when it had been in place."""
    originals = _originals.pop(patch.name, None)
    for symbol, original in (originals or {}).items():
        owner, name = locate(symbol)
        setattr(owner, name, original)
    return originals is not None


def _report(level: int, patch: Patch, outcome: str) -> None:
    if patch.name not in _reported:
        _reported.add(patch.name)
        logger.log(level, "upstream patch %s %s", patch.name, outcome)
