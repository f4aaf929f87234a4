"""The image sets and their batches, held against slow loops and counts made by other means."""

import http.server
import multiprocessing
import threading
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits

from scconv import data as data_module
from scconv.data import (
    ImageData,
    Photographs,
    channel_statistics,
    crop_and_flip,
    epoch_order,
    eval_batches,
    load_data,
    normalise,
    photograph_addresses,
    pick_test_images,
    random_crop_and_flip,
    shrink,
    train_batches,
)
from scconv.files import atomic_file


def shift_by_loop(image: np.ndarray, top: int, left: int, flipped: bool, padding: int) -> np.ndarray:
    """One image (C, H, W), pixel by pixel: output (y, x) is input (y + top - padding, x + left - padding), or 0."""
    _, height, width = image.shape
    out = np.zeros_like(image)
    for y in range(height):
        for x in range(width):
            source_x = width - 1 - x if flipped else x
            row, column = y + top - padding, source_x + left - padding
            if 0 <= row < height and 0 <= column < width:
                out[:, y, x] = image[:, row, column]
    return out


@pytest.mark.parametrize(("full", "size"), [(32, 16), (32, 24), (224, 168), (9, 8)])
def test_shrinking_is_pillows(full, size):
    """Antialiased: Pillow's bilinear filter, which averages over the pixels that become one."""
    images = torch.rand(2, 3, full, full, generator=torch.Generator().manual_seed(0))
    small = shrink(images, size)
    assert small.shape == (2, 3, size, size)
    for image, expected in zip(small.flatten(0, 1), images.flatten(0, 1), strict=True):
        pillow = Image.fromarray(expected.numpy()).resize((size, size), Image.Resampling.BILINEAR)
        torch.testing.assert_close(image, torch.from_numpy(np.array(pillow)), rtol=1e-5, atol=1e-5)


def test_full_size_is_the_image_itself():
    images = torch.rand(2, 3, 32, 32)
    assert shrink(images, 32) is images


@pytest.mark.parametrize(
    ("shape", "padding"),
    [
        ((9, 3, 6, 6), 4),  # square, as the sets are
        ((5, 3, 5, 8), 2),  # not square: rows and columns cannot be confused
        ((2, 1, 3, 4), 0),  # no padding: only the flip is left
    ],
)
def test_crop_and_flip_equals_a_loop_over_pixels(shape, padding):
    images = torch.randint(1, 256, shape, dtype=torch.uint8)
    top, left = torch.randint(2 * padding + 1, (2, shape[0]))
    flipped = torch.arange(shape[0]) % 2 == 0
    expected = [
        shift_by_loop(image.numpy(), int(t), int(c), bool(f), padding)
        for image, t, c, f in zip(images, top, left, flipped, strict=True)
    ]
    out = crop_and_flip(images, top, left, flipped, padding)
    assert out.dtype == torch.uint8
    np.testing.assert_array_equal(out.numpy(), np.stack(expected))


def test_centre_crop_without_flip_is_the_image_itself():
    images = torch.randint(256, (3, 3, 7, 7), dtype=torch.uint8)
    centre = torch.full((3,), 4)
    assert torch.equal(crop_and_flip(images, centre, centre, torch.zeros(3, dtype=torch.bool)), images)


def test_random_crops_reach_every_offset_and_flip_half():
    """Pixels are numbered from left to right, so the middle tells the offset and its neighbour the flip."""
    numbered = torch.arange(81).reshape(1, 1, 9, 9).expand(4000, 1, 9, 9)
    out = random_crop_and_flip(numbered, torch.Generator().manual_seed(0), padding=3)
    assert set(out[:, 0, 4, 4].tolist()) == set(numbered[0, 0, 1:8, 1:8].flatten().tolist())
    assert 0.45 < (out[:, 0, 4, 5] < out[:, 0, 4, 4]).double().mean() < 0.55
    out = random_crop_and_flip(numbered, torch.Generator().manual_seed(0), padding=3, flip=False)
    assert (out[:, 0, 4, 5] == out[:, 0, 4, 4] + 1).all()


