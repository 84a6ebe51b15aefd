"""Competition files: any size works, no code runs."""

import os
import pickle

import numpy as np
import pytest
import torch

from common import WorkbookError, competition, evaluate
from common.data import Images
from common.models import build


def dump(path, content, protocol=4):
    path.write_bytes(pickle.dumps(content, protocol=protocol))
    return path


def pictures(n):
    return np.random.default_rng(0).integers(0, 256, (n, 32, 32, 3), dtype=np.uint8)


@pytest.mark.parametrize("protocol", range(2, pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize("n", (1, 7))
def test_reads_what_pickle_writes(tmp_path, n, protocol):
    x = pictures(n)
    read, ids = competition.read_images(dump(tmp_path / "test.pkl", {b"data": x}, protocol))
    assert ids == list(range(n)) and read.dtype == torch.uint8 and np.array_equal(read.permute(0, 2, 3, 1).numpy(), x)


def test_reads_keys_written_by_python_2(tmp_path):
    """Python 2 wrote texts with the opcode SHORT_BINSTRING: put one in the place of the key."""
    raw = pickle.dumps({b"data": pictures(2)}, protocol=2)
    key_is_built = raw.index(b"Rq") + 3
    (tmp_path / "test.pkl").write_bytes(raw[:key_is_built] + b"0U\x04data" + raw[key_is_built:])  # 0: drop Python 3's
    with pytest.raises(UnicodeDecodeError):
        pickle.loads(raw[:key_is_built] + b"0U\x01\xff" + raw[key_is_built:])
    assert competition.read_images(tmp_path / "test.pkl")[0].shape == (2, 3, 32, 32)


def test_reads_arrays_written_by_python_2(tmp_path):
    """There every text of the file is bytes, also the byte order of the array's type."""

    class Kind:
        def __reduce__(self):
            return np.dtype, (b"u1", 0, 1), (3, b"|", None, None, None, -1, -1, 0)

    class Array:
        def __reduce__(self):
            call, arguments, (version, shape, _, order, raw) = pictures(2).__reduce__()
            return call, arguments, (version, shape, Kind(), order, raw)

    read, _ = competition.read_images(dump(tmp_path / "test.pkl", {b"data": Array()}, 2))
    assert np.array_equal(read.permute(0, 2, 3, 1).numpy(), pictures(2))


def test_submission_of_100_000_images(tmp_path, sample):
    path = dump(tmp_path / "test.pkl", {b"data": np.broadcast_to(pictures(1), (100_000, 32, 32, 3)).copy()})
    x, ids = competition.read_images(path)
    labels = torch.arange(len(x)) % 10
    lines = competition.write_submission(tmp_path / "submission.csv", ids, labels).read_text().splitlines()
    assert lines[0] == "ID,Labels" and lines[1] == "0,0" and lines[-1] == "99999,9" and len(lines) == 100_001


@pytest.mark.parametrize("ids", ([105, 3, 77], np.array([105, 3, 77]), (105, 3, 77)))
def test_ids_of_the_file_are_those_of_the_submission(tmp_path, ids):
    _, read = competition.read_images(dump(tmp_path / "test.pkl", {b"data": pictures(3), b"ids": ids}))
    lines = competition.write_submission(tmp_path / "submission.csv", read, [7, 8, 9]).read_text().splitlines()
    assert lines == ["ID,Labels", "105,7", "3,8", "77,9"]


@pytest.mark.parametrize("ids", ([1, 2], [1, 2, 2], [1, 2, 3.5], "abc", 7, [[1], [2], [3]], [[1], [2, 3], 4], [True, False, 3]))
def test_ids_that_are_none_are_refused(tmp_path, ids):
    with pytest.raises(WorkbookError, match='b"ids" that are not 3 different numbers'):
        competition.read_images(dump(tmp_path / "test.pkl", {b"data": pictures(3), b"ids": ids}))


def test_rows_in_the_layout_of_cifar_are_the_same_images(tmp_path):
    x = pictures(3)
    rows = x.transpose(0, 3, 1, 2).reshape(3, 3072)
    read, _ = competition.read_images(dump(tmp_path / "test.pkl", {b"data": rows}))
    assert np.array_equal(read.permute(0, 2, 3, 1).numpy(), x) and read.is_contiguous(memory_format=torch.channels_last)


def test_predictions_of_one_image_make_one_line(tmp_path, sample):
    x, ids = competition.read_images(dump(tmp_path / "test.pkl", {b"data": pictures(1)}))
    logits = evaluate.predict(build("fastnet", width=4), Images(x, torch.zeros(len(x), dtype=torch.long)), sample.spec, tta=2)
    lines = competition.write_submission(tmp_path / "submission.csv", ids, logits.argmax(1)).read_text().splitlines()
    assert lines == ["ID,Labels", f"0,{int(logits.argmax())}"]


def test_a_place_that_cannot_be_written_is_named_beforehand(tmp_path):
    competition.check_writable(tmp_path / "new" / "submission.csv")
    assert not list((tmp_path / "new").iterdir())
    with pytest.raises(WorkbookError, match="is a folder"):
        competition.check_writable(tmp_path / "new")
    with pytest.raises(WorkbookError, match="is a folder"):
        competition.check_writable(f"{tmp_path}/other/")
    (tmp_path / "file").touch()
    with pytest.raises(WorkbookError, match="cannot write"):
        competition.check_writable(tmp_path / "file" / "submission.csv")


class Hostile:
    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("function", (os.system, eval, exec, getattr, open))
def test_hostile_file_is_refused_and_does_nothing(tmp_path, function):
    mark = tmp_path / "mark"
    words = {os.system: f"touch {mark}", eval: f"open({str(mark)!r}, 'w')", exec: f"open({str(mark)!r}, 'w')"}
    arguments = (words[function],) if function in words else (str(mark), "w") if function is open else (1, "real")
    path = dump(tmp_path / "test.pkl", {b"data": pictures(1), b"more": Hostile(function, *arguments)})
    with pytest.raises(WorkbookError, match="not admitted.*asks for"):
        competition.read_images(path)
    assert not mark.exists()


@pytest.mark.parametrize(
    "content", ([1, 2], {}, {b"data": "text"}, {b"data": np.zeros((2, 32, 32, 3))}, {b"data": pictures(2)[:, :, :, :1]},
                {b"data": pictures(0)}, {b"data": np.array([None])}),
)  # fmt: skip
def test_other_content_is_named(tmp_path, content):
    with pytest.raises(WorkbookError, match=r"\(N, 32, 32, 3\)"):
        competition.read_images(dump(tmp_path / "test.pkl", content))


def test_missing_and_damaged_files_are_named(tmp_path):
    with pytest.raises(WorkbookError, match="does not exist"):
        competition.read_images(tmp_path / "none.pkl")
    path = dump(tmp_path / "test.pkl", {b"data": pictures(3)})
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(WorkbookError, match="not admitted"):
        competition.read_images(path)
