"""Makes tasks/data/species: aligned pieces of four great apes' chromosome 22 as gzip FASTA.

The alignment (Ensembl Compara, EPO, five catarrhine primates) comes from Debian's package
maffilter-examples:
    apt-get download maffilter-examples && dpkg-deb -x maffilter-examples_*.deb extracted
    python scripts/slice_apes.py extracted/usr/share/doc/maffilter/examples/Gorilla/*.maf.gz
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import json
from collections.abc import Iterator
from pathlib import Path

OUTPUT = Path(__file__).resolve().parents[1] / "tasks" / "data" / "species" / "apes.fa.gz"
SPECIES = {"Hsap": "human", "Ptro": "chimpanzee", "Ggor": "gorilla", "Ppyg": "orangutan"}
SHORTEST = 2100  # bases of a block in every species: room for windows of 2048
EVERY = 5  # one block in so many is kept, all along the chromosome
LINE = 60


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("alignment", type=Path, help="the .maf.gz of maffilter-examples")
    parser.add_argument("--output", type=Path, default=OUTPUT)
    arguments = parser.parse_args()

    long = [
        (place, block)
        for place, block in _blocks(arguments.alignment)
        if len(block) == len(SPECIES) and min(map(len, block.values())) >= SHORTEST
    ]
    lines = []
    for place, block in long[::EVERY]:
        for species, sequence in block.items():
            lines.append(f">{species}|22:{place}")
            lines += [sequence[i : i + LINE] for i in range(0, len(sequence), LINE)]
    fasta = ("\n".join(lines) + "\n").encode()
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    with (
        arguments.output.open("wb") as file,
        gzip.GzipFile(filename="", mode="wb", compresslevel=9, fileobj=file, mtime=0) as packed,
    ):
        packed.write(fasta)
    data = arguments.output.read_bytes()
    bases = sum(len(line) for line in lines if not line.startswith(">"))
    print(json.dumps({"bytes": len(data), "bases": bases, "blocks": len(long[::EVERY])}))
    print(f"sha256: {hashlib.sha256(data).hexdigest()}")


def _blocks(path: Path) -> Iterator[tuple[str, dict[str, str]]]:
    """(place on the human chromosome, species -> its bases without gaps), block by block.

    Upper case all: repeats are in lower case in some of the assemblies alone, which would tell the
    species.
    """
    block: dict[str, str] = {}
    place = ""
    with gzip.open(path, "rt", encoding="ascii") as file:
        for line in file:
            if line.startswith("s "):
                _, source, start, _, strand, _, text = line.split()
                species = SPECIES.get(source.partition(".")[0])
                if species is not None and strand == "+":
                    block[species] = text.replace("-", "").upper()
                if species == "human":
                    place = start
            elif block:
                yield place, block
                block = {}
    if block:
        yield place, block


if __name__ == "__main__":
    main()