def test_augmentation_depends_on_its_generator_alone_and_keeps_its_input():
    images = torch.randint(256, (8, 3, 8, 8), dtype=torch.uint8)
    before = images.clone()
    first = random_crop_and_flip(images, torch.Generator().manual_seed(5))
    torch.manual_seed(99)
    assert torch.equal(first, random_crop_and_flip(images, torch.Generator().manual_seed(5)))
    assert not torch.equal(first, random_crop_and_flip(images, torch.Generator().manual_seed(6)))
    assert torch.equal(images, before)


def test_channel_statistics_and_normalise():
    images = torch.randint(256, (50, 3, 6, 6), dtype=torch.uint8)
    images[:, 1] //= 2  # each channel has statistics of its own
    images[:, 2] //= 4
    pixels = images.numpy() / 255
    mean, std = channel_statistics(images)
    np.testing.assert_allclose(mean, pixels.mean((0, 2, 3)), rtol=1e-12)
    np.testing.assert_allclose(std, pixels.std((0, 2, 3)), rtol=1e-12)
    out = normalise(images, torch.tensor(mean), torch.tensor(std))
    torch.testing.assert_close(out.mean((0, 2, 3)), torch.zeros(3), atol=1e-5, rtol=0)
    torch.testing.assert_close(out.std((0, 2, 3), correction=0), torch.ones(3))


# ---- the sampler ---------------------------------------------------------------------------------------------------


def numbered(n: int) -> ImageData:
    """`n` images, each its own class."""
    split = (torch.randint(256, (n, 3, 8, 8), dtype=torch.uint8), torch.arange(n))
    return ImageData("toy", ("a",) * n, 8, (0.0,) * 3, (1.0,) * 3, split, split)


def test_an_epoch_has_each_index_once_in_another_order():
    order = epoch_order(103, seed=1, epoch=2).tolist()
    assert sorted(order) == list(range(103))
    assert order != list(range(103))


@pytest.mark.parametrize(("batch_size", "steps"), [(10, 10), (103, 1), (104, 0)])
def test_an_epoch_has_only_full_batches(batch_size, steps):
    batches = [labels for _, labels in train_batches(numbered(103), batch_size, 1, 2)]
    assert [len(labels) for labels in batches] == [batch_size] * steps
    assert len({label for labels in batches for label in labels.tolist()}) == batch_size * steps


def test_order_follows_from_seed_and_epoch():
    def order(seed, epoch):
        return epoch_order(100, seed, epoch).tolist()

    assert order(0, 1) == order(0, 1)
    assert len({tuple(order(seed, epoch)) for seed in range(4) for epoch in range(4)}) == 16


