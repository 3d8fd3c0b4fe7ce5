"""tools/nsys_report.py as a command: what it writes, and files that it cannot read."""

from __future__ import annotations

import json
import os
import sqlite3
import stat
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest

from tests.helpers.nsys_example import picture
from tests.helpers.nsys_file import NsysFile, training
from tools import nsys_report
from tools.nsight import report
from tools.nsight.classes import COLOURS


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (b"QUADD\x00binary report" * 10, "is not SQLite"),
        (None, "cannot be read"),
    ],
)
def test_files_that_are_no_database(tmp_path: Path, content: bytes | None, message: str) -> None:
    file = tmp_path / "a.sqlite"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(ValueError, match=f"a.sqlite {message}"):
        report.build([file])


def test_files_cut_off_foreign_or_without_activity(tmp_path: Path) -> None:
    cut = training().write(tmp_path / "cut.sqlite")
    cut.write_bytes(cut.read_bytes()[: cut.stat().st_size // 2])
    with pytest.raises(ValueError, match=r"cut.sqlite is damaged or was cut off .* nsys export"):
        report.build([cut])
    with sqlite3.connect(tmp_path / "foreign.sqlite") as database:
        database.execute("CREATE TABLE recipes (name TEXT)")
    database.close()
    with pytest.raises(ValueError, match="no export of nsys .its tables: recipes"):
        report.build([tmp_path / "foreign.sqlite"])
    idle = NsysFile()
    idle.range("train.step 1", 0, 10)
    with pytest.raises(ValueError, match="no device activity.*--profile-step-start"):
        report.build([idle.write(tmp_path / "idle.sqlite")])
    # One good file is enough, and the others are named.
    good = training().write(tmp_path / "good.sqlite")
    found = report.build([cut, good])[0]
    assert "left out" in found["warnings"][0] and "cut.sqlite" in found["warnings"][0]


def test_text_that_is_no_utf8_is_read(tmp_path: Path) -> None:
    file = training().write(tmp_path / "run.sqlite")
    with sqlite3.connect(file) as database:
        database.execute("INSERT INTO StringIds VALUES (999, CAST(x'fffe41' AS TEXT))")
    database.close()
    assert report.build([file])[0]["ranks"][0]["coverage"]["activities"] == 9


def test_command_writes_text_json_and_page(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bad = "evil<script>alert('1')</script>&\""
    file = training()
    file.kernel(bad, 2050, 2060, launch=1990)
    file.range(bad, 1985, 1995)
    path = str(file.write(tmp_path / "run.sqlite"))
    page, numbers = tmp_path / "report.html", tmp_path / "report.json"
    words = [path, "--html", str(page), "--json", str(numbers), "--unprofiled-ms", "0.0005"]
    assert nsys_report.main(words) == 0
    out = capsys.readouterr().out
    assert "step 5 left out (the profiler starts up in it)" in out
    assert "if exposed communication were hidden: 11.8% faster" in out
    assert "takes 1.90 of the unprofiled" in out
    assert json.loads(numbers.read_text())["schema"] == 1
    text = page.read_text(encoding="utf-8")
    tree = ElementTree.fromstring(text.removeprefix("<!DOCTYPE html>\n"))
    assert "<script" not in text and "evil&lt;script&gt;" in text
    svg = tree.find(".//{http://www.w3.org/2000/svg}svg")
    assert svg is not None
    bars = {bar.get("fill") for bar in svg.iter("{http://www.w3.org/2000/svg}rect")}
    assert {COLOURS["GEMM"], COLOURS["communication: NCCL"]} <= bars
    names = {text.text for text in svg.iter("{http://www.w3.org/2000/svg}text")}
    assert {"stream 7", "stream 13", "host ranges", "train.step 6"} <= names
    assert "http" not in text.replace("http://www.w3.org/2000/svg", ""), "needs nothing else"
    assert nsys_report.main([path, "--json", "-"]) == 0
    assert json.loads(capsys.readouterr().out)["schema"] == 1


def test_command_refuses_with_one_message(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert nsys_report.main([str(tmp_path / "none.sqlite")]) == 78
    assert capsys.readouterr().err.startswith("refused: ")
    file = str(training().write(tmp_path / "run.sqlite"))
    assert nsys_report.main([file, "--html", str(tmp_path / "no" / "x.html")]) == 78
    assert "cannot be written" in capsys.readouterr().err


def test_a_report_of_nsys_is_exported_where_nsys_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """`nsys` is a stand-in here, which copies a file prepared by the test."""
    capture = tmp_path / "run.nsys-rep"
    capture.write_bytes(b"report")
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    assert nsys_report.main([str(capture)]) == 78
    assert "nsys export --type sqlite" in capsys.readouterr().err
    prepared = training().write(tmp_path / "prepared.sqlite")
    fake = tmp_path / "bin" / "nsys"
    fake.parent.mkdir()
    fake.write_text(f'#!/bin/sh\n/bin/cp "{prepared}" "$7"\n')
    fake.chmod(fake.stat().st_mode | stat.S_IXUSR)
    assert nsys_report.main([str(capture)]) == 0
    assert "nvjet_hsh" in capsys.readouterr().out
    fake.write_text("#!/bin/sh\necho bad version >&2\nexit 3\n")
    os.utime(capture, (2**31, 2**31))
    assert nsys_report.main([str(capture)]) == 78
    assert "bad version" in capsys.readouterr().err


def test_picture_of_the_docs_is_what_the_report_draws() -> None:
    root = Path(__file__).parents[2]
    committed = root / "docs" / "results" / "nsys-example.svg"
    assert committed.read_text(encoding="utf-8") == picture()
    assert "synthetic" in picture()
