"""The training loop on real images: each family learns scikit-learn's handwritten digits, on either CPU path alike."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import Dataset, TensorDataset

import kernels
from models._contract import BackboneContract
from models.commands.recipe import Recipe
from models.commands.training import Run, Trainer
from models.overlock import OverLoCK
from models.rednet import Bottleneck, RedNet
from models.volo import VOLO
from tests.support import relative_error

datasets = pytest.importorskip("sklearn.datasets")
model_selection = pytest.importorskip("sklearn.model_selection")


class NarrowRedNet(RedNet):
    """RedNet's stem and head around one bottleneck a stage, a quarter as wide."""

    def __init__(self) -> None:
        super().__init__((1, 1, 1, 1), num_classes=10, in_chans=1)
        channels = 64
        for stage, info in enumerate(self.feature_info):
            width = 16 * 2**stage
            block = Bottleneck(channels, width, stride=1 if stage == 0 else 2)
            setattr(self, info["module"], nn.Sequential(block))
            channels = info["num_chs"] = Bottleneck.expansion * width
        self.head = nn.Sequential()
        self.head.add_module("fc", nn.Linear(channels, 10))
        self._initialise()


def narrow_volo(**options: bool) -> VOLO:
    return VOLO((2, 1, 1, 1), (48, 96), (2, 4), stem_dim=32, img_size=32, num_classes=10, in_chans=1, **options)


def narrow_overlock() -> OverLoCK:
    return OverLoCK(
        depth=(1, 1, 1, 1),
        sub_depth=(1, 1),
        embed_dim=(16, 16, 32, 32),
        sub_num_heads=(1, 1),
        kernel_size=(7, 7, 7, 7),
        num_classes=10,
        in_chans=1,
    )


FAMILIES: dict[str, tuple[Callable[[], BackboneContract], Recipe]] = {
    "rednet": (NarrowRedNet, Recipe(epochs=3, batch=24, learning_rate=6e-3, ema_decay=0)),
    "volo": (lambda: narrow_volo(return_dense=False), Recipe(epochs=3, batch=48, learning_rate=3e-3, ema_decay=0.8)),
    "overlock": (narrow_overlock, Recipe(epochs=3, batch=48, learning_rate=6e-3, ema_decay=0)),
}


class Keyed(Dataset[tuple[Tensor, int]]):
    """Training images as the loop asks for them, by (epoch, index); the same in every epoch."""

    def __init__(self, images: Tensor, labels: Tensor) -> None:
        self.images, self.labels = images, labels.tolist()

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, key: tuple[int, int]) -> tuple[Tensor, int]:
        return self.images[key[1]], self.labels[key[1]]


@pytest.fixture(autouse=True)
def _one_thread():
    """Maps this small gain nothing from a second one, and lose much where other tests run beside these."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def digits() -> tuple[Keyed, TensorDataset]:
    """1437 images to learn from and 360 others to be judged by, enlarged from 8×8 to 32×32."""
    data, labels = datasets.load_digits(return_X_y=True)
    images = torch.from_numpy(data.astype(np.float32)).view(-1, 1, 8, 8) / 8 - 1
    images = F.interpolate(images, (32, 32), mode="bilinear")
    learn, judge = model_selection.train_test_split(
        np.arange(len(labels)), test_size=0.2, random_state=0, stratify=labels
    )
    labels = torch.from_numpy(labels)
    return Keyed(images[learn], labels[learn]), TensorDataset(images[judge], labels[judge])


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_reaches_95_percent_on_images_it_has_not_seen(digits, family):
    build, recipe = FAMILIES[family]
    torch.manual_seed(0)
    model = build()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 0.3  # running statistics that keep up with a run of a hundred steps
    training, judging = digits
    log = Trainer(model, recipe, training, judging, torch.device("cpu"), Run(log_every=10)).fit()
    accuracies = [row["top1"] for row in log if "top1" in row]
    assert len(accuracies) == recipe.epochs
    assert accuracies[-1] >= 95, accuracies


def first_losses(build: Callable[[], BackboneContract], images: Keyed, backend: str, seed: int) -> Tensor:
    """Loss of each of one epoch's eight steps, in float64: in float32 rounding grows tenfold every few steps."""
    recipe = Recipe(epochs=1, batch=12, learning_rate=3e-4, ema_decay=0, seed=seed)
    torch.manual_seed(seed)
    with kernels.use_backend(backend):
        trainer = Trainer(build().double(), recipe, images, None, torch.device("cpu"), Run(log_every=1))
        return torch.tensor([row["loss"] for row in trainer.fit() if "loss" in row], dtype=torch.float64)


@pytest.mark.parametrize("family", [*FAMILIES, "volo with token labels"])
def test_eager_and_naive_paths_follow_the_same_curve(digits, family):
    """Up to rounding; another seed changes it a billion times as much."""
    build = FAMILIES[family][0] if family in FAMILIES else narrow_volo
    few = Keyed(digits[0].images[:96].double(), torch.tensor(digits[0].labels[:96]))
    eager, naive = (first_losses(build, few, backend, seed=0) for backend in ("eager", "reference"))
    other = first_losses(build, few, "eager", seed=1)
    assert len(eager) == 8
    assert eager.min() < eager[0]
    assert relative_error(eager, naive) < 1e-10
    assert relative_error(other, naive) > 1e-2
