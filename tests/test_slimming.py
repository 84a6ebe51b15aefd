"""Slimming: every transform is checked against an oracle."""

import copy

import pytest
import torch
import torch.nn.functional as F
import torch_pruning

from common import WorkbookError, slimming
from common.augment import normalise
from common.data import Loader
from tests.conftest import calibration, warmed

KINDS = ("inner", "coupled")


@pytest.fixture(scope="module")
def x(sample):
    return normalise(sample.test.x[:8], sample.spec)


def apart(a, b):
    """The largest difference of two sets of logits (N, classes), as a share of their spread between images."""
    return float((a - b).abs().max() / b.std(0).mean())


NEAR = 1e-3  # rounding stays below a tenth of it


def close(a, b):
    return apart(a, b) <= NEAR


def masked(model, ratio=0.5, seed=0):
    """Masks for all groups of a model; each keeps at least three channels."""
    masks = {}
    for kind in KINDS:
        if model.groups(kind):
            masks |= slimming.make_masks(slimming.scores(model, "random", kind, seed=seed), ratio, min_channels=3)
    return masks


def fitted(model, masks):
    """A copy with the running statistics it has once masked: with others, deep ones answer the same to all images."""
    silenced, model = slimming.apply_masks(model, masks), copy.deepcopy(model)
    torch.optim.swa_utils.update_bn([calibration()], silenced)
    statistics = {name: value for name, value in silenced.state_dict().items() if "running" in name}
    model.load_state_dict(model.state_dict() | statistics)
    return model


@torch.no_grad()
@pytest.mark.parametrize("ratio", (0.5, 0.9))
def test_masked_network_equals_compact_network(network, x, ratio):
    masks = masked(network, ratio)
    model = fitted(network, masks)
    compact, expected = slimming.slim(model, masks)(x), slimming.apply_masks(model, masks)(x)
    assert apart(compact, expected) <= NEAR < apart(model(x), expected)
    images = calibration()[:8]
    assert apart(slimming.slim(model, masks)(images), expected) > 0.1, "answers differ between images"


@torch.no_grad()
def test_pruning_twice_is_pruning_once(network, x):
    first = masked(network)
    second = masked(slimming.slim(network, first), seed=1)
    both = {}
    for name, mask in first.items():
        kept = mask.nonzero()[:, 0][second[name]]
        both[name] = torch.zeros_like(mask).index_fill(0, kept, True)
    model = fitted(network, both)
    once = slimming.slim(model, first)
    twice = slimming.slim(once, second)
    assert sum(twice.cfg) < sum(once.cfg) < sum(model.cfg)
    assert apart(twice(x), slimming.apply_masks(model, both)(x)) <= NEAR
    assert apart(twice(x), slimming.apply_masks(once, second)(x)) <= NEAR


def wrong_surgeries(model):
    """What can go wrong in a compact model, one at a time: (what, tensor, wrong value)."""
    state = model.state_dict()
    for group in model.groups():
        for layer in group.into:
            weight = state[f"{layer}.weight"]
            yield f"inputs of {layer} rolled", weight, weight.roll(1, 1)
        for layer in group.out:
            weight = state[f"{layer}.weight"]
            yield f"filters of {layer} rolled", weight, weight.roll(1, 0)
        for layer in group.norm:
            for kind in ("weight", "bias", "running_mean", "running_var"):
                if (name := f"{layer}.{kind}") in state:
                    yield f"{name} rolled", state[name], state[name].roll(1)
            if f"{layer}.bias" in state:
                yield f"{layer}.bias missing", state[f"{layer}.bias"], torch.zeros_like(state[f"{layer}.bias"])
        for layer in group.gates:
            for kind in ("weight", "bias"):
                value = state[f"{layer}.{kind}"]
                yield f"{layer}.{kind} rolled", value, value.roll(1, 0)


