"""Random changes of the training images of a batch (`training.augment`): just before a forward pass (worker).

All is drawn from torch's generator, which the loop seeds for each pass with its place: the same images come out after
a resume, and with `exact` at any number of workers. Otherwise a worker's rank is part of its place, as for dropout.

Images are as the model sees them, normalised. Moving pixels needs to know nothing of that: what comes in at an edge is
0, the mean. Colour is done by kornia on values from 0 to 1, so it is wrapped: each channel's range over the training
images, which for pictures is 0 to 255 however they are normalised, goes to 0..1 and back.

Crop, flip, mixup and cutmix are a few lines of torch here: the usual ones then need no kornia, and are faster. On 128
images of 3 x 32 x 32, in ms of one core (torch 2.13, kornia 0.9): crop 1.5 (kornia's 6.1), flip 0.6 (0.7), mixup 1.5
(3.8), cutmix 2.7 (13). Of what is left to kornia, rotation takes 5.7 ms, resize 7.3 (9.1 by slices), brightness and
contrast 0.6 each, saturation 2.6, hue 15. A training step of a small network on such a batch takes 200 ms and more.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from bigray.data.row_file import RowFile
from bigray.errors import SpecError
from bigray.specs import AugmentSpec

if TYPE_CHECKING:
    import torch

RANGE_ROWS = 1024
"""Training images whose values give the range for colour; from so many, pictures have all of it."""

ImageChange = Callable[["torch.Tensor"], "torch.Tensor"]


@dataclass(frozen=True)
class Augmented:
    """Changed inputs of a forward pass, and what they are to be compared with."""

    x: torch.Tensor
    y: torch.Tensor
    partners: torch.Tensor | None = None
    """Targets of the rows that were mixed in, where some were."""
    shares: torch.Tensor | None = None
    """(rows,): how much of each row is its own."""

    def losses(self, of: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
        """(rows,) losses, where `of` gives those against some targets: of mixed rows, the mean by their shares."""
        if self.partners is None or self.shares is None:
            return of(self.y)
        return self.shares * of(self.y) + (1 - self.shares) * of(self.partners)


class Augmentation:
    """The changes that a job asks for; none without a spec."""

    def __init__(self, spec: AugmentSpec | None, x_train: NDArray[np.float32] | RowFile) -> None:
        """`x_train` (rows, H, W) or (rows, C, H, W) as the model sees them.

        Raises:
            SpecError: the spec does not suit the images, or kornia is not installed.
        """
        self._spec = spec
        self._changes: list[ImageChange] = []
        if spec is not None:
            if faults := list(augment_faults(spec, x_train.shape[1:])):
                raise SpecError(faults)
            self._changes = list(_image_changes(spec, x_train))

    def __call__(self, x: torch.Tensor, y: torch.Tensor) -> Augmented:
        """Changed copies of (rows, *image) and their targets; draws from torch's generator."""
        if self._spec is None:
            return Augmented(x, y)
        import torch

        with torch.no_grad():
            images = x.unsqueeze(1) if x.dim() == 3 else x
            for change in self._changes:
                images = change(images)
            return _mixed(self._spec, images.squeeze(1) if x.dim() == 3 else images, y)


def augment_faults(spec: AugmentSpec | None, input_shape: tuple[int, ...]) -> Iterator[str]:
    """Why these rows cannot be changed so; without torch, so that it can be asked before a start."""
    if spec is None:
        return
    if len(input_shape) not in (2, 3):
        yield f"training.augment: is for images of shape (H, W) or (C, H, W), and the rows are {input_shape}; remove it"
        return
    for name in ("saturation", "hue"):
        if getattr(spec, name) and (len(input_shape) == 2 or input_shape[0] != 3):
            yield f"training.augment.{name}: needs three channels, and the images are {input_shape}; remove it"
    if (needed := _of_kornia(spec)) and importlib.util.find_spec("kornia") is None:
        yield f"training.augment.{needed}: needs kornia; pip install 'bigray[vision]'"


def _of_kornia(spec: AugmentSpec) -> str | None:
    """The first change that is kornia's."""
    names = ("rotation", "resize", "brightness", "contrast", "saturation", "hue")
    return next((name for name in names if getattr(spec, name)), None)


