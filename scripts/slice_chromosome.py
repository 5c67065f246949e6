"""Makes tasks/data/dna: a slice of human chromosome 20 (GRCh37) as gzip FASTA.

The chromosome comes from Debian's package vt-examples:
    apt-get download vt-examples && dpkg-deb -x vt-examples_*.deb extracted
    python scripts/slice_chromosome.py extracted/usr/share/doc/vt/examples/ref/20.fa.gz
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import sys
from pathlib import Path

OUTPUT = Path(__file__).resolve().parents[1] / "tasks" / "data" / "dna" / "chr20_slice.fa.gz"
CHROMOSOME_MD5 = "0dec9660ec1efaaf33281c0d5ea2560f"  # the published one of GRCh37's chr20
START, END = 40_000_000, 44_000_000  # zero-based, half-open; 10 Mbp right of the centromere's gap
LINE = 60


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("chromosome", type=Path, help="20.fa.gz of vt-examples")
    parser.add_argument("--output", type=Path, default=OUTPUT)
    arguments = parser.parse_args()

    header, _, body = gzip.decompress(arguments.chromosome.read_bytes()).partition(b"\n")
    chromosome = body.replace(b"\n", b"").upper()
    found = hashlib.md5(chromosome).hexdigest()
    if found != CHROMOSOME_MD5:
        sys.exit(
            f"{arguments.chromosome}: md5 of the sequence is {found}, not that of GRCh37's "
            f"chromosome 20, {CHROMOSOME_MD5}; take the file from vt-examples"
        )
    piece = chromosome[START:END]
    assert set(piece) == set(b"ACGT"), "the slice was chosen free of gaps"

    name = header.lstrip(b">").decode()
    lines = [piece[i : i + LINE] for i in range(0, len(piece), LINE)]
    fasta = f">{name}:{START + 1}-{END} GRCh37\n".encode() + b"\n".join(lines) + b"\n"
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    with (
        arguments.output.open("wb") as file,
        gzip.GzipFile(filename="", mode="wb", compresslevel=9, fileobj=file, mtime=0) as packed,
    ):
        packed.write(fasta)
    print(f"{arguments.output}: {arguments.output.stat().st_size} bytes")
    print(f"md5 of the slice's sequence: {hashlib.md5(piece).hexdigest()}")


if __name__ == "__main__":
    main()
