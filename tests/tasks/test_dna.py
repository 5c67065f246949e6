"""DNA: reading FASTA and BED, splits that cannot meet, gaps that are never scored, clear errors."""

import dataclasses
import gzip
import hashlib
import os
import stat
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from seqbench.tasks.base import IGNORE, SPLITS, TaskError
from seqbench.tasks.dna import (
    BGZIP_END,
    LETTERS,
    SLICE,
    Dna,
    DnaConfig,
    Genome,
    _merged,
    _without,
)
from seqbench.tasks.fetch import fetch, registry, verify
from seqbench.tasks.streams import Windows

RNG = np.random.default_rng(0)


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SEQBENCH_DATA", str(tmp_path / "cache"))
    return tmp_path / "cache"


def _random_dna(size: int) -> str:
    return "".join(RNG.choice(list("ACGT"), size))


def _fasta(path: Path, records: dict[str, str], end: str = "\n", width: int = 50) -> Path:
    text = "".join(
        f">{name} some words\n" + "".join(s[i : i + width] + "\n" for i in range(0, len(s), width))
        for name, s in records.items()
    )
    path.write_text(text.removesuffix("\n") + end)
    return path


def _task(fasta: Path | None, length: int = 8, **config: Any) -> Dna:
    task = Dna(DnaConfig(fasta=None if fasta is None else str(fasta), length=length, **config))
    task.prepare()
    return task


def _letters(ids: Any) -> str:
    return "".join(LETTERS[i] for i in ids)


def _bases(task: Dna, name: str) -> str:
    start, end = task._genome.records[name]
    return _letters(task._genome.bases[start:end])


def _covered(task: Dna, split: Any) -> set[int]:
    return {i for start, end in task._regions[split] for i in range(start, end)}


def test_targets_are_the_next_bases(tmp_path: Path) -> None:
    sequence = _random_dna(2000)
    inputs, targets = _task(_fasta(tmp_path / "a.fa", {"a": sequence})).batch("train", 0, 16)
    assert torch.equal(inputs[:, 1:], targets[:, :-1])
    for row, last in zip(inputs.tolist(), targets[:, -1].tolist()):
        assert _letters([*row, last]) in sequence


def test_a_record_is_partitioned_by_position(tmp_path: Path) -> None:
    records = {"a": _random_dna(1003), "b": _random_dna(500)}
    task = _task(_fasta(tmp_path / "a.fa", records))
    covered = [_covered(task, split) for split in SPLITS]
    assert not covered[0] & covered[1] and not covered[0] & covered[2]
    assert not covered[1] & covered[2]
    bases = {i for start, end in task._genome.records.values() for i in range(start, end)}
    assert covered[0] | covered[1] | covered[2] == bases and len(bases) == 1503
    assert [round(len(c) / 1503, 2) for c in covered] == [0.8, 0.1, 0.1]


def test_no_window_crosses_records(tmp_path: Path) -> None:
    task = _task(_fasta(tmp_path / "a.fa", {"a": "A" * 200, "c": "C" * 200}))
    bed = tmp_path / "all.bed"  # whole records touch in the file, and must not become one
    bed.write_text("a 0 160 train\na 160 200 test\nc 0 40 test\nc 40 80 valid\nc 80 200 train\n")
    for each in (task, _task(tmp_path / "a.fa", bed=str(bed))):
        for split in SPLITS:
            for index in range(each.num_batches(split, 4) or 20):
                inputs, targets = each.batch(split, index, 4)
                whole = torch.cat([inputs, targets], dim=1)
                assert (whole.min(1).values == whole.max(1).values).all()


def test_gaps_are_never_scored_and_no_window_is_all_gap(tmp_path: Path) -> None:
    piece = "N" * 100 + _random_dna(30) + "NN" + _random_dna(9) + "N" * 7 + _random_dna(12)
    task = _task(_fasta(tmp_path / "a.fa", {"a": piece * 20}), length=8)
    for split in SPLITS:
        for index in range(task.num_batches(split, 8) or 100):
            inputs, targets = task.batch(split, index, 8)
            assert (targets != 4).all()
            assert (targets != IGNORE).any(dim=1).all()
            following = inputs[:, 1:]
            assert ((targets[:, :-1] == IGNORE) == (following == 4)).all()
    assert any((task.batch("train", i, 8).inputs == 4).any() for i in range(20))  # short gaps stay


