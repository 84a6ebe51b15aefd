"""What students write: wrong attempts at each exercise, as they really occur.

Exercise → (what is wrong, a part of the solution, what stands in its place, words of the check's
message that must name it). A part may have several lines; a fifth entry is a second change.
"""

ATTEMPTS = {
    "bottleneck": [
        (
            "the middle width for the stream",
            "outputs, 1, bias=False))\nself.inside.append(nn.BatchNorm2d(outputs))",
            "second, 1, bias=False))\nself.inside.append(nn.BatchNorm2d(second))",
            "must end in",
        ),
        (
            "no convolution on the shortcut where only the stride differs",
            "stride != 1 or ",
            "",
            "on the shortcut",
        ),
        (
            "the stride on the first convolution",
            "first, 1, bias=False",
            "first, 1, stride, bias=False",
            "the 3×3 carries it",
            (", 3, stride, 1,", ", 3, 1, 1,"),
        ),
        ("no activation", ".append(nn.ReLU())", "", "is there a ReLU"),
    ],
    "add-l1": [
        ("L2", "gamma.detach().sign()", "gamma.detach()", "that is L2"),
        ("the gradient replaced", "+=", "=", "the loss (1) is gone"),
        (
            "divided by its size",
            "gamma.detach().sign()",
            "(gamma / gamma.abs()).detach()",
            "NaN",
        ),
        ("the parameter changed", "gamma.grad +=", "gamma.data -=", "gamma itself"),
    ],
    "reach": [
        ("no momentum", "lam / (1 - momentum)", "lam", "momentum adds up"),
        ("peak times steps", "sum(rates)", "rates[0] * len(rates)", "the rates fall"),
    ],
    "soft-threshold": [
        ("across zero", "(gamma.abs() - a).clamp(min=0)", "gamma.abs() - a", "must stop there"),
        (
            "negative ones die",
            "gamma.copy_(gamma.sign() * shorter)",
            "gamma.copy_((gamma - a).clamp(min=0))",
            "its sign must stay",
        ),
        ("only a name", "gamma.copy_(gamma.sign() * shorter)", "gamma = shorter", "another tensor"),
    ],
    "make-masks": [
        (
            "a threshold",
            "kept[removed] = False",
            "kept = every > every.sort().values[max(0, round(ratio * len(every)) - 1)]",
            "threshold",
        ),
        ("cut off", "round(ratio * len(every))", "int(ratio * len(every))", "int() cuts off"),
        ("signed", ".abs()", "", "is higher than one that stays"),
        ("integers", "dtype=torch.bool", "dtype=torch.int", "~1 is -2"),
    ],
    "give-back": [
        (
            "all get least",
            "max(int(mask.sum()), min(least, len(mask)))",
            "min(least, len(mask))",
            "full kept 5",
        ),
        (
            "the worst return",
            "scores[layer].argsort(descending=True)[:wanted]",
            "(scores[layer] - 100 * mask).argsort()[:wanted]",
            "the best return first",
        ),
        (
            "a layer smaller than least",
            "scores[layer].argsort(descending=True)[:wanted]",
            "scores[layer].topk(max(int(mask.sum()), least)).indices",
            "it cannot get 4",
        ),
    ],
    "cut": [
        (
            "the first ones",
            "conv.weight.data[mask]",
            "conv.weight.data[:kept]",
            "other channels than the mask keeps",
        ),
        (
            "statistics forgotten",
            '"weight", "bias", "running_mean", "running_var"',
            '"weight", "bias"',
            "running_mean and running_var",
        ),
        (
            "the reader forgotten",
            "new_reader.weight.data = reader.weight.data[:, mask].clone()",
            "pass",
            "take the slices",
        ),
        (
            "the layer given changed",
            "new_conv.weight.data = ",
            "conv.weight.data *= 2\nnew_conv.weight.data = ",
            "work on copies",
        ),
    ],
    "fold": [
        ("the sign", "mean - weight", "mean + weight", "sign"),
        ("one tap", "weight.sum((2, 3))", "weight[:, :, 0, 0]", "sum over all taps"),
        ("those kept, too", " * ~mask", "", "those kept still send"),
        ("no activation", "act(beta)", "beta", "its constant is act(beta)"),
    ],
    "remeasure": [
        ("no reset", "module.reset_running_stats()", "pass", "reset them first"),
        (
            "the last batches count most",
            "module.momentum = None",
            "module.momentum = 0.9",
            "the order of the batches",
        ),
        ("left in training", "return net.eval()", "return net", "eval mode"),
    ],
    "conv-macs": [
        ("pixels that go in", "rows * columns", "height * width", "pixels that come out"),
        ("groups ignored", " // conv.groups", "", "a quarter of the inputs"),
        ("FLOPs", "return rows", "return 2 * rows", "FLOPs are 2 × MACs"),
    ],
    "equal-epochs": [
        ("no fine-tuning", " + small_macs * tuning_epochs", "", "equal networks"),
        (
            "inverted",
            "spent / small_macs",
            "dense_epochs * small_macs / dense_macs + tuning_epochs",
            "may be trained for longer",
        ),
        (
            "tuning at the dense cost",
            "small_macs * tuning_epochs",
            "dense_macs * tuning_epochs",
            "of the small network",
        ),
    ],
    "difference": [
        (
            "unpaired",
            "better.std()",
            "((a == labels).double().var() + (b == labels).double().var()) ** 0.5",
            "equal answers",
        ),
        ("no root of N", " / len(labels) ** 0.5", "", "root of N"),
        (
            "turned round",
            "(a == labels).double() - (b == labels).double()",
            "(b == labels).double() - (a == labels).double()",
            "a is the better one",
        ),
    ],
}
