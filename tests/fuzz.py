"""Random damage to what a user gives or keeps: it is accepted and right, or refused in one line; nothing is lost.

`python -m tests.fuzz 200` tries that many seeds (twenty are in `make test`) and names those that fail.
"""

import copy
import dataclasses
import hashlib
import os
import random
import shutil
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
import yaml

from common import WorkbookError, config, data, models, report, runs, sources
from common.config import TrainConfig
from common.data import Images, Split
from common.train import fit

ODD = (None, "", "x", "0,5", "50%", -1, 0, 1, 0.5, 2**70, float("nan"), float("inf"), 1e300, True, [], [1], {}, {"a": 1})
ODD += (["flip"],)
ODD += ("../evil", "\n", "λ", [None], [[]], "no", "auto", b"x", -0.0, [0.5, 2], "crop:99", "a" * 300)
TINY = dict(dataset="cifar10-sample", model="fastnet", depth=3, gammas=True, cfg=[8] * 6, epochs=1, batch_size=25)
STUDY = dict(name="small", base=TINY, seeds=[0, 1], configurations=dict(plain=None, decay=dict(weight_decay=0.01, why="to see")))
CONFIG = TrainConfig(epochs=1, batch_size=25, lr=0.01)


def some(images, n):
    return Images(images.x[:n], images.y[:n])


def split():
    sample = data.load("cifar10-sample")
    return Split(some(sample.train, 50), some(sample.val, 20), some(sample.test, 20), sample.spec, sample.class_names)


