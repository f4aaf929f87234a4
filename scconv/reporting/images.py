"""Photographs that need no download: those inside scikit-image and scikit-learn, whole and cut into tiles."""

import numpy as np
from skimage import data, transform
from sklearn.datasets import load_sample_image


def load_photographs() -> dict[str, np.ndarray]:
    """Six photographs by name, each uint8 (H, W, 3)."""
    return {
        "cat": data.chelsea(),
        "astronaut": data.astronaut(),
        "coffee": data.coffee(),
        "rocket": data.rocket(),
        "temple": load_sample_image("china.jpg"),
        "flower": load_sample_image("flower.jpg"),
    }


def resize(picture: np.ndarray, rows: int, columns: int | None = None) -> np.ndarray:
    """uint8 (H, W, 3) to uint8 (rows, columns, 3), smoothed; without `columns` the picture keeps its proportions."""
    columns = columns or round(picture.shape[1] * rows / picture.shape[0])
    return (255 * transform.resize(picture, (rows, columns), anti_aliasing=True)).round().astype(np.uint8)


def cut_tiles(picture: np.ndarray, side: int = 32) -> np.ndarray:
    """Tiles without overlap, row by row: (H, W, 3) to (N, side, side, 3). An incomplete tile at an edge is dropped."""
    rows, columns = picture.shape[0] // side, picture.shape[1] // side
    tiles = picture[: rows * side, : columns * side].reshape(rows, side, columns, side, 3)
    return tiles.swapaxes(1, 2).reshape(-1, side, side, 3)