@pytest.mark.parametrize("world", [1, 2, 3])
def test_train_batches_are_the_sampler_and_the_augmentation(world):
    """Two processes together see what one sees, image by image, crops included."""
    data = numbered(20)
    images = data.train[0]
    ranks = [list(train_batches(data, 6, 3, 4, rank=rank, world=world)) for rank in range(world)]
    plain = [torch.cat(parts) for parts in zip(*([y for _, y in rank] for rank in ranks), strict=True)]
    assert torch.cat(plain).tolist() == epoch_order(20, 3, 4)[:18].tolist()
    assert {len(labels) for rank in ranks for _, labels in rank} == {6 // world}
    alone = list(train_batches(data, 6, 3, 4))
    for step, (x, y) in enumerate(alone):
        assert torch.equal(torch.cat([rank[step][0] for rank in ranks]), x)
        assert not torch.equal(x * 255, images[y].float())
    for x, y in train_batches(data, 6, 3, 4, augment=False):
        torch.testing.assert_close(x * 255, images[y].float())


@pytest.mark.parametrize("start", [0, 3, 44])
def test_an_epoch_can_be_entered_later(start):
    data = load_data("digits", image_size=8)
    whole = list(train_batches(data, 32, seed=1, epoch=2))
    rest = list(train_batches(data, 32, seed=1, epoch=2, start=start))
    assert len(whole) == 1437 // 32
    assert len(rest) == len(whole) - start
    for (images, labels), (expected, expected_labels) in zip(rest, whole[start:], strict=True):
        assert torch.equal(images, expected)
        assert torch.equal(labels, expected_labels)


def test_the_same_test_images_are_picked_in_each_order():
    data = load_data("digits", image_size=8)
    order = data.test[1].argsort(stable=True)
    by_class = replace(data, test=(data.test[0][order], data.test[1][order]))
    picked, others = (pick_test_images(copy, 100) for copy in (data, by_class))
    assert torch.equal(picked[0], others[0])
    assert torch.equal(picked[1], others[1])
    assert len(picked[1].unique()) == 10
    brightness = picked[0].double().mean() / data.test[0].double().mean()
    assert 0.9 < brightness < 1.1, "the lot must not depend on how bright an image is"


def test_eval_batches_are_all_images_in_order():
    data = numbered(20)
    assert torch.cat([y for _, y in eval_batches(data, 6)]).tolist() == list(range(20))
    shares = [y for rank in range(3) for _, y in eval_batches(data, 6, rank=rank, world=3)]
    assert sorted(torch.cat(shares).tolist()) == list(range(20))


# ---- the sets ------------------------------------------------------------------------------------------------------


def test_digits():
    data = load_data("digits")
    images, labels = data.train
    assert images.shape == (1437, 3, 32, 32)
    assert images.dtype == torch.uint8
    assert data.test[0].shape == (360, 3, 32, 32)
    assert data.classes == tuple("0123456789")
    assert not data.mirror
    everything = np.bincount(load_digits().target)
    share = np.bincount(data.test[1]) / everything
    assert np.all(np.abs(share - 360 / 1797) < 0.006)  # stratified: within one image of an equal share
    np.testing.assert_array_equal(np.bincount(labels) + np.bincount(data.test[1]), everything)


def test_digits_at_their_own_size_are_scikit_learns_pixels():
    data = load_data("digits", image_size=8)
    own = {(image.tobytes(), int(label)) for image, label in zip(*load_digits(return_X_y=True), strict=True)}
    for images, labels in (data.train, data.test):
        grey = (images[:, 0].double() * 16 / 255).round()
        assert {(g.numpy().tobytes(), int(y)) for g, y in zip(grey.reshape(-1, 64), labels, strict=True)} <= own
        assert torch.equal(images[:, 0], images[:, 2])


def test_digits_split_is_always_the_same():
    np.random.seed(3)  # noqa: NPY002 - the split must not follow the global generator
    first = load_data("digits", image_size=8)
    np.random.seed(4)  # noqa: NPY002
    second = load_data("digits", image_size=8)
    assert torch.equal(first.train[0], second.train[0])
    assert torch.equal(first.test[1], second.test[1])


def write_cache(root, n=(6, 4), **changes):
    """A tiny packed CIFAR-100, with `changes` in both files; returns its images."""
    (root / "cifar100").mkdir(parents=True)
    everything = []
    for split, count in zip(("train", "test"), n, strict=True):
        images = np.random.default_rng(count).integers(256, size=(count, 32, 32, 3), dtype=np.uint8)
        parts = {"images": images, "labels": np.arange(count), "classes": np.array([f"c{k}" for k in range(100)])}
        parts |= changes
        np.savez(root / "cifar100" / f"{split}.npz", **parts)
        everything.append(parts["images"])
    return everything


def test_packed_cifar100_is_read_as_it_is(tmp_path, monkeypatch):
    images, test_images = write_cache(tmp_path)
    monkeypatch.setenv("SCCONV_DATA", str(tmp_path))
    data = load_data("cifar100")
    np.testing.assert_array_equal(data.train[0].permute(0, 2, 3, 1), images)
    np.testing.assert_array_equal(data.test[0].permute(0, 2, 3, 1), test_images)
    assert data.train[1].tolist() == [0, 1, 2, 3, 4, 5]
    assert (data.num_train, data.num_test, len(data.classes), data.image_size) == (6, 4, 100, 32)
    np.testing.assert_allclose(data.mean, images.mean((0, 1, 2)) / 255, rtol=1e-12)


def test_torchvisions_copy_is_packed_once(tmp_path, monkeypatch):
    calls = []

    class FakeCifar:
        def __init__(self, root, train, download):
            calls.append((train, download))
            self.data = np.full((3 if train else 2, 32, 32, 3), 7, dtype=np.uint8)
            self.targets = [2, 1, 0][: len(self.data)]
            self.classes = ["x", "y", "z"]

    monkeypatch.setattr(data_module, "CIFAR100", FakeCifar)
    first = load_data("cifar100", root=tmp_path, download=True)
    assert calls == [(True, True), (False, True)]
    second = load_data("cifar100", root=tmp_path)
    assert len(calls) == 2
    assert first.classes == second.classes == ("x", "y", "z")
    assert torch.equal(first.train[0], second.train[0])
    assert second.test[1].tolist() == [2, 1]
    assert sorted(path.name for path in (tmp_path / "cifar100").iterdir()) == ["test.npz", "train.npz"]


@pytest.mark.parametrize("keep", [0, 10, 3000])
def test_a_truncated_cache_is_one_line_with_its_name(tmp_path, keep):
    write_cache(tmp_path)
    path = tmp_path / "cifar100" / "test.npz"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ValueError, match=r"test\.npz: cannot be read .*delete it and load again") as error:
        load_data("cifar100", root=tmp_path)
    assert "\n" not in str(error.value)


