"""From input files to published token files, by way of parts that outlive a kill."""

import logging
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tqdm import tqdm

from moa_megatron.data import parts, publishing, workers
from moa_megatron.data.containers import compression
from moa_megatron.data.documents import ReadReport, in_validation, read_slice
from moa_megatron.data.encoding import TextEncoder
from moa_megatron.data.inputs import Slice, SourceFile
from moa_megatron.data.parts import Options, Part, Record, Workplace
from moa_megatron.data.publishing import Publication, Published
from moa_megatron.data.token_files import pair, token_dtype
from moa_megatron.data.tokenization import train_tokenizer

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Request:
    """One preparation. Of `tokenizer_dir` and `train_tokenizer` one is None."""

    files: list[SourceFile]
    output: Path
    options: Options
    tokenizer_dir: Path | None
    train_tokenizer: int | None
    tokenizer_bytes: int = 1 << 30
    engine: str = "auto"
    workers: int = 2
    strict: bool = False
    overwrite: bool = False
    shard_tokens: int | None = None

    def prefix(self, split: str) -> Path:
        return Path(f"{self.output}-{split}") if split else self.output

    @property
    def workplace(self) -> Workplace:
        return Workplace(Path(f"{self.output}.parts"))


@dataclass(frozen=True)
class Result:
    """What stands on disk: pairs by split, with the sums over all parts, and flags to train."""

    splits: dict[str, list[Published]]
    num_bytes: Counter[str]
    report: ReadReport
    tokenizer_dir: Path
    flags: dict[str, Path]


def taken(request: Request) -> list[Path]:
    """Existing output that the request may not replace: none where it goes on after a kill."""
    if request.overwrite or request.workplace.unfinished():
        return []
    prefixes = [request.prefix(split) for split in request.options.splits]
    if request.shard_tokens:
        prefixes += [Path(f"{prefix}-00000") for prefix in prefixes]
    names = [path for prefix in prefixes for path in pair(prefix)]
    names += [publishing.manifest_path(request.output), *publishing.blend_paths(request.output)]
    if request.train_tokenizer is not None:
        names.append(publishing.tokenizer_path(request.output))
    return [path for path in names if path.exists()]


def prepare(request: Request) -> Result:
    """Prepare, or finish what an earlier run of the same request began.

    Raises:
        ValueError: unfinished parts of another request, input that changed meanwhile, no documents,
            with `strict` anything that was skipped (the parts stay: without `strict` they are
            published as they are).
        OSError: storage; published files of before are kept.
        WorkerDiedError: a worker was killed.
    """
    workplace, plan = request.workplace, _plan(request, request.files)
    with workplace.locked():
        try:
            workplace.adopt(plan)
        except ValueError:
            if not request.overwrite:
                raise
            workplace.clear()
            workplace.adopt(plan)
        tokenizer_dir = request.tokenizer_dir or _trained(request)
        sha256 = parts.tokenizer_sha256(tokenizer_dir)
        workplace.settle_tokenizer(sha256)
        encoder = TextEncoder(tokenizer_dir, request.options.append_eod, request.engine)
        if request.engine == "auto" and encoder.reason:
            logger.warning("the slower engine tokenizes: %s", encoder.reason)
        output = Publication(
            request.output, request.options.splits, token_dtype(encoder.vocab_size),
            encoder.vocab_size, sha256, request.shard_tokens, request.options.split_valid,
            None if request.tokenizer_dir else tokenizer_dir,
        )  # fmt: skip
        records = _finish_parts(request, tokenizer_dir, encoder.engine, output.dtype.itemsize)
        now = [replace(file, size=file.path.stat().st_size) for file in request.files]
        if changed := parts.changes(plan, _plan(request, now)):
            raise ValueError(
                "input changed while it was read; pass --overwrite once it is still:\n"
                + "\n".join(changed)
            )
        report = _merged(parts.cut(request.files, request.options.part_bytes), records)
        if request.strict:
            report.refuse_skipped()
        empty = [s for s in output.splits if not any(record.documents[s] for record in records)]
        try:
            splits = publishing.publish(workplace, records, output)
        except ValueError:
            if empty:
                workplace.remove()  # nothing to go on with
            raise
        workplace.remove()
    num_bytes: Counter[str] = sum((record.num_bytes for record in records), Counter())
    flags = publishing.data_flags(output, splits)
    final_dir = request.tokenizer_dir or publishing.tokenizer_path(request.output)
    return Result(splits, num_bytes, report, final_dir, flags)


