"""Byte-level BPE tokenizers: trained, written for Megatron, and encoding any text exactly."""

import json
import logging
import os
import re
import uuid
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

logger = logging.getLogger(__name__)

END_OF_DOCUMENT = "<|endoftext|>"
# Megatron pads samples with the pad token and masks its loss: without one it crashes on a padded
# sample, and with the end of document in its place it warns at every start (megatron_dataset.py).
PADDING = "<|pad|>"
MIN_VOCAB_SIZE = 256 + 2  # every byte, and the two special tokens

_PIECE_CHARS = 1 << 20
# A byte-level pre-token never spans these positions: a new one starts at a single space or newline
# between two visible characters. \S is narrower here than in the tokenizer's regex, so it is safe.
_CUT = re.compile(r"(?<=\S)(?=[ \n]\S)")


def write_text(path: Path, text: str) -> None:
    """Write a small file so that readers see the old one or the new one, never a part."""
    partial = path.with_name(f"{path.name}.{uuid.uuid4().hex[:8]}.partial")
    try:
        partial.write_text(text, encoding="utf-8")
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def train_tokenizer(texts: Iterable[str], vocab_size: int, out_dir: Path) -> int:
    """Train a byte-level BPE and write it where `--tokenizer-model OUT_DIR` finds it, offline.

    The same texts in the same order give the same bytes, whatever the number of threads.

    Returns:
        The vocabulary's size, special tokens included: `vocab_size`, or fewer for little text.

    Raises:
        ValueError: `vocab_size` cannot hold all bytes, or there is no text.
    """
    if vocab_size < MIN_VOCAB_SIZE:
        raise ValueError(
            f"vocab_size={vocab_size}: must be at least {MIN_VOCAB_SIZE}, "
            "for 256 bytes and 2 special tokens"
        )
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_DOCUMENT, PADDING],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    num_texts = 0

    def counted() -> Iterator[str]:
        nonlocal num_texts
        for text in texts:
            num_texts += 1
            yield text

    tokenizer.train_from_iterator(counted(), trainer)
    if not num_texts:
        raise ValueError("documents: none to train a tokenizer on; check the input paths and key")
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": END_OF_DOCUMENT,
        "pad_token": PADDING,
        "clean_up_tokenization_spaces": False,
    }
    out_dir.mkdir(parents=True, exist_ok=True)
    write_text(out_dir / "tokenizer.json", tokenizer.to_str(pretty=True))
    write_text(out_dir / "tokenizer_config.json", json.dumps(config, indent=2) + "\n")
    actual: int = tokenizer.get_vocab_size()
    if actual < vocab_size:
        logger.warning(
            "vocab_size=%d asked for, %d found: the text has no more pairs to merge",
            vocab_size, actual,
        )  # fmt: skip
    return actual


class TextEncoder:
    """A Hugging Face tokenizer folder, encoding as Megatron's HuggingFaceTokenizer does.

    One difference, on purpose: a document that spells out a special token's name gets ordinary
    tokens for it, so that no text can end a document.

    Raises:
        ValueError: the folder has no loadable `tokenizer.json`, or names no end-of-document token.
    """

    def __init__(self, tokenizer_dir: Path, append_eod: bool = True) -> None:
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
        self._may_cut = self._cuts_are_exact()

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
        """Ids of one document, with the end of document where asked for.

        Large texts are encoded in pieces where that is exact: the encoder itself takes about 180
        bytes of memory a character (tokenizers 0.23, measured on 50 MB of source).
        """
        pieces = _pieces(text) if self._may_cut else [text]
        # The batch call releases the GIL and skips the offsets; encode() does neither.
        ids = [self._tokenizer.encode_batch_fast([piece])[0].ids for piece in pieces]
        if self.eod is not None and not (ids[-1] and ids[-1][-1] == self.eod):
            ids.append([self.eod])
        array = np.concatenate([np.array(part, dtype=np.int64) for part in ids])
        if array.size and array.max() >= self.vocab_size:
            raise ValueError(
                f"tokenizer: gives id {array.max()} with a vocabulary of {self.vocab_size}; "
                "its ids have gaps, and a model of that vocabulary cannot embed them"
            )
        return array


def _pieces(text: str) -> list[str]:
    pieces, start = [], 0
    while len(text) - start > _PIECE_CHARS and (
        cut := _CUT.search(text, start + _PIECE_CHARS)
    ):  # fmt: skip
        pieces.append(text[start : cut.start()])
        start = cut.start()
    return [*pieces, text[start:]]
