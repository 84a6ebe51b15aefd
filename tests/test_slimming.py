"""Slimming: every transform is checked against an oracle."""

import copy

import pytest
import torch
import torch.nn.functional as F
import torch_pruning

from common import WorkbookError, slimming
from common.augment import normalise
from common.data import Loader
from tests.conftest import warmed

KINDS = ("inner", "coupled")


@pytest.fixture(scope="module")
def x(sample):
    return normalise(sample.test.x[:8], sample.spec)


def close(a, b):
    return (a - b).abs().max() <= 1e-4 * max(1.0, float(b.abs().max()))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("ratio", (0.5, 0.9))
def test_masked_network_equals_compact_network(network, x, kind, ratio):
    masks = slimming.make_masks(slimming.scores(network, kind=kind), ratio)
    compact = slimming.slim(network, masks)
    assert sum(p.numel() for p in compact.parameters()) < sum(p.numel() for p in network.parameters())
    with torch.no_grad():
        expected = slimming.apply_masks(network, masks)(x)
        assert close(compact(x), expected)
        assert not close(network(x), expected)


@pytest.mark.parametrize("kind", KINDS)
def test_ratio_zero_is_the_identity(network, x, kind):
    compact = slimming.slim(network, slimming.make_masks(slimming.scores(network, kind=kind), 0.0))
    assert compact.cfg == network.cfg
    with torch.no_grad():
        assert torch.equal(compact(x), network(x))


def test_slim_leaves_the_model_alone(network, x):
    before = copy.deepcopy(network.state_dict())
    masks = slimming.make_masks(slimming.scores(network), 0.5)
    slimming.slim(network, masks), slimming.apply_masks(network, masks), slimming.fold_bias(network, masks, x)
    assert all(torch.equal(before[name], value) for name, value in network.state_dict().items())


def test_layer_shapes_agree_with_the_weights(network):
    compact = slimming.slim(network, slimming.make_masks(slimming.scores(network, kind="coupled"), 0.7))
    for module in compact.modules():
        if isinstance(module, torch.nn.Conv2d):
            assert module.weight.shape[:2] == (module.out_channels, module.in_channels // module.groups)
        if isinstance(module, torch.nn.BatchNorm2d):
            assert len(module.running_mean) == module.num_features


@pytest.mark.parametrize("kind", KINDS)
def test_torch_pruning_removes_the_same_channels(network, x, kind):
    """An independent implementation, given the same channels, must give the same outputs."""
    masks = slimming.make_masks(slimming.scores(network, kind=kind), 0.5)
    other = copy.deepcopy(network)
    graph = torch_pruning.DependencyGraph().build_dependency(other, torch.randn(1, 3, 32, 32))
    for group in other.groups(kind):
        conv = other.get_submodule(group.out[0])
        removed = (~masks[group.name]).nonzero()[:, 0].tolist()
        if removed:
            graph.get_pruning_group(conv, torch_pruning.prune_conv_out_channels, removed).prune()
    with torch.no_grad():
        assert close(slimming.slim(network, masks)(x), other(x))


def test_groups_cover_cfg_in_order(network):
    widths = [network.get_submodule(group.out[0]).out_channels for group in network.groups("coupled")]
    assert widths == network.cfg
    for group in network.groups("coupled"):
        assert {network.get_submodule(name).out_channels for name in group.out} == {
            network.get_submodule(group.out[0]).out_channels
        }


@pytest.mark.parametrize("ratio", (0.0, 0.1, 0.5, 0.95))
def test_exactly_k_channels_go_even_with_ties(ratio):
    scores = {"a": torch.ones(30), "b": torch.ones(70)}
    assert slimming.achieved(slimming.make_masks(scores, ratio, min_channels=0)) == pytest.approx(ratio)


def test_lowest_scores_go_first():
    masks = slimming.make_masks({"a": torch.tensor([3.0, 1.0, 2.0]), "b": torch.tensor([9.0, 0.5, 8.0])}, 0.5)
    assert masks["a"].tolist() == [True, False, False] and masks["b"].tolist() == [True, False, True]


def test_minimum_and_rounding_keep_the_best():
    scores = {"starved": torch.linspace(0, 0.1, 20), "rich": torch.linspace(1, 2, 20)}
    masks = slimming.make_masks(scores, 0.5, min_channels=3, round_to=4)
    assert [int(mask.sum()) for mask in masks.values()] == [4, 20]
    assert masks["starved"].nonzero()[:, 0].tolist() == [16, 17, 18, 19]


def test_layer_scope_removes_the_same_share_everywhere():
    masks = slimming.make_masks({"a": torch.rand(10), "b": 100 + torch.rand(20)}, 0.5, scope="layer")
    assert [int(mask.sum()) for mask in masks.values()] == [5, 10]


@pytest.mark.parametrize("ratio", (1, 1.5, -0.1, float("nan"), "50%", True, None))
def test_illegal_ratio(ratio):
    with pytest.raises(WorkbookError, match="ratio="):
        slimming.make_masks({"a": torch.rand(10)}, ratio)


@pytest.mark.parametrize("criterion", slimming.CRITERIA)
def test_criteria_score_every_group(x, sample, criterion):
    model = warmed("resnet17", width=16)
    batches = [(x, sample.test.y[:8])]
    for kind in KINDS:
        scores = slimming.scores(model, criterion, kind, batches)
        assert list(scores) == [group.name for group in model.groups(kind)]
        assert all(torch.isfinite(score).all() and (score >= 0).all() for score in scores.values())


def test_criteria_mean_what_they_say(x, sample):
    model = warmed("vgg16")
    group = model.groups()[0]
    norm, conv = (model.get_submodule(name[0]) for name in (group.norm, group.out))
    gamma = slimming.scores(model)[group.name]
    assert torch.equal(gamma, norm.weight.abs())
    assert slimming.scores(model, "gamma/mean")[group.name].mean() == pytest.approx(1, abs=1e-5)
    assert torch.allclose(slimming.scores(model, "l1")[group.name], conv.weight.abs().sum((1, 2, 3)))
    with torch.no_grad():
        norm.weight[5], norm.bias[5] = 0, 0
    assert slimming.scores(model, "taylor", batches=[(x, sample.test.y[:8])])[group.name][5] == 0
    with pytest.raises(WorkbookError, match="taylor"):
        slimming.scores(model, "taylor")


def test_folding_is_exact_where_no_padding_meets_the_constant(x):
    """With gamma 0 a channel is the constant relu(beta): folding it into a 1×1 convolution loses nothing."""
    model = warmed("resnet17", width=16)
    pointwise = [group for group in model.groups() if group.into[0].endswith("conv3")]
    masks = {group.name: torch.arange(model.get_submodule(group.norm[0]).num_features) % 2 == 0 for group in pointwise}
    constant = slimming.apply_masks(model, masks, keep_beta=True)
    folded = slimming.slim(slimming.fold_bias(model, masks, x), masks)
    with torch.no_grad():
        assert close(folded(x), constant(x))
        assert not close(slimming.slim(model, masks)(x), constant(x))


def test_folding_does_not_depend_on_the_images_for_inner_groups(x):
    model = warmed("resnet18", width=8)
    masks = slimming.make_masks(slimming.scores(model), 0.5)
    a, b = (slimming.fold_bias(model, masks, images).state_dict() for images in (x[:4], x[4:]))
    assert all(torch.allclose(a[name], b[name], atol=1e-5) for name in a)


def test_recalibration_sets_statistics_to_those_of_the_data(sample, x):
    model = warmed("resnet17", width=16)
    fresh = slimming.recalibrate_bn(model, Loader(sample.train, sample.spec, 500, shuffle=False))
    inputs = []
    fresh.bn1.register_forward_pre_hook(lambda module, args: inputs.append(args[0]))
    with torch.no_grad():
        fresh(normalise(sample.train.x, sample.spec))
    assert torch.allclose(fresh.bn1.running_mean, inputs[0].mean((0, 2, 3)), atol=1e-4)
    assert fresh.bn1.momentum == model.bn1.momentum and not fresh.training
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), fresh.parameters()))