def test_a_cache_with_damaged_pixels_is_refused(tmp_path):
    write_cache(tmp_path)
    path = tmp_path / "cifar100" / "train.npz"
    content = bytearray(path.read_bytes())
    content[5000] ^= 255
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"train\.npz: cannot be read .*CRC"):
        load_data("cifar100", root=tmp_path)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"images": np.zeros((6, 32, 32), np.uint8)}, "images are uint8"),
        ({"images": np.zeros((6, 32, 32, 3), np.float32)}, "images are float32"),
        ({"labels": np.zeros(5, np.int64)}, "labels are int64"),
        ({"labels": np.array([0, 1, 2, 3, 4, 100])}, "labels run from 0 to 100"),
        ({"labels": np.array([None] * 6)}, "pickle"),  # an object array, which only pickle could read
    ],
)
def test_a_misshapen_cache_is_refused(tmp_path, changes, reason):
    write_cache(tmp_path, n=(6, 6), **changes)
    with pytest.raises(ValueError, match=rf"train\.npz: cannot be read .*{reason}") as error:
        load_data("cifar100", root=tmp_path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["cifar100", "food101"])
def test_a_missing_set_says_where_it_looked_and_the_two_ways(tmp_path, name):
    with pytest.raises(ValueError, match=f"^{name}: not found in ") as error:
        load_data(name, root=tmp_path)
    message = str(error.value)
    assert str(tmp_path) in message
    assert "SCCONV_DATA" in message
    assert "--download" in message
    assert "\n" not in message
    assert list(tmp_path.iterdir()) == []


def test_the_home_folder_is_known_by_its_sign(tmp_path, monkeypatch):
    write_cache(tmp_path / "sets")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    assert load_data("cifar100", root="~/sets").num_train == 6
    monkeypatch.setenv("SCCONV_DATA", "~/sets")
    assert load_data("cifar100").num_train == 6


def test_a_notebook_and_a_command_look_in_one_place(tmp_path, monkeypatch):
    """In a checkout in its data/, wherever they run; with an installed package in ./data."""
    monkeypatch.delenv("SCCONV_DATA", raising=False)
    root = Path(data_module.__file__).parents[1]
    for folder in (root, root / "notebooks", tmp_path):
        monkeypatch.chdir(folder)
        assert data_module.default_root() == root / "data"
    monkeypatch.setattr(data_module, "CHECKOUT", tmp_path / "site-packages")
    write_cache(tmp_path / "data")
    assert load_data("cifar100").num_train == 6


# ---- downloads -----------------------------------------------------------------------------------------------------


class Answer(http.server.BaseHTTPRequestHandler):
    """Of a server that has no archive: 404, a page in its place, or the first bytes of one."""

    def do_GET(self):
        if self.path.startswith("/404"):
            return self.send_error(404)
        content = b"<html>Please log in</html>" if self.path.startswith("/html") else b"\x1f\x8b" + bytes(1000)
        self.send_response(200)
        self.send_header("Content-Length", str(len(content) + 5000 * self.path.startswith("/cut")))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_):
        pass


