"""The training loop behind ``python -m models finetune``: on one process or several, and the same after a kill.

A run is a function of its settings and its step number. What is random in a step (which images, their crops, dropped
paths, mixed boxes) is drawn from generators seeded with the run's seed and that number; learning rate and averaging
follow from the number too. So the state to keep is the weights, the optimiser's moments and the number itself, and a
run that continues from it takes the path it would have taken.
"""

from __future__ import annotations

import contextlib
import json
import math
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel
from torch.utils.data import Dataset, Subset

from kernels.files import writing
from models._contract import BackboneContract
from models.checkpoints import save_checkpoint
from models.commands import distributed
from models.commands.augmentation import mixing
from models.commands.evaluate import count_correct, predict
from models.commands.files import BEST, LAST, LOG, STATE, read_lines, read_state, write_lines, write_state
from models.commands.folders import Batch, loader
from models.commands.images import UnreadableImageError
from models.commands.optimisation import Objective, cosine_with_warmup, parameter_groups, warmed_up_ema
from models.commands.progress import Bar, console
from models.commands.recipe import OPTIONS, Recipe
from models.commands.sampling import TrainingBatches, seed_of, seeded
from models.commands.types import DTYPES
from models.metadata import Metadata

BOARD = "tensorboard"


@dataclass(frozen=True)
class Run:
    """Where a run keeps its files, and how often.

    Args:
        output: an existing folder for ``state.pt``, ``log.jsonl``, the weights and, where TensorBoard is installed, its
            events; None keeps nothing.
        settings: what must be the same for a run to continue; plain values.
        save_every: steps between states; each epoch's end has one anyway. 0: only there.
        log_every: steps between lines of the log.
        workers: processes that load images.
        metadata: what the weights' files say of themselves.
    """

    output: Path | None = None
    settings: dict[str, Any] = field(default_factory=dict)
    save_every: int = 0
    log_every: int = 50
    workers: int = 0
    metadata: Metadata | None = None


