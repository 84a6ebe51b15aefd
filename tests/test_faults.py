"""Kinds of faults that users of such software have met, each with the smallest input that showed it."""

import os
import pickle
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
import yaml
from torch import nn

import common
from common import (
    ROOT,
    WorkbookError,
    competition,
    config,
    data,
    measure,
    models,
    optim,
    plots,
    report,
    runs,
    sources,
    storage,
    sweep,
)
from common.config import TrainConfig
from common.data import Images, Loader
from common.evaluate import evaluate
from common.models import files
from common.train import fit
from tests import fuzz

CONFIG = TrainConfig(epochs=1, batch_size=50, lr=0.01, augment=())
TINY = dict(dataset="cifar10-sample", model="fastnet", depth=3, gammas=True, cfg=[8] * 6, epochs=1, batch_size=50)


def network(seed=0, **more):
    x = torch.randn(20, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    return models.fresh("fastnet", seed, x, cfg=[8] * 6, depth=3, gammas=True, **more)


@pytest.fixture
def run(places, small):
    return fit(network(), small, CONFIG, runs.folder("one"))


# Lost data and doors: 50 to 56


class Pickled:
    """Is pickled as a call, and with a state."""

    def __init__(self, call, arguments, state=None):
        self.parts = (call, arguments) if state is None else (call, arguments, state)

    def __reduce__(self):
        return self.parts


def fields(dtype):  # what numpy itself would do with a dtype's state is not tried here
    return Pickled(np.dtype, ("u1", False, True), (3, "|", None, ("data",), {"data": (dtype, 0)}, 8, 1, 27))


@pytest.mark.parametrize(
    "kind",
    (
        Pickled(np.dtype, ("O8", False, True), (3, "|", None, None, None, -1, -1, 63)),
        Pickled(np.dtype, ("V8", False, True), (3, "|", None, None, None, 8, 1, 0)),
        fields(np.dtype("O")),
        Pickled(np.dtype, ("u1", False, True), (3, ">", None, None, None, -1, -1, 0)),
        Pickled(np.dtype, ("u1", False, True), (3, "|", (np.dtype("u1"), (8,)), None, None, 8, 1, 0)),
    ),
)
def test_50_a_pickle_chooses_no_memory_to_read(tmp_path, kind):
    array = np.zeros((1, 32, 32, 3), np.uint8)
    call, arguments, (version, shape, _, order, raw) = array.__reduce__()
    path = tmp_path / "test.pkl"
    path.write_bytes(pickle.dumps({b"data": Pickled(call, arguments, (version, shape, kind, order, raw))}))
    with pytest.raises(WorkbookError, match="not admitted"):
        competition.read_images(path)


@pytest.mark.parametrize("shape, raw", (((9, 32, 32, 3), b"x" * 10), ((-1, 32, 32, 3), b""), ((2**40, 32, 32, 3), b"")))
def test_50_an_array_is_as_long_as_its_bytes(tmp_path, shape, raw):
    call, arguments, (version, _, kind, order, _) = np.zeros((1, 32, 32, 3), np.uint8).__reduce__()
    path = tmp_path / "test.pkl"
    path.write_bytes(pickle.dumps({b"data": Pickled(call, arguments, (version, shape, kind, order, raw))}))
    with pytest.raises(WorkbookError, match="test.pkl"):
        competition.read_images(path)


def test_50_flags_of_the_file_do_not_count(tmp_path):
    """A dtype of plain bytes whose state says that it holds objects is read as bytes."""
    call, arguments, (version, shape, _, order, raw) = np.full((2, 32, 32, 3), 7, np.uint8).__reduce__()
    forged = Pickled(np.dtype, ("u1", False, True), (3, "|", None, None, None, -1, -1, 63))
    path = tmp_path / "test.pkl"
    path.write_bytes(pickle.dumps({b"data": Pickled(call, arguments, (version, shape, forged, order, raw))}))
    images, _ = competition.read_images(path)
    assert images.unique().tolist() == [7]


@pytest.mark.parametrize("name", ("../evil", "/tmp/evil", "a/b", "..", "", "a" * 151, "a b"))
def test_53_a_name_is_no_path(places, run, name):
    if name:
        with pytest.raises(WorkbookError, match="not legal; give letters"):
            runs.folder(name)
    with pytest.raises(WorkbookError, match="not legal; give letters"):
        report.write_report(places / "out", "lab", "Title", ["text"], [run.manifest | dict(name=name)])
    assert not list(places.rglob("evil*"))


def test_53_a_manifest_is_found_by_its_whole_name(tmp_path):
    (tmp_path / "pruned-0.json").write_text("{}")
    with pytest.raises(WorkbookError, match="no manifest"):
        runs.load_manifest(tmp_path / "pruned-0.5")


def test_54_writers_with_equal_numbers_do_not_meet(tmp_path, monkeypatch):
    """Two processes of one number, in two containers, write one file at once."""
    replace, path = os.replace, tmp_path / "file"

    def meanwhile(partial, target):
        monkeypatch.setattr(os, "replace", replace)
        common.write_file(path, "other")
        replace(partial, target)

    monkeypatch.setattr(os, "replace", meanwhile)
    common.write_file(path, "one")
    assert path.read_text() == "one" and list(tmp_path.iterdir()) == [path]


def test_54_what_a_killed_process_left_is_swept_up(tmp_path):
    old, fresh, other = (tmp_path / f"{name}.partial" for name in ("file.1", "file.2", "another.1"))
    for path in (old, fresh, other):
        path.touch()
    for path in (old, other):
        os.utime(path, (time.time() - 90_000,) * 2)
    common.write_file(tmp_path / "file", "text")
    assert not old.exists() and fresh.exists() and other.exists()


STUDY = dict(name="small", base=TINY, seeds=[0], configurations=dict(plain=None, decay=dict(weight_decay=0.01)))


def write(path, **changes):
    path.write_text(yaml.dump(STUDY | changes, sort_keys=False))
    return path


def test_55_workers_beat_as_the_first_did(places):
    study = config.read_study(write(places / "study.yaml"))
    sweep.open_study(study, heartbeat=7)
    backend = sweep.open_study(study, heartbeat=99)._storage._backend
    assert backend.heartbeat_interval == 7 and backend.grace_period == 7 * storage.MISSED


def test_55_a_database_may_be_away(places, monkeypatch):
    opened = sweep.open_study(config.read_study(write(places / "study.yaml")))
    backend, failures = opened._storage._backend, iter((True, True, False))
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    inner = storage.RDBStorage.get_all_trials

    def sometimes(self, *arguments, **named):
        if next(failures, False):
            raise storage.sqlalchemy.exc.OperationalError("away", None, None)
        return inner(self, *arguments, **named)

    monkeypatch.setattr(storage.RDBStorage, "get_all_trials", sometimes)
    assert len(backend.get_all_trials(opened._study_id)) == 2


def test_56_the_file_decides_what_is_trained(places):
    """Queued by an earlier file: one that is gone, and one with other settings."""
    sweep.open_study(config.read_study(write(places / "study.yaml")))
    study = config.read_study(write(places / "study.yaml", configurations=dict(decay=dict(weight_decay=0.02))))
    opened = sweep.open_study(study)
    sweep.work(opened, study)
    assert [path.name for path in sorted(runs.folder().iterdir()) if path.is_dir()] == ["small-decay-0"]
    assert runs.load_manifest("small-decay-0")["config"]["weight_decay"] == 0.02
    assert sweep.results(opened, study)["decay/0"]["state"] == "complete"


def test_56_a_study_with_failures_ends_with_status_1(places):
    path = write(places / "study.yaml", configurations=dict(wild=dict(lr=1e30, optimizer="sgd"), plain=None))
    words = [sys.executable, "-m", "common.sweep", str(path), "--workers", "1"]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1 and "1 complete, 1 fail" in done.stdout
    assert done.stderr.splitlines()[-1] == "error: wild/0 failed, see above; --requeue runs them again"


def test_56_what_kills_its_workers_is_given_up(places, monkeypatch):
    study = config.read_study(write(places / "study.yaml", configurations=dict(plain=None)))
    opened = sweep.open_study(study)
    monkeypatch.setattr(sweep, "RETRIES", 2)
    again = []
    for _ in range(5):
        opened.ask()
        again += sweep.requeue(opened, failed=False, dead=lambda trial: True)
    assert again == ["plain/0"] * 2


@pytest.mark.parametrize("given, expected", ((None, ["0", "1", "0"]), ("3,5", ["3", "5", "3"])))
def test_56_workers_share_out_the_gpus(places, monkeypatch, given, expected):
    seen = []

    class Process:
        def __init__(self, call, env):
            seen.append(env.get("CUDA_VISIBLE_DEVICES"))

        wait = terminate = lambda self: 0

    monkeypatch.setattr(sweep.subprocess, "Popen", Process)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    if given:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", given)
    else:
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    sweep.start_workers(sweep.StudyCommand(str(write(places / "study.yaml")), workers=3))
    assert seen == expected


def test_56_a_corrected_configuration_comes_back(places):
    """Another run of that name was complete; the one with today's settings has died."""
    sweep.work(sweep.open_study(config.read_study(write(places / "study.yaml", configurations=dict(plain=None)))))
    study = config.read_study(write(places / "study.yaml", configurations=dict(plain=dict(lr=0.01))))
    opened = sweep.open_study(study)
    opened.ask()
    assert sweep.requeue(opened, failed=False, dead=lambda trial: True) == ["plain/0"]


def test_55_what_is_tried_again_exists():
    assert not [name for name in storage.PATIENT if not hasattr(storage.RDBStorage, name)]


def test_52_a_storage_stands_in_no_command_line(places, monkeypatch):
    seen = []

    class Process:
        def __init__(self, call, env):
            seen.append((" ".join(call), env.get("STUDY_STORAGE")))

        wait = terminate = lambda self: 0

    monkeypatch.setattr(sweep.subprocess, "Popen", Process)
    address = "postgresql://me:secret@host/db"
    sweep.start_workers(sweep.StudyCommand(str(write(places / "study.yaml")), workers=1, storage=address))
    assert "secret" not in seen[0][0] and seen[0][1] == address


def test_54_two_processes_may_write_one_file_at_once(tmp_path):
    code = f"import common\nfor _ in range(150): common.write_file({str(tmp_path / 'file')!r}, 'text' * 100)"
    both = [subprocess.Popen([sys.executable, "-c", code], cwd=ROOT) for _ in range(2)]
    assert [process.wait() for process in both] == [0, 0] and [path.name for path in tmp_path.iterdir()] == ["file"]


def test_23_workers_end_with_the_process_that_started_them(places):
    """The middle process starts a worker that never ends by itself, and is gone."""
    write(places / "study.yaml")
    worker = f"sweep.work = lambda *_: time.sleep(60); sweep.worker_main({str(places / 'study.yaml')!r}, 30, int(sys.argv[1]))"
    words = [sys.executable, "-c", f"import sys, time; from common import sweep; {worker}"]
    start = f"p = subprocess.Popen({words!r} + [str(os.getpid())], stdout=-3, stderr=-3); print(p.pid, flush=True); time.sleep(2)"
    start = f"import os, subprocess, time; {start}"
    pid = int(subprocess.run([sys.executable, "-c", start], cwd=ROOT, capture_output=True, text=True).stdout)
    for _ in range(60):
        time.sleep(0.5)
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return
    os.kill(pid, 9)
    raise AssertionError("the worker goes on")


# Raw tracebacks, late and wrong refusals: 10 to 18, 57, 58


def test_10_gammas_of_nothing_but_zeros_are_drawn():
    plots.plt.close(plots.gamma_histogram({"a": torch.zeros(20)}).figure)


@pytest.mark.parametrize("images, changes", ((97, dict(batch_size=48)), (100, dict(batch_size=50, accumulate=50))))
def test_11_a_remainder_of_one_is_refused_before_training(small, places, images, changes):
    split = data.Split(small.train[:images], small.val, small.test, small.spec, small.class_names)
    told = TrainConfig(**dict(epochs=1, low_res=0.5) | changes)
    with pytest.raises(WorkbookError, match="batch_size=.*accumulate=.*leave a piece of one image"):
        fit(models.build("vgg16", cfg=[4] * 13), split, told, runs.folder("one"))
    assert not runs.folder("one").exists()
    assert fit(network(), split, told, runs.folder("two")).history, "where a map is larger, one image is enough"


def test_12_two_classes_have_a_top_5(small):
    images = Images(small.val.x, small.val.y % 2)
    found = evaluate(models.build("resnet17", classes=2, width=8), images, small.spec)
    assert found["top5"] == 1.0


def test_14_texts_are_utf_8_whatever_the_machine_says(places):
    (places / "study.yaml").write_text(yaml.dump(STUDY, allow_unicode=True) + "# λ\n", encoding="utf-8")
    environment = os.environ | dict(LC_ALL="C", PYTHONUTF8="0", PYTHONCOERCECLOCALE="0")
    words = [sys.executable, "-W", "error::EncodingWarning", "-m", "common.sweep", str(places / "study.yaml"), "--workers", "0"]
    done = subprocess.run(words, cwd=ROOT, env=environment, capture_output=True)
    assert done.returncode == 0 and b"2 not run" in done.stdout, done.stderr.decode()
    for encoding in ("latin-1", "utf-16"):
        (places / "study.yaml").write_bytes(("# ä\n" + yaml.dump(STUDY)).encode(encoding))
        with pytest.raises(WorkbookError, match="cannot be read"):
            config.read_study(places / "study.yaml")


def test_14_no_text_is_read_in_the_encoding_of_the_machine():
    """A file opened without naming its encoding would be read otherwise elsewhere."""
    for path in sorted((ROOT / "common").rglob("*.py")):
        for line in path.read_text(encoding="utf-8").splitlines():
            if ".read_text(" in line and "mark.read_text" not in line:  # hexadecimal digits alone
                assert "encoding=" in line, f"{path.name}: {line.strip()}"


@pytest.mark.parametrize("content", ("", "{}", "[]", "null", '{"name": "x"', "\xff"))
def test_16_a_damaged_manifest_is_left_out_of_the_index(run, places, capsys, content):
    folder = places / "reports" / "runs"
    report.record("one", data.load("cifar10-sample"))
    (folder / "broken.json").write_bytes(content.encode("latin-1"))
    (folder / "._one.json").write_bytes(b"\x00\x05\x16\x07")
    report.write_index(places / "reports")
    index = (places / "reports" / "README.md").read_text(encoding="utf-8")
    assert "[one]" in index and "broken" not in index and "broken.json is damaged" in capsys.readouterr().out
    (runs.folder("one") / "run.json").write_bytes(content.encode("latin-1"))
    for ask in (runs.load_manifest, lambda run: runs.save_result(run, test=1)):
        with pytest.raises(WorkbookError, match="run.json is damaged"):
            ask(runs.folder("one"))
    report.write_report(places / "out", "lab", "Title", ["text"], [run.manifest])


SPOILT = [dict(spec={}), dict(spec=None), dict(spec=[1])]
SPOILT += [dict(state_dict=[1]), dict(state_dict=None), dict(state_dict={"a": None})]


@pytest.mark.parametrize("changes", SPOILT)
def test_17_weights_that_are_none_are_one_line(tmp_path, changes):
    content = files.deployable(network()) | changes
    torch.save(content, tmp_path / "model.pt")
    with pytest.raises(WorkbookError, match="^[^\n]*model.pt[^\n]*$"):
        runs.load_model(tmp_path / "model.pt")


def test_17_a_flipped_bit_is_noticed(run):
    """In the middle of the file there are weights; torch itself would read others."""
    raw = bytearray((run.folder / "best.pt").read_bytes())
    raw[len(raw) // 2] ^= 1
    (run.folder / "best.pt").write_bytes(raw)
    with pytest.raises(WorkbookError, match="best.pt cannot be read as a checkpoint"):
        runs.load_model(run.folder)


def test_17_weights_in_the_place_of_a_checkpoint_are_named(run, small):
    (run.folder / "best.pt").rename(run.folder / "checkpoint.pt")
    with pytest.raises(WorkbookError, match="checkpoint.pt holds weights alone; delete it to begin anew"):
        fit(network(), small, CONFIG, run.folder)


@pytest.mark.parametrize(
    "changes",
    (
        dict(seed=20260101120000), dict(augment=None), dict(augment="flip"), dict(augment=[1]), dict(val="500"),
        dict(val=0.5), dict(lr="fast"), dict(watch="whiten.weight"), dict(model="vgg16", cfg=None, depth=None, gammas=None),
    ),
)  # fmt: skip
def test_18_values_are_checked_where_they_enter(places, changes):
    with pytest.raises(WorkbookError):
        config.read_study(write(places / "study.yaml", base=TINY | changes))
    assert not (places / "runs").exists()


@pytest.mark.parametrize("val", ("500", 0.5, -10, True))
def test_18_a_number_of_validation_images_is_a_number(val):
    with pytest.raises(WorkbookError, match="val="):
        data.load("cifar10-sample", val)


def test_18_names_of_nine_classes_are_refused():
    sample = sources.read_sample()
    with pytest.raises(WorkbookError, match=r"names classes as an array of \(9,\), not of 10"):
        sources.check_arrays(sample | dict(classes=np.array(["x"] * 9)), sources.SPECS["cifar10-sample"], "here")


def test_57_defaults_written_out_make_no_other_run(run, small, capsys):
    assert fit(network(se=0, classes=10, width=64), small, CONFIG, run.folder).manifest == run.manifest
    crop = config.dataclasses.replace(CONFIG, augment=("crop", "flip"))
    first = fit(network(), small, crop, runs.folder("crop"))
    crop = config.dataclasses.replace(CONFIG, augment=("crop:4", "flip:50"))
    assert fit(network(), small, crop, runs.folder("crop")).manifest == first.manifest
    with pytest.raises(WorkbookError, match="augment=.*crop.*4.*but augment=.*crop.*3"):
        fit(network(), small, config.dataclasses.replace(CONFIG, augment=("crop:3", "flip")), runs.folder("crop"))


def test_57_twins_in_a_study_are_named(places):
    twins = dict(plain=None, twin=dict(augment=["flip:50", "crop:4"], momentum=0.9))
    with pytest.raises(WorkbookError, match="'plain' is the same"):
        config.read_study(write(places / "study.yaml", configurations=twins))


def test_57_a_checkpoint_with_other_columns_goes_on(places, small):
    two = config.dataclasses.replace(CONFIG, epochs=2)

    def stop(row):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fit(network(), small, two, runs.folder("one"), on_epoch=stop)
    path = runs.folder("one") / "checkpoint.pt"
    state = files.load_checkpoint(path)
    del state["history"][0]["grad_norm"]
    state["history"][0]["before"] = 1.0
    path.write_bytes(files.torch_bytes(state))
    done = fit(network(), small, two, runs.folder("one"))
    assert len(done.history) == 2 and runs.load_run("one").history == done.history


def test_58_a_frozen_parameter_is_not_watched(small, places):
    with pytest.raises(WorkbookError, match="unknown parameter 'whiten.weight'"):
        fit(network(), small, config.dataclasses.replace(CONFIG, watch="whiten.weight"), runs.folder("one"))


def test_58_a_penalty_without_gammas_is_refused_at_the_door(places):
    with pytest.raises(WorkbookError, match="gammas are fixed"):
        config.read_study(write(places / "study.yaml", base=TINY | dict(gammas=False, lam=0.01)))


def test_58_yaml_means_what_it_says(tmp_path):
    (tmp_path / "x.yaml").write_text("a: no\nb: off\nc: 012\nd: 5e-2\ne: true\nf: 1_000\ng: ~\nh: -.5\n")
    from common.params import read_yaml

    assert read_yaml(tmp_path / "x.yaml") == dict(a="no", b="off", c=12, d=0.05, e=True, f="1_000", g=None, h=-0.5)


def test_58_a_cpu_that_was_asked_for_takes_no_fp16(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (7, 5))
    assert optim.native_precision("auto", network()) in ("no", "bf16")


def test_58_images_that_are_not_channels_last_are_turned_once(small):
    images = Images(small.train.x.contiguous(), small.train.y)
    loader = Loader(images, small.spec, 20, shuffle=False)
    assert loader.images.x.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(next(iter(loader))[0], next(iter(Loader(small.train, small.spec, 20, shuffle=False)))[0])


def test_58_whitening_needs_images():
    with pytest.raises(WorkbookError, match="holds no images"):
        models.fresh("fastnet", 0, torch.zeros(0, 3, 32, 32))


# Poor answers, versions


def test_19_a_number_for_a_text_is_told_how_to_be_one():
    with pytest.raises(WorkbookError, match="with papermill: -r run 2024"):
        common.params.text("run", 2024)


def test_22_numbers_of_numpy_are_numbers(tmp_path):
    path = files.save_model(tmp_path / "model.pt", network(), accuracy=np.float64(0.9), epoch=np.int64(3))
    assert files.load_checkpoint(path)["meta"] == dict(accuracy=0.9, epoch=3)
    told = TrainConfig(epochs=np.int64(3), lr=np.float32(0.5))
    assert config.as_json(told)["epochs"] == 3 and config.as_json(told)["lr"] == 0.5


def test_25_a_finished_run_without_best_pt_has_its_weights(run):
    (run.folder / "best.pt").unlink()
    assert models.digest(runs.load_model(run.folder)) == models.digest(run.model)


def test_26_a_copied_run_has_its_own_name(run):
    run.folder.rename(runs.folder("copy"))
    assert runs.load_manifest("copy")["name"] == "copy"


def test_28_without_a_checkout_runs_lie_where_one_works(tmp_path):
    package = tmp_path / "site" / "common"
    package.mkdir(parents=True)
    (package / "__init__.py").write_bytes((ROOT / "common" / "__init__.py").read_bytes())
    (tmp_path / "work").mkdir()
    code = "import common; print(common.folder_from('RUNS_DIR', 'runs'))"
    environment = {key: value for key, value in os.environ.items() if key != "RUNS_DIR"}
    how = dict(cwd=tmp_path / "work", env=environment | dict(PYTHONPATH=str(tmp_path / "site")), capture_output=True, text=True)
    done = subprocess.run([sys.executable, "-c", code], **how)
    assert done.stdout.strip() == str(tmp_path / "work" / "runs"), done.stderr


def test_29_a_number_and_a_text_are_one_name(tmp_path):
    twice = "configurations: {7: {lr: 0.1}, '7': {lr: 0.2}}"
    text = yaml.dump(STUDY | dict(configurations=None)).replace("configurations: null", twice)
    (tmp_path / "study.yaml").write_text(text)
    with pytest.raises(WorkbookError, match="'7' is a duplicate"):
        config.read_study(tmp_path / "study.yaml")


def test_31_a_convolution_of_zeros_stays_one():
    conv = nn.Conv2d(3, 4, 3, bias=False)
    nn.init.zeros_(conv.weight)
    model = nn.Sequential(conv, nn.BatchNorm2d(4))
    optimizer = optim.make_optimizer(model, TrainConfig(optimizer="muon"))
    model(torch.randn(2, 3, 8, 8)).square().sum().backward()
    optimizer.step()
    assert conv.weight.isfinite().all()


def test_32_a_picture_that_is_missing_is_not_told_its_format():
    with pytest.raises(WorkbookError, match="none.png cannot be read .*; give another path"):
        competition.read_picture("none.png")


def test_34_an_older_torch_tells_no_capabilities(monkeypatch):
    monkeypatch.delattr(torch.cpu, "get_capabilities", raising=False)
    assert optim.native_precision("auto", network()) == "no" and measure.machine()["cpu"]


@pytest.mark.parametrize("seed", range(20))
def test_random_damage_is_refused_in_one_line_or_harmless(seed, monkeypatch):
    for name in ("RUNS_DIR", "REPORTS_DIR"):  # put back afterwards
        monkeypatch.setenv(name, os.environ.get(name, ""))
    assert fuzz.attempt(seed) is None
