"""Publishing parts: all or nothing, nothing unasked; shards, lists and blends of one output."""

import dataclasses
import errno
import json
import os
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from moa_megatron.data import blends, preparing, publishing, token_files
from moa_megatron.data.inputs import list_files
from moa_megatron.data.parts import Options
from tests.helpers.corpora import ENVIRONMENT, ROOT, command, jsonl, outputs


def test_a_full_disk_keeps_the_output_of_before(inputs: Path, tokenizer_dir: Path) -> None:
    """Files may not grow over a limit: first parts fail, then the published pair."""
    words = command(inputs, "--tokenizer", str(tokenizer_dir), "--overwrite")

    def run(limit: int) -> int:
        return subprocess.run(
            words, cwd=inputs, capture_output=True, env=ENVIRONMENT,
            preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)),
        ).returncode  # fmt: skip

    assert run(1 << 30) == 0
    before = outputs(inputs)
    with (inputs / "a.jsonl").open("a") as stream:
        stream.write('{"text": "one more"}\n')
    assert run(20_000) == 74 and outputs(inputs) == before
    assert run(len(before["x-train.bin"]) - 1000) == 74
    assert outputs(inputs) == before
    assert run(1 << 30) == 0 and outputs(inputs) != before


def request_for(folder: Path, *files: str, **more: Any) -> preparing.Request:
    values: dict[str, Any] = {"engine": "tokenizers", "workers": 1, **more}
    paths = [folder / name for name in files]
    options = Options(split_valid=values.pop("split_valid", 0.0))
    tokenizer_dir = values.pop("tokenizer_dir", None)
    train = None if tokenizer_dir else 300
    output = values.pop("output", folder / "x")
    return preparing.Request(list_files(paths), output, options, tokenizer_dir, train, **values)


def test_parts_serve_no_other_list_of_files(tmp_path: Path, tokenizer_dir: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / f"{name}.jsonl").write_bytes(jsonl([name] * 5) + b"broken\n")
    with pytest.raises(ValueError, match=r"a.jsonl: named twice"):
        request_for(tmp_path, "a.jsonl", "b.jsonl", "a.jsonl", tokenizer_dir=tokenizer_dir)
    (tmp_path / "link.jsonl").symlink_to(tmp_path / "a.jsonl")
    with pytest.raises(ValueError, match=r"link.jsonl: named twice"):
        request_for(tmp_path, "a.jsonl", "link.jsonl", tokenizer_dir=tokenizer_dir)
    both = request_for(tmp_path, "a.jsonl", "b.jsonl", tokenizer_dir=tokenizer_dir, strict=True)
    with pytest.raises(ValueError, match="2 bad lines"):
        preparing.prepare(both)
    for files, what in (
        (("a.jsonl",), "b.jsonl: not given now"),
        (("b.jsonl", "a.jsonl"), "in another order"),
    ):
        with pytest.raises(ValueError, match=what):
            preparing.prepare(request_for(tmp_path, *files, tokenizer_dir=tokenizer_dir))


def test_what_a_folder_hides_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.py").write_text("text")
    (tmp_path / "b.py").symlink_to(tmp_path / "gone")
    with pytest.raises(ValueError, match=r"b.py: No such file or directory; make it readable"):
        list_files([tmp_path])


def test_every_folder_that_cannot_be_listed_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("open", "closed", "shut", ".hidden"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "a.py").write_text("text")
    scandir = os.scandir

    def refuse(path: str) -> Any:  # permissions would not stop root
        if Path(path).name in ("closed", "shut", ".hidden"):
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(ValueError) as caught:
        list_files([tmp_path, tmp_path / "none"])
    lines = sorted(str(caught.value).splitlines())
    assert [line.partition(": ")[0] for line in lines] == [
        f"{tmp_path}/closed", f"{tmp_path}/shut", f"input {tmp_path}/none"
    ]  # fmt: skip