def network():
    x = torch.randn(20, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    return models.fresh("fastnet", 0, x, depth=3, gammas=True, cfg=[8] * 6)


def damage(draw, path):
    """Cut a file off, empty it, turn a byte, put something else in its place, or delete it."""
    raw = bytearray(path.read_bytes())
    way = draw.choice(("cut", "empty", "byte", "bytes", "text", "gone", "folder"))
    if way in ("gone", "folder"):
        path.unlink()
        if way == "folder":
            path.mkdir()
        return way
    if way == "cut":
        raw = raw[: draw.randrange(len(raw))]
    elif way == "empty":
        raw = bytearray()
    elif way == "text":
        raw = bytearray(draw.choice((b"{}", b"null", b"[1, 2]", b"x", b"\xff\xfe", b'{"recorded": 1}')))
    else:
        for _ in range(1 if way == "byte" else 20):
            raw[draw.randrange(len(raw))] ^= 1 << draw.randrange(8)
    path.write_bytes(raw)
    return way


def digest(path):
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "folder"


def tree(folder):
    return {path: digest(path) for path in sorted(folder.rglob("*")) if path.name not in ("lock", "owner")}


def parameters(draw, place):
    """One setting of a run is odd: if it is taken, the run trains."""
    names = [field.name for field in dataclasses.fields(TrainConfig)] + ["model", "dataset", "val", "cfg", "depth", "width", "se"]
    name, value = draw.choice(names), copy.deepcopy(draw.choice(ODD))
    yield f"{name}={value!r}"
    settings = TINY | {name: value}
    told, arguments, *_ = config.check_settings(settings)
    if told.epochs > 3 or told.batch_size > 1000 or told.init != "random":
        return
    own, network = config.config_and_network(settings)
    x = data.normalise(split().train.x, split().spec)
    fit(models.fresh(seed=0, x=x, **network), split(), own, runs.folder("one"))
    assert runs.load_run("one").manifest["finished"]


def study(draw, place):
    """A study file whose lines, values or bytes are changed: if it is taken, its runs are legal."""
    text = yaml.dump(STUDY, sort_keys=False)
    lines = text.splitlines()
    way = draw.choice(("drop", "double", "value", "byte", "swap"))
    at = draw.randrange(len(lines))
    if way == "drop":
        del lines[at]
    elif way == "double":
        lines.insert(at, lines[at])
    elif way == "value":
        lines[at] = lines[at].split(":")[0] + f": {draw.choice(ODD)!r}"
    elif way == "swap":
        lines[at - 1], lines[at] = lines[at], lines[at - 1]
    raw = bytearray("\n".join(lines).encode())
    if way == "byte":
        raw[draw.randrange(len(raw))] ^= 1 << draw.randrange(8)
    path = place / "study.yaml"
    path.write_bytes(raw)
    yield f"study {way} {bytes(raw)!r}"
    for settings in config.read_study(path).runs.values():
        config.check_settings(settings)


def finished(place):
    run = fit(network(), split(), CONFIG, runs.folder("one"))
    report.record("one", split(), weights=True)
    return models.digest(run.model)


def run_folder(draw, place):
    """A file of a finished run is damaged: what is returned is the run as it was."""
    wanted = finished(place)
    shutil.rmtree(place / "reports")
    path = runs.folder("one") / draw.choice(("run.json", "history.csv", "best.pt", "checkpoint.pt", "answers.bin", "owner"))
    before = tree(place)
    yield f"{path.name} {damage(draw, path)}"
    read_back(place, wanted, before, path)


def record(draw, place):
    """A file of a recorded run is damaged; the run's own folder is gone."""
    run = finished(place)
    wanted = models.digest(runs.files.rounded(runs.load_model("one"))), run
    shutil.rmtree(runs.folder("one"))
    path = runs.recorded("one", draw.choice(tuple(runs.RECORDED)))
    before = tree(place)
    yield f"recorded {path.name} {damage(draw, path)}"
    read_back(place, wanted, before, path)
    report.write_index(place / "reports")


def read_back(place, wanted, before, damaged):
    """Every way to read a run gives it as it was, or refuses in one line and changes nothing."""
    refused, wanted = [], wanted if isinstance(wanted, tuple) else (wanted,)
    asks = (
        lambda: runs.load_manifest("one")["config"],
        lambda: len(runs.load_run("one").history),
        lambda: len(runs.load_answers("one")),
        lambda: models.digest(runs.load_model("one")) in wanted or "another network",
        lambda: models.digest(fit(network(), split(), CONFIG, runs.folder("one")).model) in wanted or "another network",
    )
    for ask in asks:
        try:
            found = ask()
            assert found != "another network", "other weights were taken for those of the run"
        except WorkbookError as error:
            assert "\n" not in str(error), error
            refused.append(str(error))
    after = tree(place)
    lost = [path for path in before if path not in after and path != damaged]
    assert not lost, f"lost: {lost}"


def data_file(draw, place):
    """An .npz of images is damaged: it is refused, kept, and never read as other images."""
    spec = sources.SPECS["cifar10"]
    sources.SPECS["cifar10"] = dataclasses.replace(spec, counts=(4, 2), default_val=10, contents="")
    try:
        generator = np.random.default_rng(0)
        arrays = {f"x_{part}": generator.integers(0, 256, (n, 32, 32, 3), np.uint8) for part, n in (("train", 40), ("test", 20))}
        arrays |= {f"y_{part}": np.arange(n, dtype=np.uint8) % 10 for part, n in (("train", 40), ("test", 20))}
        path = place / "cifar10.npz"
        np.savez(path, **arrays)
        way = damage(draw, path)
        yield f"cifar10.npz {way}"
        if way == "gone":
            return  # it would be downloaded
        kept = digest(path)
        try:
            found = data.load("cifar10", folder=place)
        finally:
            assert digest(path) == kept, "the file is changed"
        images = torch.cat([found.train.x, found.val.x]).long().sum()
        assert images == int(arrays["x_train"].sum(dtype=np.int64)), "other images were read"
    finally:
        sources.SPECS["cifar10"] = spec


KINDS = (parameters, parameters, study, study, run_folder, record, data_file)


def attempt(seed):
    """None if all is well, else what was damaged and what came of it."""
    draw, told = random.Random(seed), "?"
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        (place / "here").mkdir()
        os.environ |= dict(RUNS_DIR=str(place / "runs"), REPORTS_DIR=str(place / "reports"))
        home = os.getcwd()
        os.chdir(place / "here")
        try:
            steps = KINDS[seed % len(KINDS)](draw, place)
            told = next(steps)
            next(steps, None)
        except WorkbookError as error:
            if "\n" in str(error):
                return f"{told}: more than one line: {error}"
        except Exception as error:
            return f"{told}: {type(error).__name__}: {error}"
        finally:
            os.chdir(home)
        allowed = {"runs", "reports", "here", "study.yaml", "cifar10.npz"}
        strange = [path for path in place.iterdir() if path.name not in allowed] + list((place / "here").iterdir())
        if strange:
            return f"{told}: written outside runs/: {strange}"
    return None


def main(count):
    failed = 0
    for seed in range(count):
        found = attempt(seed)
        failed += found is not None
        if found:
            print(f"seed {seed}: {found}")
    print(f"{count - failed} of {count} are accepted and right, or refused in one line")
    return failed


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1])) > 0)
