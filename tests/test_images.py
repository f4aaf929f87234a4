"""The photographs, and the tiles that they are cut into."""

import numpy as np

from scconv.reporting.images import cut_tiles, load_photographs, resize


def test_six_photographs_of_bytes_in_colour():
    photographs = load_photographs()
    assert len(photographs) == 6
    assert all(p.dtype == np.uint8 and p.ndim == 3 and p.shape[2] == 3 for p in photographs.values())


def test_resize_keeps_proportions_and_colours():
    picture = np.full((40, 60, 3), (10, 200, 255), dtype=np.uint8)
    assert resize(picture, 20).shape == (20, 30, 3)
    assert resize(picture, 20, 50).shape == (20, 50, 3)
    assert (resize(picture, 20) == picture[0, 0]).all()


def test_tiles_are_the_pictures_parts_row_by_row():
    picture = np.random.default_rng(0).integers(0, 256, (70, 100, 3), dtype=np.uint8)
    tiles = cut_tiles(picture)
    assert tiles.shape == (6, 32, 32, 3)  # 6 rows and 4 columns of pixels are left over
    for n, (row, column) in enumerate((r, c) for r in (0, 32) for c in (0, 32, 64)):
        assert (tiles[n] == picture[row : row + 32, column : column + 32]).all()
