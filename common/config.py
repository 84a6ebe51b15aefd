"""What is a run told? `TrainConfig`, flat settings of a run, and the many of a study file."""

import dataclasses
import json
import re
from dataclasses import dataclass, field
from typing import Annotated, get_type_hints

from torch import nn

from common import WorkbookError, choose, models
from common.augment import parse_augment
from common.data import Split, check_val, pixels, sha256
from common.params import name as legal_name
from common.params import (
    number,
    one_of,
    optional,
    read_yaml,
    several,
    switch,
    text,
    texts,
    whole,
)
from common.slimming import PENALTIES, trained_gammas
from common.sources import SPECS

OPTIMIZERS = ("sgd", "adam", "muon")
SCHEDULES = ("cosine", "linear", "steps", "constant")
PRECISIONS = ("auto", "no", "fp16", "bf16")
SELECT = ("best", "last")
DIGESTS = ("pixels", "weights")  # not known of runs made before 2026-12
DATA = {"model", "dataset", "val"}  # settings that are no fields and do not go to the network
SECTIONS = dict(name=str, base=dict, seeds=list, configurations=dict)  # of a study file
# what it may hold besides: settings to be merged, and what a report says (`Lab2/experiment.py`)
MORE = {"shared", "title", "text", "comparisons", "notes"}
ABOUT = {"why", "pmacs", "weights"}  # of a configuration, besides settings

# A type and the rule that its values keep.
Count = Annotated[int, whole(1)]
Rate = Annotated[float, number(0)]
Share = Annotated[float, number(0, below=1)]


@dataclass(frozen=True)
class TrainConfig:
    """Every setting of a run. Two runs are the same if it, network, first weights and data are.

    Raises WorkbookError for an illegal value, and for settings that contradict each other.
    """

    epochs: Count = 20  # passes over the training images
    batch_size: Count = 128  # images a step
    # "sgd" (Nesterov), "adam" (AdamW) or "muon" (convolutions; the rest with SGD)
    optimizer: Annotated[str, one_of(OPTIMIZERS)] = "sgd"
    lr: Rate = 0.1  # peak learning rate
    lr_other: Rate = 0.1  # with "muon": peak learning rate of all that is not a convolution
    lr_gamma: Rate = 1.0  # learning rate of gammas, as a multiple of the others'
    lr_bias: Rate = 1.0  # learning rate of biases and betas, as a multiple of the others'
    momentum: Share = 0.9  # of "sgd" and "muon"
    # with "muon": of all that is not a convolution; None: the same
    momentum_other: Annotated[float | None, optional(number(0, below=1))] = None
    weight_decay: Rate = 5e-4  # on weights only: not on gammas, betas and biases
    # biases and betas decay too, as fast as the other weights do
    decay_bias: Annotated[bool, switch] = False
    # "cosine", "linear", "steps" or "constant"; all but the last end near 0
    schedule: Annotated[str, one_of(SCHEDULES)] = "cosine"
    warmup: Rate = 0.0  # epochs of linear warm-up
    # with "steps": shares of the run after which lr falls tenfold
    milestones: Annotated[tuple[float, ...], several(number(0, 1))] = (0.5, 0.75)
    label_smoothing: Share = 0.0  # share of the target spread over all classes
    augment: Annotated[tuple[str, ...], texts] = ("flip", "crop:4")  # see common.augment.AUGMENT
    low_res: Share = 0.0  # share of the epochs, from the first on, trained on shrunken images
    # side lengths of those images in pixels, one after the other for equal shares
    low_sizes: Annotated[tuple[int, ...], several(whole(16, 32))] = (24,)
    accumulate: Count = 1  # pieces a batch is cut into, one backward pass each
    # largest gradient norm
    clip: Annotated[float | None, optional(number(1e-9))] = None
    # "no", "fp16", "bf16", or "auto": what the machine computes natively
    precision: Annotated[str, one_of(PRECISIONS)] = "auto"
    # whose weights are kept: of the "best" epoch on validation, or of the "last"
    select: Annotated[str, one_of(SELECT)] = "best"
    # epochs without a better validation accuracy before stopping
    patience: Annotated[int | None, optional(whole(1))] = None
    lam: Rate = 0.0  # L1 strength on the gammas of the inner prune groups
    # how the L1 term acts: "subgradient", or "proximal", which reaches exact zeros
    penalty: Annotated[str, one_of(PENALTIES)] = "subgradient"
    # parameter whose gradient norm is recorded, before clipping, as the mean over an epoch
    watch: Annotated[str | None, optional(text)] = None
    seed: Annotated[int, whole(0, 2**31)] = 0  # order of images, augmentation, dropout
    init: Annotated[str, text] = "random"  # where the first weights come from

    def __post_init__(self):
        for name, hint in get_type_hints(TrainConfig, include_extras=True).items():
            for rule in getattr(hint, "__metadata__", ()):
                rule(name, getattr(self, name))
        parse_augment(self.augment)
        if self.patience and self.select == "last":
            raise WorkbookError("patience waits for a better epoch, select='last' takes the last")
        if self.warmup and self.warmup >= self.epochs:
            raise WorkbookError(f"warmup={self.warmup} fills epochs={self.epochs}; give fewer")


