"""What the training loop is made of: losses, rates, groups, batches, random numbers; and each family learns digits."""

import copy
import importlib.util
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import Dataset, TensorDataset

from models._contract import BackboneContract
from models.commands.augmentation import Augmentation, seed_of, seeded
from models.commands.folders import ImageFolder, TrainingBatches, TrainingImages
from models.commands.images import Preprocessing
from models.commands.recipe import Recipe
from models.commands.training import Trainer
from models.overlock import OverLoCK
from models.rednet import RedNet
from models.volo import VOLO
from tests.models.families import on_meta
from tests.models.running import tiny_volo
from tests.support import relative_error

CPU = torch.device("cpu")
pytestmark = pytest.mark.usefixtures("one_thread")


def test_loss_of_each_familys_training_output():
    labels, cross_entropy = torch.tensor([0, 2, 1, 1]), nn.functional.cross_entropy
    plain, smooth = Recipe(label_smoothing=0), Recipe(label_smoothing=0.1)
    main_logits, auxiliary = torch.randn(2, 4, 3).unbind()
    expected = cross_entropy(main_logits, labels)
    assert plain.loss(main_logits, labels) == expected
    both = plain.loss({"main": main_logits, "aux": auxiliary}, labels)
    torch.testing.assert_close(both, expected + 0.4 * cross_entropy(auxiliary, labels))

    tokens = torch.randn(4, 6, 3)  # of a 2×3 map, of which the box covers 2
    triple = (main_logits, tokens, torch.tensor([0, 1, 1, 3]))
    by_token = torch.stack([cross_entropy(tokens[:, t], labels) for t in range(6)]).mean()
    opposite = cross_entropy(main_logits, labels.flip(0))
    torch.testing.assert_close(plain.loss(triple, labels), 4 / 6 * expected + 2 / 6 * opposite + 0.5 * by_token)

    for output in (main_logits, {"main": main_logits, "aux": auxiliary}, triple):  # labels may be shares
        smoothed = [smooth.loss(output, y) for y in (torch.eye(3)[labels], labels)]
        torch.testing.assert_close(*smoothed)
        assert smoothed[0] != plain.loss(output, labels)


def test_learning_rate_rises_then_falls():
    recipe = Recipe(epochs=10, warmup_epochs=1, learning_rate=1.0, final_learning_rate=0.01)
    rates = [recipe.rate(step, 10) for step in range(100)]
    assert rates[:11] == sorted(rates[:11])
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert rates[10] == 1
    assert rates[-1] == pytest.approx(0.01)
    given: dict[str, Any] = {"learning_rate": 0.8, "first_learning_rate": 0.2, "final_learning_rate": 0.0}
    rates = [Recipe(epochs=4, warmup_epochs=1, **given).rate(step, 5) for step in range(20)]
    assert rates[0] == pytest.approx(0.2)
    assert np.diff(rates[:6]) == pytest.approx(0.12)
    assert rates[-1] == pytest.approx(0)


def setting_of(model: Any, setting: str, **options: Any) -> dict[str, float]:
    """Name -> what the parameter groups of ``options`` set for each parameter."""
    names = {id(parameter): key for key, parameter in model.named_parameters()}
    groups = Recipe(weight_decay=0.05, **options).parameter_groups(model)
    return {names[id(parameter)]: group[setting] for group in groups for parameter in group["params"]}


@pytest.mark.parametrize("name", ["overlock_xt", "rednet26", "volo_d1"])
def test_matrices_alone_decay_and_rates_fall_by_layer(name):
    model = on_meta(name)
    parameters, spared = dict(model.named_parameters()), model.no_weight_decay()
    decays = {key: 0 if key in spared or parameter.ndim <= 1 else 0.05 for key, parameter in parameters.items()}
    assert setting_of(model, "weight_decay") == decays
    decays = {key: 0 if key in spared else 0.05 for key in parameters}
    assert setting_of(model, "weight_decay", decay_vectors=True) == decays
    if all(importlib.util.find_spec(package) for package in ("timm", "torchvision")):  # timm needs both
        scales = setting_of(model, "lr_scale", layer_decay=0.9)
        assert scales.keys() == parameters.keys()
        assert scales[f"{next(iter(model.classifiers))}.weight"] == max(scales.values()) == 1
        assert scales[next(iter(parameters))] == min(scales.values()) < 0.9**5
    model.requires_grad_(False).get_submodule(next(iter(model.classifiers))).requires_grad_(True)
    assert [len(group["params"]) for group in Recipe().parameter_groups(model)] == [1, 1], "frozen ones are in no group"


