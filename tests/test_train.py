"""Training: exact resumption, load-or-train, schedules, optimizers, checkpoints that cannot harm."""

import contextlib
import copy
import dataclasses
import functools
import json
import math
import os
import pickle
import random
import shutil
import signal
import subprocess
import sys
import time
import types

import filelock
import pytest
import torch

from common import ROOT, WorkbookError, augment, evaluate, measure, models, optim, runs, slimming, train
from common.config import OPTIMIZERS, SCHEDULES, TrainConfig
from common.data import Images, Loader, Split
from common.models import build, files
from common.optim import gamma_rates, lr_factor, native_precision, reach
from common.train import fit

CONFIG = TrainConfig(epochs=3, batch_size=30, optimizer="muon", lr=0.1, momentum=0.6, augment=("flip", "crop:2"))


def network(seed=0, **arguments):
    torch.manual_seed(seed)
    return build("resnet17", width=4, **arguments)


def weights(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


class Stop(Exception):
    pass


def stop_after(epoch):
    def hook(row):
        if row["epoch"] == epoch:
            raise Stop

    return hook


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_interrupted_and_resumed_equals_uninterrupted(optimizer, small, tmp_path):
    config = dataclasses.replace(CONFIG, optimizer=optimizer, lr=0.02, lam=1e-3, accumulate=2, clip=1.0)
    whole = fit(network(), small, config, tmp_path / "whole")
    with pytest.raises(Stop):
        fit(network(), small, config, tmp_path / "parts", on_epoch=stop_after(1))
    resumed = fit(network(), small, config, tmp_path / "parts")
    assert same(weights(whole.model), weights(resumed.model))
    ends = [torch.load(tmp_path / name / "checkpoint.pt", weights_only=True)["model"] for name in ("whole", "parts")]
    assert same(*ends)
    plain = lambda history: [{k: v for k, v in row.items() if k not in ("seconds", "images_per_s")} for row in history]
    assert plain(whole.history) == plain(resumed.history)


def test_a_run_names_every_commit_and_precision_it_was_trained_with(small, tmp_path, monkeypatch):
    config = dataclasses.replace(CONFIG, epochs=3)
    for epoch, commit, precision in ((1, "aaa", "no"), (2, "bbb+", "bf16"), (3, "bbb+", "no")):
        monkeypatch.setattr(measure, "COMMIT", commit)
        monkeypatch.setattr(train, "native_precision", lambda *_, precision=precision: precision)
        with contextlib.suppress(Stop):
            fit(network(), small, config, tmp_path / "run", on_epoch=stop_after(epoch) if epoch < 3 else None)
    manifest = fit(network(), small, config, tmp_path / "run").manifest
    assert manifest["commit"] == "aaa, bbb+" and manifest["precision"] == "no, bf16"
    assert manifest["machine"]["instructions"] == torch.backends.cpu.get_cpu_capability()
    assert [(part["commit"], part["precision"], part["epochs"]) for part in manifest["parts"]] == [
        ("aaa", "no", 1), ("bbb+", "bf16", 1), ("bbb+", "no", 1)
    ]  # fmt: skip
    assert sum(part["seconds"] for part in manifest["parts"]) == pytest.approx(manifest["seconds"])
    assert all(part["machines"] == [manifest["machine"]] for part in manifest["parts"])


SCRIPT = """
import random, sys, time, torch
from tests.test_train import CONFIG, network
from common.data import Split, load
from common.train import fit
s = load('cifar10-sample')
torch.set_num_threads(1)
small = Split(s.train[:100], s.val[:40], s.test[:40], s.spec, s.class_names)
pause = float(sys.argv[2])
fit(network(), small, CONFIG, sys.argv[1], on_grad=lambda model: time.sleep(pause * random.random()))
"""


def start(folder, pause):
    """A process that trains the run in `folder`; it sleeps up to `pause` seconds in each step."""
    how = dict(cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    return subprocess.Popen([sys.executable, "-c", SCRIPT, str(folder), str(pause)], **how)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "undisturbed"
    assert start(folder, 0).wait() == 0
    return folder


def is_undisturbed(folder, undisturbed):
    """Manifest, history, checkpoint and best weights are those of a training that nothing disturbed."""
    state, expected = (files.load_checkpoint(place / "checkpoint.pt") for place in (folder, undisturbed))
    assert same(state["model"], expected["model"]) and same(state["best"]["state_dict"], expected["best"]["state_dict"])
    assert same(runs.load_model(folder).state_dict(), expected["best"]["state_dict"])
    manifest = runs.load_manifest(folder)
    assert manifest["finished"] and manifest["best"] == runs.load_manifest(undisturbed)["best"]
    assert sum(part["epochs"] for part in manifest["parts"]) == len(state["history"]) == CONFIG.epochs
    plain = lambda rows: [{k: v for k, v in row.items() if k not in ("seconds", "images_per_s")} for row in rows]
    assert plain(state["history"]) == plain(expected["history"])


def test_killed_process_resumes_exactly(undisturbed, tmp_path):
    """kill -9 in the middle of an epoch: the next process ends with the weights of an undisturbed one."""
    killed = start(tmp_path / "run", 0.6)
    deadline = time.monotonic() + 120
    while not (tmp_path / "run" / "checkpoint.pt").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    time.sleep(0.5)
    killed.kill()
    killed.wait()
    assert 1 <= len(files.load_checkpoint(tmp_path / "run" / "checkpoint.pt")["history"]) < CONFIG.epochs
    assert start(tmp_path / "run", 0).wait() == 0
    is_undisturbed(tmp_path / "run", undisturbed)


@pytest.mark.parametrize("seed", range(int(os.environ.get("ROUNDS", 3))))
def test_two_processes_on_one_run(seed, undisturbed, tmp_path):
    """They sleep, are stopped, go on and are killed at random: one run, all of it of the same training."""
    chance = random.Random(seed)
    folder, living, deadline = tmp_path / "run", [], time.monotonic() + 120
    while time.monotonic() < deadline:
        living = [process for process in living if process.poll() is None]
        if not living and (folder / "best.pt").exists():
            break
        while len(living) < 2 and not (folder / "best.pt").exists():
            living.append(start(folder, chance.choice((0, 0.3, 1))))
        time.sleep(chance.uniform(0.5, 3))
        for process in living:
            what = chance.choice((signal.SIGSTOP, signal.SIGCONT, signal.SIGCONT, signal.SIGKILL, None))
            if what:
                process.send_signal(what)
    for process in living:
        process.kill()
    assert start(folder, 0).wait() == 0, "whoever asks for it gets the finished run"
    is_undisturbed(folder, undisturbed)


def test_finished_run_is_loaded_not_trained(small, tmp_path):
    first = fit(network(), small, CONFIG, tmp_path / "run")
    touched = (tmp_path / "run" / "checkpoint.pt").stat().st_mtime_ns
    rows = []
    again = fit(network(), small, CONFIG, tmp_path / "run", on_epoch=rows.append)
    assert same(weights(first.model), weights(again.model)) and rows == again.history == first.history
    assert (tmp_path / "run" / "checkpoint.pt").stat().st_mtime_ns == touched


@pytest.mark.parametrize("change", ({"lr": 0.2}, {"seed": 1}, {"augment": ("flip",)}))
def test_other_settings_are_refused_by_name(change, small, tmp_path):
    config = dataclasses.replace(CONFIG, epochs=1)
    fit(network(), small, config, tmp_path / "run")
    before = (tmp_path / "run" / "checkpoint.pt").read_bytes()
    with pytest.raises(WorkbookError, match=next(iter(change))):
        fit(network(), small, dataclasses.replace(config, **change), tmp_path / "run")
    with pytest.raises(WorkbookError, match="width"):
        fit(build("resnet17", width=8), small, config, tmp_path / "run")
    assert (tmp_path / "run" / "checkpoint.pt").read_bytes() == before


def test_best_epoch_is_really_kept(small, tmp_path):
    """The returned weights give the best validation accuracy, also when later epochs were worse."""
    run = fit(
        network(), small, dataclasses.replace(CONFIG, epochs=6, lr=0.5, lr_other=0.5, schedule="constant"), tmp_path / "run"
    )
    accuracies = [row["val_accuracy"] for row in run.history]
    assert run.manifest["best"]["epoch"] == accuracies.index(max(accuracies)) + 1
    assert evaluate.evaluate(run.model, small.val, small.spec)["accuracy"] == pytest.approx(max(accuracies))
    assert same(weights(run.model), weights(runs.load_model(run.folder)))


def test_early_stopping_after_patience_epochs(small, tmp_path):
    run = fit(network(), small, dataclasses.replace(CONFIG, epochs=50, lr=0.0, lr_other=0.0, patience=2), tmp_path / "run")
    best = run.manifest["best"]["epoch"]
    assert run.manifest["finished"] and len(run.history) == best + 2


def test_manifest_and_history_stand_beside_the_run(small, tmp_path):
    run = fit(network(), small, CONFIG, tmp_path / "run")
    manifest = json.loads((run.folder / "run.json").read_text())
    assert manifest["config"]["lr"] == CONFIG.lr and manifest["data"]["train"] == 100 and manifest["seconds"] > 0
    assert {"commit", "machine", "spec", "best"} <= set(manifest)
    assert len((run.folder / "history.csv").read_text().splitlines()) == CONFIG.epochs + 1


def test_checkpoint_every_k_epochs_and_at_the_end(small, tmp_path):
    seen = []

    def hook(row):
        path = tmp_path / "run" / "checkpoint.pt"
        seen.append(len(files.load_checkpoint(path)["history"]) if path.exists() else 0)

    fit(network(), small, dataclasses.replace(CONFIG, epochs=5), tmp_path / "run", on_epoch=hook, every=2)
    assert seen == [0, 2, 2, 4, 5]


def sizes_of_training_images(sizes):
    def hook(module, inputs):
        if module.training:
            sizes.append(inputs[0].shape[2])

    return hook


def test_low_resolution_for_the_first_share_of_the_epochs(small, tmp_path):
    for epochs, share, low in ((4, 0.5, (24, 24)), (3, 0.5, (24, 24)), (2, 0.25, (24,)), (5, 0.5, (20, 20, 28))):
        sizes, model = [], network()
        model.register_forward_pre_hook(sizes_of_training_images(sizes))
        config = dataclasses.replace(CONFIG, epochs=epochs, batch_size=100, low_res=share, low_sizes=tuple(sorted(set(low))))
        fit(model, small, config, tmp_path / f"run{epochs}")
        assert sizes == [*low, *[32] * (epochs - len(low))]
        cost = measure.pflops(model, 100, epochs, share, config.low_sizes)
        assert cost == pytest.approx(6e-13 * sum(measure.macs(model, size) for size in sizes))


@pytest.mark.parametrize("capability, expected", ((None, "no"), ("avx512_bf16", "bf16"), ("amx_bf16", "bf16")))
def test_auto_precision_is_what_the_cpu_computes_natively(capability, expected, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    told = {capability: True, "avx512_f": True}
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: told, raising=False)  # torch 2.11 and newer have it
    assert native_precision("auto", network()) == expected and native_precision("no", network()) == "no"
    assert native_precision("auto", build("mobilenet", width=0.1)) == "no"  # depthwise convolutions are slower in bf16


@pytest.mark.parametrize("capability, expected", (((7, 5), "fp16"), ((8, 0), "bf16")))
def test_auto_precision_is_what_the_gpu_computes_natively(capability, expected, monkeypatch):
    state = types.SimpleNamespace(device=torch.device("cuda"))
    monkeypatch.setattr(optim, "PartialState", lambda: state)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    assert native_precision("auto", network()) == expected


def test_bf16_on_a_cpu_trains(small, tmp_path):
    run = fit(network(), small, dataclasses.replace(CONFIG, precision="bf16"), tmp_path / "run")
    assert run.manifest["precision"] == "bf16"
    assert all(value.dtype != torch.bfloat16 for value in run.model.state_dict().values()) and math.isfinite(
        run.history[-1]["train_loss"]
    )
    if not torch.cuda.is_available():
        with pytest.raises(WorkbookError, match="needs a GPU"):
            fit(network(), small, dataclasses.replace(CONFIG, precision="fp16"), tmp_path / "other")


def test_views_are_weighted_means_of_shifted_and_mirrored_images(small):
    x = torch.randn(4, 3, 32, 32)
    seen = []
    centre = lambda x: seen.append(x) or x[:, :, 16, 16]
    assert torch.equal(evaluate.views(centre, x), x[:, :, 16, 16])
    assert torch.allclose(evaluate.views(centre, x, 1), (x[:, :, 16, 16] + x[:, :, 16, 15]) / 2)
    shifted = [(x[:, :, 16 + d, 16 + d] + x[:, :, 16 + d, 15 + d]) / 2 for d in (-1, 1)]
    expected = (x[:, :, 16, 16] + x[:, :, 16, 15]) / 4 + sum(shifted) / 4
    seen.clear()
    assert torch.allclose(evaluate.views(centre, x, 2), expected, atol=1e-6) and len(seen) == 6


def test_predictions_agree_with_evaluate(small):
    model = network()
    for tta in (0, 2):
        logits, scores = (
            evaluate.predict(model, small.val, small.spec, 7, tta),
            evaluate.evaluate(model, small.val, small.spec, tta=tta),
        )
        assert (logits.argmax(1) == small.val.y).float().mean().item() == pytest.approx(scores["accuracy"])
        assert scores["accuracy"] <= scores["top5"] <= 1


def test_settings_that_contradict_each_other_are_refused(small, tmp_path):
    with pytest.raises(WorkbookError, match="patience"):
        dataclasses.replace(CONFIG, patience=2, select="last")
    with pytest.raises(WorkbookError, match="gammas=True"):
        fit(build("fastnet", width=8), small, dataclasses.replace(CONFIG, lam=1e-3), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_biases_decay_as_fast_as_weights_if_asked():
    config = TrainConfig(optimizer="muon", lr=0.1, lr_other=0.2, lr_bias=64, weight_decay=0.01)
    for on in (False, True):
        groups = optim.make_optimizer(network(), dataclasses.replace(config, decay_bias=on)).param_groups
        other, biases = groups[1], groups[3]
        assert biases["lr"] * biases["weight_decay"] == pytest.approx(other["lr"] * other["weight_decay"] * on)


def test_momentum_other_is_that_of_all_but_convolutions():
    config = TrainConfig(optimizer="muon", momentum=0.6)
    for other, expected in ((None, [0.6] * 4), (0.85, [0.6] + [0.85] * 3), (0.0, [0.6, 0.0, 0.0, 0.0])):
        groups = optim.make_optimizer(network(), dataclasses.replace(config, momentum_other=other)).param_groups
        assert [group["momentum"] for group in groups] == expected
    with pytest.raises(WorkbookError, match="momentum_other=1"):
        dataclasses.replace(config, momentum_other=1)


def test_watched_gradient_is_the_one_before_clipping(small, tmp_path):
    def fitted(name, **changes):
        seen = []
        config = dataclasses.replace(CONFIG, epochs=1, batch_size=100, watch="conv1.weight", **changes)
        run = fit(network(), small, config, tmp_path / name, on_grad=lambda m: seen.append(m.conv1.weight.grad.norm()))
        return run.history[0]["watched_norm"], float(seen[0])

    recorded, free = fitted("free")
    assert recorded == pytest.approx(free)
    again, clipped = fitted("clipped", clip=1e-3)
    assert again == pytest.approx(free, rel=1e-4) and clipped < 1e-3 < free
    with pytest.raises(WorkbookError, match="unknown parameter 'blocks.0.conv9.weight'.*did you mean"):
        fit(network(), small, dataclasses.replace(CONFIG, watch="blocks.0.conv9.weight"), tmp_path / "unknown")


def test_accumulation_takes_the_same_steps(small, tmp_path):
    """Without BatchNorm, pieces of a batch weigh as much as the whole, also where they are of uneven size."""
    ends = {}
    for pieces in (1, 4):
        model = network()
        for block in [model, *model.blocks]:
            for name in [name for name, module in block.named_children() if isinstance(module, torch.nn.BatchNorm2d)]:
                setattr(block, name, torch.nn.Identity())
            if hasattr(block, "shortcut") and len(block.shortcut):
                block.shortcut[1] = torch.nn.Identity()
        config = dataclasses.replace(
            CONFIG, optimizer="sgd", lr=1e-3, epochs=1, accumulate=pieces, schedule="constant", precision="no"
        )
        ends[pieces] = weights(fit(model, small, config, tmp_path / str(pieces)).model)
    start = weights(network())
    moved = max(float((ends[1][name] - start[name]).abs().max()) for name in ends[1])
    apart = max(float((ends[1][name] - ends[4][name]).abs().max()) for name in ends[1])
    assert apart < 1e-3 * moved


def test_hook_sees_clipped_gradients_and_penalty_is_added_after(small, tmp_path):
    norms, seen = [], []

    def hook(model):
        norms.append(math.sqrt(sum(float(p.grad.square().sum()) for p in model.parameters() if p.grad is not None)))
        seen.append(model)

    fit(network(), small, dataclasses.replace(CONFIG, epochs=1, clip=0.01), tmp_path / "clipped", on_grad=hook)
    assert max(norms) <= 0.01 * 1.01 and len(seen) == 4
    norms.clear()
    run = fit(network(), small, dataclasses.replace(CONFIG, epochs=1, clip=0.01, lam=10.0), tmp_path / "penalised", on_grad=hook)
    assert min(norms) > 1, "the L1 term is not clipped away"
    assert run.history[0]["grad_norm"] > 0.01, "the logged norm is that before clipping"


@pytest.mark.parametrize("penalty", slimming.PENALTIES)
def test_penalty_shrinks_gammas(penalty, small, tmp_path):
    config = dataclasses.replace(CONFIG, epochs=4, lam=0.5, lr_other=0.1, penalty=penalty)
    run = fit(network(), small, config, tmp_path / "run")
    run.model.load_state_dict(files.load_checkpoint(run.folder / "checkpoint.pt")["model"])  # the last epoch, not the best
    values = torch.cat([g.detach() for g in slimming.gammas(run.model)]).abs()
    assert values.median() < 0.2
    assert (values == 0).any() == (penalty == "proximal")


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_schedule_warms_up_from_step_0_and_never_rises_after(schedule):
    factors = [lr_factor(step, 100, 10, schedule) for step in range(100)]
    assert factors[:10] == pytest.approx([(i + 1) / 10 for i in range(10)])
    assert all(a >= b >= 0 for a, b in zip(factors[9:], factors[10:]))
    assert {
        "cosine": factors[-1] < 0.01,
        "linear": factors[-1] < 0.02,
        "steps": factors[-1] == pytest.approx(0.01),
        "constant": factors[-1] == 1,
    }[schedule]


def test_orthogonalise_brings_singular_values_together():
    torch.manual_seed(0)
    for shape in ((20, 50), (50, 20)):
        values = torch.linalg.svdvals(optim.orthogonalise(torch.randn(shape), steps=5))
        assert values.min() > 0.4 and values.max() < 1.4


def test_parameter_groups_hold_each_parameter_once():
    model = network()
    optimizer = optim.make_optimizer(model, dataclasses.replace(CONFIG, lr_gamma=0.5, lr_bias=3.0))
    conv, other, gamma, bias = (group["params"] for group in optimizer.param_groups)
    trained = [p for p in model.parameters() if p.requires_grad]
    assert sorted(map(id, conv + other + gamma + bias)) == sorted(map(id, trained))
    assert {id(g) for g in slimming.gammas(model, "coupled")} <= {id(p) for p in gamma}
    assert [group["weight_decay"] for group in optimizer.param_groups][2:] == [0, 0]
    assert [group["peak"] for group in optimizer.param_groups[2:]] == pytest.approx([0.5 * CONFIG.lr_other, 3 * CONFIG.lr_other])


def test_diverging_loss_is_reported_and_the_checkpoint_kept(small, tmp_path):
    def poison(model):
        if (tmp_path / "run" / "checkpoint.pt").exists():
            model.fc.weight.data.fill_(math.nan)

    with pytest.raises(WorkbookError, match="lower lr"):
        fit(network(), small, CONFIG, tmp_path / "run", on_grad=poison)
    assert len(files.load_checkpoint(tmp_path / "run" / "checkpoint.pt")["history"]) == 1


def test_weights_that_diverge_in_the_last_step_of_an_epoch_are_reported(small, tmp_path):
    seen = []

    def poison(model):
        seen.append(1)
        if len(seen) == -(-len(small.train) // CONFIG.batch_size):  # the loss of this step is long computed
            model.fc.weight.grad.fill_(math.nan)

    with pytest.raises(WorkbookError, match="weights became infinite in epoch 1; lower lr"):
        fit(network(), small, CONFIG, tmp_path / "run", on_grad=poison)
    assert not (tmp_path / "run" / "checkpoint.pt").exists()


def test_processes_that_cannot_share_the_work_are_refused(small, tmp_path, monkeypatch):
    with pytest.raises(WorkbookError, match="leaves 1 of 100 images for the last batch, too few for 4 processes"):
        Loader(small.train, small.spec, 11, share=(0, 4))
    Loader(small.train, small.spec, 11, share=(0, 1))
    monkeypatch.setattr(train, "gather_object", lambda mine: [*mine, 1])
    with pytest.raises(WorkbookError, match="not all processes find the same run"):
        fit(network(), small, CONFIG, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_finished_run_without_its_manifest_is_named(small, tmp_path):
    fit(network(), small, CONFIG, tmp_path / "run")
    (tmp_path / "run" / "run.json").unlink()
    with pytest.raises(WorkbookError, match="no manifest beside .*run; restore its run.json"):
        fit(network(), small, CONFIG, tmp_path / "run")


@pytest.mark.parametrize(
    "wrong",
    ({"optimizer": "sdg"}, {"schedule": "cos"}, {"epochs": 0}, {"lr": math.nan}, {"lr": "0.1"}, {"lam": -1}, {"momentum": 1},
     {"label_smoothing": 1.0}, {"precision": "fp8"}, {"penalty": "l2"}, {"augment": ("flipp",)}, {"batch_size": 0.5},
     {"low_sizes": ()}, {"low_sizes": (20, 64)}, {"low_sizes": 24}, {"milestones": 0.5}, {"milestones": (0.5, 2)}),
)  # fmt: skip
def test_illegal_settings(wrong):
    with pytest.raises(WorkbookError) as caught:
        TrainConfig(**wrong)
    assert "\n" not in str(caught.value)


def test_model_files_rebuild_themselves(tmp_path):
    model = network()
    pruned = slimming.slim(model, slimming.make_masks(slimming.scores(model, "random"), 0.5))
    path = files.save_model(tmp_path / "model.pt", pruned)
    again = runs.load_model(path, expect="resnet17")
    assert again.cfg == pruned.cfg and same(weights(again), weights(pruned))


class Bomb:
    def __reduce__(self):
        return os.system, ("touch exploded",)


def test_unusable_checkpoints(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    good = files.save_model(tmp_path / "good.pt", network())
    (tmp_path / "truncated.pt").write_bytes(good.read_bytes()[:2000])
    (tmp_path / "text.pt").write_text("hello")
    (tmp_path / "bomb.pt").write_bytes(pickle.dumps(Bomb()))
    torch.save({"spec": {}, "state_dict": Bomb()}, tmp_path / "bomb2.pt")
    torch.save({"weights": torch.zeros(3)}, tmp_path / "other.pt")
    torch.save({"spec": {"name": "resnet17", "width": 8}, "state_dict": network().state_dict()}, tmp_path / "mismatch.pt")
    torch.save({"spec": {"name": "resnet99"}, "state_dict": {}}, tmp_path / "unknown.pt")
    for name, reason in dict(missing="does not exist", truncated="truncated", text="cannot be read", bomb="code", bomb2="code",
                             other="not a checkpoint", mismatch="do not fit", unknown="resnet99").items():  # fmt: skip
        with pytest.raises(WorkbookError, match=reason) as caught:
            runs.load_model(tmp_path / f"{name}.pt")
        assert "\n" not in str(caught.value)
    with pytest.raises(WorkbookError, match="holds a 'resnet17'"):
        runs.load_model(good, expect="vgg16")
    assert not (tmp_path / "exploded").exists()


def test_full_disk_keeps_the_previous_file(tmp_path, monkeypatch):
    path = files.save_model(tmp_path / "model.pt", network())
    before = path.read_bytes()

    def full(number):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(WorkbookError, match="No space left"):
        files.save_model(path, network(seed=1))
    assert path.read_bytes() == before and len(list(tmp_path.iterdir())) == 1


def test_unwritable_runs_folder_is_named(small, tmp_path):
    (tmp_path / "runs").write_text("a file where a folder is needed")
    epochs = []
    with pytest.raises(WorkbookError, match="cannot write"):
        fit(network(), small, dataclasses.replace(CONFIG, epochs=1), tmp_path / "runs" / "run", on_grad=epochs.append)
    assert not epochs, "found out before the training"


@pytest.fixture
def free_threads(monkeypatch):
    """A machine of four cores on which nobody has set a number of threads."""
    before = torch.get_num_threads()
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(measure, "CORES", 4)
    torch.set_num_threads(4)
    yield monkeypatch
    torch.set_num_threads(before)


def busy(monkeypatch, cores):
    monkeypatch.setattr(measure, "idle_cores", lambda: 4 - cores)


@pytest.mark.parametrize("cores,threads", ((-60, 4), (0, 4), (0.3, 4), (1, 3), (2, 2), (3, 1), (4, 1)))
def test_a_training_takes_as_many_threads_as_cores_are_idle(cores, threads, free_threads, tmp_path, capsys):
    busy(free_threads, cores)
    with measure.idle_threads(tmp_path):
        assert torch.get_num_threads() == threads
    assert f"threads: {threads}, " in capsys.readouterr().out and torch.get_num_threads() == 4, "as it was before"


def test_the_accuracy_on_clean_training_images_is_noted(small, tmp_path):
    """It is measured without augmentation, in eval mode, with the best weights."""
    run = fit(network(), small, dataclasses.replace(CONFIG, augment=("cutout:32",)), tmp_path / "run")
    few = Images(small.train.x[::2][:40], small.train.y[::2][:40])
    expected = evaluate.evaluate(run.model, few, small.spec)["accuracy"]
    assert run.manifest["clean_train_accuracy"] == expected == runs.load_manifest(tmp_path / "run")["clean_train_accuracy"]


def test_a_number_of_threads_that_was_set_wins(free_threads, tmp_path, capsys):
    busy(free_threads, 4)
    torch.set_num_threads(3)
    with measure.idle_threads(tmp_path):
        assert torch.get_num_threads() == 3
    torch.set_num_threads(4)
    free_threads.setenv("OMP_NUM_THREADS", "4")
    with measure.idle_threads(tmp_path):
        assert torch.get_num_threads() == 4 and not capsys.readouterr().out


def test_a_run_goes_on_with_its_threads(small, free_threads, tmp_path):
    busy(free_threads, 2)
    with pytest.raises(Stop):
        fit(network(), small, CONFIG, tmp_path / "run", on_epoch=stop_after(1))
    assert torch.get_num_threads() == 4, "also after an exception"
    busy(free_threads, 0)
    assert fit(network(), small, CONFIG, tmp_path / "run").manifest["machine"]["threads"] == 2


def test_a_damaged_manifest_does_not_keep_a_run_from_going_on(small, free_threads, tmp_path):
    busy(free_threads, 2)
    with pytest.raises(Stop):
        fit(network(), small, CONFIG, tmp_path / "run", on_epoch=stop_after(1))
    (tmp_path / "run" / "run.json").write_text("{")
    assert fit(network(), small, CONFIG, tmp_path / "run").manifest["finished"]


CHANGES = dict(
    epochs=1, batch_size=20, optimizer="sgd", lr=0.05, lr_other=0.3, lr_gamma=0.5, lr_bias=2.0, momentum=0.5,
    momentum_other=0.1, weight_decay=0.05, decay_bias=True, schedule="constant", warmup=1.0, milestones=(0.25,),
    label_smoothing=0.3, augment=("flip",), low_res=0.7, low_sizes=(20,), accumulate=3, clip=0.01, precision="bf16",
    lam=0.05, penalty="proximal", seed=1,
)  # fmt: skip
# Settings that only act beside others.
BESIDE = dict(milestones=dict(schedule="steps"), low_sizes=dict(low_res=0.5), penalty=dict(lam=0.05))


def after(small, folder, **changes):
    """Digest of the last weights of two epochs, of a network with everything a setting could act on."""
    settings = dict(epochs=2, optimizer="muon", lr=0.1, momentum=0.6, augment=("crop:2",), precision="no", select="last")
    config = TrainConfig(**{"batch_size": 30, **settings, **changes})
    return models.digest(fit(network(), small, config, folder).model)


@pytest.fixture(scope="module")
def unchanged(small, tmp_path_factory):
    """Digests of the runs that the changed ones are compared with, each trained once."""
    found = {}

    def digest(**beside):
        key = str(beside)
        if key not in found:
            found[key] = after(small, tmp_path_factory.mktemp("plain") / "run", **beside)
        return found[key]

    return digest


def test_the_same_run_ends_with_the_same_weights(small, tmp_path, unchanged):
    assert after(small, tmp_path / "again") == unchanged()


@pytest.mark.parametrize("name", sorted(CHANGES))
def test_no_setting_is_ignored(name, small, tmp_path, unchanged):
    """The same run but for one setting ends with other weights."""
    beside = BESIDE.get(name, {})
    assert after(small, tmp_path / "changed", **beside, **{name: CHANGES[name]}) != unchanged(**beside)


def test_every_setting_is_tried_above():
    others = {"select", "patience", "watch", "init"}  # tested by what they keep, stop, record and name
    assert set(CHANGES) | others == set(dataclasses.asdict(TrainConfig()))


def test_select_says_which_epoch_is_kept(small, tmp_path):
    """Validation accuracies 0.1, 0.3, 0.2 in three epochs: the best is the second, the last the third."""
    for select, epoch in (("best", 2), ("last", 3)):
        config = dataclasses.replace(CONFIG, select=select, epochs=3)
        learner = train.Learner(network(), small, config, tmp_path / select)
        state = dict(history=[], best=None, seconds=0.0, finished=False, parts=[dict(epochs=0, seconds=0.0)])
        for number, accuracy in enumerate((0.1, 0.3, 0.2), 1):
            learner.model.fc.bias.data.fill_(number)
            learner.record(state, dict(epoch=number, val_accuracy=accuracy, seconds=1.0))
        assert state["best"]["epoch"] == epoch and state["best"]["state_dict"]["fc.bias"][0] == epoch
        assert state["finished"] and state["seconds"] == 3


def test_schedules_have_their_shapes():
    at = lambda schedule, **options: [lr_factor(step, 100, 0, schedule, **options) for step in (0, 25, 50, 75)]
    assert at("cosine") == pytest.approx([1, 0.5 + 0.5**1.5, 0.5, 0.5 - 0.5**1.5])
    assert at("linear") == pytest.approx([1, 0.75, 0.5, 0.25])
    assert at("steps", milestones=(0.25, 0.5)) == pytest.approx([1, 0.1, 0.01, 0.01])
    assert at("constant") == [1] * 4


def test_rates_follow_warm_up_and_schedule(small, tmp_path):
    """The rate of every step, seen from inside: two epochs of four steps, one of them warm-up."""
    seen = []
    config = dataclasses.replace(CONFIG, epochs=2, warmup=1.0, schedule="linear", lr=0.4, optimizer="sgd")
    learner = train.Learner(network(), small, config, tmp_path / "run")
    for _ in range(2):
        train.train_epoch(learner, lambda model: seen.append(learner.optimizer.param_groups[0]["lr"]))
    assert seen == pytest.approx([0.1, 0.2, 0.3, 0.4, 0.4, 0.3, 0.2, 0.1])


def test_training_loss_and_accuracy_are_means_over_images(small, tmp_path):
    """With a rate of 0 in one batch, they are those of the network in train mode, smoothing included."""
    config = TrainConfig(
        epochs=1, batch_size=100, lr=0, augment=(), label_smoothing=0.2, weight_decay=0, precision="no", accumulate=4
    )
    model = network()
    images = augment.normalise(small.train.x, small.spec)
    loss = correct = 0.0
    twin = copy.deepcopy(model).train()
    # The order of the images decides which share a piece, and so BatchNorm's means.
    order = torch.randperm(100, generator=torch.Generator().manual_seed(0))
    for part in order.chunk(4):
        logits = twin(images[part]).detach()
        loss += float(torch.nn.functional.cross_entropy(logits, small.train.y[part], label_smoothing=0.2, reduction="sum"))
        correct += float((logits.argmax(1) == small.train.y[part]).sum())
    row = fit(model, small, config, tmp_path / "run").history[0]
    assert row["train_loss"] == pytest.approx(loss / 100, rel=1e-4) and row["train_accuracy"] == correct / 100


@pytest.mark.parametrize("tta", (0, 1, 2))
def test_scores_agree_with_their_definitions(tta, small):
    model = network().eval()
    for parameter in model.parameters():
        parameter.data.mul_(1.5)  # answers that differ between images
    images = small.train
    with torch.no_grad():
        logits = evaluate.views(model, augment.normalise(images.x, small.spec), tta)
    scores = evaluate.evaluate(model.train(), images, small.spec, batch_size=33, tta=tta)
    assert model.training, "as it was before"
    chosen = logits.gather(1, images.y[:, None])
    assert scores["loss"] == pytest.approx(float((logits.logsumexp(1) - chosen[:, 0]).mean()), rel=1e-4)
    better = (logits > chosen).sum(1)
    assert scores["accuracy"] == pytest.approx(float((better == 0).float().mean()))
    assert scores["top5"] == pytest.approx(float((better < 5).float().mean())) and scores["top5"] < 1
    assert torch.allclose(evaluate.predict(model, images, small.spec, 33, tta), logits, atol=1e-4)


def test_muon_orthogonalises_keeps_the_norm_and_looks_ahead():
    """One step by hand, for a convolution: Nesterov's momentum, orthogonalised, from weights of norm sqrt(outputs)."""
    torch.manual_seed(0)
    conv = torch.nn.Conv2d(3, 8, 3, bias=False)
    optimizer = optim.make_optimizer(conv, TrainConfig(optimizer="muon", lr=0.1, momentum=0.6, weight_decay=0.5))
    w, buffer = conv.weight.detach().clone(), 0
    for _ in range(2):
        conv.weight.grad = torch.randn_like(conv.weight)
        grad = conv.weight.grad.clone()
        buffer = 0.6 * buffer + grad
        update = optim.orthogonalise((grad + 0.6 * buffer).flatten(1)).view_as(w)
        w = w * 8**0.5 / w.norm() - 0.1 * update
        optimizer.step()
        assert torch.allclose(conv.weight, w, atol=1e-5)
    assert abs(float(torch.linalg.svdvals(update.flatten(1)).mean()) - 1) < 0.4


def test_sgd_is_nesterov_with_decay_on_weights_alone():
    """Two steps by hand; gammas, betas and biases do not decay."""
    config = TrainConfig(lr=0.1, momentum=0.6, weight_decay=0.5)
    for module, name, decay in (
        (torch.nn.Linear(2, 2), "weight", 0.5), (torch.nn.Linear(2, 2), "bias", 0), (torch.nn.BatchNorm2d(2), "weight", 0),
    ):  # fmt: skip
        optimizer, p = optim.make_optimizer(module, config), getattr(module, name)
        w, buffer = p.detach().clone(), 0
        for _ in range(2):
            p.grad = torch.ones_like(p)
            grad = 1 + decay * w
            buffer = 0.6 * buffer + grad
            w = w - 0.1 * (grad + 0.6 * buffer)
            optimizer.step()
        assert torch.allclose(p, w, atol=1e-6), name


def test_dropout_differs_between_epochs_and_repeats_when_resumed(small, tmp_path):
    drawn = []
    learner = train.Learner(network(), small, dataclasses.replace(CONFIG, epochs=2), tmp_path / "run")
    for _ in range(2):
        train.train_epoch(learner, lambda model: drawn.append(float(torch.rand(1))))
    learner.loader.epoch = 1
    train.train_epoch(learner, lambda model: drawn.append(float(torch.rand(1))))
    first, second, again = drawn[:4], drawn[4:8], drawn[8:]
    assert first != second and second == again


def with_training_images(split, x, y):
    return Split(Images(x, y), split.val, split.test, split.spec, split.class_names)


def test_different_things_are_different_runs(small, tmp_path):
    """Fewer images, other labels, black images, other first weights: none is taken for the finished run."""
    fit(network(), small, CONFIG, tmp_path / "run")
    x, y = small.train.x, small.train.y
    fewer, turned = with_training_images(small, x[:99], y[:99]), with_training_images(small, x, y.flip(0))
    black = with_training_images(small, torch.zeros_like(x), y)
    turned_off = network()
    turned_off.fc.weight.data.zero_()
    for what, model, split in (
        ("weights", turned_off, small),
        ("train", network(), fewer),
        ("sha256", network(), turned),
        ("pixels", network(), black),
        ("weights", network(seed=1), small),
        ("weights", slimming.recalibrate_bn(network(), [(small.val.x.float(), None)]), small),
    ):
        with pytest.raises(WorkbookError, match=f"holds a run with {what}="):
            fit(model, split, CONFIG, tmp_path / "run")
    assert models.digest(network()) == models.digest(network()) != models.digest(network(seed=1))


def test_first_weights_are_the_same_but_for_the_last_bits():
    one, other = network(), network()
    with torch.no_grad():
        for p in other.parameters():
            p.mul_(1 + 1e-7)
    assert models.digest(one) != models.digest(other) and models.fingerprint(one) == models.fingerprint(other)


def test_a_run_made_before_digests_is_loaded_and_goes_on(small, tmp_path, capsys):
    with pytest.raises(Stop):
        fit(network(), small, CONFIG, tmp_path / "run", on_epoch=stop_after(1))
    path = tmp_path / "run" / "checkpoint.pt"
    state = files.load_checkpoint(path)
    del state["data"]["pixels"], state["start"], state["parts"]
    path.write_bytes(files.torch_bytes(state | dict(commit="aaa, bbb", precision="no")))
    run = fit(network(), small, CONFIG, tmp_path / "run")
    told = capsys.readouterr().out
    assert "made before digests, so its pixels and weights are not compared" in told
    assert len(run.history) == CONFIG.epochs and run.manifest["commit"].startswith("aaa, bbb, ")
    assert [part["epochs"] for part in run.manifest["parts"]] == [1, 2] and run.manifest["data"].get("pixels") is None


def test_a_process_that_slept_overwrites_nothing(small, tmp_path):
    """Another one takes the run over and ends it meanwhile; the first stops at its next save."""
    folder = tmp_path / "run"

    def meanwhile(row):
        if row["epoch"] == 2:
            fit(network(), small, CONFIG, folder)
            runs.save_result(folder, test=dict(accuracy=0.5))

    with pytest.raises(WorkbookError, match="has another owner now, or is gone; this process stops"):
        fit(network(), small, CONFIG, folder, on_epoch=meanwhile)
    manifest = runs.load_manifest(folder)
    assert manifest["finished"] and manifest["test"] == dict(accuracy=0.5)
    assert same(runs.load_model(folder).state_dict(), files.load_checkpoint(folder / "checkpoint.pt")["best"]["state_dict"])


def test_a_run_that_another_process_has_finished_meanwhile_is_loaded(small, tmp_path, monkeypatch):
    claim = train.claim

    def late(folder):  # between looking for the run and claiming it
        monkeypatch.setattr(train, "claim", claim)
        fit(network(), small, CONFIG, folder)
        before.append((folder / "checkpoint.pt").read_bytes())
        return claim(folder)

    before = []
    monkeypatch.setattr(train, "claim", late)
    run = fit(network(), small, CONFIG, tmp_path / "run")
    assert len(run.history) == CONFIG.epochs and (tmp_path / "run" / "checkpoint.pt").read_bytes() == before[0]


def test_a_process_that_stopped_while_saving_is_named(small, tmp_path, monkeypatch):
    monkeypatch.setattr(filelock, "FileLock", functools.partial(filelock.FileLock, is_singleton=False))
    with pytest.raises(WorkbookError, match="stopped while it was saving"), runs.locked(tmp_path):
        lock = filelock.FileLock(tmp_path / "lock", timeout=0.1)
        monkeypatch.setattr(filelock, "FileLock", lambda *_, **__: lock)
        with runs.locked(tmp_path):
            pass


def test_a_folder_that_cannot_be_locked_or_was_deleted_is_named(small, tmp_path):
    (tmp_path / "run" / "lock").mkdir(parents=True)
    with pytest.raises(WorkbookError, match="cannot be locked"):
        fit(network(), small, CONFIG, tmp_path / "run")

    def delete(row):
        shutil.rmtree(tmp_path / "gone")

    with pytest.raises(WorkbookError, match="or is gone; this process stops"):
        fit(network(), small, CONFIG, tmp_path / "gone", on_epoch=delete)


def test_an_exception_leaves_the_model_as_it_was(small, tmp_path):
    model, config = network(), dataclasses.replace(CONFIG, precision="bf16")
    before = copy.deepcopy(weights(model))
    with pytest.raises(Stop):
        fit(model, small, config, tmp_path / "a", on_epoch=stop_after(1))
    assert same(weights(model), before) and "forward" not in vars(model)
    fit(model, small, config, tmp_path / "b")
    assert same(weights(model), before), "a finished run is another model"


def test_processes_that_would_train_alone_are_refused(small, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(WorkbookError, match="2 processes were started, but each would train alone"):
        fit(network(), small, CONFIG, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_the_environment_of_accelerate_changes_nothing(small, tmp_path, monkeypatch):
    plain = fit(network(), small, CONFIG, tmp_path / "plain")
    for name, value in (
        ("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4"),
        ("ACCELERATE_DYNAMO_BACKEND", "inductor"),
        ("ACCELERATE_MIXED_PRECISION", "bf16"),
    ):
        monkeypatch.setenv(name, value)
    told = fit(network(), small, CONFIG, tmp_path / "told")
    assert same(weights(plain.model), weights(told.model)) and plain.manifest["precision"] == told.manifest["precision"]


def test_evaluating_in_a_hook_leaves_the_mode(small, tmp_path):
    modes = []

    def hook(model):
        modes.append(model.training)
        evaluate.evaluate(model, small.val, small.spec)

    fit(network(), small, dataclasses.replace(CONFIG, epochs=1), tmp_path / "run", on_grad=hook)
    assert modes and all(modes)


def test_speed_is_that_of_training_alone(small, tmp_path, monkeypatch):
    slow = lambda *words, **named: time.sleep(0.5) or evaluate.evaluate(*words, **named)
    monkeypatch.setattr(train, "evaluate", slow)
    row = fit(network(), small, dataclasses.replace(CONFIG, epochs=1), tmp_path / "run").history[0]
    assert row["images_per_s"] > 100 / (row["seconds"] - 0.4)


def test_the_commit_is_that_of_git():
    if not (ROOT / ".git").exists():
        pytest.skip("no checkout")
    head = subprocess.check_output(["git", "-C", str(ROOT), "rev-parse", "HEAD"], text=True)
    assert head.startswith(measure.commit().removesuffix("+"))


def test_the_commit_is_not_that_of_another_repository(tmp_path, monkeypatch):
    git = lambda *words: subprocess.run(["git", "-C", str(tmp_path), *words], check=True, capture_output=True)
    git("init")
    git("-c", "user.name=a", "-c", "user.email=a@b", "commit", "--allow-empty", "-m", "other")
    own = measure.commit()
    monkeypatch.setenv("GIT_DIR", str(tmp_path / ".git"))
    assert measure.commit() == own
    (tmp_path / "unpacked").mkdir()
    monkeypatch.setattr(measure, "ROOT", tmp_path / "unpacked")
    assert measure.commit() == "unknown"


@pytest.mark.parametrize("optimizer", ("sgd", "muon"))
@pytest.mark.parametrize("schedule", ("linear", "cosine", "constant"))
def test_the_reach_is_how_far_l1_moves_a_gamma_that_nobody_defends(optimizer, schedule, small):
    """A training by `Learner`'s own optimizer and schedule, whose gradients are those of L1 alone."""
    told = dict(lr=0.02, lr_other=0.03, lr_gamma=0.5, momentum=0.6, weight_decay=0.0, lam=0.01)
    told = TrainConfig(epochs=20, batch_size=45, warmup=2, optimizer=optimizer, schedule=schedule, **told)
    net = models.build("fastnet", depth=3, gammas=True, cfg=[8] * 6)
    gamma = slimming.gammas(net)[0]
    machine = optim.make_optimizer(net, told)
    images = len(small.train)
    warmup = round(2 * -(-images // 45))
    total = -(-images // 45) * 20
    peaks = [group["lr"] for group in machine.param_groups]
    for step in range(total):
        for group, peak in zip(machine.param_groups, peaks):
            group["lr"] = peak * lr_factor(step, total, warmup, schedule)
        for p in net.parameters():
            p.grad = torch.zeros_like(p)
        slimming.add_subgradient([gamma], told.lam)
        machine.step()
    far = reach(told.lam, gamma_rates(told, images), told.momentum)
    assert len(gamma_rates(told, images)) == total
    assert float(1 - gamma.mean()) == pytest.approx(far, rel=0.05)
