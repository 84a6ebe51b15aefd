"""How does a file arrive? From the first of several servers that delivers it; MD5 decides."""

import http.client
import queue
import re
import threading
import urllib.error
import urllib.request
from dataclasses import dataclass
from pathlib import Path
from time import monotonic

from torchvision.datasets.utils import check_md5
from tqdm.auto import tqdm

from common import writing

NETWORK = (OSError, ValueError, http.client.HTTPException)  # what the next server may not have


@dataclass(frozen=True)
class Patience:
    """When a server is given up."""

    silence: float = 20.0  # seconds without a byte, also before the first
    slowest: float = 200.0  # kB a second, on average over so many seconds


PATIENT = Patience()


def fetch(mirrors, name: str, part: Path, md5: str, patience: Patience) -> tuple:
    """Download a file into `part`; returns where it came from, or None, and what failed.

    Raises WorkbookError where the disk fails.
    """
    tried = []
    if size(part) and check_md5(part, md5):
        return "an earlier download", tried
    for mirror in mirrors:
        url = f"{mirror.rstrip('/')}/{name}"
        try:
            persist(url, part, md5, patience)
            return public(url), tried
        except NETWORK as error:
            tried.append(f"{host(url)}: {getattr(error, 'reason', error)}")
    return None, tried


def persist(url: str, part: Path, md5: str, patience: Patience) -> None:
    """Download into `part`, from where an earlier attempt ended; raises one of NETWORK."""
    for attempt in range(3):
        begun = size(part)
        try:
            append(url, part, patience)
        except (ConnectionError, http.client.IncompleteRead):  # cut off in the middle
            if attempt == 2 or size(part) <= begun:
                raise
            continue
        except urllib.error.HTTPError as error:
            if error.code != 416:  # there is no more; what is here is not the file
                raise
        if size(part) and check_md5(part, md5):
            return
        part.unlink(missing_ok=True)
        if not begun:  # all of it came from here
            break
    raise ValueError("another file than the official one")


def public(url: str) -> str:
    """An address without name and password."""
    return re.sub("//[^/]*@", "//", url)


def host(url: str) -> str:
    """The server of an address, or the address where it has none."""
    return public(url).split("//", 1)[-1].split("/")[0] if "//" in url else url


def size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def append(url: str, part: Path, patience: Patience) -> None:
    """Add to `part` what it lacks of a file; from the start where the server cannot do that."""
    begun = size(part)
    request = urllib.request.Request(url, headers={"Range": f"bytes={begun}-"} if begun else {})
    with ask(request, patience.silence) as answer:
        if answer.headers.get_content_type() == "text/html":  # a page to log in, or of an error
            raise ValueError("a web page in place of the file")
        if answer.status != 206:
            begun = 0
            with writing(part):
                part.unlink(missing_ok=True)
        length = answer.headers.get("Content-Length")
        total = begun + int(length) if length else None
        with tqdm(desc=host(url), total=total, initial=begun, unit="B", unit_scale=True) as bar:
            copy(answer, part, bar, patience)
    if total and size(part) < total:
        raise ConnectionError("cut off")


def ask(request, seconds: float):
    """The answer to a request; TimeoutError after some time, also where headers only trickle."""
    found = queue.SimpleQueue()

    def wait():
        try:
            found.put(urllib.request.urlopen(request, timeout=seconds))
        except Exception as error:  # raised where it is waited for
            found.put(error)

    threading.Thread(target=wait, daemon=True).start()
    try:
        answer = found.get(timeout=seconds)
    except queue.Empty:
        raise TimeoutError("no answer in time") from None
    if isinstance(answer, Exception):
        raise answer
    return answer


def copy(answer, part: Path, bar, patience: Patience) -> None:
    """What a server sends, to the end of a file; raises TimeoutError where that takes too long."""
    since, got = monotonic(), 0
    while piece := answer.read1(1 << 20):
        with writing(part), open(part, "ab") as file:
            file.write(piece)
        bar.update(len(piece))
        got += len(piece)
        passed = monotonic() - since
        if passed >= patience.silence:
            if got < 1000 * patience.slowest * passed:
                raise TimeoutError(f"slower than {patience.slowest:g} kB/s")
            since, got = monotonic(), 0


def rate(url: str, seconds: float) -> float:
    """Bytes a second of the start of a file; 0 where nothing came in time."""
    began, got = monotonic(), 0
    try:
        with ask(url, seconds) as answer:
            while monotonic() - began < seconds and (piece := answer.read1(1 << 16)):
                got += len(piece)
    except NETWORK:
        return 0
    return got / (monotonic() - began)
