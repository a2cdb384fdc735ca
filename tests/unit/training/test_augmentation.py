"""Random changes of training images: what each does to a batch, that it is repeatable, and what it refuses."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from torch.nn import functional

from bigray.data.dataset import TrainingArrays
from bigray.errors import SpecError
from bigray.specs import AugmentSpec, TrainingSpec, TrialSpec
from bigray.training.augmentation import Augmentation, Augmented, augment_faults
from bigray.training.loop import TrialTraining, Worker
from bigray.training.stack import why_not_stacked
from tests.loop_hooks import RecordingHooks

MakeTrial = Callable[..., TrialSpec]
ALONE = Worker(rank=0, world_size=1, device=torch.device("cpu"))

IN_TORCH: list[dict[str, Any]] = [{"crop": 2}, {"flip": True}, {"mixup": 0.4}, {"cutmix": 1.0}]
BY_KORNIA: list[dict[str, Any]] = [
    {"rotation": 20.0},
    {"resize": [0.5, 1.0]},
    {"brightness": 0.3},
    {"contrast": 0.3},
    {"saturation": 0.5},
    {"hue": 0.2},
]
EACH = pytest.mark.parametrize("settings", IN_TORCH + BY_KORNIA, ids=lambda settings: next(iter(settings)))


def _pictures(rows: int = 12) -> torch.Tensor:
    """Values from 0 to 255, with both ends in each channel."""
    pictures = torch.rand(rows, 3, 8, 10, generator=torch.Generator().manual_seed(3)) * 255
    pictures[0, :, 0, 0], pictures[0, :, 0, 1] = 0.0, 255.0
    return pictures


def _augmented(settings: dict[str, Any], x: torch.Tensor, seed: int = 0) -> Augmented:
    if any(name in settings for named in BY_KORNIA for name in named):
        pytest.importorskip("kornia", reason="needs bigray[vision]")
    augment = Augmentation(AugmentSpec.model_validate(settings), x.numpy())
    torch.manual_seed(seed)
    return augment(x, torch.arange(len(x)))


@EACH
def test_the_seed_alone_decides_and_rows_are_changed_each_by_itself(settings: dict[str, Any]) -> None:
    x = _pictures()[:1].repeat(12, 1, 1, 1) if "mixup" not in settings and "cutmix" not in settings else _pictures()
    kept = x.clone()
    first, again, other = (_augmented(settings, x, seed) for seed in (0, 0, 1))

    assert torch.equal(x, kept), "what was loaded is left as it was"
    assert first.x.shape == x.shape
    assert torch.equal(first.x, again.x)
    assert not torch.equal(first.x, other.x)
    assert len(first.x.flatten(1).unique(dim=0)) > 1, "one draw for each row"


@pytest.mark.parametrize("settings", [*IN_TORCH[:2], *BY_KORNIA[:4]], ids=lambda settings: next(iter(settings)))
def test_grey_images_are_changed_too(settings: dict[str, Any]) -> None:
    grey = _pictures()[:, 0]

    assert _augmented(settings, grey).x.shape == grey.shape


def test_a_crop_is_a_window_of_the_padded_image() -> None:
    x = _pictures()
    padded = functional.pad(x, (2, 2, 2, 2))
    places = set()
    for row, window in enumerate(_augmented({"crop": 2}, x).x):
        found = [
            (top, left)
            for top in range(5)
            for left in range(5)
            if torch.equal(window, padded[row, :, top : top + 8, left : left + 10])
        ]
        assert len(found) == 1
        places.update(found)
    assert len(places) > 4


def test_about_half_of_the_images_are_mirrored() -> None:
    x = _pictures(400)
    is_mirrored = (_augmented({"flip": True}, x).x == x.flip(3)).flatten(1).all(1)
    is_same = (_augmented({"flip": True}, x).x == x).flatten(1).all(1)

    assert (is_mirrored ^ is_same).all()
    assert 150 < int(is_mirrored.sum()) < 250


@pytest.mark.parametrize(
    "settings", [{"brightness": 0.3, "contrast": 0.2, "saturation": 0.5}, {"hue": 0.2}], ids=["light", "hue"]
)
def test_colour_is_the_same_however_the_images_are_normalised(settings: dict[str, Any]) -> None:
    """Each channel has its own centre and scale, as `normalize = "standard"` gives it."""
    x = _pictures()
    centre, scale = torch.tensor([120.0, 90.0, 100.0])[:, None, None], torch.tensor([60.0, 50.0, 70.0])[:, None, None]

    raw, normalised = _augmented(settings, x).x, _augmented(settings, (x - centre) / scale).x

    torch.testing.assert_close(normalised * scale + centre, raw, rtol=1e-3, atol=0.05)
    assert (raw - x).abs().mean() > 1
    assert 0 <= raw.min() <= raw.max() <= 255.001


def test_mixup_blends_images_and_losses_by_the_same_share() -> None:
    x = torch.arange(40.0)[:, None, None, None].expand(40, 3, 4, 4).clone()
    mixed = _augmented({"mixup": 1.0}, x)
    assert mixed.shares is not None
    assert mixed.partners is not None

    torch.testing.assert_close(mixed.x[:, 0, 0, 0], mixed.losses(lambda targets: targets.float()))
    assert mixed.shares.min() >= 0
    assert mixed.shares.max() <= 1
    assert mixed.shares.unique().numel() == 40
    assert sorted(mixed.partners.tolist()) == list(range(40))


def test_cutmix_pastes_one_box_and_weighs_the_loss_by_its_pixels() -> None:
    x = torch.arange(40.0)[:, None, None, None].expand(40, 3, 8, 10).clone()
    mixed = _augmented({"cutmix": 1.0}, x)
    assert mixed.partners is not None

    torch.testing.assert_close(mixed.x.mean(dim=(1, 2, 3)), mixed.losses(lambda targets: targets.float()))
    for row, (image, partner) in enumerate(zip(mixed.x, mixed.partners, strict=True)):
        assert set(image.unique().tolist()) <= {float(row), float(partner)}
        pasted = (image[0] == partner) & (partner != row)
        box = pasted[pasted.any(1)][:, pasted.any(0)]
        assert box.all()


def test_with_both_some_passes_are_blended_and_some_are_pasted() -> None:
    x = torch.arange(40.0)[:, None, None].expand(40, 8, 8).clone()
    is_pasted = [bool((_augmented({"mixup": 1.0, "cutmix": 1.0}, x, seed).x % 1 == 0).all()) for seed in range(20)]

    assert 3 < sum(is_pasted) < 17


def test_without_a_spec_rows_pass_as_they_are() -> None:
    x, y = torch.randn(3, 5), torch.arange(3)
    passed = Augmentation(None, x.numpy())(x, y)

    assert passed.x is x
    assert passed.losses(lambda targets: targets) is y


@pytest.mark.parametrize(
    ("settings", "input_shape", "expected"),
    [
        (
            {"flip": True},
            (30,),
            r"training.augment: is for images of shape (H, W) or (C, H, W), and the rows are (30,)",
        ),
        ({"hue": 0.1}, (8, 8), "training.augment.hue: needs three channels, and the images are (8, 8)"),
        ({"saturation": 0.1}, (1, 8, 8), "training.augment.saturation: needs three channels"),
    ],
)
def test_what_does_not_suit_the_rows_is_refused(
    settings: dict[str, Any], input_shape: tuple[int, ...], expected: str
) -> None:
    (fault,) = augment_faults(AugmentSpec.model_validate(settings), input_shape)

    assert expected in fault
    with pytest.raises(SpecError):
        Augmentation(AugmentSpec.model_validate(settings), np.zeros((2, *input_shape), dtype=np.float32))


def test_without_kornia_its_changes_are_refused_and_the_others_work(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "kornia", None)

    assert list(augment_faults(AugmentSpec(crop=4, flip=True, cutmix=1.0), (3, 8, 8))) == []
    assert list(augment_faults(AugmentSpec(crop=4, rotation=5.0), (3, 8, 8))) == [
        "training.augment.rotation: needs kornia; pip install 'bigray[vision]'"
    ]


@pytest.mark.parametrize(
    ("training", "expected"),
    [
        ({"task": "regression", "augment": {"mixup": 0.2}}, "augment: mixup and cutmix are for classification"),
        (
            {"loop": "user:train", "metric": "val_loss", "metric_mode": "min", "augment": {"flip": True}},
            "augment: is of bigray's own loop",
        ),
        ({"augment": {"resize": [0.9, 0.5]}}, r"resize: use \[least, most\] with 0 < least <= most <= 1"),
        ({"augment": {"flips": True}}, "Extra inputs are not permitted"),
    ],
)
def test_settings_that_do_not_go_together_are_refused(training: dict[str, Any], expected: str) -> None:
    with pytest.raises(ValidationError, match=expected):
        TrainingSpec.model_validate({"task": "classification", **training})


def _data() -> TrainingArrays:
    generator = np.random.default_rng(0)
    x, y = generator.normal(size=(40, 3, 8, 8)).astype(np.float32), np.arange(40) % 3
    return TrainingArrays(x, y, x[:10], y[:10])


def _train(trial: TrialSpec, hooks: RecordingHooks, at: int | None = None) -> TrialTraining:
    training = TrialTraining(trial, _data(), 3, ALONE, hooks)
    if at is not None:
        training.restore(hooks.checkpoints[at])
    training.train_to(2)
    return training


@pytest.mark.parametrize(
    "settings", [{}, {"exact": True, "logical_shards": 3, "micro_batch_size": 3}], ids=["plain", "exact"]
)
def test_training_goes_on_from_any_step_with_the_same_images(make_trial: MakeTrial, settings: dict[str, Any]) -> None:
    augment = {"crop": 1, "flip": True, "mixup": 0.3, "cutmix": 1.0}
    trial = make_trial("bigray.models:cnn", {"channels": [4]}, epochs=2, augment=augment, **settings)
    hooks = RecordingHooks(save_at=range(100))
    whole = _train(trial, hooks).weights_sha256()
    saved = len(hooks.checkpoints)

    assert saved > 3
    assert {_train(trial, hooks, at).weights_sha256() for at in range(saved)} == {whole}
    plain = make_trial("bigray.models:cnn", {"channels": [4]}, epochs=2, **settings)
    assert _train(plain, RecordingHooks()).weights_sha256() != whole


def test_validation_rows_are_never_changed(make_trial: MakeTrial) -> None:
    trial = make_trial("bigray.models:cnn", {"channels": [4]}, epochs=2, augment={"crop": 3, "cutmix": 1.0})
    hooks = RecordingHooks()
    training = _train(trial, hooks)
    with torch.inference_mode():
        outputs = training.module(torch.from_numpy(_data().x_val))
        loss = functional.cross_entropy(outputs, torch.from_numpy(_data().y_val)).item()

    assert hooks.reports[-1]["metrics"]["val_loss"] == pytest.approx(loss, rel=1e-5)


def test_trials_with_augmentation_or_a_file_of_weights_are_not_stacked(make_trial: MakeTrial) -> None:
    trial = make_trial("bigray.models:cnn", {"channels": [4]}, augment={"flip": True})
    assert "training.augment" in str(why_not_stacked(trial, _data(), 3, ALONE.device))

    plain = make_trial("bigray.models:cnn", {"channels": [4]})
    frozen = plain.model_copy(update={"model": plain.model.model_copy(update={"freeze": ("0.*",)})})
    assert "weights, freeze and keep_zeros" in str(why_not_stacked(frozen, _data(), 3, ALONE.device))
    assert why_not_stacked(plain, _data(), 3, ALONE.device) is None
