"""Train a model on a folder of images, from official weights, from a file, or from scratch.

  python -m models finetune flowers --model overlock_t --pretrained --output run
  torchrun --nproc-per-node 8 -m models finetune imagenet --model overlock_t --recipe overlock --dtype fp16 --output run

DIR holds train and val, each with one folder per class. The run keeps in --output: state.pt (to continue),
log.jsonl, settings.json, classes.txt, last.safetensors and best.safetensors, the weights, which tell evaluate and
classify (--run) what they are of, and where TensorBoard is installed its events. Call the same command again after a
kill and it continues, with the result it would have had; with more than two processes, but for rounding. (torchrun
takes --run DIR for an option of its own: write --checkpoint DIR/best.safetensors there.)

AdamW; linear warm-up, then half a cosine; random-resized crops and flips; label smoothing; the averaged weights (EMA)
are the ones evaluated and kept. OverLoCK trains with its auxiliary loss; VOLO on its summed logits, or, with
--model-kwargs return_dense=True, on class and token logits with mix-token. --recipe sets what a family's paper trained
with from scratch on ImageNet-1k, and options beside it change that:

  overlock  arXiv 2502.20087: 300 epochs, 2048 images per step, AdamW at 2e-3, mixup, CutMix, RandAugment, erasing, EMA
  rednet    arXiv 2103.06255: 130 epochs, 2048 images per step, SGD at 0.8, crops and flips alone
  volo      arXiv 2106.13112: 300 epochs, 1024 images per step, AdamW at 1.6e-3 (D2, D3: 1e-3), RandAugment, erasing and
            mix-token; the authors' token labels come from a larger network, here each token has its image's label

The images per step are divided among the processes; where a GPU holds fewer, --accumulate divides them further.
Mixup, CutMix, RandAugment, erasing and repeated augmentation are timm's and need it installed.
"""

import argparse
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import filelock
import torch

from kernels.files import WriteError, atomic_write, locked, write_json
from models.commands import arguments as common
from models.commands import distributed
from models.commands.augmentation import Augmentation
from models.commands.dispatch import CommandError, input_errors
from models.commands.files import BEST, LOCK, STATE
from models.commands.folders import EvaluationImages, ImageFolder, TrainingImages
from models.commands.progress import console, note
from models.commands.recipe import PUBLISHED, Recipe
from models.commands.training import Trainer
from models.commands.types import Number, natural, positive
from models.metadata import Metadata

LOCK_SECONDS = 15.0
NOT_KEPT = ("num_classes", "drop_path_rate", "return_dense")  # arguments of the model that only training needs


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("dir", type=Path, metavar="DIR", help="holds train and val, or one folder per class")
    parser.add_argument("--val", type=Path, metavar="DIR", help="images to evaluate on (DIR/val)")
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="where the run is kept")
    parser.add_argument("--restart", action="store_true", help="begin anew even if --output holds a run")
    common.add_model_arguments(parser)

    group = parser.add_argument_group("recipe")
    group.add_argument("--recipe", choices=tuple(PUBLISHED), help="what the paper trained with, see above")
    text = "chance that a block is skipped (the model's own)"
    group.add_argument("--drop-path", type=Number(at_least=0, below=1), metavar="RATE", help=text)
    for known in fields(Recipe):  # what is not given is the recipe's
        flag, kind, text = known.metadata["flag"], known.metadata["kind"], known.metadata["help"]
        how: dict[str, Any] = {"type": kind, "metavar": "TEXT" if kind is str else "N"}
        if kind is bool:
            how = {"action": "store_true"}
        elif isinstance(kind, tuple):
            how = {"choices": kind}
        text = text if known.default is None or kind in (bool, str) else f"{text} ({known.default})"
        group.add_argument(flag, dest=known.name, default=argparse.SUPPRESS, help=text, **how)

    common.add_image_arguments(parser)
    common.add_device_arguments(parser, loads=True)
    group = parser.add_argument_group("bookkeeping")
    group.add_argument("--grad-checkpointing", action="store_true", help="less memory, more time")
    text = "steps between states (%(default)s; 0: epochs)"
    group.add_argument("--save-every", type=natural, default=500, metavar="N", help=text)
    group.add_argument("--log-every", type=positive, default=50, metavar="N", help="steps per row (%(default)s)")


def make_recipe(arguments: argparse.Namespace) -> Recipe:
    """The recipe of --recipe, or the default one, changed by the options given; completes the model's options, too.

    Raises:
        ValueError: a value that cannot be used; the message begins with its option.
    """
    given = {known.name: getattr(arguments, known.name) for known in fields(Recipe) if hasattr(arguments, known.name)}
    options = {} if arguments.drop_path is None else {"drop_path_rate": arguments.drop_path}
    if arguments.recipe is not None:
        published = PUBLISHED[arguments.recipe]
        settings, own = published.of(arguments.model)
        given, options = settings | given, own | options
        shares, images = distributed.world_size() * given.get("accumulate", 1), f"{published.images} images per step"
        if "batch" not in given:
            given["batch"], left = divmod(published.images, shares)
            if left or not given["batch"]:
                why = f"takes {images}, which {shares} batches cannot share; give another --accumulate, or --batch"
                raise ValueError(f"--recipe {arguments.recipe} {why}")
        elif given["batch"] * shares != published.images:
            note(f"--lr {given['learning_rate']} was published for {images}, not {given['batch'] * shares}")
    arguments.model_kwargs = [*options.items(), *arguments.model_kwargs]
    return Recipe(**given)