class Trainer:
    """Trains ``model`` in place; ``fit`` returns the log.

    The log has a row for every ``log_every`` steps (step, epoch, loss: the mean since the row before, learning_rate,
    images_per_second) and one for each epoch (step, epoch, top1, top5, best_top1, seconds).

    Args:
        model: of one of the families, with its classifier, on ``device``.
        recipe: how to train.
        training: (draw, index) -> (image, label) or ``Unreadable``, and a length; ``TrainingBatches`` gives the keys.
        validation: index -> (image, label) or ``Unreadable``; None evaluates nothing.
        device: where the model is.
        run: which files to keep.
    """

    def __init__(
        self,
        model: BackboneContract,
        recipe: Recipe,
        training: Dataset[Any],
        validation: Dataset[Any] | None,
        device: torch.device,
        run: Run | None = None,
    ) -> None:
        self.model, self.recipe, self.run, self.device = model, recipe, run or Run(), device
        self.training, self.validation = training, validation
        self.dtype = DTYPES[recipe.dtype]
        self.objective = Objective(recipe.label_smoothing, recipe.auxiliary_weight)
        self.step = 0
        self.steps_per_epoch = TrainingBatches(training, recipe).steps_per_epoch
        self.total_steps = recipe.epochs * self.steps_per_epoch
        if recipe.freeze_backbone:
            model.requires_grad_(False)
            for name in model.classifiers:
                model.get_submodule(name).requires_grad_(True)
        groups = parameter_groups(model, recipe.weight_decay, recipe.layer_decay, recipe.decay_vectors)
        self.optimizer: torch.optim.Optimizer = (
            torch.optim.SGD(groups, lr=recipe.learning_rate, momentum=0.9, nesterov=True)
            if recipe.optimizer == "sgd"
            else torch.optim.AdamW(groups, lr=recipe.learning_rate)
        )
        mixes = recipe.mixup > 0 or recipe.cutmix > 0
        self.mix = mixing(recipe.mixup, recipe.cutmix, model.num_classes) if mixes else None
        self.scaler = torch.amp.GradScaler(device.type, enabled=self.dtype == torch.float16)
        self.average: AveragedModel | None = None
        if recipe.ema_decay:
            self.average = AveragedModel(model, multi_avg_fn=warmed_up_ema(recipe.ema_decay), use_buffers=True)
        self.best: float | None = None
        self.log: list[dict[str, Any]] = []
        self._interval_loss, self._interval_steps = torch.zeros((), device=device), 0
        self._board: Any = None

    # ---- the state

    def resume(self) -> bool:
        """Takes up the state in ``output``, if there is one.

        Raises:
            ValueError: it is damaged, or of a run with other settings; the message names them.
        """
        if self.run.output is None or not (self.run.output / STATE).exists():
            return False
        path = self.run.output / STATE
        anew = f"--restart begins anew, with --checkpoint {self.run.output / LAST} from the last epoch's weights"
        try:
            state = read_state(path)
            differing = self._differing(state["settings"])
            if not differing:
                self._take_up(state)
        except ValueError as error:
            raise ValueError(f"{error}; {anew}") from error
        except Exception as error:  # a state that was changed can make its readers fail in any way
            reason = (str(error).strip().splitlines() or [""])[0]
            raise ValueError(f"{path} is not a state of this run ({type(error).__name__}: {reason}); {anew}") from error
        if differing:
            ways = "another --output keeps both runs, --restart begins anew"
            if self.run.settings.get("epochs", 0) > state["settings"].get("epochs", 0):  # its rates have fallen already
                ways += f", with --checkpoint {path.with_name(LAST)} the weights are trained for longer"
            raise ValueError(f"{path} belongs to a run with other settings: {'; '.join(differing)}; {ways}")
        return True

    def _differing(self, settings: dict[str, Any]) -> list[str]:
        known, own = _plain(asdict(Recipe())) | settings, _plain(self.run.settings)
        return [
            f"{OPTIONS.get(name, name)} was {known.get(name)!r}, is {own[name]!r}"
            for name in own
            if known.get(name) != own[name]
        ]

    def _take_up(self, state: dict[str, Any]) -> None:
        assert self.run.output is not None
        if type(state["step"]) is not int or not 0 <= state["step"] <= self.total_steps:
            raise ValueError(f"{self.run.output / STATE} is not a state of this run: it is of step {state['step']!r}")
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scaler.load_state_dict(state["scaler"])
        if self.average is not None:
            self.average.load_state_dict(state["average"])
        self.step, self.best = state["step"], state["best"]
        self._interval_loss.copy_(state["interval_loss"])
        self._interval_steps = state["interval_steps"]
        self.log = [row for row in read_lines(self.run.output / LOG) if row["step"] <= self.step]

    def _save(self) -> None:
        if self.run.output is None or distributed.rank() != 0:
            return
        self._check_finite(self._interval_loss.item())
        state = {
            "settings": _plain(self.run.settings),
            "step": self.step,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "average": None if self.average is None else self.average.state_dict(),
            "best": self.best,
            "interval_loss": self._interval_loss,
            "interval_steps": self._interval_steps,
        }
        write_state(self.run.output / STATE, state)

    def _record(self, row: dict[str, Any]) -> None:
        self.log.append(row)
        if self.run.output is not None and distributed.rank() == 0:
            path = self.run.output / LOG
            with writing(path), open(path, "a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
        for name, value in row.items() if self._board is not None else ():
            if name not in ("step", "epoch"):
                self._board.add_scalar(name, value, row["step"])

    # ---- the loop

    def fit(self) -> list[dict[str, Any]]:
        """Trains from the present step to the last and returns the whole log.

        Raises:
            UnreadableImageError: a file that cannot be decoded.
            FloatingPointError: the loss is no longer finite. The last state written is from before that.
            kernels.files.WriteError: a file of the run cannot be written; the files before it are whole.
        """
        if self.run.output is not None and distributed.rank() == 0:
            if (self.run.output / LOG).exists():
                write_lines(self.run.output / LOG, self.log)  # without what a killed run wrote after its last state
            self._board = event_writer(self.run.output / BOARD, self.step)
        wrapped: nn.Module = self.model
        if distributed.world_size() > 1:
            places = [self.device] if self.device.type == "cuda" else None
            unused = self.recipe.freeze_backbone  # OverLoCK's auxiliary head
            wrapped = DistributedDataParallel(self.model, places, find_unused_parameters=unused)
        keys = TrainingBatches(self.training, self.recipe, self.step)
        batches = iter(loader(self.training, self.device, self.run.workers, batch_sampler=keys))
        self.model.train(not self.recipe.freeze_backbone)
        self._clock = self._epoch_clock = time.perf_counter()
        self._timed_steps = 0
        with Bar(self.total_steps, self.step, shown=self.run.output is not None and distributed.rank() == 0) as bar:
            while self.step < self.total_steps:
                self._train_step(wrapped, batches)
                at_end = self.step % self.steps_per_epoch == 0
                if at_end or self.step % self.run.log_every == 0:
                    self._end_interval()
                if at_end:
                    self._end_epoch(bar)
                    self._save()
                elif self.run.save_every and self.step % self.run.save_every == 0:
                    self._save()
                bar.advance(1, self._told())
        if self._board is not None:
            self._board.close()
        return self.log

    @property
    def _epoch(self) -> int:
        """Of the step just done, from 1."""
        return -(-self.step // self.steps_per_epoch)

    def _told(self) -> str:
        losses = [f"loss {row['loss']:.4f}" for row in self.log[-2:] if "loss" in row]
        return f"epoch {self._epoch}/{self.recipe.epochs} {''.join(losses[-1:])}"

    def _train_step(self, wrapped: nn.Module, batches: Iterator[Batch]) -> None:
        recipe, warmup = self.recipe, round(self.recipe.warmup * self.steps_per_epoch)
        rates = (recipe.learning_rate, recipe.final_learning_rate, recipe.first_learning_rate)
        rate = cosine_with_warmup(self.step, self.total_steps, warmup, *rates)
        for group in self.optimizer.param_groups:
            group["lr"] = rate * group["rate_scale"]
        for part in range(self.recipe.accumulate):
            waits = part + 1 < self.recipe.accumulate  # for the last part, which sums over the processes
            alone = isinstance(wrapped, DistributedDataParallel) and waits
            with wrapped.no_sync() if alone else contextlib.nullcontext():
                loss = self._loss(wrapped, next(batches), self.step * self.recipe.accumulate + part)
                self.scaler.scale(loss).backward()
            self._interval_loss += loss.detach()
        if self.recipe.clip_norm:
            self.scaler.unscale_(self.optimizer)
            nn.utils.clip_grad_norm_(self.model.parameters(), self.recipe.clip_norm)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        if self.average is not None:
            self.average.update_parameters(self.model)
        self.step += 1
        self._interval_steps += 1
        self._timed_steps += 1

    def _loss(self, wrapped: nn.Module, batch: Batch, number: int) -> Tensor:
        """A batch's share of its step's loss; what is random follows from the batch's ``number`` in the run."""
        if batch.unreadable:
            raise UnreadableImageError(batch.unreadable[0])
        images = batch.images.to(self.device, non_blocking=True)
        labels = batch.labels.to(self.device, non_blocking=True)
        seed = seed_of(self.recipe.seed, number, distributed.rank())
        if self.mix is not None:
            with seeded(seed):
                images, labels = self.mix(images, labels)
        torch.manual_seed(seed)
        with torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32):
            output = wrapped(images)
        return self.objective(output, labels) / self.recipe.accumulate

    def _check_finite(self, loss: float) -> None:
        if not math.isfinite(loss):
            raise FloatingPointError(f"the loss is not finite at step {self.step}; a lower --lr may help")

    def _end_interval(self) -> None:
        total = distributed.sum_over_processes(self._interval_loss.clone())
        loss = total.item() / (self._interval_steps * distributed.world_size())
        self._check_finite(loss)
        now = time.perf_counter()
        images = self._timed_steps * self.recipe.batch * self.recipe.accumulate * distributed.world_size()
        self._interval_loss.zero_()
        self._interval_steps = 0
        rate, speed = max(group["lr"] for group in self.optimizer.param_groups), images / (now - self._clock)
        row = {"step": self.step, "epoch": self._epoch, "loss": loss, "learning_rate": rate}
        self._clock, self._timed_steps = now, 0
        self._record({**row, "images_per_second": speed})

    def _end_epoch(self, bar: Bar) -> None:
        kept = self.model if self.average is None else self.average.module
        row: dict[str, Any] = {"step": self.step, "epoch": self._epoch}
        better = True
        if self.validation is not None:
            row |= self._evaluate(kept)
            better = self.best is None or row["top1"] > self.best
            row["best_top1"] = self.best = row["top1"] if better else self.best
        now = time.perf_counter()
        row["seconds"] = now - self._epoch_clock
        if self.run.output is not None and distributed.rank() == 0:
            for name in (LAST, BEST) if better else (LAST,):
                save_checkpoint(kept, self.run.output / name, self.run.metadata)
        self._record(row)
        self._clock = self._epoch_clock = time.perf_counter()
        scores = f", top-1 {row['top1']:.2f} %, best {row['best_top1']:.2f} %" if "top1" in row else ""
        bar.say(f"{self._told()}{scores} ({row['seconds']:.0f} s)")

    def _evaluate(self, model: nn.Module) -> dict[str, float]:
        """Top-1 and top-5 in per cent, every process on its share of the images."""
        assert self.validation is not None
        distributed.broadcast_buffers(model)
        count = len(self.validation)  # pyright: ignore[reportArgumentType]
        share = Subset(self.validation, range(distributed.rank(), count, distributed.world_size()))
        batches = loader(share, self.device, self.run.workers, batch_size=self.recipe.batch)
        totals = torch.zeros(2, dtype=torch.int64, device=self.device)
        was_training = model.training
        model.eval()
        for batch, logits, labels in predict(model, batches, self.device, self.dtype):
            if batch.unreadable:
                raise UnreadableImageError(batch.unreadable[0])
            totals += torch.stack(count_correct(logits, labels))
        model.train(was_training)
        top1, top5 = (100 * hits / count for hits in distributed.sum_over_processes(totals).tolist())
        return {"top1": top1, "top5": top5}


def event_writer(folder: Path, step: int) -> Any:
    """TensorBoard's writer, which leaves out what a killed run wrote after ``step``; None where it is not installed."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        return None
    except Exception as error:  # an installation that does not fit must not end a training
        console.print(f"note: TensorBoard is left out, it cannot be imported: {error}", markup=False)
        return None
    return SummaryWriter(str(folder), purge_step=step + 1)


def _plain(settings: dict[str, Any]) -> dict[str, Any]:
    """As they are once written and read again: tuples are lists."""
    return json.loads(json.dumps(settings))