@pytest.fixture
def address(monkeypatch):
    """Of a server on this machine."""
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Answer)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize("name", ["cifar100", "food101"])
@pytest.mark.parametrize(
    ("path", "reason"),
    [
        ("/404", "HTTP Error 404"),
        ("/html", "not the archive: an error page, or cut short"),
        ("/cut", "not the archive: an error page, or cut short"),
        (None, "Connection refused"),
    ],
)
def test_a_download_that_fails_is_one_line(tmp_path, monkeypatch, address, name, path, reason):
    url = f"{address}{path}.tar.gz" if path else "http://127.0.0.1:1/no.tar.gz"
    monkeypatch.setattr(data_module.CIFAR100, "url", url)
    monkeypatch.setattr(data_module.Food101, "_URL", url)
    monkeypatch.setattr(data_module, "FOOD101", url)
    with pytest.raises(ValueError, match=f"^{name}: could not be fetched from {url} into {tmp_path} ") as error:
        load_data(name, root=tmp_path, download=True)
    assert reason in str(error.value)
    assert "check the connection" in str(error.value)
    assert "\n" not in str(error.value)


def test_the_address_is_torchvisions():
    assert data_module.FOOD101 == data_module.Food101._URL


@pytest.mark.parametrize(
    ("name", "image_size", "message"),
    [
        ("mnist", None, "data='mnist': must be one of digits, cifar100, food101"),
        ("digits", 7, "image_size=7: must be at least 8"),
        ("digits", 257, "image_size=257: must be at most 256"),
        ("food101", 4096, "image_size=4096: must be at most 2048"),
        ("digits", 0, "image_size=0: must be at least 8"),
        ("cifar100", 64, "image_size=64: must be 32"),
        ("food101", 8, "image_size=8: must be at least 32"),
    ],
)
def test_what_no_set_can_give(name, image_size, message):
    with pytest.raises(ValueError, match=message):
        load_data(name, image_size=image_size)


# ---- photographs ---------------------------------------------------------------------------------------------------


@pytest.fixture
def food(tmp_path):
    """Two classes in Food-101's layout, one colour each; returns the root."""
    from PIL import Image

    base = tmp_path / "food-101"
    (base / "meta").mkdir(parents=True)
    for split, count in (("train", 6), ("test", 3)):
        listed = {name: [f"{name}/{split}{k}" for k in range(count)] for name in ("pie", "soup")}
        (base / "meta" / f"{split}.json").write_text(data_module.json.dumps(listed))
        for name, colour in (("pie", (200, 0, 0)), ("soup", (0, 0, 100))):
            (base / "images" / name).mkdir(parents=True, exist_ok=True)
            for k in range(count):
                image = Image.new("RGB", (50, 40), colour)
                image.paste((0, 255, 0), (k, k, 20 + k, 15))  # something that a crop and a flip move
                image.save(base / "images" / name / f"{split}{k}.jpg", quality=95)
    return tmp_path


def test_food101_has_the_classes_that_are_listed(food):
    data = load_data("food101", root=food, image_size=32, workers=0)
    assert data.classes == ("pie", "soup")
    assert (data.num_train, data.num_test, data.image_size) == (12, 6, 32)
    assert isinstance(data.test, Photographs)
    batches = list(eval_batches(data, 4))
    assert [tuple(x.shape) for x, _ in batches] == [(4, 3, 32, 32), (2, 3, 32, 32)]
    assert torch.cat([y for _, y in batches]).tolist() == [0, 0, 0, 1, 1, 1]


