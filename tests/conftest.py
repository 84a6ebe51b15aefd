"""Shared fixtures: small data, warmed-up networks."""

import functools

import pytest
import torch

from common.augment import normalise
from common.data import Images, Split, load
from common.models import MODELS, build


@pytest.fixture(scope="session")
def sample():
    return load("cifar10-sample")


@pytest.fixture(scope="session")
def small(sample):
    """100 training, 40 validation and 40 test images."""
    cut = lambda images, n: Images(images.x[:n], images.y[:n])
    return Split(cut(sample.train, 100), cut(sample.val, 40), cut(sample.test, 40), sample.spec, sample.class_names)


@functools.cache
def calibration():
    """64 images of the sample, normalised."""
    split = load("cifar10-sample")
    return normalise(split.train.x[:64], split.spec)


def warmed(name, **arguments):
    """A network with random weights, gammas and betas, and running statistics of images."""
    torch.manual_seed(0)
    model = build(name, **arguments)
    for module in model.modules():
        if isinstance(module, torch.nn.Conv2d):  # fastnet's own start copies single channels
            torch.nn.init.kaiming_normal_(module.weight)
        if isinstance(module, torch.nn.BatchNorm2d) and module.affine:
            torch.nn.init.uniform_(module.weight, 0.2, 1.2)
            torch.nn.init.normal_(module.bias, 0, 0.1)
    torch.optim.swa_utils.update_bn([calibration()], model)
    return model.eval()


def narrow(name, **arguments):
    """The same graph with an eighth of the channels: cheap to run."""
    return warmed(name, cfg=[max(6, width // 8) for width in build(name, **arguments).cfg], **arguments)


SHAPES = {
    "fastnet, residual": dict(name="fastnet", depth=3, gammas=True),
    "fastnet, se": dict(name="fastnet", se=16, gammas=True),
    "fastnet": dict(name="fastnet", gammas=True),
    "mobilenet, sigmoid": dict(name="mobilenet", activation="sigmoid"),
    "mobilenet, prelu": dict(name="mobilenet", activation="prelu"),
    "mobilenet, tanh": dict(name="mobilenet", activation="tanh"),
}


@pytest.fixture(scope="session", params=sorted({*MODELS, *SHAPES}))
def network(request):
    return narrow(**SHAPES.get(request.param, dict(name=request.param)))


@pytest.fixture
def places(tmp_path, monkeypatch):
    """Folders of their own for runs and for reports."""
    monkeypatch.setenv("RUNS_DIR", str(tmp_path / "runs"))
    monkeypatch.setenv("REPORTS_DIR", str(tmp_path / "reports"))
    return tmp_path
