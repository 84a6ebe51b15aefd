"""Measuring: counts agree with an independent one, and nothing changes the model."""

import copy
import mmap

import psutil
import pytest
import torch

from common import measure
from common.models import MODELS, build
from tests.conftest import warmed


@pytest.mark.parametrize("profiler", (measure.macs, measure.thop_macs, measure.summary, measure.latency, measure.file_bytes))
@pytest.mark.parametrize("training", (False, True))
def test_profilers_leave_the_model_alone(profiler, training, sample):
    model = warmed("resnet17", width=8).train(training)
    before, x = copy.deepcopy(model.state_dict()), torch.randn(2, 3, 32, 32)
    expected = copy.deepcopy(model).eval()(x)
    profiler(model)
    assert list(model.state_dict()) == list(before) and model.training == training
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert not any(module._forward_hooks for module in model.modules())
    assert torch.equal(model.eval()(x), expected)


@pytest.mark.parametrize("name", MODELS)
def test_thop_counts_the_same_convolutions(name):
    """thop adds BatchNorm (4 operations an element) and pooling layers on top: a few percent, never less."""
    network = build(name)
    counted = measure.macs(network)
    assert counted <= measure.thop_macs(network) <= counted * 1.15


def test_macs_of_one_convolution_by_hand():
    model = warmed("resnet18", width=4)
    stem = 3 * 3 * 3 * 4 * 32 * 32
    assert measure.macs(model) > stem
    alone = torch.nn.Conv2d(3, 4, 3, padding=1, bias=False)
    assert measure.macs(alone) == stem


def test_latency_is_ordered():
    row = measure.latency(warmed("resnet17", width=4), batch_size=2, repeats=50)
    assert 0 < row["p10"] <= row["median"] <= row["p90"]


def test_profile_has_every_column():
    row = measure.profile(warmed("resnet17", width=4), repeats=5)
    assert (
        set(row) == {"params", "macs", "latency_1", "range_1", "latency_64", "range_64", "bytes"}
        and row["bytes"] > 4 * row["params"]
    )


def test_peak_memory_grows_with_what_is_used():
    """In GB: half a gigabyte above the peak so far is taken, and seen."""
    before, gpu = measure.peak_memory(), torch.cuda.is_available()
    now = torch.cuda.memory_allocated() if gpu else psutil.Process().memory_info().rss
    size = int(before * 1e9) - now + 500_000_000
    # memory that is new for sure: torch may have kept some that was freed
    block = torch.ones(size, dtype=torch.uint8, device="cuda") if gpu else mmap.mmap(-1, size)
    if not gpu:
        block.write(bytes(size))
    assert 0.4 < measure.peak_memory() - before < 1.2


def test_pflops_count_low_resolution_epochs_cheaper():
    model = build("fastnet", width=8)
    whole = measure.pflops(model, 1000, 4)
    assert whole == pytest.approx(6e-15 * 4000 * measure.macs(model))
    assert measure.pflops(model, 1000, 4, 0.5) == pytest.approx(6e-15 * 2000 * (measure.macs(model) + measure.macs(model, 24)))
    assert measure.macs(model, 24) < 0.6 * measure.macs(model)
    assert measure.pflops(model, 1000, 4, 0.5, done=3) == pytest.approx(measure.pflops(model, 1000, 4, 0.5) - whole / 4)


def test_latency_runs_the_model_on_a_batch_of_its_size():
    seen = []
    model = torch.nn.Conv2d(3, 1, 1)
    model.register_forward_pre_hook(lambda module, inputs: seen.append(tuple(inputs[0].shape)))
    measure.latency(model, batch_size=64, repeats=3, warmup=2)
    assert seen == [(64, 3, 32, 32)] * 5
