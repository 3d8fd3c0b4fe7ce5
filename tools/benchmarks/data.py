#!/usr/bin/env python3
"""Time tools/prepare_data.py against Megatron-LM's two preprocessing scripts, in turn.

The text is drawn from Python's standard library; every script gets the same file, tokenizer and
number of processes, and must give the same tokens. Peak memory is the sum over all processes of a
command; seconds are those of the best round. On a busy host compare those on cores. The last line
is one JSON object.
"""

import argparse
import hashlib
import json
import os
import random
import sys
import sysconfig
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

import psutil

from moa_megatron.data.tokenization import train_tokenizer

ROOT = Path(__file__).resolve().parents[2]
EXAMPLE = """example:
  tools/benchmarks/data.py --upstream ../Megatron-LM --megabytes 200 --workers 2 --rounds 3
"""


def write_text(path: Path, megabytes: int) -> None:
    """JSON lines of 200 to 8,000 characters, cut from the standard library's files."""
    root = Path(sysconfig.get_paths()["stdlib"])
    files = (file for file in sorted(root.rglob("*.py")) if "site-packages" not in file.parts)
    texts = [text for file in files if (text := file.read_text("utf-8", "ignore")).strip()]
    generator = random.Random(0)
    size = 0
    with path.open("w", encoding="utf-8") as out:
        while size < megabytes * 1_000_000:
            text = generator.choice(texts)
            start = generator.randrange(len(text))
            text = text[start : start + generator.randrange(200, 8000)]
            if text.strip():
                size += out.write(json.dumps({"text": text, "url": f"https://example.org/{size}"}))
                size += out.write("\n")


def commands(
    upstream: Path | None, text: Path, tokenizer: Path, folder: Path, workers: int
) -> dict[str, tuple[list[str], Path]]:
    """By name a command and the .bin it writes."""
    ours = [str(ROOT / "tools" / "prepare_data.py"), str(text), "--tokenizer", str(tokenizer)]
    ours += ["--workers", str(workers), "--overwrite", "--part-bytes", str(16 << 20)]
    found = {}
    for engine in ("gigatoken", "tokenizers"):
        words = [*ours, "--output", str(folder / engine), "--engine", engine]
        found[f"ours, {engine}"] = (words, folder / f"{engine}.bin")
    if upstream is not None:
        theirs = ["--input", str(text), "--tokenizer-type", "HuggingFaceTokenizer"]
        theirs += ["--tokenizer-model", str(tokenizer), "--append-eod"]
        for script, flags in (
            ("preprocess_data_fast", ["--use-gigatoken"]),
            ("preprocess_data", ["--workers", str(workers)]),
        ):
            prefix = folder / script
            words = [str(upstream / "tools" / f"{script}.py"), *theirs, *flags]
            output = folder / f"{script}_text_document.bin"
            found[script] = ([*words, "--output-prefix", str(prefix)], output)
    return found


def measure(command: list[str], folder: Path, upstream: Path | None) -> tuple[float, float, int]:
    """Seconds on the wall and on all cores, and peak bytes, of a command with its processes."""
    # Each side imports its own tree first; packages beyond the environment come after it.
    first = upstream if upstream and str(upstream) in command[0] else ROOT
    paths = [str(first), *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}
    with (folder / "log").open("w") as log:
        before, start = os.times(), time.perf_counter()
        process = psutil.Popen([sys.executable, *command], env=environment, stdout=log, stderr=log)
        peak = 0
        while process.poll() is None:
            peak = max(peak, resident(process))
            time.sleep(0.1)
        seconds, after = time.perf_counter() - start, os.times()
    spent = after.children_user + after.children_system
    spent -= before.children_user + before.children_system
    if process.returncode:
        raise SystemExit(f"{' '.join(command)}\n{(folder / 'log').read_text()[-3000:]}")
    return seconds, spent, peak


def resident(process: psutil.Process) -> int:
    total = 0
    for one in (process, *process.children(recursive=True)):
        try:
            total += one.memory_full_info().uss
        except psutil.Error:  # it has just ended
            continue
    return total


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLE, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--upstream", type=Path, metavar="DIR", help="a checkout of Megatron-LM")
    parser.add_argument("--megabytes", type=int, default=200, help="of JSON lines (default: 200)")
    parser.add_argument("--vocab-size", type=int, default=32000)
    parser.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--rounds", type=int, default=3, help="all commands in turn, as often")
    parser.add_argument(
        "--skip", nargs="*", default=[], metavar="NAME", help="commands to leave out"
    )
    args = parser.parse_args()
    upstream = args.upstream.resolve() if args.upstream else None
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        text, tokenizer = folder / "text.jsonl", folder / "tokenizer"
        write_text(text, args.megabytes)
        with text.open(encoding="utf-8") as lines:
            sample = (json.loads(line)["text"] for _, line in zip(range(5000), lines))
            train_tokenizer(sample, args.vocab_size, tokenizer)
        found = commands(upstream, text, tokenizer, folder, args.workers)
        chosen = {name: words for name, words in found.items() if name not in args.skip}
        walls: dict[str, list[float]] = {name: [] for name in chosen}
        cores: dict[str, list[float]] = {name: [] for name in chosen}
        peaks = dict.fromkeys(chosen, 0)
        digests = {}
        for number in range(args.rounds):
            for name, (command, output) in chosen.items():
                wall, core, peak = measure(command, folder, upstream)
                walls[name].append(wall)
                cores[name].append(core)
                peaks[name] = max(peak, peaks[name])
                digests[name] = hashlib.sha256(output.read_bytes()).hexdigest()
                print(
                    f"round {number} {name}: {wall:.1f} s, {core:.1f} s on cores, {peak >> 20} MiB",
                    flush=True,
                )
        if len(set(digests.values())) != 1:
            raise SystemExit(f"the tokens differ: {digests}")
        megabytes = text.stat().st_size / 1e6
    report = {
        "megabytes": round(megabytes),
        "workers": args.workers,
        "versions": {name: version(name) for name in ("tokenizers", "numpy", "megatron-core")},
        "peak_mib": {name: peak >> 20 for name, peak in peaks.items()},
    }
    for title, spent in (("wall", walls), ("cores", cores)):
        best = {name: min(found) for name, found in spent.items()}
        theirs = [best[name] for name in best if not name.startswith("ours")]
        report[f"{title}_seconds"] = {name: round(found, 2) for name, found in best.items()}
        report[f"{title}_throughput_over_best_upstream"] = {
            name: round(min(theirs) / found, 2) for name, found in best.items() if theirs
        }
    print(json.dumps(report))


if __name__ == "__main__":
    main()