@torch.no_grad()
def test_every_wrong_surgery_is_noticed(network, x):
    masks = masked(network)
    model = fitted(network, masks)
    compact, expected = slimming.slim(model, masks), slimming.apply_masks(model, masks)(x)
    unseen = []
    for what, tensor, wrong in wrong_surgeries(compact):
        right = tensor.clone()
        tensor.copy_(wrong)
        if close(compact(x), expected):
            unseen.append(what)
        tensor.copy_(right)
    assert not unseen and apart(compact(x), expected) <= NEAR


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
def test_ratio_zero_is_the_identity(network, x, kind):
    if not network.groups(kind):
        with pytest.raises(WorkbookError, match="has no 'coupled' groups; choose the other kind"):
            slimming.scores(network, kind=kind)
        return
    compact = slimming.slim(network, slimming.make_masks(slimming.scores(network, kind=kind), 0.0))
    assert compact.cfg == network.cfg and torch.equal(compact(x), network(x))


def test_slim_leaves_the_model_alone(network, x):
    before = copy.deepcopy(network.state_dict())
    masks = slimming.make_masks(slimming.scores(network), 0.5)
    slimming.slim(network, masks), slimming.apply_masks(network, masks), slimming.fold_bias(network, masks, x)
    slimming.recalibrate_bn(network, [(x, None)])
    assert all(torch.equal(before[name], value) for name, value in network.state_dict().items())


@torch.no_grad()
def test_torch_pruning_removes_the_same_channels(network, x):
    """An independent implementation, given the same channels, must give the same outputs."""
    if any(isinstance(module, torch.nn.PReLU) for module in network.modules()):
        pytest.skip("torch_pruning cuts the only parameter of a PReLU")
    masks = masked(network)
    network = fitted(network, masks)
    other = copy.deepcopy(network)
    with torch.enable_grad():
        graph = torch_pruning.DependencyGraph().build_dependency(other, torch.randn(1, 3, 32, 32))
    for group in other.groups():
        conv = other.get_submodule(group.out[0])
        removed = (~masks[group.name]).nonzero()[:, 0].tolist()
        graph.get_pruning_group(conv, torch_pruning.prune_conv_out_channels, removed).prune()
    assert apart(slimming.slim(network, masks)(x), other(x)) <= NEAR


def test_each_group_is_of_one_kind(network):
    """Widths that L1 acts on, or streams that it does not: they are never ranked together."""
    inner, coupled = ([group.name for group in network.groups(kind)] for kind in KINDS)
    assert sorted(inner + coupled) == sorted(group.name for group in network.groups())
    penalised = {id(gamma) for gamma in slimming.gammas(network)}
    for group in network.groups("coupled"):
        norms = [network.get_submodule(name) for name in group.norm]
        assert not penalised & {id(norm.weight) for norm in norms}


@pytest.mark.parametrize(
    "mask", (torch.ones(3, dtype=torch.bool), torch.ones(64), torch.ones(64, 1, dtype=torch.bool), [True] * 64)
)
def test_masks_are_checked(x, mask):
    model = warmed("resnet17", width=64)
    name = model.groups("inner")[0].name
    for use in (slimming.slim, slimming.apply_masks, lambda *both: slimming.fold_bias(*both, x)):
        with pytest.raises(WorkbookError, match="give a tensor of 64 booleans"):
            use(model, {name: mask})


def test_slim_keeps_the_number_format(x):
    model = warmed("resnet17", width=8).double()
    compact = slimming.slim(model, masked(model))
    assert {value.dtype for value in compact.parameters()} == {torch.float64}


def test_groups_cover_cfg_in_order(network):
    widths = [network.get_submodule(group.out[0]).out_channels for group in network.groups()]
    assert widths == network.cfg
    for group in network.groups():
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


