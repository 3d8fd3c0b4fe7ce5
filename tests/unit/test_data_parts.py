"""Packed and damaged input, parts, resumption, shards and blends: always against one hand-made
reference, the pair that Megatron's own writer makes of the texts that should be kept."""

import dataclasses
import errno
import gzip
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from moa_megatron.data import containers, parts, preparing, publishing, token_files
from moa_megatron.data.documents import Location, ReadReport, read_slice
from moa_megatron.data.encoding import TextEncoder
from moa_megatron.data.inputs import Slice, list_files
from moa_megatron.data.parts import Options, Workplace
from moa_megatron.data.tokenization import train_tokenizer

ROOT = Path(__file__).parents[2]
TOOL = ROOT / "tools" / "prepare_data.py"
ENVIRONMENT = {**os.environ, "PYTHONPATH": f"{ROOT}:{os.environ.get('PYTHONPATH', '')}"}
needs_zstandard = pytest.mark.skipif(
    find_spec("zstandard") is None, reason="needs the package zstandard"
)
CONTAINERS = ["", ".gz", pytest.param(".zst", marks=needs_zstandard)]


@pytest.fixture(scope="session")
def tokenizer_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    train_tokenizer(["def f(x):\n    return x + 1\n", "Größe, 漢字, 🙂"] * 3, 300, folder)
    return folder


def pack(raw: bytes, kind: str) -> bytes:
    if kind == ".gz":
        return gzip.compress(raw, mtime=0)
    if kind == ".zst":
        import zstandard

        return zstandard.ZstdCompressor(write_checksum=True).compress(raw)
    return raw


def jsonl(texts: list[str]) -> bytes:
    return "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()


def reference(texts: list[str], tokenizer_dir: Path, prefix: Path) -> tuple[bytes, bytes]:
    """The pair that Megatron's writer makes."""
    from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder

    encoder = TextEncoder(tokenizer_dir)
    binary, index = token_files.pair(prefix)
    builder = IndexedDatasetBuilder(str(binary), DType.optimal_dtype(encoder.vocab_size))
    for text in texts:
        ids = encoder.encode(text)
        builder.add_document(ids, [len(ids)])
    builder.finalize(str(index))
    builder.data_file.close()
    return binary.read_bytes(), index.read_bytes()


def in_process(
    folder: Path, paths: list[Path], tokenizer_dir: Path, options: Options, order: int = 0,
    shard_tokens: int | None = None,
) -> tuple[dict[str, Any], Any]:  # fmt: skip
    """All parts in a random order, then published as `folder/x`; pairs' bytes and report."""
    files = list_files(paths)
    cut = parts.cut(files, options.part_bytes)
    workplace = Workplace(folder / "parts")
    workplace.folder.mkdir(parents=True)
    encoder = TextEncoder(tokenizer_dir)
    numbers = list(range(len(cut)))
    random.Random(order).shuffle(numbers)
    sizes: list[int] = []
    for number in numbers:
        parts.process(cut[number], number, workplace, encoder, options, sizes.append)
    assert sum(sizes) == sum(file.size for file in files)
    records = [workplace.load(number, options, 2) for number in range(len(cut))]
    found = {}
    for split in options.splits:
        output = publishing.Publication(
            folder / "x", (split,), np.dtype("<u2"), encoder.vocab_size, "", shard_tokens
        )
        try:
            published = publishing.publish(workplace, records, output)[split]
        except ValueError:
            continue  # no documents
        found[split] = [
            (item, *(path.read_bytes() for path in token_files.pair(folder / item.prefix)))
            for item in published
        ]
    return found, preparing._merged(cut, records)


LIMIT = 3000
BAD: list[tuple[str, bytes, str]] = [
    ("skipped", b'{"text": "\xff"}\n', "invalid UTF-8"),
    ("skipped", b'{"text": "a"\n', "invalid JSON"),
    ("skipped", b'{"body": "a"}\n', "missing key 'text'"),
    ("skipped", b'{"text": 3}\n', "value of 'text' not a string"),
    ("skipped", b'["a"]\n', "not a JSON object"),
    ("skipped", b" \n", "empty or blank"),
    ("skipped", b'{"text": "a\0"}\n', "NUL byte"),
    ("skipped", b'{"text": "' + b"y" * 3 * LIMIT + b'"}\n', "longer than --max-line-bytes"),
    ("noted", b'\xef\xbb\xbf{"text": "after the mark"}\n', "byte order mark stripped"),
    ("noted", b'{"text": "before CRLF"}\r\n', "CRLF line end"),
]