@pytest.mark.parametrize("split", ["validation", "test"])
def test_a_pass_scores_each_base_at_most_once(tmp_path: Path, split: Any) -> None:
    sequence = _random_dna(6000)
    task = _task(_fasta(tmp_path / "a.fa", {"a": sequence}), length=32)
    scored = np.zeros(6000, dtype=int)
    for index in range(task.num_batches(split, 4) or 0):
        for row, wanted in zip(*task.batch(split, index, 4)):
            found = sequence.find(_letters([*row.tolist(), int(wanted[-1])]))
            scored[found + 1 : found + 33] += 1
    assert scored.max() == 1 and scored.sum() == 32 * 18


def test_lower_case_ambiguity_codes_and_a_missing_last_newline_are_read(tmp_path: Path) -> None:
    sequence = "acgtnACGTN" * 30 + "RYSWKMBDHV" + "acgt" * 60 + "ac"
    task = _task(_fasta(tmp_path / "a.fa", {"a": sequence}, end=""))
    read = _bases(task, "a")
    assert read == "ACGTNACGTN" * 30 + "N" * 10 + "ACGT" * 60 + "AC"


def test_plain_gzip_and_windows_line_ends_read_the_same(tmp_path: Path) -> None:
    plain = _fasta(tmp_path / "a.fa", {"a": _random_dna(1000), "b": _random_dna(700)})
    packed = tmp_path / "packed.fa.gz"
    # As bgzip writes it: several gzip members, one after another.
    text = plain.read_bytes()
    packed.write_bytes(gzip.compress(text[:777]) + gzip.compress(text[777:]))
    crlf = tmp_path / "crlf.fa"
    crlf.write_bytes(text.replace(b"\n", b"\r\n"))
    tasks = [_task(path) for path in (plain, packed, crlf)]
    assert len({task.fingerprint() for task in tasks}) == 1
    assert len({_bases(task, "b") for task in tasks}) == 1


def _bgzip(text: bytes, block: int = 200) -> bytes:
    """As the bgzip command writes: members with their own size in a field, an empty one last."""
    out = b""
    for first in range(0, len(text) + block, block):
        piece = text[first : first + block]
        deflate = zlib.compressobj(6, zlib.DEFLATED, -15)
        data = deflate.compress(piece) + deflate.flush()
        head = b"\x1f\x8b\x08\x04" + bytes(5) + b"\xff\x06\x00BC\x02\x00"
        out += head + struct.pack("<H", len(data) + 25) + data
        out += struct.pack("<II", zlib.crc32(piece), len(piece))
    return out


def test_bgzip_and_plain_text_under_any_name_read_the_same(tmp_path: Path) -> None:
    plain = _fasta(tmp_path / "a.fa", {"a": _random_dna(1000)})
    text = plain.read_bytes()
    blocks = _bgzip(text)
    assert blocks.endswith(BGZIP_END) and gzip.decompress(blocks) == text
    paths = [_written(tmp_path / name, blocks) for name in ("b.fa.bgz", "c.fa")]
    paths += [_written(tmp_path / name, text) for name in ("d.fa.gz", "e.txt")]
    assert {_task(path).fingerprint() for path in paths} == {_task(plain).fingerprint()}


def test_nothing_is_written_beside_a_read_only_file(tmp_path: Path, own_cache: Path) -> None:
    folder = tmp_path / "readonly"
    folder.mkdir()
    fasta = _fasta(folder / "a.fa", {"a": _random_dna(500)})
    fasta.chmod(stat.S_IRUSR)
    folder.chmod(stat.S_IRUSR | stat.S_IXUSR)
    try:
        _task(fasta)
        assert os.listdir(folder) == ["a.fa"]
    finally:
        folder.chmod(stat.S_IRWXU)
    (encoded,) = (own_cache / "dna").iterdir()  # and no temporary folder is left
    assert sorted(p.name for p in encoded.iterdir()) == ["bases.u1", "gaps.npy", "records.json"]


