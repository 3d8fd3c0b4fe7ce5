"""Texts to token ids: exactly as Megatron would, as fast as the installed engines can."""

import json
import re
import resource
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer

ENGINES = ("auto", "gigatoken", "tokenizers")
# What engines have been known to get wrong: white space, marks, contractions, digits, emoji.
PROBE = (
    "",
    " leading  and   trailing \t\n\r\n\n ",
    "It's 12345.678 and I'LL've\u2019s\u00a0x\u2003y\u200bz\u3000",
    "Stra\u00dfe \u6f22\u5b57\u304b\u306a \u0627\u0644\u0639 \u0e44\u0e17\u0e22",
    "e\u0301\u0308 \ufeff\ufffd \u2460\u00b2\u2167 \x01\x1c\x85",
    "\U0001f642\U0001f468\u200d\U0001f469\u200d\U0001f467 \U0001f1e9\U0001f1ea",
    "<|endoftext|> <|pad|></s><unk>[PAD]<|im_start|>user",
    "def f(x):\n\treturn {'a': x ** 2}  # __init__\n" * 3,
    "".join(map(chr, range(1, 0x3000))),
)
_CHECKED_EVERY = 2048
_CACHE_BYTES = 256 << 20
_PIECE_CHARS = 1 << 20
# A byte-level pre-token never spans these positions: a new one starts at a single space or newline
# between two visible characters. \S is narrower here than in the tokenizer's regex, so it is safe.
_CUT = re.compile(r"(?<=\S)(?=[ \n]\S)")