def test_food101_picks_the_same_photographs_in_each_order(food):
    data = load_data("food101", root=food, image_size=32, workers=0)
    whole = next(eval_batches(data, 6))
    images, labels = pick_test_images(data, 6)
    assert (images.dtype, labels.dtype, len(images.flatten(1).unique(dim=0))) == (torch.uint8, torch.int64, 6)
    mean, std = torch.tensor(data.mean), torch.tensor(data.std)
    for image, label in zip(normalise(images, mean, std), labels, strict=True):
        (place,) = (whole[0] == image).flatten(1).all(1).nonzero().flatten()
        assert whole[1][place] == label
    listed = food / "food-101" / "meta" / "test.json"
    names = data_module.json.loads(listed.read_text())
    listed.write_text(data_module.json.dumps({name: found[::-1] for name, found in reversed(names.items())}))
    others = pick_test_images(load_data("food101", root=food, image_size=32, workers=0), 4)
    assert torch.equal(images[:4], others[0])
    assert torch.equal(labels[:4], others[1])


def test_food101_batches_do_not_depend_on_workers_or_processes(food):
    alone = list(train_batches(load_data("food101", root=food, image_size=32, workers=0), 4, 0, 1))
    pool = list(train_batches(load_data("food101", root=food, image_size=32, workers=2), 4, 0, 1))
    data = load_data("food101", root=food, image_size=32, workers=0)
    ranks = [list(train_batches(data, 4, 0, 1, rank=rank, world=2)) for rank in range(2)]
    for step, (x, y) in enumerate(alone):
        torch.testing.assert_close(pool[step], (x, y), atol=0, rtol=0)
        assert torch.equal(torch.cat([rank[step][0] for rank in ranks]), x)
    assert not torch.equal(alone[0][0], next(train_batches(data, 4, 0, 2))[0])
    plain = {y.item(): x for xs, ys in train_batches(data, 4, 0, 1, augment=False) for x, y in zip(xs, ys, strict=True)}
    assert plain.keys() == {0, 1}


def test_food101_crops_an_image_anew_in_every_epoch_and_place(food):
    data = load_data("food101", root=food, image_size=32, workers=0)
    first = [(1, 10), (1, 10), (1, 11), (1, 12)]  # (index, seed)
    views = [data.train[address][0] for address in first]
    assert torch.equal(views[0], views[1])
    assert not torch.equal(views[0], views[2])
    assert not torch.equal(views[2], views[3])
    addresses = [photograph_addresses([0, 1, 2], seed, epoch) for seed in (0, 1) for epoch in (1, 2)]
    assert [index for index, _ in addresses[0]] == [0, 1, 2]
    assert len({seed for epoch in addresses for _, seed in epoch}) == 12


def test_food101_without_a_class_folder_is_refused(food):
    (food / "food-101" / "images" / "soup").rename(food / "elsewhere")
    with pytest.raises(ValueError, match="no folder of the class 'soup'"):
        load_data("food101", root=food, image_size=32)


@pytest.mark.parametrize("content", [None, b"", b'{"pie": ["pie/tr', b"[1]", b'{"pie": 3}', b"\xff\xfe"])
def test_food101_with_a_damaged_list_is_refused(food, content):
    path = food / "food-101" / "meta" / "test.json"
    path.unlink() if content is None else path.write_bytes(content)
    with pytest.raises(ValueError, match=rf"test\.json: cannot be read .*delete the folder {path.parent} and") as error:
        load_data("food101", root=food, image_size=32)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("damage", [lambda content: content[:700], lambda content: b"<html>", None])
def test_a_damaged_photograph_is_named_in_one_line(food, workers, damage):
    path = food / "food-101" / "images" / "soup" / "train3.jpg"
    path.write_bytes(damage(path.read_bytes())) if damage else path.unlink()
    data = load_data("food101", root=food, image_size=32, workers=workers)
    with pytest.raises(ValueError, match=rf"^{path}: cannot be read \(.*replace the image") as error:
        list(train_batches(data, 4, 0, 1))
    assert "\n" not in str(error.value)
    assert not multiprocessing.active_children()  # an exit would wait for them


def write_half(path):
    with atomic_file(path) as file:
        file.write(b"half of the ne")
        raise OSError("disk full")


def test_atomic_file_leaves_the_old_file_when_writing_fails(tmp_path):
    path = tmp_path / "x.bin"
    path.write_bytes(b"old")
    with pytest.raises(OSError, match="disk full"):
        write_half(path)
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]
