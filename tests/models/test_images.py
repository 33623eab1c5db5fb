"""What image files are read as, and which are refused, by the one reader of all commands."""

import os
import struct
from unittest import mock

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from models.commands.folders import ImageFolder
from models.commands.images import Preprocessing, UnreadableImageError, check_image, read_image

POSTSCRIPT = "%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n"


def slopes(height: int, width: int) -> np.ndarray:
    """Pixels [height, width, 3] that differ in each of the eight orientations."""
    down, right = np.linspace(0, 255, height)[:, None], np.linspace(0, 200, width)[None]
    return np.stack(np.broadcast_arrays(down, right, 0 * down + 10), axis=-1).astype(np.uint8)


@pytest.mark.parametrize("suffix", ["png", "tif", "pgm"])
def test_sixteen_bits_are_scaled_to_eight(tmp_path, suffix):
    deep = np.linspace(0, 65535, 48 * 64).reshape(48, 64).astype(np.uint16)
    path, rows = tmp_path / f"deep.{suffix}", [({}, deep / 257.0)]
    if suffix == "tif":
        rows.append(({"tiffinfo": {262: 0}}, 255 - deep / 257.0))  # white is zero
    for options, expected in rows:
        Image.fromarray(deep).save(path, **options)
        for channels in (1, 3):
            read = np.asarray(read_image(path, channels)).reshape(48, 64, channels)
            assert np.abs(read - expected[..., None]).max() <= 0.5


def test_twelve_bits_are_scaled_to_eight(tmp_path):
    path = tmp_path / "deep.tif"
    tags = {256: 2, 257: 1, 258: 12, 259: 1, 262: 1, 273: 8, 277: 1, 278: 1, 279: 3}  # 2 × 1 pixels of 12 bits, at 8
    directory = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags.items())
    pixels = struct.pack(">I", (4095 << 12) | 1024)[1:] + b"\0"
    path.write_bytes(b"II*\0" + struct.pack("<I", 12) + pixels + struct.pack("<H", len(tags)) + directory + bytes(4))
    assert np.asarray(read_image(path, 1)).tolist() == [[255, 64]]


@pytest.mark.parametrize("dtype", [np.float32, np.int32])
def test_numbers_without_a_scale_are_refused_by_name(tmp_path, dtype):
    path = tmp_path / "scan.tif"
    Image.fromarray(np.ones((9, 9), dtype)).save(path)
    with pytest.raises(UnreadableImageError, match=r"scan\.tif .*nothing says which is white"):
        read_image(path)


@pytest.mark.parametrize("suffix", ["jpg", "png", "tif", "webp"])
def test_orientation_is_obeyed(tmp_path, suffix):
    path = tmp_path / f"turned.{suffix}"
    for orientation in range(1, 9):
        exif = Image.Exif()
        exif[0x0112] = orientation
        Image.fromarray(slopes(24, 40)).save(path, exif=exif)
        with Image.open(path) as file:
            expected = np.asarray(ImageOps.exif_transpose(file).convert("RGB"))
        assert np.array_equal(np.asarray(read_image(path)), expected)


def test_only_plain_image_files_are_opened(tmp_path):
    (tmp_path / "drawing.jpg").write_text(POSTSCRIPT)
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "link.png").symlink_to(tmp_path / "none.png")
    for name in ("drawing.jpg", "pipe.png", "link.png", "none.png", "."):
        for refusal in (read_image, check_image):
            with pytest.raises(UnreadableImageError, match="cannot be read as an image"):
                refusal(tmp_path / name)


@pytest.mark.parametrize("sides", [(1, 10_000), (100_000, 1), (3, 50_000)])
def test_strips_are_never_resized_whole(sides, monkeypatch):
    """Resized to the crop's scale as a whole, they would take gigabytes."""
    image, resized = Image.fromarray(slopes(*sides)), mock.create_autospec(Image.Image.resize)
    resized.side_effect = Image.Image.resize
    monkeypatch.setattr(Image.Image, "resize", resized)
    x = Preprocessing((224, 224), 0.875, "bicubic", (0.0,) * 3, (1.0,) * 3)(image)
    assert x.shape == (3, 224, 224)
    assert 0 < max(max(call.args[1]) for call in resized.mock_calls) <= 8 * 256
    middle = image.getpixel((sides[1] // 2, sides[0] // 2))
    assert isinstance(middle, tuple)
    assert torch.allclose(255 * x[:, 112, 112], torch.tensor(middle, dtype=torch.float32), atol=2)


def test_the_test_crop_is_resize_then_centre_crop(tmp_path):
    preprocessing = Preprocessing((224, 224), 0.875, "bilinear", (0.0,) * 3, (1.0,) * 3)
    pixels = np.random.default_rng(0).integers(0, 256, (300, 401, 3), dtype=np.uint8)
    image = Image.fromarray(pixels)
    # torchvision: the shorter side becomes 256, the longer int(256 · 401 / 300) = 342; crop from (16, 59)
    expected = image.resize((342, 256), Image.Resampling.BILINEAR).crop((59, 16, 283, 240))
    assert torch.equal(preprocessing(image), torch.from_numpy(np.array(expected)).permute(2, 0, 1) / 255)

    framed = Preprocessing((224, 224), 1.15, "bicubic", (0.5,) * 3, (0.5,) * 3)(image)  # resized to 194: a black frame
    assert framed.shape == (3, 224, 224)
    assert (framed[:, :15] == -1).all()
    assert (framed[:, 15:209, 15:209] > -1).any()

    grey = tmp_path / "grey.png"
    Image.fromarray(pixels[..., 0]).save(grey)
    assert read_image(grey).mode == "RGB"
    wide = Preprocessing((64, 128), 1.0, "bicubic", (0.0,), (1.0,))
    assert wide(read_image(grey, 1)).shape == (1, 64, 128)


def test_folders_are_walked_once_whatever_their_links_and_names(tmp_path):
    for name in ("ant", "bee"):
        (tmp_path / name / "deep").mkdir(parents=True)
        for file in (tmp_path / name / "a.png", tmp_path / name / "deep" / "b.png"):
            Image.fromarray(slopes(8, 8)).save(file)
    elsewhere = tmp_path.parent / "elsewhere"
    elsewhere.mkdir()
    Image.fromarray(slopes(8, 8)).save(elsewhere / "c.png")
    for link, target in (("loop", "bee"), ("up", "."), ("deep/up", "bee"), ("twice", "bee/deep")):
        (tmp_path / "bee" / link).symlink_to(tmp_path / target)
    (tmp_path / "bee" / "more").symlink_to(elsewhere)
    (elsewhere / "back").symlink_to(tmp_path / "bee")
    (tmp_path / "zoo").symlink_to(tmp_path)
    folder = ImageFolder(tmp_path)
    assert folder.classes == ["ant", "bee"]
    assert [label for _, label in folder.samples] == [0, 0, 1, 1, 1]
    before = folder.digest()

    Image.fromarray(slopes(8, 8)).save(os.fsencode(tmp_path) + b"/ant/caf\xe9.png")
    assert ImageFolder(tmp_path).digest() != before
    (tmp_path / "two\nlines").mkdir()
    with pytest.raises(ValueError, match="line break"):
        ImageFolder(tmp_path)