FIELDS = tuple(field.name for field in dataclasses.fields(TrainConfig))


def as_json(value) -> dict:
    """What JSON makes of a dataclass or dict, so that saved and new settings compare equal."""
    value = dataclasses.asdict(value) if dataclasses.is_dataclass(value) else value
    return json.loads(json.dumps(value, default=lambda number: number.item()))  # of numpy


def identity(model: nn.Module, split: Split, config: TrainConfig) -> dict:
    """What makes two runs the same: config, network, its first weights, and the data.

    `sha256`: of the labels of both parts, which fix the split; `pixels`: of their images.
    """
    parts = split.train, split.val
    data = dict(name=split.spec.name, train=len(split.train), val=len(split.val))
    data |= dict(sha256=sha256(*(part.y.byte() for part in parts)), pixels=pixels(*parts))
    start = dict(weights=models.fingerprint(model))
    return dict(config=as_json(config), spec=as_json(model.spec), data=data, start=start)


def differences(kept: dict, identity: dict):
    """Yield (setting, value of the run that is kept, value asked for) where these are not equal."""
    for part, wanted in identity.items():  # older ones lack fields
        fill = dict(config=full_config, spec=full_spec).get(part, dict)
        had, wanted = fill(kept.get(part, {})), fill(wanted)
        for key in {**had, **wanted}:
            old, new = had.get(key), wanted.get(key)
            if old != new and (key not in DIGESTS or old is not None):
                yield key, old, new


def full_config(config: dict) -> dict:
    """A saved config with all fields, and the numbers that augmentations stand for."""
    config = as_json(TrainConfig()) | config
    steps = parse_augment(config["augment"])
    return config | dict(augment=[(f.__name__ if f else "altflip", *rest) for f, rest in steps])


def full_spec(spec: dict) -> dict:
    """A network's spec with all that it leaves to defaults."""
    return as_json(models.arguments_of(spec["name"])) | dict(classes=10) | spec


def parse_init(init: str) -> tuple:
    """("lab2-sparse-0", 0.5) of "lab2-sparse-0, ratio 0.5"; None for "lab2-sparse-0, gap"."""
    found = re.fullmatch(r"([\w.-]+), (?:gap|ratio (0?\.\d+))", str(init))
    if not found:
        legal = '"RUN, gap" or "RUN, ratio 0.5"'
        raise WorkbookError(f"init={init!r} is not legal; give random, {legal}")
    return found[1], float(found[2]) if found[2] else None


def config_and_network(settings: dict) -> tuple:
    """The `TrainConfig` of a run's flat settings, and the arguments of its network."""
    own = {key: settings[key] for key in settings if key in FIELDS}
    own = {key: tuple(value) if isinstance(value, list) else value for key, value in own.items()}
    network = {key: settings[key] for key in settings if key not in {*FIELDS} | DATA}
    classes = SPECS[settings["dataset"]].classes
    return TrainConfig(**own), dict(name=settings["model"], classes=classes, **network)