BED = """# a comment
track name=split
a\t0\t400\ttrain\textra
a 400 500 valid
b 0 300 test
b\t250\t600\ttrain
b 550 650 validation
"""


def test_a_bed_file_splits(tmp_path: Path) -> None:
    fasta = _fasta(tmp_path / "a.fa", {"a": _random_dna(500), "b": _random_dna(700)})
    bed = tmp_path / "split.bed"
    bed.write_text(BED)
    task = _task(fasta, bed=str(bed))
    b = task._genome.records["b"][0]
    # Where intervals of two splits overlap, test keeps its bases, then validation.
    assert task._regions == {
        "train": [(0, 400), (b + 300, b + 550)],
        "validation": [(400, 500), (b + 550, b + 650)],
        "test": [(b, b + 300)],
    }
    assert task.fingerprint() != _task(fasta).fingerprint()


def test_chromosomes_split(tmp_path: Path) -> None:
    fasta = _fasta(tmp_path / "a.fa", {f"chr{i}": _random_dna(100) for i in range(4)})
    task = _task(fasta, validation_chromosomes=("chr1",), test_chromosomes=("chr3",))
    records = task._genome.records
    assert task._regions == {
        "train": [records["chr0"], records["chr2"]],
        "validation": [records["chr1"]],
        "test": [records["chr3"]],
    }


def test_the_packaged_slice_is_the_one_its_readme_describes() -> None:
    task = _task(None, length=256)
    ((name, (start, end)),) = task._genome.records.items()
    assert name == "20:40000001-44000000" and end - start == 4_000_000
    md5 = hashlib.md5(_bases(task, name).encode()).hexdigest()
    assert md5 in (fetch(SLICE).parent / "README.md").read_text(encoding="utf-8")
    assert verify(SLICE).startswith("ok")
    assert task._genome.gaps == []


def test_a_damaged_slice_is_not_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "slice.fa.gz"
    file.write_bytes(b"x" + fetch(SLICE).read_bytes()[1:])
    damaged = dataclasses.replace(registry()[SLICE], embedded=lambda: file)
    monkeypatch.setattr("seqbench.tasks.fetch._embedded", lambda: [damaged])
    with pytest.raises(TaskError, match="corrupt"):
        _task(None)


