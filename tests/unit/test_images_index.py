"""The index: three containers, bad images, what is remembered, what is refused."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from moa_megatron.recipes import RefusedError
from moa_megatron.vision.images import checking, formats
from moa_megatron.vision.images.building import build
from moa_megatron.vision.images.index import ImageIndex
from moa_megatron.vision.images.reading import ChangedError, Reader
from tests.helpers import images

ROOT = Path(__file__).parents[2]


def made(source: Path, cache: Path, **options: object) -> ImageIndex:
    settings = {"workers": 1, "progress": False, **options}
    return build([source], cache, **settings)  # type: ignore[arg-type]


def written(folder: Path, kind: str, files: dict[str, bytes]) -> Path:
    if kind == "tree":
        return images.write_tree(folder / "tree", files)
    if kind == "tar":
        return images.write_tar(folder / "shards" / "train-000.tar", files)
    return images.write_records(folder / "records" / "train-00000-of-00001", files)


def contents(index: ImageIndex) -> list[tuple[bytes, int, int, int]]:
    reader, found = Reader(), []
    for row in range(len(index)):
        container, offset = index.containers[index.container[row]], int(index.offset[row])
        path = container if offset >= 0 else str(Path(container, index.names[row]))
        data = reader.read(path, offset, int(index.size[row])).tobytes()
        shape = int(index.height[row]), int(index.width[row])
        found.append((data, int(index.label[row]), *shape))
    return found


@pytest.mark.parametrize("kind", ["tree", "tar", "records"])
def test_every_container_gives_the_same_images(tmp_path: Path, kind: str) -> None:
    files = dict(sorted(images.good(7).items()))
    files["2/turned.png"] = images.encode(images.photograph(9), "PNG", exif=images.turned(6))
    index = made(written(tmp_path, kind, files), tmp_path / "cache")
    shapes = [(images.HEIGHT, images.WIDTH)] * 7 + [(images.WIDTH, images.HEIGHT)]
    assert contents(index) == [
        (data, int(name[0]), *shape) for (name, data), shape in zip(files.items(), shapes)
    ]
    assert index.class_names == (("0", "1", "2") if kind == "tree" else ())
    assert "8 images, 3 classes" in index.describe()


@pytest.mark.parametrize("kind", ["tree", "tar", "records"])
def test_bad_images_are_found_everywhere(tmp_path: Path, kind: str) -> None:
    bad = images.bad()
    files = {f"1/{name}": data for name, (data, _) in bad.items()} | images.good(4)
    index = made(written(tmp_path, kind, files), tmp_path / "cache", max_bad_fraction=0.9)
    assert {row[0] for row in contents(index)} == set(images.good(4).values())
    expected = {
        name if kind != "records" else f"record {number}": reason
        for number, (name, (_, reason)) in enumerate(bad.items())
    }
    found = {path.replace(": ", "/").rpartition("/")[2]: reason for path, reason in index.bad}
    assert found.keys() == expected.keys()
    wrong = {name: found[name] for name in found if not found[name].startswith(expected[name])}
    assert not wrong
    (bad_list,) = (tmp_path / "cache").glob("*.bad.txt")
    assert bad_list.read_text().splitlines() == [f"{p}\t{reason}" for p, reason in index.bad]


def test_odd_but_whole_images_are_taken(tmp_path: Path) -> None:
    image = images.photograph(3)
    files = {
        "progressive.jpg": images.encode(image, progressive=True),
        "tiny.jpg": images.encode(image.resize((1, 1))),
        "whole.JPEG": images.encode(image),
        "png.jpg": images.encode(image, "PNG"),
        "whole.bmp": images.encode(image, "BMP"),
        "whole.webp": images.encode(image, "WEBP"),
        "moving.webp": images.encode(
            image, "WEBP", save_all=True, append_images=[images.photograph(4)]
        ),
        "more-behind.jpg": images.encode(image) + b"behind" * 50,
    }
    assert len(made(images.write_tree(tmp_path, files), tmp_path / "cache")) == len(files)


def test_too_many_bad_images_are_refused_by_name(tmp_path: Path) -> None:
    grey = images.encode(images.photograph(1).convert("L"))
    files = images.good(20) | {f"0/grey{n:02}.jpg": grey for n in range(12)} | {"0/zero.jpg": b""}
    source, cache = images.write_tree(tmp_path / "data", files), tmp_path / "cache"
    with pytest.raises(RefusedError) as refused:
        made(source, cache)
    message = str(refused.value)
    (bad_list,) = cache.glob("*.bad.txt")
    for part in (
        "13 of 33 images are bad (12 grey, 1 zero bytes)",
        "1.00%",
        f"{source}/0/grey09.jpg: grey",
        str(bad_list),
        "--moa-grey-images",
    ):
        assert part in message
    assert "grey10.jpg" not in message  # ten are named
    fraction = float(message.rpartition("--moa-max-bad-images ")[2].split(";")[0])
    assert len(made(source, cache, max_bad_fraction=fraction)) == 20
    assert len(made(source, cache, max_bad_fraction=0.04, grey=True)) == 32
    with pytest.raises(RefusedError, match="1 of 33"):
        made(source, cache, grey=True)


def test_the_second_start_checks_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = images.write_tree(tmp_path / "data", images.good(3))
    cache = tmp_path / "cache"
    first = made(source, cache)
    calls: list[int] = []
    real = checking.check
    monkeypatch.setattr(
        checking, "check", lambda places, grey: (calls.append(len(places)), real(places, grey))[1]
    )
    again = made(source, cache)
    assert not calls
    assert (again.digest, list(again.names)) == (first.digest, list(first.names))
    np.testing.assert_array_equal(again.height, first.height)

    path = source / "0" / "000.jpg"
    path.write_bytes(images.encode(images.photograph(50)))
    changed = made(source, cache)
    assert calls == [3] and changed.digest != first.digest

    for stored in cache.glob("*.npz"):
        stored.write_bytes(stored.read_bytes()[:200])
    assert made(source, cache).digest == changed.digest
    assert calls == [3, 3]


def test_digest_names_the_data_not_its_place(tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    first = made(images.write_tree(tmp_path / "here", images.good(4)), cache)
    moved = made(images.write_tree(tmp_path / "there", images.good(4)), cache)
    files = images.good(4)
    files["1/000.jpg"] = files.pop("0/000.jpg")
    other = made(images.write_tree(tmp_path / "other", files), cache)
    assert first.digest == moved.digest != other.digest
    assert len(first.digest) == 12


def test_processes_find_the_same(tmp_path: Path) -> None:
    files = images.good(5) | {name: data for name, (data, _) in images.bad().items()}
    source = images.write_tree(tmp_path / "data", files)
    alone = made(source, tmp_path / "one", max_bad_fraction=0.9)
    many = made(source, tmp_path / "two", max_bad_fraction=0.9, workers=2)
    assert (alone.digest, alone.bad) == (many.digest, many.bad)


def test_two_commands_at_once_do_no_harm(tmp_path: Path) -> None:
    source = images.write_tree(tmp_path / "data", images.good(30) | {"0/zero.jpg": b""})
    words = [sys.executable, str(ROOT / "tools" / "index_images.py"), str(source)]
    words += ["--moa-cache-dir", str(tmp_path / "cache"), "--workers", "1"]
    words += ["--moa-max-bad-images", "0.1"]
    both = [
        subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    printed = [process.communicate(timeout=120) for process in both]
    for process, (out, err) in zip(both, printed):
        assert process.returncode == 0, err
        assert "30 images, 3 classes" in out and "bad: 1 zero bytes" in out
        assert "short side: 48" in out
    assert sorted(path.suffix for path in (tmp_path / "cache" / "images").iterdir()) == [
        ".npz",
        ".txt",
    ]


def test_command_refuses_with_78(tmp_path: Path) -> None:
    words = [sys.executable, str(ROOT / "tools" / "index_images.py"), str(tmp_path / "none")]
    run = subprocess.run(words, capture_output=True, text=True)
    assert run.returncode == 78 and "no such file or folder" in run.stderr
    assert "Traceback" not in run.stderr


def test_inputs_are_refused_all_at_once(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "notes.txt").touch()
    tree = images.write_tree(tmp_path / "tree", images.good(1))
    packed = tmp_path / "packed" / "train.tar.gz"
    packed.parent.mkdir()
    packed.touch()
    inputs = [tmp_path / name for name in ("none", "empty", "text", "packed", "text/notes.txt")]
    with pytest.raises(RefusedError) as refused:
        formats.scan([*inputs, tree, tree])
    message = str(refused.value)
    assert len(message.splitlines()) == 6
    for part in ("no such file", "1 .txt were ignored", f"{packed}: compressed", "named twice"):
        assert part in message
    with pytest.raises(RefusedError, match="at least one"):
        formats.scan([])


def test_damaged_shards_are_refused_all_at_once(tmp_path: Path) -> None:
    shards = tmp_path / "shards"
    tar = images.write_tar(shards / "cut.tar", images.good(4))
    tar.write_bytes(tar.read_bytes()[:4000])
    (shards / "text.tar").write_text("no tar at all")
    record = images.write_records(shards / "cut.tfrecord", images.good(4))
    record.write_bytes(record.read_bytes()[:-10])
    length = images.write_records(shards / "length.tfrecord", images.good(4))
    length.write_bytes(b"\1" + length.read_bytes()[1:])
    images.write_tar(shards / "whole.tar", images.good(2))
    with pytest.raises(RefusedError) as refused:
        made(shards, tmp_path / "cache")
    lines = str(refused.value).splitlines()
    assert [Path(line.partition(":")[0]).name for line in lines] == [
        "cut.tar", "cut.tfrecord", "length.tfrecord", "text.tar",
    ]  # fmt: skip
    other = images.write_tar(tmp_path / "none.tar", {"readme.txt": b""})
    with pytest.raises(RefusedError, match=r"no images .* only 1 \.txt, 1 \.json"):
        made(other, tmp_path / "cache")


def test_trees_follow_links_and_count_what_they_ignore(tmp_path: Path) -> None:
    files = images.good(3) | {".hidden.jpg": b"", "0/deep/er/x.png": images.good(1)["0/000.jpg"]}
    source = images.write_tree(tmp_path / "tree", files | {"0/a.txt": b"", "1/b": b""})
    elsewhere = images.write_tree(tmp_path / "elsewhere", {"z.jpg": images.good(1)["0/000.jpg"]})
    (source / "linked").symlink_to(elsewhere)
    (source / "0" / "up").symlink_to(source / "0")  # a circle
    (source / "1" / "gone.jpg").symlink_to(tmp_path / "gone")
    (source / "2" / os.fsdecode(b"\xff.jpg")).write_bytes(files["0/000.jpg"])
    index = made(source, tmp_path / "cache", max_bad_fraction=0.5)
    assert list(index.names) == [
        "0/000.jpg", "0/deep/er/x.png", "1/001.jpg", "2/002.jpg", "2/\udcff.jpg", "linked/z.jpg",
    ]  # fmt: skip
    assert index.class_names == ("0", "1", "2", "linked")
    assert index.ignored == {".txt": 1, "no suffix": 1}
    assert [reason for _, reason in index.bad] == ["unreadable: No such file or directory"]


def test_labels_of_shards(tmp_path: Path) -> None:
    data = images.encode(images.photograph(0))
    named = images.write_tar(tmp_path / "named.tar", {"dog/a.jpg": data, "cat/b.jpg": data})
    assert made(named, tmp_path / "cache").class_names == ("cat", "dog")
    assert made(named, tmp_path / "cache").label.tolist() == [1, 0]
    partly = images.write_tar(tmp_path / "partly.tar", {"10/a.jpg": data, "b.jpg": data})
    assert made(partly, tmp_path / "cache").label.tolist() == [10, -1]
    flat = images.write_tree(tmp_path / "flat", {"a.jpg": data, "b.jpg": data})
    assert made(flat, tmp_path / "cache").label.tolist() == [0, 0]


def test_reader_bounds_its_descriptors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("moa_megatron.vision.images.reading._OPEN_SHARDS", 3)
    reader = Reader()
    before = len(os.listdir("/proc/self/fd"))
    for number in range(10):
        path = tmp_path / str(number)
        path.write_bytes(bytes(range(100)))
        assert reader.read(str(path), 10, 5).tolist() == [10, 11, 12, 13, 14]
        assert reader.read(str(path), -1, 100).tolist() == list(range(100))
    assert len(os.listdir("/proc/self/fd")) - before == 3
    with pytest.raises(ChangedError, match="ends 10 bytes before"):
        reader.read(str(path), 10, 100)
    with pytest.raises(ChangedError, match="100 bytes long, 99"):
        reader.read(str(path), -1, 99)


def test_a_killed_worker_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checking, "check", _killed)
    source = images.write_tree(tmp_path / "data", images.good(3))
    with pytest.raises(RuntimeError, match="killed.*0/000.jpg"):
        made(source, tmp_path / "cache", workers=2)
    assert not list(tmp_path.glob("cache/*"))


def _killed(places: object, grey: bool) -> None:
    os.kill(os.getpid(), 9)


def test_nothing_good_is_refused_whatever_is_allowed(tmp_path: Path) -> None:
    source = images.write_tree(tmp_path / "data", {"a.jpg": b""})
    with pytest.raises(RefusedError, match="1 of 1 images are bad"):
        made(source, tmp_path / "cache", max_bad_fraction=1.0)