@torch.no_grad()
def test_a_dead_channel_goes_first_wherever_it_sits(x, sample):
    """In a chain (depthwise convolutions) one dead BatchNorm is enough; in a sum, all must be."""
    batches = [(x, sample.test.y[:8])]
    chain = warmed("mobilenet", width=0.25)
    group = chain.groups()[2]
    for place, channel in enumerate((5, 11)):
        norm = chain.get_submodule(group.norm[place])
        norm.weight[channel], norm.bias[channel] = 0, 0
    for criterion in ("gamma", "taylor"):
        with torch.enable_grad():
            score = slimming.scores(chain, criterion, batches=batches)[group.name]
        assert sorted(score.argsort()[:2].tolist()) == [5, 11], criterion
    stream = warmed("resnet17", width=8)
    group = next(group for group in stream.groups("coupled") if len(group.norm) > 1)
    norms = [stream.get_submodule(name) for name in group.norm]
    expected = torch.stack([norm.weight.abs() if norm.affine else torch.ones(norm.num_features) for norm in norms])
    assert torch.allclose(slimming.scores(stream, kind="coupled")[group.name], expected.mean(0))


def test_a_shortcut_without_gamma_counts_as_one():
    norm = torch.nn.BatchNorm2d(5, affine=False)
    assert slimming.gamma_of(norm).tolist() == [1] * 5


def test_fixed_gammas_are_not_ranked(x, sample):
    model = warmed("fastnet", width=4)
    with pytest.raises(WorkbookError, match="gammas=True"):
        slimming.scores(model)
    assert slimming.scores(model, "taylor", batches=[(x, sample.test.y[:8])])


def test_criteria_mean_what_they_say(x, sample):
    model = warmed("vgg16", cfg=[8] * 13)
    group = model.groups()[0]
    norm = model.get_submodule(group.norm[0])
    assert torch.equal(slimming.scores(model)[group.name], norm.weight.abs())
    with torch.no_grad():
        norm.weight[5], norm.bias[5] = 0, 0
    assert slimming.scores(model, "taylor", batches=[(x, sample.test.y[:8])])[group.name][5] == 0
    for nothing in ((), iter([])):
        with pytest.raises(WorkbookError, match="taylor"):
            slimming.scores(model, "taylor", batches=nothing)


@pytest.mark.parametrize("cut", ((8,), (7, 1), (3, 3, 2)))
def test_each_image_counts_the_same_however_they_are_batched(x, sample, cut):
    model, y = warmed("resnet17", width=8), sample.test.y[:8]
    whole = slimming.scores(model, "taylor", batches=[(x, y)])
    parts = slimming.scores(model, "taylor", batches=list(zip(x.split(cut), y.split(cut))))
    for name, score in whole.items():
        assert torch.allclose(parts[name], score, rtol=1e-3, atol=1e-9)


@torch.no_grad()
def with_constants(model, masks):
    """A copy in which a removed channel sends the constant act(beta): its gamma is 0."""
    model = copy.deepcopy(model)
    for group in model.groups():
        for name in group.norm if group.name in masks else ():
            model.get_submodule(name).weight[~masks[group.name]] = 0
    return model


def test_folding_is_exact_where_no_padding_meets_the_constant(x):
    """With gamma 0 a channel is the constant relu(beta): folding it into a 1×1 convolution loses nothing."""
    model = warmed("resnet17", width=16)
    pointwise = [group for group in model.groups() if group.into[0].endswith("conv3")]
    masks = {group.name: torch.arange(model.get_submodule(group.norm[0]).num_features) % 2 == 0 for group in pointwise}
    constant = with_constants(model, masks)
    folded = slimming.slim(slimming.fold_bias(model, masks, x), masks)
    with torch.no_grad():
        assert apart(folded(x), constant(x)) <= NEAR < apart(slimming.slim(model, masks)(x), constant(x))


def test_folding_does_not_depend_on_the_images_for_inner_groups(x):
    model = warmed("resnet18", width=8)
    masks = slimming.make_masks(slimming.scores(model), 0.5)
    a, b = (slimming.fold_bias(model, masks, images).state_dict() for images in (x[:4], x[4:]))
    assert all(torch.allclose(a[name], b[name], atol=1e-5) for name in a)