def test_a_cache_that_cannot_be_written_says_what_to_set(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("SEQBENCH_DATA", str(tmp_path / "file"))
    with pytest.raises(TaskError, match="set SEQBENCH_DATA"):
        _task(_fasta(tmp_path / "a.fa", {"a": _random_dna(500)}))


def test_markov_baselines_of_the_slice() -> None:
    found = _task(None, length=256).baselines()
    assert list(found) == [f"order-{k}" for k in range(9)]
    values = list(found.values())
    assert values == sorted(values, reverse=True)
    assert 1.95 < found["order-0"] < 2.0 and 1.8 < found["order-8"] < 1.9


def _written(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


GOOD = b">a\n" + b"ACGT" * 100 + b"\n"


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda d: d / "none.fa", "no such file"),
        (lambda d: d, "no such file"),
        (lambda d: _written(d / "e.fa", b""), "not a FASTA file"),
        (lambda d: _written(d / "h.fa", b"ACGT\n" * 50), "not a FASTA file"),
        (lambda d: _written(d / "o.fa", b">a\n>b\n"), "no record has any base"),
        (lambda d: _written(d / "r.fa", b">a\nACGT\nACGTACGT\nAC\n"), "not a FASTA file"),
        (lambda d: _written(d / "t.fa", b">a\nACGT\nACGT\n\n\n"), "not a FASTA file"),
        (lambda d: _written(d / "d.fa", b">a\nAC\n>a\nAC\n"), "Duplicate key"),
        (lambda d: _written(d / "x.fa", bytes(range(128, 256)) * 9), "not a FASTA file"),
        (lambda d: _written(d / "p.fa", b">p\nGATKMKVLE*\n"), "record 'p' has 'L' at base 8"),
        (lambda d: _written(d / "u.fa", b">p\nACGU\n"), "record 'p' has 'U' at base 4"),
        (lambda d: _written(d / "c.fa.gz", gzip.compress(GOOD)[:-12]), "cut short or damaged"),
        (lambda d: _written(d / "b.fa.gz", gzip.compress(GOOD)[:-8] + b"x" * 8), "cut short or"),
        (lambda d: _written(d / "g.fa.gz", _bgzip(GOOD)[:-40]), "cut short"),
        (lambda d: _written(d / "m.fa.gz", _bgzip(GOOD)[:-28]), "its end mark is missing"),
        (lambda d: _written(d / "z.fa.gz", b""), "not a FASTA file"),
        (lambda d: _written(d / "y.fa.gz", gzip.compress(b"")), "not a FASTA file"),
        (lambda d: _written(d / "l.fa", b">p\ngatkmkvle\n"), "record 'p' has 'L' at base 8"),
        (lambda d: _written(d / "n.fa", b">a\n" + b"N" * 400 + b"\n"), "no stretch of bases"),
        (lambda d: _written(d / "s.fa", b">a\nACGTACGTACGTACGT\n"), "no stretch of bases"),
    ],
)
def test_a_bad_fasta_is_one_line_that_names_it(
    tmp_path: Path, own_cache: Path, make: Any, said: str
) -> None:
    path = make(tmp_path)
    for _ in range(2):  # nothing half-made is left to be found the second time
        with pytest.raises(TaskError) as error:
            _task(path)
        message = str(error.value)
        assert said in message and f"task.fasta={str(path)!r}" in message
        assert "\n" not in message and "; " in message
        assert str(own_cache) not in message


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("a 0 501 test", "line 1: 0 to 501 of 'a', which has 500 bases"),
        ("a 10 10 test", "line 1: 10 to 10"),
        ("chr_a 0 100 test", "'chr_a' is no record of"),
        ("a zero 100 test", "wants chromosome, start, end, split"),
        ("a 0 100", "wants chromosome, start, end, split"),
        ("a 0 100 holdout", "split 'holdout': valid are test, train, val, valid, validation"),
        ("a 0 400 train\na 400 500 test", "the validation split has no stretch"),
        ("", "the train split has no stretch"),
    ],
)
def test_a_bad_bed_is_one_line_that_names_it(tmp_path: Path, line: str, said: str) -> None:
    fasta = _fasta(tmp_path / "a.fa", {"a": _random_dna(500)})
    bed = tmp_path / "split.bed"
    bed.write_text(line)
    with pytest.raises(TaskError) as error:
        _task(fasta, bed=str(bed))
    assert said in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"bed": "/none.bed"}, "task.bed='/none.bed': No such file"),
        ({"test_chromosomes": ("a",)}, "task.validation_chromosomes is empty"),
        ({"test_chromosomes": ("a",), "validation_chromosomes": ("a",)}, "'a' is named twice"),
        ({"test_chromosomes": ("a",), "validation_chromosomes": ("b2",)}, "did you mean b"),
        ({"test_chromosomes": ("a",), "bed": "x.bed"}, "leave the other out"),
        ({"length": 0}, "task.length=0"),
    ],
)
def test_a_config_that_cannot_be_is_refused(tmp_path: Path, config: Any, said: str) -> None:
    fasta = _fasta(tmp_path / "a.fa", {"a": _random_dna(300), "b": _random_dna(300)})
    with pytest.raises(TaskError) as error:
        _task(fasta, **{"length": 8, **config})
    assert said in str(error.value) and "\n" not in str(error.value)


def test_intervals_less_intervals_is_what_sets_say() -> None:
    for _ in range(200):
        cuts = sorted(RNG.choice(60, 8, replace=False).tolist())
        intervals = list(zip(cuts[::2], cuts[1::2]))
        holes = _merged([(a, a + int(RNG.integers(1, 9))) for a in RNG.integers(0, 60, 5).tolist()])
        left = _without(intervals, holes)
        expected = {i for a, b in intervals for i in range(a, b)}
        expected -= {i for a, b in holes for i in range(a, b)}
        assert {i for a, b in left for i in range(a, b)} == expected
        assert sum(b - a for a, b in left) == len(expected) and all(a < b for a, b in left)


