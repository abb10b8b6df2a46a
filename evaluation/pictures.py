"""Pictures to look at: images side by side, close-ups, errors and maps of the spread."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

from evaluation.uncertainty import Interval
from files.pictures import SOFTWARE
from running.writing import atomic_path

OVERVIEW = (1024, 768)  # height and width to which pictures of larger images are reduced
TITLE, GAP, BAR = 34, 6, 14  # pixels: labels of a picture, space between its parts, width of a colour bar
ERROR_RANGE = 0.05  # errors are drawn from black (-0.05) over grey (0) to white (+0.05)


def _close_up(clean: Tensor, mask: Tensor, largest: int) -> tuple[int, int, int]:
    """Row, column and side, at most `largest`, of the square inside the breast with the most fine structure."""
    height, width = clean.shape[-2:]
    side = min(max(16, min(height, width) // 4), height, width, largest)
    stride = max(1, side // 8)
    image, inside = clean.mean(0)[None, None].float(), mask[None].float()
    detail = (image - F.avg_pool2d(image, 9, 1, 4, count_include_pad=False)).square()
    structure = F.avg_pool2d(detail, side, stride)
    coverage = F.avg_pool2d(inside, side, stride)
    # a square that leaves the breast, with the skin line or a label in it, counts only if there is no other
    best = int(torch.where(coverage >= min(1.0, float(coverage.max())), structure, -1.0).argmax())
    columns = structure.shape[-1]
    return best // columns * stride, best % columns * stride, side


def to_grey(image: np.ndarray) -> Image.Image:
    """An image (H, W) in [0, 1], grey."""
    return Image.fromarray((np.clip(image, 0, 1) * 255).round().astype(np.uint8)).convert("RGB")


def to_magma(values: np.ndarray) -> Image.Image:
    """Values (H, W) in the colours of matplotlib's magma, from 0 to 1."""
    import matplotlib  # which no training needs

    return Image.fromarray(matplotlib.colormaps["magma"](np.clip(values, 0, 1).astype(np.float64), bytes=True)[..., :3])


def reduction(shape: tuple[int, ...]) -> int:
    """The factor by which a picture of an image (H, W) is reduced."""
    return math.ceil(max(side / most for side, most in zip(shape, OVERVIEW, strict=True)))


def side_by_side(columns: Sequence[tuple[str, str, Sequence[Image.Image]]]) -> Tensor:
    """Columns of pictures, alike in height, under a name and a label: (3, H, W) uint8."""
    font = ImageFont.load_default(13)
    widths = [
        max(*(image.width for image in images), *(math.ceil(font.getlength(text)) for text in (name, label)))
        for name, label, images in columns
    ]
    height = TITLE + sum(image.height + GAP for image in columns[0][2])
    canvas = Image.new("RGB", (GAP + sum(width + GAP for width in widths), height), (24, 24, 24))
    draw, left = ImageDraw.Draw(canvas), GAP
    for (name, label, images), width in zip(columns, widths, strict=True):
        draw.text((left, 2), name, font=font, fill=(255, 255, 255))
        draw.text((left, 17), label, font=font, fill=(180, 200, 255))
        top = TITLE
        for image in images:
            canvas.paste(image, (left, top))
            top += image.height + GAP
        left += width + GAP
    return torch.from_numpy(np.array(canvas)).permute(2, 0, 1)


def comparison(
    clean: Tensor, images: Mapping[str, Tensor], mask: Tensor, labels: Mapping[str, str], reference: str = "clean"
) -> Tensor:
    """Side by side, (3, H', W') uint8: clean, the images, and the errors of the first and the last of them.

    All are (C, H, W) in [0, 1]; `reference` names the clean one. Below each stands a close-up of the part with the most fine
    structure, windowed by the clean image's range there, alike in all columns. Large images are reduced, close-ups never.
    """
    columns = [(reference, clean.mean(0), "")]
    columns += [(name, image.mean(0), labels.get(name, "")) for name, image in images.items()]
    ends = list(dict.fromkeys([next(iter(images)), list(images)[-1]]))
    errors = [(f"{name} - {reference}", (images[name] - clean).mean(0), f"+-{ERROR_RANGE}") for name in ends]
    reduced = reduction(clean.shape[-2:])
    least = max(192, -(-clean.shape[-1] // reduced))
    row, column, side = _close_up(clean, mask, least)
    window = slice(row, row + side), slice(column, column + side)
    low, high = torch.quantile(clean.mean(0)[window].flatten().float(), torch.tensor([0.005, 0.995])).tolist()
    high = max(high, low + 0.02)
    box = [column // reduced, row // reduced, (column + side) // reduced - 1, (row + side) // reduced - 1]
    pictures = []
    for i, (name, image, label) in enumerate(columns + errors):
        part = (image[window] - low) / (high - low)
        if i >= len(columns):
            image = 0.5 + image / (2 * ERROR_RANGE)
            part = image[window]
        whole = to_grey(image.cpu().numpy()).reduce(reduced)
        ImageDraw.Draw(whole).rectangle(box, outline=(255, 200, 0))
        zoom = (side * max(1, least // side),) * 2
        pictures.append((name, label, [whole, to_grey(part.cpu().numpy()).resize(zoom, Image.Resampling.NEAREST)]))
    return side_by_side(pictures)


def spread_picture(clean: np.ndarray | None, own: Interval, sample: np.ndarray) -> Tensor:
    """The mean of posterior samples, one of them, and the expected error: (3, H', W') uint8 with labels and a colour bar.

    With `clean` (H, W) the absolute error of the mean stands beside. Maps are drawn from 0 to one and a half times what 99 %
    of the expected errors stay below; large images are reduced.
    """
    limit = max(1.5 * float(np.quantile(own.std, 0.99)), 1e-6)
    columns = [
        ("mean of the samples", "", to_grey(own.mean)),
        ("posterior sample", "the first", to_grey(sample)),
        ("expected error", "standard deviation", to_magma(own.std / limit)),
    ]
    if clean is not None:
        covered = f"{own.holds(clean).mean():.1%} in the interval"
        columns.append(("absolute error", covered, to_magma(np.abs(clean - own.mean) / limit)))
    columns = [(name, label, [image.reduce(reduction(own.mean.shape))]) for name, label, image in columns]
    bar = to_magma(np.repeat(np.linspace(1, 0, columns[0][2][0].height)[:, None], BAR, axis=1))
    return side_by_side([*columns, (f"{limit:.3f}", "to 0", [bar])])


def save_picture(picture: Tensor, path: Path) -> None:
    """Write a picture (3, H, W) uint8 atomically, in the format of the path's suffix.

    A PNG says what made it, so that it is not taken for a mammogram.
    """
    text = PngInfo()
    text.add_itxt("Software", SOFTWARE)
    png = dict(format="PNG", pnginfo=text, compress_level=3)
    form = dict(format="JPEG", quality=95) if path.suffix == ".jpg" else png
    with atomic_path(path) as temporary:
        Image.fromarray(picture.permute(1, 2, 0).numpy()).save(temporary, **form)
