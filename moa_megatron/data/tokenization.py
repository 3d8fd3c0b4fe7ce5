"""Byte-level BPE tokenizers: trained, and written for Megatron."""

import json
import logging
import os
import uuid
from collections.abc import Iterable, Iterator
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

logger = logging.getLogger(__name__)

END_OF_DOCUMENT = "<|endoftext|>"
# Megatron pads samples with the pad token and masks its loss: without one it crashes on a padded
# sample, and with the end of document in its place it warns at every start (megatron_dataset.py).
PADDING = "<|pad|>"
MIN_VOCAB_SIZE = 256 + 2  # every byte, and the two special tokens


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
