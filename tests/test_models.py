"""Networks: sizes from the literature, shapes, widths."""

import pytest
import torch

from common import WorkbookError
from common.augment import normalise
from common.measure import macs, params
from common.models import MODELS, build, fresh, pytorch_init
from common.models.groups import Whiten
from common.models.mobilenet import ACTIVATIONS

PARAMETERS = dict(resnet50=23_513_162, resnet18=11_173_962, resnet56=591_322, vgg16=14_724_042, vgg19=20_035_018)


@pytest.mark.parametrize("name", PARAMETERS)
def test_parameters_of_the_literature(name):
    assert params(build(name)) == PARAMETERS[name]


def test_macs_of_the_literature():
    assert macs(build("resnet18")) == pytest.approx(555e6, rel=0.01)
    assert macs(build("vgg16")) == pytest.approx(313e6, rel=0.01)
    assert macs(build("fastnet")) == pytest.approx(118e6, rel=0.01)
    assert macs(build("mobilenet", classes=100)) == pytest.approx(46.4e6, rel=0.01)


def test_depths_are_what_the_names_say():
    for name in ("resnet18", "resnet50", "resnet56", "vgg16", "vgg19", "resnet17", "seresnet44"):
        layers = [n for n, m in build(name).named_modules() if isinstance(m, (torch.nn.Conv2d, torch.nn.Linear))]
        assert sum("shortcut" not in n and ".se." not in n and n != "whiten" for n in layers) == {"vgg16": 14, "vgg19": 17}.get(
            name, int(name[-2:])
        )


@pytest.mark.parametrize("classes", (10, 100))
def test_one_logit_a_class(network, classes):
    model = build(**{**network.spec, "classes": classes}).eval()
    assert model(torch.zeros(2, 3, 32, 32)).shape == (2, classes)


def test_spec_builds_the_same_network(network):
    again = build(**network.spec)
    assert {k: v.shape for k, v in again.state_dict().items()} == {k: v.shape for k, v in network.state_dict().items()}


@pytest.mark.parametrize("name", ("resnet18", "seresnet44"))
def test_gradients_of_narrow_networks_do_not_depend_on_the_memory_layout(name, monkeypatch):
    """Strided 1×1 convolutions of few channels: torch's CPU library gets their gradients wrong (oneDNN issue 6035)."""
    for owner in (torch.nn.functional, torch.Tensor):  # a smooth activation: no kink that rounding could cross
        monkeypatch.setattr(owner, "relu", lambda x: torch.nn.functional.softplus(x))
    x, gradients = torch.randn(5, 3, 32, 32, generator=torch.Generator().manual_seed(0)), []
    for layout, dtype in ((torch.channels_last, torch.float32), (torch.contiguous_format, torch.float64)):
        model = fresh(name, 0, x[:0], width=4).to(dtype)
        model.to(memory_format=layout)(x.to(dtype, memory_format=layout)).logsumexp(1).sum().backward()
        gradients.append({n: p.grad for n, p in model.named_parameters()})
    for n, wanted in gradients[1].items():
        error = float((gradients[0][n].double() - wanted).norm() / wanted.norm())
        assert error < 0.01, f"{n}: {error:.1%} off"


