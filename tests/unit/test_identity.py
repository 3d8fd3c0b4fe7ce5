"""The identity of a run's data: what changes it, and that it stands for the order of samples."""

import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from moa_megatron import identity
from moa_megatron.data.token_files import pair
from tests.helpers import isolated


def write(prefix: Path, documents: int = 40, first: int = 0) -> Path:
    """A pair with documents of 3 to 30 tokens."""
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    bin_path, idx_path = pair(prefix)
    builder = IndexedDatasetBuilder(str(bin_path), np.uint16)
    generator = np.random.default_rng(first)
    for _ in range(documents):
        tokens = generator.integers(0, 100, generator.integers(3, 30))
        builder.add_document(tokens, [len(tokens)])
    builder.finalize(str(idx_path))
    return prefix


def arguments(**values: Any) -> Any:
    common: dict[str, Any] = {
        "seq_length": 16, "seed": 1, "split": None, "mock_data": False, "train_samples": None,
        "train_iters": 5, "global_batch_size": 4, "mid_level_dataset_surplus": 0.005,
        "tokenizer_type": "NullTokenizer", "tokenizer_model": None, "vocab_size": 100,
        "data_path": None, "data_args_path": None, "per_split_data_args_path": None,
        "train_data_path": None, "valid_data_path": None, "test_data_path": None,
        "vocab_file": None, "merge_file": None, "dataloader_type": "single", "skip_train": False,
        "data_parallel_size": 1, "finetune": False, "accept_data_change": False, "load": "runs/old",
    }  # fmt: skip
    return SimpleNamespace(**{**common, **values})


def check_real_arguments_are_described() -> None:
    from moa_megatron import host

    host.install()  # before any other check imports Megatron
    from moa_megatron import launch, patches, recipes

    patches.apply()
    argv = ["tiny-moe", "--run-dir", "runs/never-made", "--moa-corpus", "stdlib"]
    args = launch.prepare(recipes.parse_command_line(argv), host.HOST_ARGS).args
    found = args.moa_data_identity
    assert found["passes over the training data"] == ["1"] and len(found["validation data"]) == 1
    assert found["tokenizer"].startswith("HuggingFaceTokenizer ") and found["seed"] == 1234


def check_content_counts_and_not_the_path() -> None:
    import tempfile

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        a, same, other = write(folder / "a"), folder / "moved.v2", write(folder / "c", first=1)
        for old, new in zip(pair(a), pair(same)):
            shutil.copy(old, new)
        assert identity.digest(a) == identity.digest(same) != identity.digest(other)
        one = identity.describe(arguments(train_data_path=[str(a)]))
        assert one == identity.describe(arguments(train_data_path=[str(same)]))
        two = identity.describe(arguments(train_data_path=["1", str(a), "3", str(other)]))
        again = identity.describe(arguments(train_data_path=["2", str(a), "6", str(other)]))
        assert two == again, "weights count by their ratio"
        swapped = identity.describe(arguments(train_data_path=["3", str(a), "1", str(other)]))
        assert [d.split(":")[0] for d in identity.differences(two, swapped)] == ["training data"]
        changed = arguments(
            train_data_path=[str(other)], seed=2, seq_length=8, tokenizer_type="GPT2"
        )
        found = identity.differences(one, identity.describe(changed))
        assert [d.split(":")[0] for d in found] == [
            "sequence length", "seed", "tokenizer", "training data"
        ]  # fmt: skip
        assert "sequence length: checkpoint 16, this run 8" in found
        part = identity.describe(arguments(data_path=[str(a)], split="90,10,0"))
        whole = identity.describe(arguments(data_path=[str(a)], split="100,0,0"))
        assert "split" in identity.differences(part, whole)[0]
        assert part == identity.describe(arguments(data_path=[str(a)], split="9,1"))
        cyclic = arguments(train_data_path=[str(a)], dataloader_type="cyclic", data_parallel_size=2)
        assert identity.differences(one, identity.describe(cyclic)) == [
            "order: checkpoint single, this run cyclic",
            "data parallel size: checkpoint none, this run 2",
        ]
        weighted = arguments(data_path=["1", str(a)], split="1", mid_level_dataset_surplus=4.0)
        (found,) = identity.describe(weighted)["passes over the training data"]
        assert found != "1", "a single weighted corpus is a blend, built with a surplus"
        # 40 documents of 16 tokens: about 40 samples. 4 times that is more than one pass.
        long = identity.describe(arguments(train_data_path=[str(a)], train_iters=40))
        (longer,) = identity.differences(one, long)
        assert longer.startswith("passes over the training data: checkpoint [1], this run [")


