"""The command line, alone and on two processes."""

import json
import os
import subprocess
import sys

import pytest
import torch

from common import ROOT, WorkbookError, cli

SMALL = "--model resnet17 --width 8 --dataset cifar10-sample --epochs 2 --batch-size 100 --lr 0.02 --augment flip crop:2"


@pytest.fixture
def runs(tmp_path, monkeypatch):
    monkeypatch.setenv("RUNS_DIR", str(tmp_path))
    return tmp_path


def test_help_gives_units_and_defaults(capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(["--help"])
    text = capsys.readouterr().out
    assert stop.value.code == 0
    for option in ("--weight-decay", "--model", "images a step (default: 128)", "epochs of linear warm-up", "passes over"):
        assert option in text
    assert "--init" not in text


def test_unknown_options_and_values_are_refused_by_name(runs, capsys):
    for words, named in (("--epoch 3", "--epochs"), ("--epochs many", "many")):
        with pytest.raises(SystemExit) as stop:
            cli.main(["--dataset", "cifar10-sample", *words.split()])
        assert stop.value.code not in (0, None) and named in capsys.readouterr().err and not list(runs.iterdir())


def test_a_run_trains_is_tested_once_and_is_loaded_again(runs, capsys, monkeypatch):
    tests, predict = [], cli.report.predict
    monkeypatch.setattr(cli.report, "predict", lambda *rest, **named: tests.append(1) or predict(*rest, **named))
    for _ in range(2):
        cli.main([*SMALL.split(), "--run", "one", "--test"])
    out = capsys.readouterr().out
    assert out.count("epoch   1/2") == 1 and len(tests) == 1, "the second call loads what the first trained and tested"
    first, second = out.split("one: best epoch")[1:]
    assert first.splitlines()[:2] == second.splitlines()[:2]
    manifest = json.loads((runs / "one" / "run.json").read_text())
    assert manifest["config"]["augment"] == ["flip", "crop:2"] and manifest["spec"]["width"] == 8
    assert 0 <= manifest["test"]["accuracy"] <= manifest["test"]["top5"] <= 1


@pytest.mark.parametrize(
    "words,message",
    (
        ("--model resnet19", "unknown model 'resnet19'"),
        ("--dataset mnist", "unknown dataset 'mnist'"),
        ("--optimizer lion", "unknown optimizer 'lion'"),
        ("--epochs 0", "epochs=0 is not legal"),
        ("--model vgg16 --width 3", "'width'"),
        ("--width 0", "width of resnet18=0 is not legal"),
        ("--width 0.5", "width of resnet18=0.5 is not legal"),
        ("--model mobilenet --width 0", "width of mobilenet=0 is not legal"),
        ("--every 0", "every=0 is not legal"),
        ("--val 100", "val=100 is not legal"),
        ("--model fastnet --network depht 3", "did you mean 'depth'?"),
        ("--model fastnet --network classes 100", "unknown argument of fastnet 'classes'"),
        ("--model fastnet --network lr 0.3", "unknown argument of fastnet 'lr'"),
        ("--model fastnet --network depth 4", "depth=4 is not legal"),
        ("--model fastnet --network dropout 2", "cannot be built: dropout probability"),
    ),
)
def test_mistakes_end_in_one_line(runs, words, message):
    with pytest.raises(SystemExit) as stop:
        cli.main(["--dataset", "cifar10-sample", *words.split()])
    assert message in str(stop.value) and str(stop.value).count("\n") == 0 and not list(runs.iterdir())


def test_two_processes_learn_what_one_learns(runs):
    """Two CPU processes (gloo), each with half of every batch; BatchNorm sees smaller batches, so only about the same."""
    launch = "-m torch.distributed.run --standalone --nproc_per_node 2 -m common.train"  # on a free port
    paths = {}
    for words, name in ((launch, "two"), ("-m common.train", "one")):
        command = [sys.executable, *words.split(), *SMALL.replace("0.02", "0.05").split(), "--epochs", "5"]
        environment = {**os.environ, "ACCELERATE_USE_CPU": "1", "OMP_NUM_THREADS": "1", "RUNS_DIR": str(runs / name)}
        result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment)
        assert result.returncode == 0, result.stderr[-2000:]
        assert result.stdout.count("epoch   5/5") == 1, "only the main process prints"
        paths[name] = next((runs / name).glob("*/run.json"))
    one, two = (json.loads(paths[name].read_text()) for name in ("one", "two"))
    assert (one["machine"]["processes"], two["machine"]["processes"]) == (1, 2)
    for name in ("one", "two"):
        header, *rows = (line.split(",") for line in (paths[name].parent / "history.csv").read_text().splitlines())
        assert [row[header.index("images")] for row in rows] == ["2000"] * 5, "each image once an epoch, over all processes"
    assert one["config"] == two["config"] and one["data"] == two["data"]
    # Chance is 10 %, and 500 validation images tell apart differences of about 6 points.
    assert min(one["best"]["val_accuracy"], two["best"]["val_accuracy"]) > 0.2
    assert abs(one["best"]["val_accuracy"] - two["best"]["val_accuracy"]) < 0.06


