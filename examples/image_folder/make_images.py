"""Write the folder of the example: 600 small pictures of circles, squares and triangles, in colour and with noise.

python examples/image_folder/make_images.py [FOLDER]    the same pictures each time
"""

import argparse
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

SHAPES = ("circle", "square", "triangle")
SIZE = 32
ROOT = Path("examples/image_folder/images")


def main(root: Path = ROOT, of_each: int = 200, seed: int = 0) -> None:
    generator = np.random.default_rng(seed)
    for shape in SHAPES:
        folder = root / shape
        folder.mkdir(parents=True, exist_ok=True)
        for number in range(of_each):
            draw_shape(shape, generator).save(folder / f"{number:03d}.png")


def draw_shape(shape: str, generator: np.random.Generator) -> Image.Image:
    """One picture: a shape of any size, place, angle and colour on a ground of another colour."""
    ground, colour = generator.integers(0, 256, (2, 3))
    while np.abs(ground - colour).sum() < 350:  # to be told apart at once
        ground, colour = generator.integers(0, 256, (2, 3))
    picture = Image.new("RGB", (SIZE, SIZE), tuple(ground.tolist()))
    radius = generator.uniform(10, 15)
    center = generator.uniform(radius, SIZE - radius, 2)
    pen = ImageDraw.Draw(picture)
    pen.polygon(_corners(shape, center, radius, generator.uniform(0, 2 * np.pi)), fill=tuple(colour.tolist()))
    noisy = np.asarray(picture, np.float64) + generator.normal(0, 10, (SIZE, SIZE, 3))
    return Image.fromarray(np.clip(noisy, 0, 255).astype(np.uint8))


def _corners(shape: str, center: np.ndarray, radius: float, turn: float) -> list[tuple[float, float]]:
    count = {"circle": 60, "square": 4, "triangle": 3}[shape]
    angles = turn + 2 * np.pi * np.arange(count) / count
    points = center + radius * np.stack([np.cos(angles), np.sin(angles)], axis=1)
    return [(x, y) for x, y in points.tolist()]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?", type=Path, default=ROOT)
    main(parser.parse_args().folder)