# ---- what is random


def test_augmentation_depends_on_seed_epoch_and_index_alone(photographs):
    folder = ImageFolder(photographs / "train")
    augmentation = Augmentation(Preprocessing((32, 32), 1.0, "bicubic", (0.0,) * 3, (1.0,) * 3))
    ours, again, other = (TrainingImages(folder.samples, augmentation, seed) for seed in (0, 0, 1))
    first, _, same, *changed = (images[0] for images in (ours[0, 3], ours[0, 4], again[0, 3], ours[1, 3], other[0, 3]))
    assert torch.equal(first, same)
    assert not any(torch.equal(first, image) for image in changed)
    generator = random.Random(0)
    for _ in range(200):
        left, top, right, bottom = augmentation.box(48, 40, generator)
        assert 0 <= left < right <= 48
        assert 0 <= top < bottom <= 40
        assert (right - left) * (bottom - top) >= 0.07 * 48 * 40


def test_random_numbers_of_others_are_left_alone():
    def draw() -> tuple[float, ...]:
        return random.random(), np.random.rand(), torch.rand(1).item()  # noqa: NPY002

    def start() -> None:
        random.seed(1)
        np.random.seed(1)  # noqa: NPY002
        torch.manual_seed(1)

    start()
    others = [draw(), draw()]
    start()
    assert draw() == others[0]
    with seeded(seed_of(0, 7)):
        first = draw()
    assert draw() == others[1]
    with seeded(seed_of(0, 7)):
        assert draw() == first


class Keyed(Dataset[tuple[Tensor, int]]):
    """Training images as the loop asks for them, by (epoch, index); the same in every epoch."""

    def __init__(self, images: Tensor, labels: Tensor) -> None:
        self.images, self.labels = images, labels.tolist()

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, key: tuple[int, int]) -> tuple[Tensor, int]:
        return self.images[key[1]], self.labels[key[1]]