def test_penalties_do_what_the_formulas_say():
    model = warmed("vgg16")
    F.cross_entropy(model(torch.randn(4, 3, 32, 32)), torch.arange(4)).backward()
    values = slimming.gammas(model)
    gradients, before = [v.grad.clone() for v in values], [v.detach().clone() for v in values]
    slimming.add_subgradient(values, 0.01)
    assert all(torch.allclose(v.grad - g, 0.01 * v.detach().sign(), atol=1e-6) for v, g in zip(values, gradients))
    slimming.shrink(values, 0.5)
    assert all(torch.allclose(v, (b.abs() - 0.5).clamp(min=0) * b.sign()) for v, b in zip(values, before))
    assert any((v == 0).any() for v in values)


def test_taylor_is_the_squared_first_order_change_of_the_loss(x, sample):
    """Against a small step: the loss with a channel's gamma and beta shrunk by a thousandth."""
    model, y = warmed("resnet17", width=4).double(), sample.test.y[:8]
    group = model.groups()[1]
    score = slimming.scores(model, "taylor", batches=[(x.double(), y)])[group.name]
    norm = model.get_submodule(group.norm[0])
    loss = lambda: float(F.cross_entropy(model(x.double()), y))
    with torch.no_grad():
        before = loss()
        for channel in range(4):
            kept = norm.weight[channel].item(), norm.bias[channel].item()
            norm.weight[channel] *= 0.999
            norm.bias[channel] *= 0.999
            change = (before - loss()) / 0.001
            norm.weight[channel], norm.bias[channel] = kept
            assert float(score[channel]) == pytest.approx(change**2, rel=0.05, abs=1e-9)


def test_gamma_over_mean_is_gamma_over_its_mean():
    model = warmed("resnet17", width=8)
    gammas, shares = slimming.scores(model), slimming.scores(model, "gamma/mean")
    for name, gamma in gammas.items():
        assert torch.allclose(shares[name], gamma / gamma.mean()) and shares[name].std() > 0.1


def test_folding_into_a_classifier_is_exact(x):
    """VGG's last convolution is read by a linear layer with a bias: relu(beta) goes there, with its sign."""
    model = warmed("vgg16")
    group = model.groups()[-1]
    masks = {group.name: torch.arange(512) % 2 == 0}
    constant = slimming.apply_masks(model, masks, keep_beta=True)
    folded = slimming.slim(slimming.fold_bias(model, masks, x), masks)
    with torch.no_grad():
        spread = float((constant(x) - slimming.apply_masks(model, masks)(x)).abs().max())
        assert float((folded(x) - constant(x)).abs().max()) < 1e-3 * spread
