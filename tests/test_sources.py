"""Data that arrive: from servers that are slow, silent, wrong or cut off, on disks that are full, for two at once."""

import contextlib
import dataclasses
import gzip
import hashlib
import http.server
import io
import os
import pickle
import subprocess
import sys
import tarfile
import threading
import time

import numpy as np
import pytest
import torchvision
import tyro

from common import ROOT, WorkbookError, mirrors, sources
from common.mirrors import Patience

HASTY = Patience(silence=0.5, slowest=100)
COUNTS = (20, 10)


def archive_of(arrays):
    """The arrays in torchvision's form: an archive, and MD5 sums of the files in it."""
    labels = lambda part: arrays[f"y_{part}"].tolist()
    rows = lambda part: arrays[f"x_{part}"].transpose(0, 3, 1, 2).reshape(-1, 3072)
    files = {
        "data_batch_1": {"data": rows("train"), "labels": labels("train")},
        "test_batch": {"data": rows("test"), "labels": labels("test")},
        "batches.meta": {"label_names": [f"kind {i}" for i in range(10)]},
    }
    sums, buffer = {}, io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for name, told in files.items():
            content = pickle.dumps(told)
            sums[name] = hashlib.md5(content).hexdigest()
            info = tarfile.TarInfo(f"cifar-10-batches-py/{name}")
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return gzip.compress(buffer.getvalue(), mtime=0), sums


def make_cifar():
    """A CIFAR-10 of 300 images: its arrays, its archive, and the class that reads it."""
    random = np.random.default_rng(0)
    arrays = {
        f"x_{part}": random.integers(0, 256, (10 * n, 32, 32, 3), dtype=np.uint8) for part, n in zip(("train", "test"), COUNTS)
    }
    arrays |= {f"y_{part}": np.tile(np.arange(10, dtype=np.uint8), n) for part, n in zip(("train", "test"), COUNTS)}
    content, sums = archive_of(arrays)

    class Small(torchvision.datasets.CIFAR10):
        tgz_md5 = hashlib.md5(content).hexdigest()
        train_list = [["data_batch_1", sums["data_batch_1"]]]
        test_list = [["test_batch", sums["test_batch"]]]
        meta = dict(torchvision.datasets.CIFAR10.meta, md5=sums["batches.meta"])

    return arrays, content, Small


@pytest.fixture(scope="module")
def small_cifar():
    return make_cifar()