def read_folders(arguments: argparse.Namespace) -> tuple[ImageFolder, ImageFolder | None]:
    """The images to train on and those to evaluate on.

    Raises:
        ValueError: a folder is missing or empty, or the two do not have the same classes.
    """
    root, val = arguments.dir, arguments.val
    if (root / "train").is_dir():
        root, val = root / "train", val or (root / "val" if (root / "val").is_dir() else None)
    training = ImageFolder(root)
    validation = None if val is None else ImageFolder(val)
    if validation is not None and validation.classes != training.classes:
        unlike = ", ".join(sorted(set(validation.classes) ^ set(training.classes))[:5])
        raise ValueError(f"--val: {val} and {root} must have the same class folders; only one has {unlike}")
    return training, validation


def run(arguments: argparse.Namespace) -> int:
    with input_errors():
        training, validation = read_folders(arguments)
        if arguments.output.exists() and not arguments.output.is_dir():
            raise CommandError(f"--output must be a folder, {arguments.output} is a file")
        common.complete(arguments)
    with distributed.process_group(arguments.device) as device, ExitStack() as held:
        with input_errors():
            trainer = make_trainer(arguments, make_recipe(arguments), training, validation, device)
            if distributed.rank() == 0:
                held.enter_context(_alone(arguments.output))
            resumed = not arguments.restart and trainer.resume()
            if distributed.rank() == 0:
                if not resumed:
                    # Before the files below, which do not belong to it.
                    (arguments.output / STATE).unlink(missing_ok=True)
                write_json(arguments.output / "settings.json", trainer.settings)
                names = "".join(f"{name}\n" for name in training.classes).encode("utf-8", "surrogateescape")
                atomic_write(arguments.output / "classes.txt", names)
        if distributed.rank() == 0:
            _tell(trainer, arguments.model, training, validation, resumed)
        try:
            trainer.fit()
        except WriteError as error:
            raise CommandError(f"{error}; the same command continues from the last state, once it can") from error
        if distributed.rank() == 0:
            scores = [row for row in trainer.log if "top1" in row]
            if scores:
                print(f"top-1 {scores[-1]['top1']:.3f} %   best {scores[-1]['best_top1']:.3f} %")
            print(arguments.output / BEST)
    return 0


def make_trainer(
    arguments: argparse.Namespace,
    recipe: Recipe,
    training: ImageFolder,
    validation: ImageFolder | None,
    device: torch.device,
) -> Trainer:
    """The trainer; nothing is written yet. ValueError, TypeError or OSError for what cannot be used."""
    torch.manual_seed(recipe.seed)  # for whatever the weight file does not hold
    model, preprocessing = common.build_model(arguments, num_classes=len(training.classes), training=True)
    augmentation = Augmentation(preprocessing, recipe.least_area, recipe.flip, recipe.rand_augment, recipe.erasing)
    if arguments.grad_checkpointing:
        model.set_grad_checkpointing()
    settings = {
        "model": arguments.model,
        "options": dict(arguments.model_kwargs),
        "weights": arguments.weights,
        **asdict(recipe),
        **asdict(preprocessing),
        "grad_checkpointing": arguments.grad_checkpointing,
        "processes": distributed.world_size(),
        "training_images": training.digest(),
        "validation_images": None if validation is None else validation.digest(),
    }
    options = {name: value for name, value in arguments.options.items() if name not in NOT_KEPT}
    metadata = Metadata(
        **asdict(preprocessing), model=arguments.model, model_args=options, classes=tuple(training.classes)
    )
    metadata.header()  # TypeError for options that cannot be written
    return Trainer(
        model.to(device),
        recipe,
        TrainingImages(training.samples, augmentation, recipe.seed),
        None if validation is None else EvaluationImages(validation.samples, preprocessing),
        device,
        folder=arguments.output,
        settings=settings,
        save_every=arguments.save_every,
        log_every=arguments.log_every,
        workers=arguments.workers,
        metadata=metadata,
    )


@contextmanager
def _alone(output: Path) -> Iterator[None]:
    """Locks the folder of the run. Waits a while: the loaders of a killed run take seconds to notice and end.

    Raises:
        CommandError: another run is still writing there.
    """
    common.make_folder(output, "--output")
    try:
        with locked(output / LOCK, LOCK_SECONDS):
            yield
    except filelock.Timeout:
        raise CommandError(f"--output: another finetune is writing to {output}") from None


def _tell(trainer: Trainer, model: str, training: ImageFolder, validation: ImageFolder | None, resumed: bool) -> None:
    weights = "RANDOM" if trainer.settings["weights"] == "random" else trainer.settings["weights"]
    evaluated = "none to evaluate on" if validation is None else f"{len(validation.samples)} to evaluate on"
    console.print(
        f"{model} from {weights} weights, {len(training.classes)} classes, {len(training.samples)} images, "
        f"{evaluated}, {trainer.total_steps} steps on {distributed.world_size()} × {trainer.device}",
        markup=False,
    )
    if trainer.step == trainer.total_steps:
        console.print("already finished; --restart begins anew")
    elif resumed:
        console.print(f"continues after step {trainer.step} of {trainer.total_steps}")