@pytest.mark.parametrize("kind", CONTAINERS)
@pytest.mark.parametrize("part_bytes", [200, 1 << 20])
def test_each_bad_line_in_each_container(
    tmp_path: Path, tokenizer_dir: Path, kind: str, part_bytes: int
) -> None:
    good = [f"document {i}" for i in range(30)]
    kept, raw, expected = [], b"", {}
    for number, (_, line, what) in enumerate(BAD):
        raw += jsonl(good[3 * number : 3 * number + 3]) + line
        kept += good[3 * number : 3 * number + 3]
        expected[what] = 4 * number + 4
        kept += {8: ["after the mark"], 9: ["before CRLF"]}.get(number, [])
    path = tmp_path / f"a.jsonl{kind}"
    path.write_bytes(pack(raw, kind))
    options = Options(max_line_bytes=LIMIT, part_bytes=part_bytes)
    found, report = in_process(tmp_path, [path], tokenizer_dir, options)
    assert found[""][0][1:] == reference(kept, tokenizer_dir, tmp_path / "reference")
    assert report.locations == {w: [Location(str(path), n)] for w, n in expected.items()}
    assert set(report.skipped) == {what for title, _, what in BAD if title == "skipped"}
    assert set(report.noted) == {what for title, _, what in BAD if title == "noted"}


@pytest.mark.parametrize("kind", CONTAINERS[1:])
def test_members_are_one_file_and_damage_is_located(
    tmp_path: Path, tokenizer_dir: Path, kind: str
) -> None:
    rng = random.Random(3)
    texts = [f"{i} " + "".join(rng.choices("abcdefgh ", k=1500)) for i in range(90)]
    first, second = pack(jsonl(texts[:60]), kind), pack(jsonl(texts[60:]), kind)
    cases = {
        "whole": (first + second, 90, None),
        "padded": (first + b"\0" * 1000 + second, 90, None),
        "cut": (first + second[:-2000], 60, "cut after compressed byte"),
        "corrupt": (first + b"\xff" * 9 + second[9:], 60, "corrupt before"),
        "trailed": (first + second + b"trailing text", 90, "corrupt before"),
    }
    if kind == ".zst":
        del cases["padded"]  # is what only tapes do to gzip
    for name, (raw, at_least, detail) in cases.items():
        path = tmp_path / name / f"a.json{kind}"
        path.parent.mkdir()
        path.write_bytes(raw)
        found, report = in_process(path.parent, [path], tokenizer_dir, Options())
        item, binary, index = found[""][0]
        assert (binary, index) == reference(
            texts[: item.documents], tokenizer_dir, path.parent / "reference"
        )
        assert item.documents >= at_least
        if detail is None:
            assert item.documents == 90 and not report.skipped
        else:
            (location,) = report.locations["damaged file"]
            assert location.line == item.documents + 1 and detail in location.detail
            assert str(location).startswith(f"{path}:{item.documents + 1} ({detail}")
    # What a flipped bit makes of the text, only the checksum behind it can tell.
    flipped = tmp_path / f"flipped.jsonl{kind}"
    flipped.write_bytes(first[:9000] + bytes([first[9000] ^ 1]) + first[9001:])
    _, report = in_process(tmp_path / "flipped", [flipped], tokenizer_dir, Options())
    assert report.skipped["damaged file"] == 1


@pytest.mark.parametrize("kind", CONTAINERS)
def test_whole_texts_in_each_container(tmp_path: Path, tokenizer_dir: Path, kind: str) -> None:
    paths = []
    for number, raw in enumerate((b"a\nb\r\n", b"\xff", b"c" * 4000, b"d")):
        paths.append(tmp_path / f"{number}.txt{kind}")
        paths[-1].write_bytes(pack(raw, kind))
    options = Options(max_line_bytes=LIMIT, part_bytes=60)
    found, report = in_process(tmp_path, paths, tokenizer_dir, options)
    assert found[""][0][1:] == reference(["a\nb\r\n", "d"], tokenizer_dir, tmp_path / "r")
    assert dict(report.skipped) == {"invalid UTF-8": 1, "longer than --max-line-bytes": 1}


def test_slices_of_any_size_hold_every_line_once(tmp_path: Path) -> None:
    """Also where a slice begins exactly with a line."""
    path = tmp_path / "a.jsonl"
    path.write_bytes(jsonl(["a", "b", "cc", "d"])[:-1])
    (file,) = list_files([path])
    for step in range(1, file.size + 2):
        slices = [Slice(file, s, min(s + step, file.size)) for s in range(0, file.size, step)]
        texts = [d.text for piece in slices for d in read_slice(piece, ReadReport())]
        assert texts == ["a", "b", "cc", "d"], step