class Handler(http.server.BaseHTTPRequestHandler):
    """What a server does stands in the address: /fast/…, /slow/…, /silent/…, and so on."""

    def do_GET(self):
        way, content, server = self.path.split("/")[1], self.server.content, self.server
        server.asked.append((way, self.headers.get("Range")))
        if way == "nowhere":
            self.send_response(302)
            self.send_header("Location", "http://127.0.0.1:9/")  # where nothing listens
            self.end_headers()
            return
        if way == "missing":
            self.send_error(404)
            return
        if way == "portal":
            self.send_response(200)
            self.send_header("Content-Type", "text/html; charset=utf-8")
            self.end_headers()
            self.wfile.write(b"<html>please log in</html>" * 100)
            return
        if way == "trickle":
            with contextlib.suppress(OSError):
                for _ in range(100):
                    self.wfile.write(b"H")
                    time.sleep(0.1)
            return
        if way == "wrong":
            content = b"<html>please log in</html>"
        begun = int(self.headers.get("Range", "bytes=0-")[6:-1]) if way != "forgetful" else 0
        if begun >= len(content):
            self.send_error(416)
            return
        self.send_response(206 if begun else 200)
        self.send_header("Content-Length", str(len(content) - begun))
        self.end_headers()
        rest = content[begun:]
        with contextlib.suppress(OSError):
            if way == "silent":
                self.wfile.write(rest[:1000])
                time.sleep(3)
            elif way == "slow":
                for i in range(0, 60_000, 1000):  # 20 kB/s
                    self.wfile.write(rest[i : i + 1000])
                    time.sleep(0.05)
            elif way in ("cut", "forgetful") and len([w for w, _ in server.asked if w == way]) < 3:
                self.wfile.write(rest[: len(content) // 3])
            elif way == "steady":
                for i in range(0, len(rest), 20_000):
                    self.wfile.write(rest[i : i + 20_000])
                    time.sleep(0.01)
            else:
                self.wfile.write(rest)

    def log_message(self, *arguments):
        pass


@pytest.fixture
def server(small_cifar, monkeypatch):
    """A server of the small CIFAR-10; `ways(…)` sets the mirrors, `asked` lists the requests."""
    arrays, content, kind = small_cifar
    spec = sources.SPECS["cifar10"]
    monkeypatch.setitem(
        sources.SPECS, "cifar10", sources.Spec("cifar10", 10, spec.mean, spec.std, 50, COUNTS, sources.contents(arrays))
    )
    monkeypatch.setattr(torchvision.datasets, "CIFAR10", kind)
    monkeypatch.setattr(sources.shutil, "which", lambda name: None)  # no npm
    monkeypatch.delenv("CIFAR_URL", raising=False)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.daemon_threads, server.block_on_close = True, False
        server.content, server.asked = content, []
        threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        base = f"http://127.0.0.1:{server.server_port}"
        server.ways = lambda *ways: monkeypatch.setattr(sources, "MIRRORS", [f"{base}/{way}" for way in ways])
        server.base = base
        yield server
        server.shutdown()


def same(found, arrays):
    return all(np.array_equal(found[key], arrays[key]) for key in sources.KEYS)


@pytest.mark.parametrize("bad", ("silent", "slow", "trickle", "wrong", "portal", "missing", "nowhere"))
def test_a_bad_mirror_is_given_up_and_the_next_one_asked(bad, server, small_cifar, tmp_path, capsys):
    server.ways(bad, "fast")
    began = time.monotonic()
    assert same(sources.cached("cifar10", tmp_path, HASTY), small_cifar[0])
    assert time.monotonic() - began < 10
    assert [way for way, _ in server.asked] == [bad, "fast"]
    assert "/fast/cifar-10-python.tar.gz" in capsys.readouterr().out, "it says from where"
    assert sorted(p.name for p in tmp_path.iterdir() if p.suffix != ".lock") == ["cifar10.npz"], "nothing is left"


def test_a_download_goes_on_where_it_stopped(server, small_cifar, tmp_path):
    """Cut off twice by one server; each request begins where the last one ended."""
    server.ways("cut")
    assert same(sources.cached("cifar10", tmp_path, HASTY), small_cifar[0])
    third = len(server.content) // 3
    assert server.asked == [("cut", None), ("cut", f"bytes={third}-"), ("cut", f"bytes={2 * third}-")]


def test_a_server_that_cannot_go_on_begins_again(server, small_cifar, tmp_path):
    server.ways("forgetful", "fast")
    assert same(sources.cached("cifar10", tmp_path, HASTY), small_cifar[0])


def test_what_one_mirror_began_another_ends_also_in_another_process(server, small_cifar, tmp_path):
    server.ways("silent")
    with pytest.raises(WorkbookError, match="127.0.0.1.*timed out"):
        sources.cached("cifar10", tmp_path, HASTY)
    assert (tmp_path / "cifar-10-python.tar.gz.part").stat().st_size == 1000
    server.ways("fast")
    assert same(sources.cached("cifar10", tmp_path, HASTY), small_cifar[0])
    assert server.asked[-1] == ("fast", "bytes=1000-")


def test_a_page_to_log_in_does_not_cost_what_is_here(server, small_cifar, tmp_path):
    (tmp_path / "cifar-10-python.tar.gz.part").write_bytes(server.content[:5000])
    server.ways("portal", "fast")
    assert same(sources.cached("cifar10", tmp_path, HASTY), small_cifar[0])
    assert server.asked[-1] == ("fast", "bytes=5000-")


@pytest.mark.parametrize("length", (10, 100, 10**7))
def test_a_wrong_beginning_does_not_spoil_a_good_mirror(length, server, small_cifar, tmp_path):
    """Shorter than the file, and longer: the download is begun again, from the same server."""
    (tmp_path / "cifar-10-python.tar.gz.part").write_bytes(bytes(length))
    server.ways("fast")
    assert same(sources.cached("cifar10", tmp_path, HASTY), small_cifar[0])


def test_a_whole_download_that_was_not_read_yet_is_used(server, small_cifar, tmp_path, capsys):
    (tmp_path / "cifar-10-python.tar.gz.part").write_bytes(server.content)
    server.ways("fast")
    assert same(sources.cached("cifar10", tmp_path, HASTY), small_cifar[0]) and not server.asked
    assert "from an earlier download" in capsys.readouterr().out


def test_what_a_killed_process_unpacked_is_swept_up(server, tmp_path):
    left = tmp_path / ".cifar-10-batches-py.partial" / "cifar-10-batches-py"
    left.mkdir(parents=True)
    (left / "test_batch").write_bytes(b"half")
    server.ways("fast")
    sources.cached("cifar10", tmp_path, HASTY)
    assert sorted(path.name for path in tmp_path.iterdir() if path.suffix != ".lock") == ["cifar10.npz"]


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="the administrator reads everything")
def test_a_file_that_cannot_be_read_is_named(server, tmp_path):
    (tmp_path / "cifar-10-python.tar.gz").write_bytes(server.content)
    (tmp_path / "cifar-10-python.tar.gz").chmod(0)
    with pytest.raises(WorkbookError, match="cannot read .*tar.gz.*make it readable"):
        sources.cached("cifar10", tmp_path, HASTY)


def test_no_password_is_shown(server, tmp_path, monkeypatch, capsys):
    with_password = server.base.replace("//", "//me:sesame@")
    server.ways("fast")
    monkeypatch.setattr(sources, "MIRRORS", [f"{with_password}/missing", f"{with_password}/wrong"])
    with pytest.raises(WorkbookError) as caught:
        sources.cached("cifar10", tmp_path, HASTY)
    said = capsys.readouterr()
    assert "127.0.0.1" in str(caught.value) and "sesame" not in f"{caught.value}{said.out}{said.err}"
    assert mirrors.public(f"{with_password}/fast/x") == f"{server.base}/fast/x"


def test_what_came_from_the_official_archive_is_not_doubted(server, small_cifar, tmp_path, monkeypatch):
    """Its MD5 was right: the digest, which was made from another copy, is for files that nobody checked."""
    server.ways("fast")
    other = dataclasses.replace(sources.SPECS["cifar10"], contents="of another copy")
    monkeypatch.setitem(sources.SPECS, "cifar10", other)
    for _ in range(2):
        assert same(sources.cached("cifar10", tmp_path, HASTY), small_cifar[0])


def test_own_address_comes_first(server, tmp_path, monkeypatch):
    server.ways("wrong")
    monkeypatch.setenv("CIFAR_URL", f"{server.base}/fast/")
    sources.cached("cifar10", tmp_path, HASTY)
    assert [way for way, _ in server.asked] == ["fast"]


@pytest.mark.parametrize("address", ("localhost", "htp://somewhere", "http://[", "file:///nowhere"))
def test_an_address_that_is_none_is_named(address, server, tmp_path, monkeypatch):
    server.ways("fast")
    monkeypatch.setenv("CIFAR_URL", address)
    sources.cached("cifar10", tmp_path, HASTY)
    assert [way for way, _ in server.asked] == ["fast"]


def test_official_files_of_the_users_are_used_and_kept(server, small_cifar, tmp_path):
    own = tmp_path / "cifar-10-python.tar.gz"
    own.write_bytes(server.content)
    assert same(sources.cached("cifar10", tmp_path, HASTY), small_cifar[0])
    assert own.read_bytes() == server.content and not server.asked


def test_an_unpacked_folder_of_the_users_is_used_and_kept(server, small_cifar, tmp_path):
    with tarfile.open(fileobj=io.BytesIO(server.content)) as archive:
        archive.extractall(tmp_path)
    assert same(sources.cached("cifar10", tmp_path, HASTY), small_cifar[0])
    assert not server.asked and (tmp_path / "cifar-10-batches-py" / "test_batch").exists()


def test_wrong_files_of_the_users_are_not_used_and_kept(server, small_cifar, tmp_path):
    own, folder = tmp_path / "cifar-10-python.tar.gz", tmp_path / "cifar-10-batches-py"
    own.write_bytes(server.content[:-1] + b"?")
    folder.mkdir()
    (folder / "test_batch").write_bytes(b"something else")
    server.ways("wrong")
    with pytest.raises(WorkbookError, match="cifar-10-python.tar.gz: not the official file"):
        sources.cached("cifar10", tmp_path, HASTY)
    server.ways("fast")
    assert same(sources.cached("cifar10", tmp_path, HASTY), small_cifar[0])
    assert own.read_bytes() == server.content[:-1] + b"?"
    assert (folder / "test_batch").read_bytes() == b"something else"


def test_other_images_of_the_right_form_are_not_used_and_kept(server, small_cifar, tmp_path):
    other = small_cifar[0] | dict(x_test=small_cifar[0]["x_test"] ^ 1)
    np.savez(tmp_path / "cifar10.npz", **other)
    before = (tmp_path / "cifar10.npz").read_bytes()
    with pytest.raises(WorkbookError, match="holds other images than cifar10"):
        sources.cached("cifar10", tmp_path, HASTY)
    assert (tmp_path / "cifar10.npz").read_bytes() == before


def test_contents_do_not_depend_on_the_order_but_on_each_label(small_cifar):
    arrays = small_cifar[0]
    order = np.random.default_rng(1).permutation(len(arrays["x_train"]))
    mixed = arrays | dict(x_train=arrays["x_train"][order], y_train=arrays["y_train"][order])
    assert sources.contents(mixed) == sources.contents(arrays)
    assert sources.contents(arrays | dict(y_train=arrays["y_train"][order])) != sources.contents(arrays)
    swapped = {key: arrays[key.replace("test", "?").replace("train", "test").replace("?", "train")] for key in sources.KEYS}
    assert sources.contents(swapped) != sources.contents(arrays)


SCRIPT = """
import sys, torchvision
sys.path.insert(0, {root!r})
from common import sources
from tests import test_sources
_, _, kind = test_sources.make_cifar()
spec = sources.SPECS["cifar10"]
sources.SPECS["cifar10"] = sources.Spec("cifar10", 10, spec.mean, spec.std, 50, test_sources.COUNTS)
torchvision.datasets.CIFAR10, sources.MIRRORS = kind, {mirrors!r}
sources.shutil.which = lambda name: None
{before}
try:
    sources.cached("cifar10", sources.Path({folder!r}))
except sources.WorkbookError as error:
    sys.exit(str(error))
"""


def other_process(server, folder, before="", **options):
    told = dict(root=str(ROOT), mirrors=sources.MIRRORS, folder=str(folder), before=before)
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    return subprocess.Popen([sys.executable, "-c", SCRIPT.format(**told)], cwd=ROOT, **pipes, **options)


def test_two_processes_download_once(server, tmp_path):
    server.ways("steady")
    processes = [other_process(server, tmp_path) for _ in range(2)]
    said = [process.communicate(timeout=100) for process in processes]
    assert all(process.returncode == 0 for process in processes), said
    assert [way for way, _ in server.asked] == ["steady"]
    assert sum("/steady/" in out for out, _ in said) == 1


@pytest.mark.skipif(os.name != "posix", reason="limits of POSIX")
def test_a_full_disk_is_one_line(server, tmp_path):
    """A file may not become larger than 100 kB: what a full disk does, without filling one."""
    server.ways("fast", "fast")
    limit = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))"
    process = other_process(server, tmp_path, limit)
    out, err = process.communicate(timeout=100)
    assert process.returncode == 1 and len(server.asked) == 1, "another mirror would not help"
    assert "cannot write" in err.splitlines()[-1] and "free some space" in err.splitlines()[-1]


