"""Packed and damaged input, parts and resumption: always against one hand-made reference, the pair
that Megatron's own writer makes of the texts that should be kept."""

import gzip
import json
import random
import signal
import subprocess
import sys
import tempfile
import time
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
from tests.helpers.corpora import ENVIRONMENT, TOOL, command, jsonl, outputs

needs_zstandard = pytest.mark.skipif(
    find_spec("zstandard") is None, reason="needs the package zstandard"
)
CONTAINERS = ["", ".gz", pytest.param(".zst", marks=needs_zstandard)]


def pack(raw: bytes, kind: str) -> bytes:
    if kind == ".gz":
        return gzip.compress(raw, mtime=0)
    if kind == ".zst":
        import zstandard

        return zstandard.ZstdCompressor(write_checksum=True).compress(raw)
    return raw


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


def test_missing_zstandard_is_a_refusal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.jsonl.zst").write_bytes(b"x")
    monkeypatch.setattr(containers, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"a\.jsonl\.zst: needs the package zstandard"):
        list_files([tmp_path / "a.jsonl.zst"])