def test_options_reach_the_training(runs, monkeypatch):
    """A checkpoint every few epochs, the validation images: what was asked for happens."""
    saved = []
    save = cli.train.runs.save_run
    monkeypatch.setattr(cli.train.runs, "save_run", lambda *rest: saved.append(1) or save(*rest))
    small = SMALL.replace("--epochs 2", "--epochs 3").split()
    cli.main([*small, "--run", "one", "--every", "2"])
    assert len(saved) == 2, "after the second epoch and at the end"
    asked = []

    def stop(*words):
        asked.append(words)
        raise WorkbookError("far enough")

    monkeypatch.setattr(cli.data, "load", stop)
    with pytest.raises(SystemExit):
        cli.main(["--val", "1000"])
    assert asked == [("cifar10", 1000)]


def test_two_processes_take_the_steps_of_one(runs):
    """Of a batch of nine, one process has five images in three pieces, the other four in four: all count the same.

    Without BatchNorm, which looks at the images of one process alone.
    """
    script = runs / "script.py"
    script.write_text(
        "import os, sys, torch\n"
        "from common import augment, config, data, models, train\n"
        "from accelerate import PartialState\n"
        "state = PartialState(cpu=True)\n"
        "s = data.load('cifar10-sample')\n"
        "s = data.Split(s.train[:36], s.val[:40], s.test[:40], s.spec, s.class_names)\n"
        "model = models.fresh('resnet17', 0, augment.normalise(s.train.x, s.spec), width=4)\n"
        "for module in list(model.modules()):\n"
        "    for name, child in module.named_children():\n"
        "        if isinstance(child, torch.nn.BatchNorm2d):\n"
        "            setattr(module, name, torch.nn.Identity())\n"
        "settings = config.TrainConfig(epochs=2, batch_size=9, lr=1e-3, accumulate=4, augment=(), precision='no')\n"
        "learner = train.Learner(model, s, settings, train.Path(os.environ['RUNS_DIR']) / 'run')\n"
        "flat = lambda: torch.cat([p.detach().flatten().double() for p in model.parameters()])\n"
        "start = flat()\n"
        "for _ in range(2):\n"
        "    train.train_epoch(learner)\n"
        "torch.save([start, flat()], f'{sys.argv[1]}-{state.process_index}.pt')\n"
    )
    paths = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    own = dict(ACCELERATE_USE_CPU="1", OMP_NUM_THREADS="1", RUNS_DIR=str(runs), PYTHONPATH=paths)
    how = dict(cwd=ROOT, capture_output=True, text=True, env=os.environ | own, timeout=300)
    for words in (f"{script} {runs}/one", f"-m torch.distributed.run --standalone --nproc_per_node 2 {script} {runs}/two"):
        result = subprocess.run([sys.executable, *words.split()], **how)
        assert result.returncode == 0, result.stderr[-2000:]
    start, one = torch.load(runs / "one-0.pt")
    two, other = (torch.load(runs / f"two-{rank}.pt")[1] for rank in (0, 1))
    assert torch.equal(two, other), "both processes hold the same weights, bit by bit"
    assert (one - two).abs().max() < 1e-4 * (one - start).abs().max()