class TextEncoder:
    """A Hugging Face tokenizer folder, encoding as Megatron's HuggingFaceTokenizer does.

    One difference, on purpose: a document that spells out a special token's name gets ordinary
    tokens for it, so that no text can end a document.

    `engine` computes the ids: "tokenizers" is the reference, "gigatoken" tens of times faster,
    "auto" takes that where it is installed and agrees on `PROBE`. Every 2,048th document then goes
    through both. `engine` is afterwards the one in use, `reason` why it is not the fast one.

    Raises:
        ValueError: the folder has no loadable `tokenizer.json`, names no end-of-document token, or
            gives that an id which no model of its size has; or gigatoken was asked for and differs.
    """

    def __init__(
        self, tokenizer_dir: Path, append_eod: bool = True, engine: str = "tokenizers"
    ) -> None:
        path = tokenizer_dir / "tokenizer.json"
        try:
            self._tokenizer = Tokenizer.from_str(path.read_text(encoding="utf-8"))
        except Exception as error:  # tokenizers raises bare Exception for a malformed file
            raise ValueError(
                f"tokenizer={tokenizer_dir}: tokenizer.json cannot be loaded ({error}); give a "
                "folder written by transformers' save_pretrained or by --train-tokenizer"
            ) from error
        # A stored truncation would silently cut documents.
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._tokenizer.encode_special_tokens = True
        self.vocab_size: int = self._tokenizer.get_vocab_size()
        self.eod = self._find_eod(tokenizer_dir) if append_eod else None
        if self.eod is not None and self.eod >= self.vocab_size:
            raise ValueError(
                f"tokenizer={tokenizer_dir}: eos_token has id {self.eod} in a vocabulary of "
                f"{self.vocab_size}: its ids have gaps, and a model of that size cannot embed them"
            )
        self._may_cut = self._cuts_are_exact()
        self._fast: FastEngine | None = None
        self._num_encoded = 0
        self.reason = "" if engine == "tokenizers" else self._use_fast(path)
        if engine == "gigatoken" and self._fast is None:
            raise ValueError(f"--engine gigatoken: {self.reason}")

    @property
    def engine(self) -> str:
        return "tokenizers" if self._fast is None else "gigatoken"

    def _use_fast(self, path: Path) -> str:
        try:
            fast = FastEngine(path)
            if any(not np.array_equal(fast.ids(text), self._ids(text)) for text in PROBE):
                return "gigatoken gives other ids than tokenizers for this tokenizer"
        except ImportError:
            return "gigatoken is not installed; pip install gigatoken"
        except Exception as error:  # Rust's panics and unsupported tokenizers, of any class
            return f"gigatoken cannot run this tokenizer: {error}"
        self._fast = fast
        return ""

    def _find_eod(self, tokenizer_dir: Path) -> int:
        """The id of `eos_token`, which Megatron takes for the end of a document."""
        for name in ("tokenizer_config.json", "special_tokens_map.json"):
            path = tokenizer_dir / name
            if not path.is_file():
                continue
            token = json.loads(path.read_text(encoding="utf-8")).get("eos_token")
            if isinstance(token, dict):
                token = token.get("content")
            if token is not None:
                eod: int | None = self._tokenizer.token_to_id(token)
                if eod is None:
                    raise ValueError(f"tokenizer={tokenizer_dir}: eos_token {token!r} has no id")
                return eod
        raise ValueError(
            f"tokenizer={tokenizer_dir}: no eos_token in tokenizer_config.json to end documents "
            "with; add one, or pass --no-append-eod"
        )

    def _cuts_are_exact(self) -> bool:
        """Whether `_CUT` never changes the ids: true for the tokenizers trained here."""
        state = json.loads(self._tokenizer.to_str())
        splitter = state["pre_tokenizer"] or {}
        return (
            state["normalizer"] is None
            and state["post_processor"] is None
            and splitter.get("type") == "ByteLevel"
            and splitter.get("use_regex") is True
            and not splitter.get("add_prefix_space")
            and all(token["special"] for token in state["added_tokens"])
        )

    def encode(self, text: str) -> np.ndarray:
        """Ids of one document, int64, with the end of document where asked for."""
        return self.encode_all([text])[0].astype(np.int64)

    def encode_all(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """The ids of all documents, one after the other, and each one's length as int32.

        Raises:
            ValueError: an id beyond the vocabulary, or engines that disagree.
        """
        end = np.array([self.eod or 0], dtype=np.uint32)
        parts, lengths = [], []
        for text in texts:
            ids = self._fast_ids(text) if self._fast else self._ids(text)
            parts.append(ids)
            length = len(ids)
            if self.eod is not None and not (length and ids[-1] == self.eod):
                parts.append(end)
                length += 1
            lengths.append(length)
        if self._fast:
            self._fast.forget_if_large()
        array = np.concatenate(parts)
        if array.size and array.max() >= self.vocab_size:
            raise ValueError(
                f"tokenizer: gives id {array.max()} with a vocabulary of {self.vocab_size}; "
                "its ids have gaps, and a model of that vocabulary cannot embed them"
            )
        return array, np.array(lengths, dtype="<i4")

    def _ids(self, text: str) -> np.ndarray:
        """Ids without the end of document.

        Large texts are encoded in pieces where that is exact: the encoder itself takes about 180
        bytes of memory a character (tokenizers 0.23, measured on 50 MB of source).
        """
        pieces = _pieces(text) if self._may_cut else [text]
        # The batch call releases the GIL and skips the offsets; encode() does neither.
        ids = [self._tokenizer.encode_batch_fast([piece])[0].ids for piece in pieces]
        return np.concatenate([np.array(part, dtype=np.uint32) for part in ids])

    def _fast_ids(self, text: str) -> np.ndarray:
        assert self._fast is not None
        ids = self._fast.ids(text)
        if self._num_encoded % _CHECKED_EVERY == 0 and not np.array_equal(ids, self._ids(text)):
            raise ValueError(
                f"gigatoken and tokenizers disagree on the text that starts {text[:60]!r}; "
                "prepare with --engine tokenizers, and with --overwrite what is there"
            )
        self._num_encoded += 1
        return ids


class FastEngine:
    """gigatoken, with special tokens' names as ordinary text, and with bounded memory."""

    def __init__(self, path: Path) -> None:
        state = json.loads(path.read_text(encoding="utf-8"))
        state["added_tokens"] = [t for t in state["added_tokens"] if not t["special"]]
        self._state = json.dumps(state)
        self._load()

    def _load(self) -> None:
        from gigatoken import Tokenizer as Gigatoken  # type: ignore[import-not-found]

        self._tokenizer: Any = Gigatoken.from_json(self._state)
        self._size = _resident_bytes()

    def ids(self, text: str) -> np.ndarray:
        ids: np.ndarray = self._tokenizer.encode(text)
        return ids

    def forget_if_large(self) -> None:
        """Start anew once the cache of words, which gigatoken never trims, has grown too large."""
        if _resident_bytes() - self._size > _CACHE_BYTES:
            self._load()


def _resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def _pieces(text: str) -> list[str]:
    pieces, start = [], 0
    while len(text) - start > _PIECE_CHARS and (
        cut := _CUT.search(text, start + _PIECE_CHARS)
    ):  # fmt: skip
        pieces.append(text[start : cut.start()])
        start = cut.start()
    return [*pieces, text[start:]]