def check_tokenizers_count_by_content() -> None:
    import tempfile

    with tempfile.TemporaryDirectory() as name:
        folders = [Path(name, part) for part in ("a", "b", "c")]
        for folder, words in zip(folders, ("one", "one", "two")):
            folder.mkdir()
            (folder / "merges.txt").write_text(words)
        a, b, c = (
            identity.describe(arguments(mock_data=True, tokenizer_model=str(folder)))["tokenizer"]
            for folder in folders
        )
        assert a == b != c
        files = [str(folder / "merges.txt") for folder in folders]
        x, y = (
            identity.describe(arguments(mock_data=True, vocab_file=files[0], merge_file=merges))
            for merges in (files[1], files[2])
        )
        assert identity.differences(x, y)


def check_equal_passes_mean_an_equal_beginning() -> None:
    """Held against Megatron's own data set, for every length of a run up to four passes."""
    import tempfile

    from megatron.core.datasets.blended_megatron_dataset_builder import (
        BlendedMegatronDatasetBuilder,
    )
    from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
    from megatron.core.tokenizers.text.libraries.null_tokenizer import NullTokenizer

    with tempfile.TemporaryDirectory() as name:
        prefix = write(Path(name, "a"), documents=12)
        tokens = identity._training_tokens(prefix, None)
        config = GPTDatasetConfig(
            random_seed=1, sequence_length=16, reset_position_ids=False, eod_mask_loss=False,
            reset_attention_mask=False, blend_per_split=[([str(prefix)], None), None, None],
            tokenizer=NullTokenizer(100), create_attention_mask=False,
        )  # fmt: skip
        orders: dict[str, list[bytes]] = {}
        for samples in range(2, 4 * tokens // 16):
            sizes = [samples, 0, 0]
            built = BlendedMegatronDatasetBuilder(GPTDataset, sizes, lambda: True, config).build()
            order = [built[0][i]["tokens"].numpy().tobytes() for i in range(samples)]
            kind = identity.passes(tokens, samples, 16)
            before = orders.setdefault(kind, order)
            assert order[: len(before)] == before[: len(order)], (samples, kind)
            orders[kind] = order
        kinds = list(orders)
        assert len(kinds) >= 5, kinds
        for first, second in zip(kinds, kinds[1:]):
            shorter = orders[first]
            assert orders[second][: len(shorter)] != shorter, (first, second)


CHECKS = [name for name in globals() if name.startswith("check_")]


@pytest.fixture(scope="module")
def failures() -> dict[str, str]:
    return isolated.outcomes(__file__, CHECKS)


@pytest.mark.parametrize("name", CHECKS)
def test_identity(failures: dict[str, str], name: str) -> None:
    assert not failures[name], failures[name]


def saved(**values: Any) -> Any:
    return SimpleNamespace(**{identity.NAME: {"seed": 1, **values}})


def test_a_change_is_refused_with_all_that_differs() -> None:
    args = arguments(moa_data_identity={"seed": 2, "split": "9,1"})
    (problem,) = identity.problems(args, saved())
    assert "runs/old" in problem and "--accept-data-change" in problem
    assert "seed: checkpoint 1, this run 2; split: checkpoint none, this run 9,1" in problem


def test_what_may_change() -> None:
    args = arguments(moa_data_identity={"seed": 2})
    assert not identity.problems(args, SimpleNamespace()), "a checkpoint of plain Megatron"
    assert not identity.problems(args, saved(seed=2))
    for free in ("finetune", "skip_train"):
        args = arguments(moa_data_identity={"seed": 2}, **{free: True})
        assert not identity.problems(args, saved()), free


def test_other_validation_data_is_only_mentioned(caplog: pytest.LogCaptureFixture) -> None:
    args = arguments(moa_data_identity={"seed": 1, "validation data": ["b"]})
    assert not identity.problems(args, saved(**{"validation data": ["a"]}))
    assert "validation data is not that of" in caplog.text


def test_an_accepted_change_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    args = arguments(moa_data_identity={"seed": 2}, accept_data_change=True)
    assert not identity.problems(args, saved())
    assert "seed: checkpoint 1, this run 2" in caplog.text