def check_settings(settings: dict) -> tuple:
    """What makes a run, all defaults filled in; builds its network.

    Raises WorkbookError for a key that is unknown, and a value that is not legal.
    """
    arguments = models.arguments_of(settings.get("model"))
    for key in settings:
        choose("key", key, sorted({*FIELDS, "cfg"} | DATA | set(arguments)))
    if settings.get("init", "random") != "random":
        parse_init(settings["init"])
    spec = SPECS[choose("dataset", settings.get("dataset"), SPECS)]
    optional(whole(1))("val", settings.get("val"))
    val = check_val(settings.get("val"), spec)
    config, network = config_and_network(settings)
    model = models.build(**network)
    if config.watch:
        trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        choose("parameter", config.watch, trained)
    if config.lam:
        trained_gammas(model)
    return config, arguments | network, spec, val


@dataclass(frozen=True)
class Study:
    """A study file, checked: `runs` maps `configuration/seed` to the settings of a run.

    `about`: what a configuration has of ABOUT; `more`: what the file has of MORE.
    """

    name: str
    runs: dict
    about: dict = field(default_factory=dict)
    more: dict = field(default_factory=dict)


def read_study(path) -> Study:
    """Read a study file (YAML): name, `base` settings, `seeds`, what `configurations` change.

    Settings: fields of `TrainConfig`, `model`, `dataset`, `val`, arguments of the network; a
    configuration may have own `seeds`. In `init`, {seed} stands for the seed. Raises WorkbookError
    for any mistake, before anything runs: every network is built once.
    """
    found = read_sections(path)
    legal_name(f"study file {path}: name", found["name"])
    expanded, about, seen = {}, {}, {}
    for name, changes in found["configurations"].items():
        try:
            legal_name("configuration", str(name))
            if not isinstance(changes or {}, dict):
                raise WorkbookError(f"{changes!r} is not legal; give settings, as in lr: 0.1")
            settings = found["base"] | (changes or {})
            about[name] = {key: settings.pop(key) for key in ABOUT if key in settings}
            seeds = settings.pop("seeds", found["seeds"])
            several(whole(0, 2**31))("seeds", seeds)
            legal_name("run", f"{found['name']}-{name}-{max(seeds)}")
            if "seed" in settings:
                raise WorkbookError("unknown key 'seed' (did you mean 'seeds'?)")
            told, *rest = check_settings(with_seed(settings, 0))
            twin = seen.setdefault(repr((full_config(as_json(told)), rest)), name)
            if twin != name or len(set(seeds)) < len(seeds):
                raise WorkbookError(f"{twin!r} is the same, or a seed is given twice; remove one")
        except Exception as error:  # of a rule, or of building the network
            reason = " ".join(str(error).split())
            raise WorkbookError(f"study file {path}, configuration {name!r}: {reason}") from None
        expanded |= {f"{name}/{seed}": with_seed(settings, seed) for seed in seeds}
    return Study(found["name"], expanded, about, {key: found[key] for key in MORE if key in found})


def with_seed(settings: dict, seed: int) -> dict:
    """The settings of one run, whose `init` may name the run of the same seed."""
    if "init" in settings:
        settings = settings | dict(init=str(settings["init"]).replace("{seed}", str(seed)))
    return settings | dict(seed=seed)


def read_sections(path) -> dict:
    """What a study file holds; raises WorkbookError for a section that is missing or unknown."""
    found = content if isinstance(content := read_yaml(path), dict) else {}
    for key in {**found, **SECTIONS}.keys() - MORE:
        if key not in SECTIONS or not isinstance(found.get(key), SECTIONS[key]) or not found[key]:
            legal = ", ".join(f"{name} ({kind.__name__})" for name, kind in SECTIONS.items())
            raise WorkbookError(f"study file {path}: look at {key!r}; it must hold exactly {legal}")
    return found