def colours() -> Keyed:
    """24 images of three classes: a colour per class, with noise that is each image's own."""
    labels = torch.arange(24) % 3
    noise = torch.randn(24, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    return Keyed((0.3 * noise + torch.eye(3)[labels, :, None, None]).double(), labels)


def test_batches_of_a_resumed_run_are_those_left():
    recipe = Recipe(epochs=3, batch=2, accumulate=3)
    batches = list(TrainingBatches(colours(), recipe))
    assert len(batches) == len(TrainingBatches(colours(), recipe)) == 3 * 4 * 3
    rest = TrainingBatches(colours(), recipe, first_step=5)
    assert len(rest) == 7 * 3
    assert list(rest) == batches[5 * 3 :]


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_accumulated_batches_are_one_large_batch(optimizer):
    """This holds where nothing is random and there are no batch norms, which would see the parts."""
    results = []
    for parts in (1, 4):
        torch.manual_seed(0)
        model = tiny_volo(num_classes=3, batch_norm=False, drop_path_rate=0.0, return_dense=False).double()
        start = nn.utils.parameters_to_vector(model.parameters()).detach().clone()
        options: dict[str, Any] = {"epochs": 1, "batch": 8 // parts, "accumulate": parts, "optimizer": optimizer}
        recipe = Recipe(**options, learning_rate=1e-3, ema_decay=0)
        log = Trainer(model, recipe, colours(), None, CPU, log_every=1).fit()
        assert len(log) == 4  # three steps and the epoch
        moved = nn.utils.parameters_to_vector(model.parameters()).detach() - start
        results.append(([row["loss"] for row in log if "loss" in row], moved))
    (losses, one), (other_losses, other) = results
    assert other_losses == pytest.approx(losses, rel=1e-6)  # logits are float32
    assert relative_error(other, one) < 1e-3


def test_averaged_weights_forget_their_start():
    """The average is the first step's weights; step n, counted from 0, keeps min(decay, (1 + n) / (10 + n)) of it."""
    model = tiny_volo(num_classes=3, return_dense=False).double()
    trainer, weights = Trainer(model, Recipe(epochs=2, batch=8, ema_decay=0.3), colours(), None, CPU), []
    vector = nn.utils.parameters_to_vector
    trainer.optimizer.register_step_post_hook(lambda *_: weights.append(vector(model.parameters()).detach().clone()))
    trainer.fit()
    expected = weights[0]
    for kept, last in zip((2 / 11, 3 / 12, 0.3, 0.3, 0.3), weights[1:], strict=True):
        expected = kept * expected + (1 - kept) * last
    assert trainer.average is not None
    torch.testing.assert_close(vector(trainer.average.module.parameters()).detach(), expected)


def test_a_frozen_backbone_stays_as_it_is():
    """Its batch norms, too, from epoch to epoch; the classifiers learn."""
    model, images = tiny_volo(num_classes=3).double(), colours()
    before = copy.deepcopy(model.state_dict())
    recipe = Recipe(epochs=2, batch=8, ema_decay=0, freeze_backbone=True)
    Trainer(model, recipe, images, TensorDataset(images.images, torch.tensor(images.labels)), CPU).fit()
    changed = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert changed == {f"{name}.{part}" for name in model.classifiers for part in ("weight", "bias")}
    overlock = on_meta("overlock_xt")  # whose auxiliary classifier would wait for gradients
    Trainer(overlock, recipe, images, None, CPU)
    assert {name for name, p in overlock.named_parameters() if p.requires_grad} == {"head.4.weight", "head.4.bias"}


# ---- scikit-learn's handwritten digits


SMALL: dict[str, Any] = {"num_classes": 10, "in_chans": 1}
OVERLOCK: dict[str, Any] = {
    "depth": (1, 1, 1, 1), "sub_depth": (1, 1), "embed_dim": (16, 16, 32, 32), "sub_num_heads": (1, 1),
    "kernel_size": (7, 7, 7, 7),
}  # fmt: skip
LEARNERS: tuple[tuple[Callable[[], BackboneContract], Recipe], ...] = (
    (lambda: RedNet((1, 1, 0, 0), **SMALL), Recipe(epochs=1, batch=12, learning_rate=6e-3, ema_decay=0)),
    (
        lambda: VOLO((2, 1, 1, 1), (48, 96), (2, 4), stem_dim=32, img_size=32, return_dense=False, **SMALL),
        Recipe(epochs=3, batch=48, learning_rate=3e-3, ema_decay=0.8),
    ),
    (lambda: OverLoCK(**OVERLOCK, **SMALL), Recipe(epochs=2, batch=32, learning_rate=6e-3, ema_decay=0)),
)


@pytest.fixture(scope="module")
def digits() -> tuple[Keyed, TensorDataset]:
    """1437 images to train on and 360 others to evaluate on, enlarged from 8×8 to 32×32."""
    data, labels = pytest.importorskip("sklearn.datasets").load_digits(return_X_y=True)
    images = torch.from_numpy(data.astype(np.float32)).view(-1, 1, 8, 8) / 8 - 1
    images, labels = F.interpolate(images, (32, 32), mode="bilinear"), torch.from_numpy(labels)
    shuffled = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    learn, judge = shuffled[360:], shuffled[:360]
    return Keyed(images[learn], labels[learn]), TensorDataset(images[judge], labels[judge])


@pytest.mark.slow
@pytest.mark.parametrize(("build", "recipe"), LEARNERS, ids=["rednet", "volo", "overlock"])
def test_reaches_95_percent_on_images_it_has_not_seen(digits, build, recipe):
    torch.manual_seed(0)
    model = build()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 0.3  # running statistics that keep up with a run of a hundred steps
    training, judging = digits
    log = Trainer(model, recipe, training, judging, CPU, log_every=10).fit()
    accuracies = [row["top1"] for row in log if "top1" in row]
    assert len(accuracies) == recipe.epochs
    assert accuracies[-1] >= 95, accuracies