def _plan(request: Request, files: list[SourceFile]) -> dict[str, Any]:
    return parts.make_plan(
        files, request.options, engine=request.engine,
        train_tokenizer=request.train_tokenizer, tokenizer_bytes=request.tokenizer_bytes,
    )  # fmt: skip


def _trained(request: Request) -> Path:
    """The tokenizer of this output, trained beside the parts unless that has been settled."""
    assert request.train_tokenizer is not None
    folder = request.workplace.folder / "tokenizer"
    settled = request.workplace.tokenizer()
    if settled is None or parts.tokenizer_sha256(folder) != settled:
        train_tokenizer(_sample(request), request.train_tokenizer, folder)
    return folder


def _sample(request: Request) -> Iterator[str]:
    """Training texts from the start of every file, about `tokenizer_bytes` of text in all."""
    left, files = request.tokenizer_bytes, len(request.files)
    with tqdm(total=left, unit="B", unit_scale=True, desc="tokenizer") as bar:
        for number, file in enumerate(request.files):
            # What small files leave goes to the rest.
            share = max(1, left // (files - number))
            taken = 0
            documents = read_slice(
                Slice(file, 0, file.size), ReadReport(), request.options.json_key,
                request.options.max_line_bytes,
            )  # fmt: skip
            for document in documents:
                if not in_validation(document.key, request.options.split_valid):
                    yield document.text
                    taken += document.num_bytes
                    if taken >= share:
                        break
            left -= taken
            bar.update(taken)
            if left <= 0:
                return


def _check_space(request: Request, itemsize: int) -> None:
    sizes = {True: 0, False: 0}
    for file in request.files:
        sizes[bool(compression(file.path))] += file.size
    warning = publishing.check_space(
        request.output.absolute().parent, sizes[False], sizes[True], itemsize
    )
    if warning:
        logger.warning("%s", warning)


def _finish_parts(
    request: Request, tokenizer_dir: Path, engine: str, itemsize: int
) -> list[Record]:
    cut = parts.cut(request.files, request.options.part_bytes)
    workplace, options = request.workplace, request.options
    found = {n: workplace.load(n, options, itemsize) for n in range(len(cut))}
    todo = [number for number, record in found.items() if record is None]
    if len(todo) < len(cut):
        logger.warning(
            "going on: %d of %d parts are finished in %s",
            len(cut) - len(todo), len(cut), workplace.folder,
        )  # fmt: skip
    else:
        _check_space(request, itemsize)
    if todo:
        job = workers.Job(cut, todo, workplace, options, tokenizer_dir, engine)
        total = sum(piece.end - piece.start for number in todo for piece in cut[number])
        with tqdm(total=total, unit="B", unit_scale=True, desc=request.output.name) as bar:
            workers.run(job, request.workers, bar.update)
    records = [found[n] or workplace.load(n, options, itemsize) for n in range(len(cut))]
    missing = [str(workplace.path(n, "", "json")) for n, r in enumerate(records) if r is None]
    if missing:
        raise OSError(f"vanished after they were written: {', '.join(missing)}")
    return [record for record in records if record is not None]


def _merged(cut: list[Part], records: list[Record]) -> ReadReport:
    """One report in the files' own lines, which a part of a cut file counts from its own start."""
    merged, lines = ReadReport(), Counter[Path]()
    for part, record in zip(cut, records, strict=True):
        path = part[0].file.path
        merged.merge(record.report, lines[path] if len(part) == 1 else 0)
        if len(part) == 1:
            lines[path] += record.report.num_lines
    return merged