def _image_changes(spec: AugmentSpec, x_train: NDArray[np.float32] | RowFile) -> Iterator[ImageChange]:
    """In the order of the fields of the spec; each takes (rows, C, H, W)."""
    if spec.crop:
        yield lambda x: _crop(x, spec.crop)
    if spec.flip:
        yield _flip
    if not _of_kornia(spec):
        return
    from kornia import augmentation as kornia

    if spec.rotation:
        yield kornia.RandomRotation(spec.rotation, p=1.0)
    if spec.resize is not None:
        yield kornia.RandomResizedCrop(x_train.shape[-2:], scale=spec.resize, cropping_mode="resample", p=1.0)
    if spec.changes_colour:
        yield _in_unit_range(_colour(spec, kornia), x_train)


def _crop(x: torch.Tensor, padding: int) -> torch.Tensor:
    import torch
    from torch.nn import functional

    height, width = x.shape[-2:]
    windows = functional.pad(x, (padding,) * 4).unfold(2, height, 1).unfold(3, width, 1)  # a view: all places at once
    down, right = torch.randint(0, 2 * padding + 1, (2, len(x))).to(x.device)
    return windows[torch.arange(len(x), device=x.device), :, down, right]


def _flip(x: torch.Tensor) -> torch.Tensor:
    import torch

    is_flipped = (torch.rand(len(x)) < 0.5).to(x.device)
    return torch.where(is_flipped[:, None, None, None], x.flip(3), x)


def _colour(spec: AugmentSpec, kornia: Any) -> ImageChange:
    """Of images with values from 0 to 1."""
    changes: list[ImageChange] = []
    if spec.brightness:
        changes.append(kornia.RandomBrightness((1 - spec.brightness, 1 + spec.brightness), p=1.0))
    if spec.contrast:
        changes.append(kornia.RandomContrast((1 - spec.contrast, 1 + spec.contrast), p=1.0))
    if spec.saturation:
        changes.append(kornia.RandomSaturation((1 - spec.saturation, 1 + spec.saturation), p=1.0))
    if spec.hue:
        changes.append(kornia.RandomHue((-spec.hue, spec.hue), p=1.0))

    def change(x: torch.Tensor) -> torch.Tensor:
        for each in changes:
            x = each(x)
        return x

    return change


def _in_unit_range(change: ImageChange, x_train: NDArray[np.float32] | RowFile) -> ImageChange:
    import torch

    images = x_train[:RANGE_ROWS]
    images = images[:, None] if images.ndim == 3 else images
    low = torch.tensor(images.min(axis=(0, 2, 3)))[:, None, None]
    span = (torch.tensor(images.max(axis=(0, 2, 3)))[:, None, None] - low).clamp_min(1e-12)

    def wrapped(x: torch.Tensor) -> torch.Tensor:
        from_here, to_here = low.to(x.device), span.to(x.device)
        # an edge that a crop or rotation has brought in may lie outside, and so may rows that gave no range
        inside = x.sub(from_here).div_(to_here).clamp_(0.0, 1.0)
        return change(inside).mul(to_here).add_(from_here)

    return wrapped


def _mixed(spec: AugmentSpec, x: torch.Tensor, y: torch.Tensor) -> Augmented:
    """Each row with another of the same forward pass, by a share of its own."""
    import torch

    if not spec.mixes_targets:
        return Augmented(x, y)
    takes_boxes = spec.cutmix > 0 and (spec.mixup == 0 or bool(torch.rand(()) < 0.5))
    alpha = spec.cutmix if takes_boxes else spec.mixup
    shares = torch.distributions.Beta(alpha, alpha).sample((len(x),))
    order = torch.randperm(len(x)).to(x.device)
    if takes_boxes:
        is_other = _boxes(1 - shares, x.shape[-2], x.shape[-1])
        shares = 1 - is_other.float().mean(dim=(1, 2))
        kept = is_other.to(x.device)
        mixed = torch.where(kept if x.dim() == 3 else kept[:, None], x[order], x)
    else:
        mixed = torch.lerp(x[order], x, shares.to(x.device).reshape(-1, *(1,) * (x.dim() - 1)))
    return Augmented(mixed, y, y[order], shares.to(x.device))


def _boxes(areas: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """(rows, height, width): true inside a box of that share of the image, at a random place, cut off at the edges."""
    sides = areas.sqrt()
    return _spans(sides, height)[:, :, None] & _spans(sides, width)[:, None, :]


def _spans(sides: torch.Tensor, length: int) -> torch.Tensor:
    import torch

    centres, halves = torch.rand(len(sides)) * length, sides * length / 2
    pixels = torch.arange(length) + 0.5
    return (pixels - centres[:, None]).abs() < halves[:, None]
