"""Draw a contact sheet of digital breast phantoms."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from helper import UserError
from running.command_line import Parser, non_negative_int, path_argument, positive_int
from running.scripts import run_script
from running.writing import atomic_path

if TYPE_CHECKING:
    import numpy as np


def draw_sheet(tiles: list[np.ndarray], columns: int = 8) -> np.ndarray:
    """Contact sheet, uint8, of equally large (H, W) images in [0, 1], filled row by row; ValueError without images."""
    import numpy as np

    if not tiles:
        raise ValueError("a contact sheet needs at least one image")
    padded = np.array([*tiles, *[np.zeros_like(tiles[0])] * (-len(tiles) % columns)], np.float64)
    rows = padded.reshape(-1, columns, *tiles[0].shape).swapaxes(1, 2)
    return (255.0 * rows.reshape(-1, columns * tiles[0].shape[1])).round().astype(np.uint8)


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = Parser(description=__doc__, allow_abbrev=False)
    add = parser.add_argument
    add("--out", type=path_argument, required=True, metavar="FILE", help="PNG file to write")
    add("--seed", type=non_negative_int, default=0, help="of the phantoms (default: 0)")
    add("--count", type=positive_int, default=24, help="number of phantoms (default: 24)")
    real = "folder of real mammograms (PGM or PNG), of which as many are drawn below the phantoms"
    add("--real", type=path_argument, metavar="DIR", help=real)
    return parser.parse_args()


def main() -> None:
    """Write a sheet of phantoms, and below it real mammograms if there are any."""
    args = parse_arguments()
    # torch and all that stands on it come after the flags: a wrong one is answered at once
    import numpy as np
    from PIL import Image, ImageOps

    from preprocessing.phantom import generate_phantom

    sheet = draw_sheet([generate_phantom(args.seed, index).image[0].numpy() for index in range(args.count)])
    if args.real:
        paths = sorted(args.real.glob("*.[pP][gGnN][mMgG]"))
        if not paths:
            raise UserError(f"--real {args.real}: no PGM or PNG files there; name a folder that holds some")
        tiles = []
        for path in paths[:: max(1, len(paths) // args.count)][: args.count]:
            film = Image.open(path).convert("L")
            film = film.crop(film.point(lambda value: 255 * (value > 24)).getbbox())  # without its dark surround
            tiles.append(np.asarray(ImageOps.pad(film, (192, 256), Image.Resampling.BOX)) / 255.0)
        sheet = np.concatenate([sheet, np.full((8, sheet.shape[1]), 255, np.uint8), draw_sheet(tiles)])
    with atomic_path(args.out) as temporary:
        Image.fromarray(sheet).save(temporary, format="PNG")
    print(f"sheet written to {args.out}")


if __name__ == "__main__":
    run_script(main)