def test_a_folder_that_cannot_be_written_is_one_line(server, tmp_path):
    (tmp_path / "data").write_text("a file where the folder should be")
    with pytest.raises(WorkbookError, match="cannot write .*data"):
        sources.cached("cifar10", tmp_path / "data", HASTY)
    assert not server.asked


def test_a_fast_server_is_not_asked_to_hurry(server, small_cifar, tmp_path):
    """The limit is on each window of time: a slow start and a good rate are no reason to go."""
    part = tmp_path / "part"
    url = f"{server.base}/steady/x"
    mirrors.persist(url, part, small_cifar[2].tgz_md5, Patience(silence=0.1, slowest=100))
    assert part.read_bytes() == server.content


def test_a_data_set_is_kept_whole_or_not_at_all(server, tmp_path, monkeypatch):
    def full(file):
        raise OSError(28, "No space left on device")

    server.ways("fast")
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(WorkbookError, match="No space left"):
        sources.cached("cifar10", tmp_path, HASTY)
    assert not (tmp_path / "cifar10.npz").exists()


def test_the_command_passes_its_patience_on_and_tries_both_sets(tmp_path, monkeypatch):
    asked = []

    def cached(*arguments):
        asked.append(arguments)
        raise WorkbookError(arguments[0])

    monkeypatch.setenv("CIFAR_DIR", str(tmp_path))
    monkeypatch.setattr(sources, "cached", cached)
    with pytest.raises(WorkbookError, match="^cifar10\ncifar100$"):
        tyro.cli(sources.main, args=["--slowest", "10"])
    assert asked == [(name, tmp_path, Patience(slowest=10)) for name in ("cifar10", "cifar100")]