def test_long_lines_leave_memory_flat(tmp_path: Path) -> None:
    """300 MB on one line, packed to 300 kB: the limit of 1 MB holds for memory, too."""
    path = tmp_path / "a.jsonl.gz"
    with gzip.open(path, "wb", compresslevel=1) as stream:
        for _ in range(300):
            stream.write(b"x" * 1_000_000)
        stream.write(b'\n{"text": "a"}\n')
    code = (
        "import resource, sys\n"
        "from pathlib import Path\n"
        "from moa_megatron.data import documents, inputs\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "file, report = inputs.list_files([Path(sys.argv[1])])[0], documents.ReadReport()\n"
        "slice = inputs.Slice(file, 0, file.size)\n"
        "assert len(list(documents.read_slice(slice, report, 'text', 1 << 20))) == 1\n"
        "assert list(report.skipped) == ['longer than --max-line-bytes']\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(path)], capture_output=True, text=True, env=ENVIRONMENT
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 40 << 10  # KiB


@settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    groups=st.lists(st.lists(st.text(max_size=60), max_size=8), min_size=1, max_size=4),
    packed=st.lists(st.booleans(), min_size=4, max_size=4),
    part_bytes=st.integers(1, 400), order=st.integers(0, 99), fraction=st.sampled_from([0, 0.4]),
    shard_tokens=st.integers(1, 200),
)  # fmt: skip
def test_neither_parts_nor_their_order_show(
    tokenizer_dir: Path, groups: list[list[str]], packed: list[bool], part_bytes: int, order: int,
    fraction: float, shard_tokens: int,
) -> None:  # fmt: skip
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        paths = []
        for number, texts in enumerate(groups):
            kind = ".gz" if packed[number] else ""
            paths.append(folder / f"{number}.jsonl{kind}")
            paths[-1].write_bytes(pack(jsonl(texts), kind))
        one = Options(split_valid=fraction)
        many = Options(split_valid=fraction, part_bytes=part_bytes)
        expected, report = in_process(folder / "one", paths, tokenizer_dir, one)
        found, other = in_process(folder / "many", paths, tokenizer_dir, many, order)
        assert found == expected and other.lines() == report.lines()
        kept = [t for texts in groups for t in texts if t.strip() and "\0" not in t]
        if not fraction and kept:
            assert expected[""][0][1:] == reference(kept, tokenizer_dir, folder / "reference")
        # Shards hold the same documents in the same order, each full but the last.
        shards, _ = in_process(folder / "s", paths, tokenizer_dir, many, order, shard_tokens)
        for split, pairs in shards.items():
            assert b"".join(binary for _, binary, _ in pairs) == expected[split][0][1]
            assert sum(item.documents for item, _, _ in pairs) == expected[split][0][0].documents
            assert all(item.tokens >= shard_tokens for item, _, _ in pairs[:-1])
            for item, _, index in pairs:
                last = np.frombuffer(index, "<i4", item.documents, token_files.HEADER.size)[-1]
                assert item.tokens - last < shard_tokens


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


@pytest.fixture
def inputs(tmp_path: Path, tokenizer_dir: Path) -> Path:
    rng = random.Random(5)
    texts = ["".join(rng.choices("abcdefgh \n", k=rng.randrange(3000))) + "." for _ in range(900)]
    (tmp_path / "a.jsonl").write_bytes(jsonl(texts[:600]) + b"broken\n")
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(jsonl(texts[600:])))
    return tmp_path