def test_segments_are_cut_as_the_paper_cuts_them(tmp_path: Path) -> None:
    sequence = _random_dna(1000)
    fasta = _fasta(tmp_path / "a.fa", {"a": sequence})
    bed = tmp_path / "split.bed"
    bed.write_text("a 100 200 train\na 300 400 train\na 500 600 valid\na 700 800 test\n")
    short = _task(fasta, length=32, bed=str(bed), sampling="segments")
    starts = [100, 132, 164, 300, 332, 364]
    assert sorted(short._windows["train"]._cuts.tolist()) == starts
    rows = torch.cat([short.batch("train", i, 4).inputs for i in range(3)])  # two epochs of six
    seen = sorted(sequence.index(_letters(row)) for row in rows.tolist())
    assert seen == sorted(starts * 2)
    long = _task(fasta, length=150, bed=str(bed), sampling="segments")
    # A window that starts with its segment, and one that ends with it.
    assert sorted(long._windows["train"]._cuts.tolist()) == [49, 100, 249, 300]
    assert len(long._windows["test"]) == 2


def test_segments_leave_out_windows_of_n_alone_and_beyond_the_record(tmp_path: Path) -> None:
    sequence = _random_dna(100) + "N" * 100 + _random_dna(300)
    fasta = _fasta(tmp_path / "a.fa", {"a": sequence})
    bed = tmp_path / "split.bed"
    bed.write_text("a 0 250 train\na 250 370 valid\na 380 500 test\n")
    for length in (16, 140):
        task = _task(fasta, length=length, bed=str(bed), sampling="segments")
        for split in SPLITS:
            for row in task.batch(split, 0, 64).targets:
                assert (row != IGNORE).any()
    assert task._windows["test"]._cuts.tolist() == [359]  # from 380 it would leave the record


def test_segments_of_two_splits_that_share_bases_are_refused(tmp_path: Path) -> None:
    fasta = _fasta(tmp_path / "a.fa", {"a": _random_dna(500)})
    bed = tmp_path / "split.bed"
    bed.write_text("a 0 300 train\na 250 350 valid\na 400 500 test\n")
    with pytest.raises(TaskError, match="share bases"):
        _task(fasta, bed=str(bed), sampling="segments")


def test_half_of_the_train_windows_come_from_the_other_strand(tmp_path: Path) -> None:
    sequence = _random_dna(3000)
    task = _task(_fasta(tmp_path / "a.fa", {"a": sequence}), length=24, reverse_complement=True)
    other = sequence[::-1].translate(str.maketrans("ACGT", "TGCA"))
    rows = [_letters(row) for row in task.batch("train", 0, 200).inputs.tolist()]
    strands = [row in sequence for row in rows]
    assert all(row in sequence or row in other for row in rows)
    assert 60 < sum(strands) < 140
    assert all(_letters(r) in sequence for r in task.batch("test", 0, 8).inputs.tolist())


def test_the_warm_up_doubles_the_length_at_the_same_number_of_bases(tmp_path: Path) -> None:
    fasta = _fasta(tmp_path / "a.fa", {"a": _random_dna(3000)})
    task = _task(fasta, length=128, warmup_from=32)
    shapes = [tuple(task.batch("train", 0, 4, stage=s).inputs.shape) for s in (0, 1, None)]
    assert shapes == [(16, 32), (8, 64), (4, 128)] and task.num_stages == 2
    with pytest.raises(TaskError, match="warmup_from=128"):
        _task(fasta, length=128, warmup_from=128)


@pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="mapped memory needs Linux")
def test_what_was_read_of_a_genome_does_not_stay_in_memory(tmp_path: Path) -> None:
    file, size = tmp_path / "bases.u1", 2**25
    file.write_bytes(bytes(size))
    bases = np.memmap(file, dtype=np.uint8, mode="r")
    genome = Genome(where="", bases=bases, records={"a": (0, size)}, gaps=[], sha256="")

    def resident() -> int:
        lines = iter(Path("/proc/self/smaps").read_text().splitlines())
        found = next(line for line in lines if line.endswith(str(file)))
        assert found
        return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("Rss:"))

    assert int(bases[:: 2**12].sum()) == 0 and resident() > size // 2  # as plain reading leaves it
    windows = Windows([(0, size)], 2**13)
    for first in range(0, len(windows), 64):
        genome.read(windows, windows.fixed(first, 64))
    assert resident() < size // 8
