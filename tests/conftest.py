"""Shared fixtures: small data, warmed-up networks, folders that are thrown away."""

import os
import tempfile

import pytest
import torch

from common.data import Images, Split, load
from common.models import MODELS, build

# Runs of tests and of notebooks under nbval go to a folder of their own, so that no old run is met.
os.environ["RUNS_DIR"] = tempfile.mkdtemp(prefix="workbook-runs-")


def pytest_collection_modifyitems(items):
    for item in items:
        if hasattr(item, "output_timeout"):  # nbval waits 5 s for each message, too short on a loaded machine
            item.output_timeout = 120


@pytest.fixture(scope="session")
def sample():
    return load("cifar10-sample")


@pytest.fixture(scope="session")
def small(sample):
    """100 training, 40 validation and 40 test images."""
    cut = lambda images, n: Images(images.x[:n], images.y[:n])
    return Split(cut(sample.train, 100), cut(sample.val, 40), cut(sample.test, 40), sample.spec, sample.class_names)


def warmed(name, **arguments):
    """A network with random gammas, betas and running statistics, so that no BatchNorm is the identity."""
    torch.manual_seed(0)
    model = build(name, **arguments)
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 1.5)
            if module.affine:
                torch.nn.init.uniform_(module.weight, 0.2, 1.2)
                torch.nn.init.normal_(module.bias, 0, 0.1)
    return model.eval()


SHAPES = {"fastnet, residual": dict(name="fastnet", depth=3, gammas=True), "fastnet, se": dict(name="fastnet", se=16)}


@pytest.fixture(scope="session", params=sorted(MODELS) + list(SHAPES))
def network(request):
    return warmed(**SHAPES.get(request.param, dict(name=request.param)))