def alive(folder: Path) -> list[int]:
    """Processes whose command line names a folder."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                environment = (entry / "environ").read_bytes() + (entry / "cmdline").read_bytes()
            except OSError:
                continue
            if str(folder).encode() in environment:
                found.append(int(entry.name))
    return found


def test_killed_at_several_points_and_resumed(inputs: Path, tokenizer_dir: Path) -> None:
    def run(folder: str) -> subprocess.Popen[str]:
        words = command(inputs / folder, "--tokenizer", str(tokenizer_dir))
        return subprocess.Popen(
            words, cwd=inputs, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            env={**ENVIRONMENT, "MARK": str(inputs / folder)},
        )  # fmt: skip

    straight = run("straight")
    report, _ = straight.communicate(timeout=60)
    assert straight.returncode == 0
    rng = random.Random(0)
    finished = 0
    for wanted in (1, 4, 8, 12):
        job = run("killed")
        deadline = time.monotonic() + 30
        while job.poll() is None and time.monotonic() < deadline:
            done = len(list((inputs / "killed" / "x.parts").glob("*.json"))) - 1
            if done >= wanted:
                time.sleep(rng.random() * 0.05)
                break
            time.sleep(0.005)
        job.kill()
        job.communicate()
        if job.returncode == -signal.SIGKILL and not list((inputs / "killed").glob("x*.idx")):
            finished += 1
        deadline = time.monotonic() + 5
        while alive(inputs / "killed") and time.monotonic() < deadline:
            time.sleep(0.02)
        assert not alive(inputs / "killed"), "workers outlive the command"
    assert finished >= 2, "too fast to be killed"
    resumed = run("killed")
    printed, errors = resumed.communicate(timeout=60)
    assert resumed.returncode == 0, errors
    assert "going on: " in errors
    assert printed.replace("/killed/", "/straight/") == report
    assert outputs(inputs / "killed") == outputs(inputs / "straight")
    assert not (inputs / "killed" / "x.parts").exists()


def test_a_dead_worker_ends_the_command(inputs: Path, tokenizer_dir: Path) -> None:
    job = subprocess.Popen(
        command(inputs, "--tokenizer", str(tokenizer_dir), "--workers", "2"), cwd=inputs,
        stderr=subprocess.PIPE, text=True, env=ENVIRONMENT,
    )  # fmt: skip
    while not list((inputs / "x.parts").glob("*.tokens")):
        assert job.poll() is None
        time.sleep(0.005)
    worker = next(
        child
        for child in psutil.Process(job.pid).children()
        if "spawn_main" in " ".join(child.cmdline())
    )
    worker.kill()
    _, errors = job.communicate(timeout=20)
    assert job.returncode == 1 and "a worker ended with code -9" in errors
    assert "Traceback" not in errors and not list(inputs.glob("x*.bin"))


def test_no_documents_leave_nothing_behind(tmp_path: Path, tokenizer_dir: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"body": "a"}\n')
    words = [sys.executable, str(TOOL), "a.jsonl", "--output", "x", "--tokenizer"]
    words += [str(tokenizer_dir), "--workers", "1"]
    done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, env=ENVIRONMENT)
    assert done.returncode == 78 and "documents: none for x" in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["a.jsonl"]
    # Parts that a kill between publishing and cleaning up has left are no part of a later plan.
    (tmp_path / "x.parts").mkdir()
    (tmp_path / "x.parts" / "000000.json").write_text("{}")
    (tmp_path / "x.bin").touch()
    words += ["--json-key", "body"]
    done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, env=ENVIRONMENT)
    assert done.returncode == 78 and "x.bin: exists" in done.stderr
    words += ["--overwrite"]
    done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, env=ENVIRONMENT)
    assert done.returncode == 0 and "going on" not in done.stderr


def test_another_command_is_refused_with_the_difference(inputs: Path, tokenizer_dir: Path) -> None:
    words = command(inputs, "--tokenizer", str(tokenizer_dir), "--strict")

    def run(*more: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [*words, *more], cwd=inputs, capture_output=True, text=True, env=ENVIRONMENT
        )

    first = run()
    assert first.returncode == 78 and "1 bad lines or files" in first.stderr
    assert "a.jsonl:601" in first.stderr
    with (inputs / "a.jsonl").open("a") as stream:
        stream.write('{"text": "one more"}\n')
    other = run("--split-valid", "0.3")
    assert other.returncode == 78
    assert "split_valid: 0.2 then, 0.3 now" in other.stderr
    assert f"input {inputs / 'a.jsonl'}: changed" in other.stderr
    anew = run("--overwrite")
    assert anew.returncode == 78 and "going on" not in anew.stderr  # strict, and still broken
    assert "1 bad lines" in anew.stderr


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


def test_token_dtype_is_megatrons() -> None:
    from megatron.core.datasets.indexed_dataset import DType

    for size in (300, 65_499, 65_500, 65_501, 65_535, 65_536, 65_537, 200_000):
        assert token_files.token_dtype(size) == np.dtype(DType.optimal_dtype(size)), size


def test_gaps_in_the_ids_are_refused(tmp_path: Path, tokenizer_dir: Path) -> None:
    state = json.loads((tokenizer_dir / "tokenizer.json").read_text())
    vocabulary = state["model"]["vocab"]
    last = max(vocabulary, key=vocabulary.__getitem__)
    vocabulary[last] = 900
    (tmp_path / "tokenizer.json").write_text(json.dumps(state))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": last}))
    with pytest.raises(ValueError, match="eos_token has id 900"):
        TextEncoder(tmp_path)
    encoder = TextEncoder(tmp_path, append_eod=False)
    text = encoder._tokenizer.decode([900])
    with pytest.raises(ValueError, match="gives id 900 with a vocabulary of"):
        encoder.encode(text)


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
        publishing.blend([*prefixes, tmp_path / "none"], [1.0] * (len(prefixes) + 1))
    lines = str(caught.value).splitlines()
    assert len(lines) == len(contents) + 1
    for prefix, line in zip([*prefixes, tmp_path / "none"], lines):
        assert line.startswith(f"{prefix}.manifest.json: no manifest of tools/prepare_data.py")


def test_missing_zstandard_is_a_refusal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.jsonl.zst").write_bytes(b"x")
    monkeypatch.setattr(containers, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"a\.jsonl\.zst: needs the package zstandard"):
        list_files([tmp_path / "a.jsonl.zst"])
