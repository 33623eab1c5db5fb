"""The training loop behind ``python -m models finetune``: on one process or several, and the same after a kill.

Everything random in a step (which images, their crops, dropped paths, mixed boxes) is drawn from generators seeded with
the run's seed and the number of the step; learning rate and averaging follow from that number, too. So the state of a
run is its weights, the optimiser's moments and the number, and a run that continues takes the path it would have taken.
With more than two processes that holds but for rounding: DistributedDataParallel puts gradients into other buckets
after a process's first step, and in which order three numbers are added depends on their place in a bucket.
"""

import contextlib
import json
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import Dataset, Subset

from kernels.files import atomic_write, writing
from models._contract import BackboneContract
from models.checkpoints import save_checkpoint
from models.commands import distributed
from models.commands.augmentation import seed_of, seeded
from models.commands.dispatch import CommandError
from models.commands.evaluate import count_correct, predict
from models.commands.files import BEST, LAST, LOG, STATE, event_writer, plain, read_state
from models.commands.folders import TrainingBatches, loader
from models.commands.progress import Bar
from models.commands.recipe import OPTIONS, Recipe
from models.commands.types import DTYPES
from models.metadata import Metadata


@dataclass(eq=False)
class Trainer:
    """Trains ``model`` in place; ``fit`` returns the log.

    The log has a row for every ``log_every`` steps (step, epoch, loss: the mean since the row before, learning_rate,
    images_per_second) and one for each epoch (step, epoch, top1, top5, best_top1, seconds).
    """

    model: BackboneContract  # with its classifier, on ``device``
    recipe: Recipe
    training: Dataset[Any]  # (draw, index) -> (image, label), and a length; ``TrainingBatches`` gives the keys
    validation: Dataset[Any] | None  # index -> (image, label); None evaluates nothing
    device: torch.device
    folder: Path | None = None  # an existing one for state, log, weights and TensorBoard's events; None keeps nothing
    settings: dict[str, Any] = field(default_factory=dict)  # what must be the same for a run to continue; plain values
    save_every: int = 0  # steps between states; each epoch's end has one anyway. 0: only there
    log_every: int = 50  # steps between lines of the log
    workers: int = 0  # processes that load images
    metadata: Metadata | None = None  # what the weights' files say of themselves

    def __post_init__(self) -> None:
        model, recipe = self.model, self.recipe
        self.settings = plain(self.settings)
        self.output = self.folder if distributed.rank() == 0 else None  # None in processes that write nothing
        self.dtype = DTYPES[recipe.dtype]
        self.steps_per_epoch = TrainingBatches(self.training, recipe).steps_per_epoch
        self.total_steps = recipe.epochs * self.steps_per_epoch
        if recipe.freeze_backbone:
            model.requires_grad_(False)
            for name in model.classifiers:  # in evaluation mode, as it then is, the model uses no other
                model.get_submodule(name).requires_grad_(not name.startswith(model.training_only))
        self.optimizer = recipe.optimizer_of(model)
        self.mix = recipe.mixing(model.num_classes)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.dtype == torch.float16)
        self.average = AveragedModel(model, use_buffers=True) if recipe.ema_decay else None
        parts = {"model": model, "optimizer": self.optimizer, "scaler": self.scaler, "average": self.average}
        self._parts: dict[str, Any] = {name: part for name, part in parts.items() if part is not None}
        self.step = 0
        self.best: float | None = None
        self.log: list[dict[str, Any]] = []
        self._losses = torch.zeros((), device=self.device)  # summed since the last row of the log
        self._board: Any = None

    # ---- the state

    def resume(self) -> bool:
        """Continues from the state in ``folder``; False if there is none.

        Raises:
            ValueError: the state is damaged, or its run had other settings, which the message names.
        """
        if self.folder is None or not (self.folder / STATE).exists():
            return False
        path, last, own = self.folder / STATE, self.folder / LAST, self.settings
        try:
            state = read_state(path)
            known = state["settings"]
            differing = [
                f"{OPTIONS.get(name, name)} was {known.get(name)!r}, is {value!r}"
                for name, value in own.items()
                if known.get(name) != value
            ]
            if not differing:
                self._take_up(state)
        except Exception as error:  # a changed file can make its readers fail in any way
            reason = next(iter(str(error).strip().splitlines()), "")
            reason = reason if isinstance(error, ValueError) else f"{type(error).__name__}: {reason}"
            anew = f"--restart begins anew, with --checkpoint {last} from the last epoch's weights"
            raise ValueError(f"{path} is not a state of this run: {reason}; {anew}") from error
        if not differing:
            return True
        ways = "another --output keeps both runs, --restart begins anew"
        if own.get("epochs", 0) > known.get("epochs", 0):  # the learning rate has already fallen
            ways += f", with --checkpoint {last} the weights are trained for longer"
        raise ValueError(f"{path} belongs to a run with other settings: {'; '.join(differing)}; {ways}")

    def _take_up(self, state: dict[str, Any]) -> None:
        if type(state["step"]) is not int or not 0 <= state["step"] <= self.total_steps:
            raise ValueError(f"it is of step {state['step']!r}")
        for name, part in self._parts.items():
            part.load_state_dict(state[name])
        self.step, self.best, self.log = state["step"], state["best"], state["log"]
        self._losses.copy_(state["losses"])

    def _save(self) -> None:
        if self.output is None:
            return
        self._check_finite(self._losses.item())
        progress = {"step": self.step, "best": self.best, "log": self.log, "losses": self._losses}
        state = {"settings": self.settings, **progress} | {name: p.state_dict() for name, p in self._parts.items()}
        atomic_write(self.output / STATE, lambda file: torch.save(state, file))

    def _record(self, row: dict[str, Any]) -> None:
        self.log.append(row)
        if self.output is not None:
            path = self.output / LOG
            with writing(path), open(path, "a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
        if self._board is not None:
            for name in row.keys() - {"step", "epoch"}:
                self._board.add_scalar(name, row[name], row["step"])

    # ---- the loop

    def fit(self) -> list[dict[str, Any]]:
        """Trains from the present step to the last and returns the whole log.

        Raises:
            UnreadableImageError: a file that cannot be decoded.
            CommandError: the loss is no longer finite. The last state written is from before that.
            kernels.files.WriteError: a file of the run cannot be written; the files before it are whole.
        """
        if self.output is not None:  # drops what a killed run wrote after its last state
            atomic_write(self.output / LOG, "".join(json.dumps(row) + "\n" for row in self.log))
            self._board = event_writer(self.output, self.step)
        wrapped: nn.Module = self.model
        if distributed.world_size() > 1:
            places = [self.device] if self.device.type == "cuda" else None
            wrapped = DistributedDataParallel(self.model, places)
        keys = TrainingBatches(self.training, self.recipe, self.step)
        batches = iter(loader(self.training, self.device, self.workers, batch_sampler=keys))
        self.model.train(not self.recipe.freeze_backbone)
        self._epoch_started = time.perf_counter()
        self._since = self._epoch_started, self.step  # for the speed of the log's next row
        with Bar(self.total_steps, self.step, shown=self.output is not None) as bar:
            while self.step < self.total_steps:
                self._train_step(wrapped, batches)
                at_end = self.step % self.steps_per_epoch == 0
                if at_end or self.step % self.log_every == 0:
                    self._end_interval()
                if at_end:
                    self._end_epoch(bar)
                if at_end or (self.save_every and self.step % self.save_every == 0):
                    self._save()
                bar.advance(1, self._told())
        if self._board is not None:
            self._board.close()
        return self.log

    @property
    def _epoch(self) -> int:
        """Epoch of the step just done, from 1."""
        return -(-self.step // self.steps_per_epoch)

    def _told(self) -> str:
        losses = [f" loss {row['loss']:.4f}" for row in self.log[-2:] if "loss" in row]
        return f"epoch {self._epoch}/{self.recipe.epochs}{''.join(losses[-1:])}"

    def _train_step(self, wrapped: Any, batches: Iterator[list[Tensor]]) -> None:
        recipe, rate = self.recipe, self.recipe.rate(self.step, self.steps_per_epoch)
        for group in self.optimizer.param_groups:
            group["lr"] = rate * group.get("lr_scale", 1.0)
        for part in range(recipe.accumulate):
            # The last part sums the gradients over the processes.
            waits = isinstance(wrapped, DistributedDataParallel) and part + 1 < recipe.accumulate
            with wrapped.no_sync() if waits else contextlib.nullcontext():
                loss = self._loss(wrapped, next(batches), self.step * recipe.accumulate + part)
                self.scaler.scale(loss).backward()
            self._losses += loss.detach()
        if recipe.clip_norm:
            self.scaler.unscale_(self.optimizer)
            nn.utils.clip_grad_norm_(self.model.parameters(), recipe.clip_norm)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        if self.average is not None:
            # So a short run forgets its start. AveragedModel would hand over its count on the GPU, to be waited for.
            decay = min(recipe.ema_decay, (1 + self.step) / (10 + self.step))
            self.average.multi_avg_fn = get_ema_multi_avg_fn(decay)
            self.average.update_parameters(self.model)
        self.step += 1

    def _loss(self, wrapped: nn.Module, batch: list[Tensor], number: int) -> Tensor:
        """A batch's share of its step's loss; ``number`` counts the run's batches and seeds what is random."""
        images, labels = (tensor.to(self.device, non_blocking=True) for tensor in batch)
        seed = seed_of(self.recipe.seed, number, distributed.rank())
        if self.mix is not None:
            with seeded(seed):
                images, labels = self.mix(images, labels)
        torch.manual_seed(seed)
        with torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32):
            output = wrapped(images)
        return self.recipe.loss(output, labels) / self.recipe.accumulate

    def _check_finite(self, loss: float) -> None:
        if not math.isfinite(loss):
            raise CommandError(f"the loss is not finite at step {self.step}; a lower --lr may help")

    def _end_interval(self) -> None:
        steps = self.step - (self.log[-1]["step"] if self.log else 0)
        loss = distributed.sum_over_processes(self._losses).item() / (steps * distributed.world_size())
        self._losses.zero_()
        self._check_finite(loss)
        (then, first), now = self._since, time.perf_counter()
        self._since = now, self.step
        images = (self.step - first) * self.recipe.batch * self.recipe.accumulate * distributed.world_size()
        rate = self.optimizer.param_groups[0]["lr"]
        row = {"step": self.step, "epoch": self._epoch, "loss": loss, "learning_rate": rate}
        self._record({**row, "images_per_second": images / (now - then)})

    def _end_epoch(self, bar: Bar) -> None:
        kept = self.model if self.average is None else self.average.module
        row: dict[str, Any] = {"step": self.step, "epoch": self._epoch}
        better, scores = True, ""
        if self.validation is not None:
            row |= self._evaluate(kept, self.validation)
            better = self.best is None or row["top1"] > self.best
            row["best_top1"] = self.best = row["top1"] if better else self.best
            scores = f", top-1 {row['top1']:.2f} %, best {row['best_top1']:.2f} %"
        row["seconds"] = time.perf_counter() - self._epoch_started
        for name in (LAST, BEST) if better else (LAST,):
            if self.output is not None:
                save_checkpoint(kept, self.output / name, self.metadata)
        self._record(row)
        self._epoch_started = time.perf_counter()
        self._since = self._epoch_started, self.step
        bar.say(f"{self._told()}{scores} ({row['seconds']:.0f} s)")

    def _evaluate(self, model: nn.Module, images: Dataset[Any]) -> dict[str, float]:
        """Top-1 and top-5 in per cent; each process evaluates its share of the images."""
        distributed.broadcast_buffers(model)
        count = len(images)  # pyright: ignore[reportArgumentType]
        share = Subset(images, range(distributed.rank(), count, distributed.world_size()))
        batches = loader(share, self.device, self.workers, batch_size=self.recipe.batch)
        totals = torch.zeros(2, dtype=torch.int64, device=self.device)
        training = model.training  # a frozen backbone is not
        model.eval()
        for logits, labels in predict(model, batches, self.device, self.dtype):
            totals += count_correct(logits, labels)
        model.train(training)
        top1, top5 = (100 * hits / count for hits in distributed.sum_over_processes(totals).tolist())
        return {"top1": top1, "top5": top5}