def test_input_that_changes_is_not_published(
    tmp_path: Path, tokenizer_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a.jsonl").write_bytes(jsonl(["a"] * 5))
    request = request_for(tmp_path, "a.jsonl", tokenizer_dir=tokenizer_dir)
    finish = preparing._finish_parts

    def meanwhile(*arguments: Any) -> Any:
        with (tmp_path / "a.jsonl").open("ab") as stream:
            stream.write(jsonl(["late"]))
        return finish(*arguments)

    changed = r"changed while it was read(.|\n)*a.jsonl: changed"
    with monkeypatch.context() as patched, pytest.raises(ValueError, match=changed):
        patched.setattr(preparing, "_finish_parts", meanwhile)
        preparing.prepare(request)
    # Grown before the plan is made, but after its size is what the parts are cut by.
    with pytest.raises(ValueError, match=changed):
        preparing.prepare(dataclasses.replace(request, overwrite=True))
    assert not (tmp_path / "x.bin").exists()


def test_a_tokenizer_is_not_replaced_unasked(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(jsonl(["some text to merge"] * 50))
    request = request_for(tmp_path, "a.jsonl")
    preparing.prepare(request)
    own = (tmp_path / "x-tokenizer" / "tokenizer.json").read_bytes()
    for path in (*token_files.pair(request.output), publishing.manifest_path(request.output)):
        path.unlink()
    assert preparing.taken(request) == [tmp_path / "x-tokenizer"]
    (tmp_path / "a.jsonl").write_bytes(jsonl(["other words entirely"] * 50) + b"broken\n")
    with pytest.raises(ValueError, match="1 bad lines"):
        preparing.prepare(request_for(tmp_path, "a.jsonl", strict=True, overwrite=True))
    assert (tmp_path / "x-tokenizer" / "tokenizer.json").read_bytes() == own
    preparing.prepare(request_for(tmp_path, "a.jsonl", overwrite=True))
    assert (tmp_path / "x-tokenizer" / "tokenizer.json").read_bytes() != own


def whole_pairs(folder: Path) -> dict[str, bytes]:
    """What a run that is given prefixes would train on."""
    indices = (path for path in folder.glob("*.idx") if path.with_suffix(".bin").exists())
    return {path.stem: path.with_suffix(".bin").read_bytes() for path in indices}


@pytest.mark.parametrize("shard_tokens", [None, 30])
def test_a_kill_between_renames_leaves_no_mixture(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shard_tokens: int | None
) -> None:
    """Killed at every change of the output's folder: what lies there is older or newer."""
    output, saved = tmp_path / "output", tmp_path / "saved"
    steps_left = 0

    def counted(original: Callable[..., Any], position: int) -> Callable[..., Any]:
        def wrapper(*arguments: Any, **more: Any) -> Any:
            nonlocal steps_left
            if Path(arguments[position]).parent in (output, output / "x-tokenizer"):
                if not steps_left:
                    raise KeyboardInterrupt
                steps_left -= 1
            return original(*arguments, **more)

        return wrapper

    def prepare(text: str, steps: int, folder: Path = output, **more: Any) -> None:
        nonlocal steps_left
        steps_left = steps
        more |= {"output": folder / "x", "overwrite": True, "split_valid": 0.4}
        preparing.prepare(request_for(tmp_path, f"{text}.jsonl", **more))

    for text in ("older", "newer"):
        (tmp_path / f"{text}.jsonl").write_bytes(jsonl([f"{text} {i}" for i in range(40)]))
    prepare("newer", 0, tmp_path / "reference")
    prepare("older", 0, saved, shard_tokens=shard_tokens)
    newer, older = whole_pairs(tmp_path / "reference"), whole_pairs(saved)
    names = sorted(path.name for path in (tmp_path / "reference").iterdir())
    assert len(older) > 3 if shard_tokens else set(older) == set(newer)
    saved.rename(output)
    monkeypatch.setattr(os, "replace", counted(os.replace, 1))
    monkeypatch.setattr(Path, "unlink", counted(Path.unlink, 0))
    with pytest.raises(KeyboardInterrupt):
        prepare("newer", 0)
    shutil.copytree(output, saved)  # with finished parts
    for steps in range(1, 100):
        try:
            prepare("newer", steps)
            break
        except KeyboardInterrupt:
            left = whole_pairs(output)
            assert left.items() <= older.items() or left.items() <= newer.items()
        prepare("newer", 100)
        assert whole_pairs(output) == newer
        assert sorted(path.name for path in output.iterdir()) == names
        shutil.rmtree(output)
        shutil.copytree(saved, output)
    assert steps > 10


def test_lists_of_shards_are_of_this_output(tmp_path: Path, tokenizer_dir: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(jsonl(["some text"] * 50))
    common = {"tokenizer_dir": tokenizer_dir, "overwrite": True}
    blend = tmp_path / "x.blend.txt"
    blend.mkdir()  # stands for a disk that fails in this moment
    sharded = request_for(tmp_path, "a.jsonl", shard_tokens=100, **common)
    with pytest.raises(OSError):
        preparing.prepare(sharded)
    blend.rmdir()
    result = preparing.prepare(sharded)
    assert result.flags == {"--data-args-path": blend} and len(result.splits[""]) > 2
    assert all(Path(word).with_suffix("").name for word in blend.read_text().split()[1::2])
    preparing.prepare(request_for(tmp_path, "a.jsonl", **common))
    assert not blend.exists() and not list(tmp_path.glob("x-0*"))


def test_existing_files_that_would_be_replaced_are_named(
    tmp_path: Path, tokenizer_dir: Path
) -> None:
    (tmp_path / "a.jsonl").write_bytes(jsonl(["some text"]))
    names = ["x-train-00000.idx", "x.blend.json", "x.blend.txt", "x.manifest.json"]
    for name in names:
        (tmp_path / name).touch()
    common = {"tokenizer_dir": tokenizer_dir, "split_valid": 0.5}
    request = request_for(tmp_path, "a.jsonl", shard_tokens=100, **common)
    assert sorted(path.name for path in preparing.taken(request)) == names
    request = request_for(tmp_path, "a.jsonl", **common)  # touches no shards that it did not make
    assert sorted(path.name for path in preparing.taken(request)) == names[1:]


def test_an_empty_split_says_what_to_do(tmp_path: Path, tokenizer_dir: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(jsonl([f"text {i}" for i in range(20)]))
    request = request_for(tmp_path, "a.jsonl", tokenizer_dir=tokenizer_dir, split_valid=1e-9)
    with pytest.raises(ValueError, match=r"none of the 20 documents fell into x-valid; give .*0.5"):
        preparing.prepare(request)
    assert not (tmp_path / "x.parts").exists()


def test_too_little_space_is_told_before_the_work(tmp_path: Path) -> None:
    assert publishing.check_space(tmp_path, 1000, 1000, 2) is None
    with pytest.raises(OSError, match="bytes free, about"):
        publishing.check_space(tmp_path / "not" / "yet", 1 << 60, 0, 2)


def test_blend(tmp_path: Path, tokenizer_dir: Path) -> None:
    from megatron.core.datasets.utils import get_blend_from_list

    for name, count in (("web", 40), ("code", 10)):
        path = tmp_path / f"{name}.jsonl"
        path.write_bytes(jsonl([f"{name} {i} " * 9 for i in range(count)]))
        request = preparing.Request(
            list_files([path]), tmp_path / name, Options(split_valid=0.3), tokenizer_dir, None,
            engine="tokenizers", workers=1, shard_tokens=300 if name == "web" else None,
        )  # fmt: skip
        preparing.prepare(request)
    tool = [sys.executable, str(ROOT / "tools" / "blend_data.py")]
    words = ["0.75", "web", "0.25", "code", "--output", "mix.json"]
    done = subprocess.run(
        [*tool, *words], cwd=tmp_path, capture_output=True, text=True, env=ENVIRONMENT
    )
    assert done.returncode == 0, done.stderr
    assert "--tokenizer-model DIR\nwhere DIR is the tokenizer" in done.stdout
    shutil.copytree(tokenizer_dir, tmp_path / "web-tokenizer")
    done = subprocess.run(
        [*tool, *words], cwd=tmp_path, capture_output=True, text=True, env=ENVIRONMENT
    )
    assert done.stdout.endswith("HuggingFaceTokenizer --tokenizer-model web-tokenizer\n")
    mix = json.loads((tmp_path / "mix.json").read_text())
    assert list(mix) == ["train", "valid", "test"] and mix["test"] is None
    prefixes, weights = get_blend_from_list(mix["train"])
    assert len(prefixes) > 3 and sum(weights) == pytest.approx(1)
    web = [w for p, w in zip(prefixes, weights) if "/web-train-" in p]
    assert sum(web) == pytest.approx(0.75) and len(web) == len(prefixes) - 1
    # Damage, another tokenizer and a bad weight in one message.
    binary = Path(f"{prefixes[0]}.bin")
    binary.write_bytes(binary.read_bytes()[:-2])
    manifest = publishing.manifest_path(tmp_path / "code")
    manifest.write_text(
        manifest.read_text().replace('"tokenizer_sha256": "', '"tokenizer_sha256": "0')
    )
    words[0] = "-1"
    done = subprocess.run(
        [*tool, *words], cwd=tmp_path, capture_output=True, text=True, env=ENVIRONMENT
    )
    assert done.returncode == 78
    for part in ("weight -1.0 of web", "code: made with another tokenizer", "one of them is cut"):
        assert part in done.stderr


def test_foreign_manifests_are_named(tmp_path: Path) -> None:
    good = {"tokenizer_sha256": "0", "vocab_size": 9, "splits": {}}
    pair_of_another_kind = {"prefix": "x", "documents": 1, "tokens": "many"}
    contents = (
        [], {"name": "app"}, {**good, "splits": []}, {**good, "vocab_size": "9"},
        {**good, "splits": {"train": [{"path": "x"}]}}, {**good, "splits": {"train": 3}},
        {**good, "splits": {"train": [pair_of_another_kind]}},
    )  # fmt: skip
    prefixes = [tmp_path / str(number) for number in range(len(contents))]
    for prefix, content in zip(prefixes, contents):
        publishing.manifest_path(prefix).write_text(json.dumps(content))
    with pytest.raises(ValueError) as caught:
        blends.blend([*prefixes, tmp_path / "none"], [1.0] * (len(prefixes) + 1))
    lines = str(caught.value).splitlines()
    assert len(lines) == len(contents) + 1
    for prefix, line in zip([*prefixes, tmp_path / "none"], lines):
        assert line.startswith(f"{prefix}.manifest.json: no manifest of tools/prepare_data.py")