def test_width_scales_the_network():
    assert build("resnet18", width=16).cfg == [c // 4 for c in build("resnet18").cfg]


def test_same_seed_same_weights(sample):
    x = normalise(sample.train.x[:100], sample.spec)
    one, two, other = (fresh("fastnet", seed, x, width=4).state_dict() for seed in (0, 0, 1))
    assert all(torch.equal(one[k], two[k]) for k in one) and not torch.equal(one["head.weight"], other["head.weight"])


def test_pytorch_init_draws_convolutions_anew_and_keeps_the_whitening(sample):
    x = normalise(sample.train.x[:100], sample.spec)
    before, after = fresh("fastnet", 0, x, width=8), pytorch_init(fresh("fastnet", 0, x, width=8))
    assert torch.equal(before.whiten.weight, after.whiten.weight) and torch.equal(before.head.weight, after.head.weight)
    for a, b in zip(before.stages, after.stages):
        bound = b.conv1.weight[0].numel() ** -0.5  # uniform up to it: of variance 1 / (3 fan-in)
        assert not torch.equal(a.conv1.weight, b.conv1.weight) and b.conv1.weight.abs().max() <= bound
        assert b.conv1.weight.std().item() == pytest.approx(bound / 3**0.5, rel=0.1)


def test_fastnet_takes_smaller_images_and_starts_with_dirac_filters():
    model = build("fastnet", width=8, depth=3).eval()
    assert model(torch.zeros(2, 3, 24, 24)).shape == (2, 10)
    x = torch.randn(1, 32, 7, 7)
    assert torch.equal(model.stages[2].conv1(x), x)


def test_only_the_slimmable_fastnet_trains_gammas():
    trained = lambda **kw: {n for n, p in build("fastnet", width=4, **kw).named_parameters() if p.requires_grad and "bn" in n}
    assert not [n for n in trained() if n.endswith("weight")]
    assert len([n for n in trained(gammas=True) if n.endswith("weight")]) == 6


def test_small_networks_stay_under_5_million_parameters():
    assert params(build("seresnet44")) < 5_000_000 and params(build("fastnet", width=79, depth=3, se=16)) < 5_000_000
    assert params(build("mobilenet", classes=100)) == pytest.approx(3.3e6, rel=0.01)


def test_mobilenet_activation_by_block():
    model = build("mobilenet", width=0.1, activation="gelu", activation_at={"sigmoid": [4, 10]})
    kinds = [type(layer.act).__name__ for layer in model.layers]
    assert kinds == ["Sigmoid" if i in (4, 10) else "GELU" for i in range(13)] and model.layers[8].conv1.weight.shape[1] == 1
    with pytest.raises(WorkbookError, match="block 13 is out of range.*0 to 12"):
        build("mobilenet", activation_at={"sigmoid": [13]})
    with pytest.raises(WorkbookError, match="unknown activation 'sigmiod' .*'sigmoid'"):
        build("mobilenet", activation_at={"sigmiod": [1]})


@pytest.mark.parametrize("name", sorted(ACTIVATIONS))
def test_every_activation_name_builds(name):
    assert build("mobilenet", width=0.05, activation=name).eval()(torch.ones(1, 3, 32, 32)).shape == (1, 10)


def test_wrong_arguments_are_named():
    with pytest.raises(WorkbookError, match="'resnet18'"):
        build("resnet19")
    with pytest.raises(WorkbookError, match="vgg16.*'width'"):
        build("vgg16", width=3)
    for cfg in ([64], [0] * 13, ["64"] * 13):
        with pytest.raises(WorkbookError, match="13 channel widths"):
            build("vgg16", cfg=cfg)


def test_whitened_stem_decorrelates_patches(sample):
    x = normalise(sample.train.x, sample.spec)
    model = fresh("resnet17", 0, x)
    out = model.whiten(x)[:, :12].transpose(0, 1).flatten(1)
    covariance = out @ out.T / out.shape[1]
    strong = covariance.diagonal() > 0.5  # weak directions are damped on purpose
    expected = torch.diag(covariance.diagonal())
    assert strong.sum() >= 8 and (covariance - expected).abs().max() < 0.05
    assert torch.equal(model.whiten.weight[:12], -model.whiten.weight[12:]) and not model.whiten.weight.requires_grad


def test_registry_names_the_functions():
    assert all(name == function.__name__ for name, function in MODELS.items())


def convolutions(model):
    inside = [m for m in model.modules() if isinstance(m, torch.nn.Conv2d) and not isinstance(m, Whiten)]
    return [conv for conv in inside if conv.weight.numel() > 2000]


@pytest.mark.parametrize("name,width", (("resnet18", 16), ("resnet17", 16), ("seresnet44", 16)))
def test_residual_networks_start_as_kaiming_says(name, width):
    """Weights of mean square 2 / (outputs × kernel size), as He et al. (2015) derive for ReLU."""
    for conv in convolutions(build(name, width=width)):
        fan_out = conv.out_channels * conv.kernel_size[0] * conv.kernel_size[1]
        assert float(conv.weight.detach().square().mean() * fan_out) == pytest.approx(2, rel=0.15)


def test_zero_last_makes_every_block_its_shortcut():
    """Lab 2's network: at the start the last BatchNorm of each block has gamma 0."""
    last = [getattr(block, f"bn{block.depth}").weight for block in build("resnet17", width=8).blocks]
    assert all(bool((gamma == 0).all()) for gamma in last)
    last = [getattr(block, f"bn{block.depth}").weight for block in build("resnet18", width=8).blocks]
    assert all(bool((gamma == 1).all()) for gamma in last)


@pytest.mark.parametrize("name", ("resnet18", "seresnet44", "fastnet"))
def test_dropout_acts_in_training_alone(name):
    x, passes = torch.randn(2, 3, 32, 32), {}
    for p in (0.0, 0.5):
        model = build(name, width=8, dropout=p)
        for module in model.modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                module.eval()
        with torch.no_grad():
            passes[p] = torch.equal(model(x), model(x))
            assert torch.equal(model.eval()(x), model(x))
    assert passes == {0.0: True, 0.5: False}