@torch.no_grad()
@pytest.mark.parametrize("size", (250, 249, 499, 500))
def test_recalibration_sets_statistics_to_those_of_the_data(sample, size):
    """Also where the last batch is smaller: each image counts the same."""
    model = warmed("resnet17", width=16)
    images = sample.train[:500]
    fresh = slimming.recalibrate_bn(model, Loader(images, sample.spec, size, shuffle=False))
    inputs = []
    fresh.bn1.register_forward_pre_hook(lambda module, args: inputs.append(args[0]))
    fresh(normalise(images.x, sample.spec))
    assert torch.allclose(fresh.bn1.running_mean, inputs[0].mean((0, 2, 3)), atol=1e-4)
    assert fresh.bn1.momentum == model.bn1.momentum and not fresh.training
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), fresh.parameters()))


def test_recalibration_puts_only_batchnorm_into_training_mode(sample):
    batches = list(Loader(sample.train[:100], sample.spec, 50, shuffle=False))
    model = warmed("mobilenet", width=0.25, activation="rrelu")  # random slopes, if it trains
    first, second = (slimming.recalibrate_bn(model, batches).state_dict() for _ in range(2))
    assert all(torch.equal(value, second[name]) for name, value in first.items())


def test_recalibration_needs_images():
    for nothing in ([], iter([])):
        with pytest.raises(WorkbookError, match="no images"):
            slimming.recalibrate_bn(warmed("resnet17", width=4), nothing)


@torch.no_grad()
def test_a_channel_that_is_constant_on_the_calibration_images_stays_harmless(sample, x):
    """Its variance is 0: another image would be divided by the square root of fastnet's eps, 1e-12."""
    model = warmed("fastnet", width=8, gammas=True)
    black = [(torch.zeros_like(x), None)]
    assert slimming.recalibrate_bn(model, black)(x).abs().max() < 1e3


def test_penalties_do_what_the_formulas_say():
    model = warmed("vgg16", cfg=[8] * 13)
    F.cross_entropy(model(torch.randn(4, 3, 32, 32)), torch.arange(4)).backward()
    values = slimming.gammas(model)
    gradients, before = [v.grad.clone() for v in values], [v.detach().clone() for v in values]
    slimming.add_subgradient(values, 0.01)
    assert all(torch.allclose(v.grad - g, 0.01 * v.detach().sign(), atol=1e-6) for v, g in zip(values, gradients))
    slimming.shrink(values, 0.5)
    assert all(torch.allclose(v, (b.abs() - 0.5).clamp(min=0) * b.sign()) for v, b in zip(values, before))
    assert any((v == 0).any() for v in values)


def test_taylor_is_the_squared_first_order_change_of_the_loss(x, sample):
    """Against a small step: the loss with a channel's gamma and beta shrunk by a millionth."""
    model, y = warmed("resnet17", width=4).double(), sample.test.y[:8]
    group = model.groups("inner")[1]
    score = slimming.scores(model, "taylor", batches=[(x.double(), y)])[group.name]
    norm = model.get_submodule(group.norm[0])
    loss = lambda: float(F.cross_entropy(model(x.double()), y))
    with torch.no_grad():
        before = loss()
        for channel in range(4):
            kept = norm.weight[channel].item(), norm.bias[channel].item()
            norm.weight[channel] *= 1 - 1e-6
            norm.bias[channel] *= 1 - 1e-6
            change = (before - loss()) / 1e-6
            norm.weight[channel], norm.bias[channel] = kept
            assert float(score[channel]) == pytest.approx(change**2, rel=0.05, abs=1e-9)


def test_folding_into_a_classifier_is_exact(x):
    """VGG's last convolution is read by a linear layer with a bias: relu(beta) goes there, with its sign."""
    model = warmed("vgg16", cfg=[16] * 13)
    group = model.groups()[-1]
    masks = {group.name: torch.arange(16) % 2 == 0}
    constant = with_constants(model, masks)
    folded = slimming.slim(slimming.fold_bias(model, masks, x), masks)
    with torch.no_grad():
        spread = float((constant(x) - slimming.apply_masks(model, masks)(x)).abs().max())
        assert float((folded(x) - constant(x)).abs().max()) < 1e-3 * spread