def test_the_patience_is_that_of_the_text():
    assert Patience() == Patience(silence=20, slowest=200)


def test_only_cifar10_comes_from_npm(server, tmp_path, monkeypatch):
    server.ways("missing")
    monkeypatch.setattr(sources.shutil, "which", lambda name: "npm")
    monkeypatch.setattr(sources, "from_npm", lambda: pytest.fail("it holds another data set"))
    with pytest.raises(WorkbookError, match="no cifar100"):
        sources.cached("cifar100", tmp_path, HASTY)


def test_the_rate_of_a_mirror_is_measured(server):
    began = time.monotonic()
    assert 5e3 < mirrors.rate(f"{server.base}/slow/x", 0.5) < 40e3  # it sends 20 kB a second
    assert time.monotonic() - began < 3
    for way in ("missing", "trickle", "nowhere"):
        assert mirrors.rate(f"{server.base}/{way}/x", 0.5) == 0


def test_the_command_fetches_and_ends_with_a_status(tmp_path):
    command = [sys.executable, "-m", "common.sources"]
    run = lambda *words: subprocess.run(
        [*command, *words], cwd=ROOT, capture_output=True, text=True, env=os.environ | dict(CIFAR_DIR=str(tmp_path))
    )
    result = run("cifar11")
    assert result.returncode == 1 and result.stderr.startswith("error: unknown dataset 'cifar11'")
    (tmp_path / "cifar10.npz").write_bytes(b"nothing")
    result = run("cifar10")
    assert result.returncode == 1 and "cifar10.npz" in result.stderr.splitlines()[-1]
    assert (tmp_path / "cifar10.npz").read_bytes() == b"nothing"
