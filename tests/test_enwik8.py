"""enwik8: the one file that it is, its splits and symbols, and how it is fetched. On a small file in its place."""

from __future__ import annotations

import hashlib
import io
import re
import threading
import zipfile
from http.server import BaseHTTPRequestHandler, HTTPServer

import numpy as np
import pytest

from lab.config import ConfigError
from lab.tasks import Enwik8, download, enwik8, prepared

TEXT = "".join(f'<page id="{i}">\n<title>Größe {i * i}</title>\n</page>\n' for i in range(60)).encode()[:2000]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The data folder, with a small file in place of enwik8."""
    for name, value in (("SIZE", len(TEXT)), ("SHA256", hashlib.sha256(TEXT).hexdigest()), ("SYMBOLS", len(set(TEXT)))):
        monkeypatch.setattr(enwik8, name, value)
    monkeypatch.setenv("LAB_DATA", str(tmp_path / "data"))
    (tmp_path / "data").mkdir()
    (tmp_path / "data/enwik8").write_bytes(TEXT)
    return tmp_path / "data"


def corpus(**changes):
    return Enwik8(**{"seq_len": 16, **changes})


def test_what_is_published():
    assert (enwik8.SIZE, enwik8.SYMBOLS, enwik8.ZIPPED) == (10**8, 205, 36_445_475)
    assert enwik8.SHA256 == "2b49720ec4d78c3c9fabaee6e4179a5e997302b3a70029f30f2d582218c024a8"


def test_90_5_and_5_per_cent_in_the_order_of_the_file(folder):
    task = corpus()
    parts = {name: task.bytes_of(name).tobytes() for name in ("train", "val", "test")}
    assert [len(part) for part in parts.values()] == [1800, 100, 100] and b"".join(parts.values()) == TEXT
    assert task.facts() == {"sha256": enwik8.SHA256, "bytes": 2000}
    (folder / "enwik8").unlink()
    assert corpus().facts() == task.facts(), "once prepared, the file is not needed"
    references = task.references("test")
    assert references["uniform"] == 8 > references["unigram"] and {"gzip_9", "xz_9"} < set(references)


def test_a_limit_takes_the_beginning_and_says_so(folder):
    task = corpus(limit_bytes=1000)
    parts = [task.bytes_of(name).tobytes() for name in ("train", "val", "test")]
    assert [len(part) for part in parts] == [900, 50, 50] and b"".join(parts) == TEXT[:1000]
    assert task.facts()["limit_bytes"] == 1000 and task.facts()["sha256"] != corpus().facts()["sha256"]


def test_the_bytes_that_occur(folder):
    n = len(set(TEXT))
    task, raw = corpus(vocab_size=n, limit_bytes=400), corpus(limit_bytes=400)
    tokens = task.bytes_of("train")
    assert tokens.max() < n and bytes(sorted(set(TEXT))[token] for token in tokens) == raw.bytes_of("train").tobytes()
    assert task.decode(tokens.tolist()) == raw.decode(raw.bytes_of("train").tolist())
    assert task.decode(task.encode("Größe\n")) == "Größe\n"
    assert task.decode([int(task.split("train").batch([0]).inputs[0, 0])]) == "\n", "what the first byte is predicted from"
    assert task.encoding == f"index into the {n} bytes that occur in enwik8, which are UTF-8, in order: {sorted(set(TEXT))}"
    assert raw.encoding == "bytes of UTF-8"
    with pytest.raises(ConfigError, match="the byte 0x7e does not occur in enwik8"):
        task.encode("~")
    assert task.references("test")["gzip_9"] == raw.references("test")["gzip_9"]
    assert task.references("test")["uniform"] == pytest.approx(np.log2(n))
    restored = corpus(vocab_size=n)
    restored.restore(task.stored())
    (folder / "enwik8").unlink()
    assert restored.decode(task.encode("Größe")) == "Größe", "without the data"


def test_a_missing_file_is_one_sentence(folder):
    (folder / "enwik8").unlink()
    sentence = f"task.path: there is no file {folder}/enwik8: put the file enwik8 there (2,000 bytes, from https://mattmahoney.net/dc/"
    with pytest.raises(ConfigError, match=re.escape(sentence)):
        corpus().split("train")
    with pytest.raises(ConfigError, match="task.path: there is no file /nowhere/else: .* name it with task.path=FILE"):
        corpus(path="/nowhere/else").split("train")
    (folder / "mine").write_bytes(TEXT)
    assert corpus(path=str(folder / "mine")).facts()["bytes"] == 2000


def test_another_file_is_refused(folder, monkeypatch):
    (folder / "enwik8").write_bytes(TEXT[:-1] + b"x")
    with pytest.raises(ConfigError, match="has the SHA-256 .*, enwik8 has .*: it is another file"):
        corpus().split("train")
    (folder / "enwik8").write_bytes(TEXT[:-1])
    with pytest.raises(ConfigError, match="has 1,999 bytes, enwik8 has 2,000: it is another file$"):
        corpus().split("train")
    monkeypatch.setattr(enwik8, "ZIPPED", 1999)
    with pytest.raises(ConfigError, match="it is the archive, which holds it: unzip"):
        corpus().split("train")
    assert not list(folder.glob("*.bin"))


@pytest.mark.parametrize(
    ("changes", "sentence"), [({"vocab_size": 100}, "task.vocab_size must be 256"), ({"limit_bytes": 3}, "limit_bytes")]
)
def test_impossible_values_say_what_would_be_right(folder, changes, sentence):
    with pytest.raises(ValueError, match=sentence):
        corpus(**changes)


# ----------------------------------------------------------------------- the download


CENTRAL = 10_000  # stands for where the second description of the file begins in an archive


def archive(content, method=zipfile.ZIP_STORED):
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", method) as packed:
        packed.writestr("enwik8", content)
    return file.getvalue()


@pytest.fixture
def server(folder, monkeypatch):
    """A server of the archive, which breaks off after `server.breaks` bytes; `server.asked` are the ranges that were asked for."""
    (folder / "enwik8").unlink()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):  # noqa: N802
            asked = self.headers["Range"]
            server.asked.append(asked)
            first = int(asked.removeprefix("bytes=").removesuffix("-"))
            self.send_response(206 if server.resumes else 200)
            self.end_headers()
            body = server.content[first if server.resumes else 0 :]
            self.wfile.write(body if server.breaks is None else body[: server.breaks])

        def log_message(self, *arguments):
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    server.content, server.asked, server.breaks, server.resumes = archive(TEXT), [], None, True
    monkeypatch.setattr(enwik8, "URL", f"http://127.0.0.1:{server.server_port}/enwik8.zip")
    monkeypatch.setattr(enwik8, "ZIPPED", len(server.content))
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.mark.parametrize("resumes", [True, False])
def test_a_download_goes_on_after_a_break(server, folder, resumes):
    server.resumes, server.breaks = resumes, 700
    sentence = r"could not be fetched \(it ended after 700 bytes\); 700 of 2,1.. bytes are in .*part, and the same command goes on"
    with pytest.raises(ConfigError, match=sentence):
        corpus(download=True).split("train")
    assert not (folder / "enwik8").exists()
    server.breaks = None
    assert corpus(download=True).facts()["bytes"] == 2000
    assert server.asked == ["bytes=0-", "bytes=700-"] and (folder / "enwik8").read_bytes() == TEXT
    assert not list(folder.glob("*.part"))


def test_a_download_is_not_begun_unasked_and_has_a_time_limit(server, folder, monkeypatch):
    with pytest.raises(ConfigError, match="task.path: there is no file"):
        corpus().split("train")
    assert server.asked == []
    monkeypatch.setattr(enwik8, "SECONDS", -1)
    with pytest.raises(ConfigError, match="not done after -1 seconds"):
        corpus(download=True).split("train")


def test_what_is_no_archive_is_not_kept(server, folder):
    server.content = b"<html>not here</html>" + bytes(len(server.content) - 21)
    with pytest.raises(ConfigError, match="task.download: what .* sends is no archive with enwik8"):
        corpus(download=True).split("train")
    assert list(folder.glob("enwik8*")) == list(folder.glob("*.lock"))


@pytest.mark.parametrize(
    ("edits", "sentence"),
    [
        ({36: 0xFF}, "invalid block type"),  # the first byte of the content: zlib.error
        ({6: 1, CENTRAL + 8: 1}, "encrypted"),  # RuntimeError
        ({8: 99, CENTRAL + 10: 99}, "compression"),  # NotImplementedError
    ],
)
def test_a_damaged_archive_is_fetched_anew(server, folder, monkeypatch, edits, sentence):
    server.content = whole = archive(TEXT, zipfile.ZIP_DEFLATED)
    monkeypatch.setattr(enwik8, "ZIPPED", len(whole))
    damaged = bytearray(whole)
    for place, value in edits.items():
        damaged[place if place < CENTRAL else whole.index(b"PK\x01\x02") + place - CENTRAL] = value
    server.content = bytes(damaged)
    with pytest.raises(ConfigError, match=f"task.download: what .* sends is no archive with enwik8: .*{sentence}"):
        corpus(download=True).split("train")
    server.content = whole
    assert corpus(download=True).facts()["bytes"] == 2000


@pytest.mark.parametrize(("other", "size"), [(TEXT[:-1] + b"x", "2,000"), (TEXT[:-1], "1,999"), (TEXT * 9, "more than 2,000")])
def test_another_file_is_not_put_in_its_place(server, folder, monkeypatch, other, size):
    server.content = archive(other)
    monkeypatch.setattr(enwik8, "ZIPPED", len(server.content))
    with pytest.raises(ConfigError, match=f"it holds another file of that name, of {size} bytes, with the SHA-256"):
        corpus(download=True).split("train")
    assert not (folder / "enwik8").exists() and not list(folder.glob("*.part")) and not list(folder.glob(".*"))


def test_no_more_is_read_than_the_archive_has(server):
    server.content += bytes(5000)
    assert corpus(download=True).facts()["bytes"] == 2000


def test_one_process_fetches_and_others_wait(server, folder):
    words = (enwik8.URL, enwik8.ZIPPED, "enwik8", enwik8.SIZE, enwik8.SHA256, folder / "enwik8", 10)
    thread = threading.Thread(target=download.fetch_member, args=words)
    with prepared.alone(folder / "enwik8.lock", ""):
        thread.start()
        thread.join(0.3)
        assert thread.is_alive() and server.asked == []
        (folder / "enwik8").write_bytes(TEXT)
    thread.join(10)
    assert not thread.is_alive() and server.asked == [] and not list(folder.glob("*.part"))


def test_a_server_that_is_not_there(server, monkeypatch):
    monkeypatch.setattr(enwik8, "URL", "http://127.0.0.1:9/enwik8.zip")
    monkeypatch.setattr(download, "SILENCE", 2)
    with pytest.raises(ConfigError, match="could not be fetched .*refused.*; 0 of"):
        corpus(download=True).split("train")
