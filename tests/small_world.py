"""A world in which a lesson of any scale takes a minute: few images, two epochs, the networks as they are."""

import dataclasses

import torch

from common import WorkbookError, data, measure, slimming, sources, sweep, train
from common.data import Images, Split

fit, profile, latency, gap = train.fit, measure.profile, measure.latency, slimming.gap


def few(part, n, classes):
    """n images of the sample; labels go through all classes."""
    index = torch.arange(n) % len(part)
    return Images(part.x[index], torch.arange(n) % classes)


def small_load(name="cifar10", val=None, seed=0, folder=None):
    """The split of a data set's kind, with a few images of each class in place of each part."""
    spec = sources.SPECS[name]
    data.check_val(val, spec)
    sample, n = load("cifar10-sample"), 200 if spec.classes == 100 else 130
    names = data.NAMES if spec.classes == 10 else tuple(f"class {i}" for i in range(spec.classes))
    parts = (few(part, n, spec.classes) for part in (sample.train, sample.val, sample.test))
    return Split(*parts, spec, names)


def small_fit(model, split, config, folder, **hooks):
    """Two epochs of whatever recipe; what is as short already stays as it is."""
    if config.epochs > 2:
        small = dict(epochs=2, batch_size=min(config.batch_size, 64), warmup=min(config.warmup, 0.5))
        config = dataclasses.replace(config, **small)
    return fit(model, split, config, folder, **hooks)


def small_gap(scores):
    """After two epochs there may be none."""
    try:
        return gap(scores)
    except WorkbookError:
        return 0.7


load = data.load


def install():
    """Take the place of what costs time."""
    data.load = sweep.load = small_load
    train.fit = small_fit
    slimming.gap = small_gap
    measure.latency = lambda model, batch_size=1, repeats=50, warmup=5: latency(model, batch_size, 2, 0)
