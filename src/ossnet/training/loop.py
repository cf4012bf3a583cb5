"""The training loop: the same for every family of networks, on one device or many.

What is random in an example does not depend on the steps before (`batches`), so a resumed training goes on bit for bit.
Under several processes each takes its share of every batch; rank 0 writes.
"""

import csv
import io
import json
import math
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from lightning_fabric import Fabric
from torch import Tensor, nn

from ossnet.data.cache import CachedCase
from ossnet.data.splits import spread
from ossnet.errors import SettingsError
from ossnet.field.model import Model
from ossnet.files.atomic import write_text
from ossnet.training.batches import Batches
from ossnet.training.checkpoint import Average, load_state, mean, save_state
from ossnet.training.gradients import Gradients
from ossnet.training.illustration import Events, Pictures
from ossnet.training.optimiser import FORGETS, Muon, forget_faint
from ossnet.training.recipes.base import Recipe
from ossnet.training.run_folder import STATE
from ossnet.training.schedule import enough_steps, rate_factor
from ossnet.training.settings import Settings
from ossnet.training.stopping import StopRequest
from ossnet.training.validation import SampledScores, mean_of_known, validate

_A_VALIDATION = 1 / 50
"""Share of a time limit that a validation takes, about; a picture that takes longer is the last one."""

_UNDEFINED_LOSSES = 10
"""So many losses in a row that are not finite end a training."""


@runtime_checkable
class Listener(Protocol):
    """Who is told how a training goes; called by rank 0 only."""

    def step(self, state: "State", loss: float, fraction: float) -> None:
        """After each step; `fraction` of the training is done."""

    def validated(self, row: dict[str, Any]) -> None:
        """After each validation, with the new row of the log."""


@dataclass
class State:
    """Where a training stands.

    Attributes:
        epoch, position: The next step is number `position` of this epoch.
        step: Steps done.
        seconds: Wall-clock time spent, over all resumed parts.
        skipped: Steps without effect, because a gradient was not finite.
        best, best_step: Highest mean IoU so far, and its step.
        validation_seconds: Time that the last validation took.
        watched: Validation cases judged while training with a time limit; 0 before the first time.
        rows: The validations so far, as in `log.csv`.
        losses: Loss of every step.
    """

    epoch: int = 0
    position: int = 0
    step: int = 0
    seconds: float = 0.0
    skipped: int = 0
    best: float = -1.0
    best_step: int = -1
    validation_seconds: float = 0.0
    watched: int = 0
    rows: list[dict[str, Any]] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)


@dataclass
class Trainer:
    """One training: give it cases and call `run`.

    Attributes:
        model: What is trained; its network is moved to the device.
        out: The run folder.
    """

    model: Model
    recipe: Recipe
    settings: Settings
    train: Sequence[CachedCase]
    validation: Sequence[CachedCase]
    out: Path
    fabric: Fabric
    listener: Listener | None = None

    def run(self, resume: bool = False) -> State:
        """Train to the end of the schedule.

        Raises:
            KeyboardInterrupt: After Ctrl-C or SIGTERM, between two steps, when the state was written.
            ResourceError: The disk is full; the last state is kept.
        """
        self._setup()
        # A run that ended before its first state goes on from the start.
        if resume and (self.out / STATE).exists():
            self._restore(load_state(self.out / STATE))
        write = self.settings.runtime.tensorboard and self.fabric.is_global_zero
        self.events = Events(self.out / "events" if write else None, self.state.step)
        minutes = self.settings.schedule.minutes or math.inf
        drawn = self.settings.validation.picture
        self.pictures = Pictures(self.out / "pictures" if drawn else None, 60 * minutes * _A_VALIDATION)
        self._started = time.monotonic() - self.state.seconds
        self._next_save = time.monotonic() + self.settings.runtime.checkpoint_seconds
        with (
            closing(self.events),
            self.batches.pool() as pool,
            StopRequest() as self.stop,
        ):
            try:
                self._epochs(pool)
                if not self.state.rows or self.state.rows[-1]["step"] != self.state.step:
                    self._validate()
                self._checkpoint()
            except KeyboardInterrupt:
                if self._whole:
                    self._save()
                raise
        self._finish_last()
        return self.state

    # Setting up ---------------------------------------------------------------------------------------------------

    def _setup(self) -> None:
        self.state = State()
        self._whole = True
        """No step is under way: weights, optimisers and counters belong together."""
        self._undefined = 0
        """Losses in a row that were not finite."""
        self._steps_per_epoch = 1
        self.batches = Batches(self.recipe, self.train, self.settings, self.fabric)
        self._enough = enough_steps(self.settings.schedule, self.batches.examples)
        self.network: nn.Module = self.model.network
        self.network.requires_grad_(True)
        self.network.train()
        self.network.to(self.fabric.device)
        self.optimisers = self.recipe.optimisers()
        for optimiser in self.optimisers:
            for group in optimiser.param_groups:
                group["initial_lr"] = group["lr"]
        self.gradients = Gradients(self.recipe, self.fabric.setup_module(self.network), self.fabric)
        decay = self.settings.optimiser.ema
        self.average = Average(self.network, decay) if decay else None

    # The loop -----------------------------------------------------------------------------------------------------

    def _epochs(self, pool: ThreadPoolExecutor) -> None:
        schedule, every = self.settings.schedule, self.settings.validation.every
        examples = self.batches.drawn(pool, self.state.epoch, self.state.position)
        while self.state.epoch < schedule.epochs or schedule.minutes is not None:
            self._steps_per_epoch = len(self.batches.of_epoch(self.state.epoch))
            while self.state.position < self._steps_per_epoch:
                fraction = self._fraction()
                if fraction >= 1:
                    return
                self._step(next(examples), fraction)
                validates = schedule.minutes is not None and self._validation_is_due()
                if validates:
                    self._validate()
                self._checkpoint(due=validates)
            # Before the epoch is counted: a run that ends while it validates does so again when it is resumed.
            done = self.state.epoch + 1
            validates = schedule.minutes is None and (done % every == 0 or done == schedule.epochs)
            if validates:
                self._validate()
            self.state.epoch, self.state.position = done, 0
            self._checkpoint(due=validates)

    def _checkpoint(self, due: bool = False) -> None:
        """Write the state where it is due, and stop where that was asked of any process."""
        due |= self.fabric.is_global_zero and time.monotonic() > self._next_save
        stop = self.stop.asked
        if self.fabric.world_size > 1:
            flags = torch.tensor([float(due), float(stop)], device=self.fabric.device)
            flags = self.fabric.all_reduce(flags, reduce_op="sum")  # type: ignore[assignment]
            due, stop = (flags > 0).tolist()
        if due or stop:
            self._save()
        if stop:
            raise KeyboardInterrupt

    def _step(self, examples: Sequence[Any], fraction: float) -> None:
        self._set_rates(fraction)
        self._whole = False  # the forward pass moves running averages already
        averages = [buffer.clone() for buffer in self.network.buffers()]
        loss = self.gradients(examples)
        norm = nn.utils.clip_grad_norm_(
            self.network.parameters(), self.settings.optimiser.clip_norm or math.inf
        )
        if bool(norm.isfinite()):
            for optimiser in self.optimisers:
                optimiser.step()
            if self.state.step % FORGETS == 0:
                forget_faint(self.optimisers)
            if self.average is not None:
                self.average.update(self.network)
        else:
            # Half-precision convolutions of some CPU libraries return garbage for tiny maps now and then: such a
            # step must not reach the weights, nor the running averages, which would not be numbers ever again. A
            # training that diverged is caught by its loss below.
            self.state.skipped += 1
            for buffer, before in zip(self.network.buffers(), averages, strict=True):
                buffer.copy_(before)
        for optimiser in self.optimisers:
            optimiser.zero_grad(set_to_none=True)
        value = self._over_processes(loss)
        # One such loss is forgiven as one such gradient is; with weights that diverged none is finite any more.
        self._undefined = 0 if math.isfinite(value) else self._undefined + 1
        if self._undefined == _UNDEFINED_LOSSES:
            raise SettingsError(
                "optimiser.lr",
                f"the loss became {value} at step {self.state.step}",
                "Start again with a lower one (optimiser.pade_lr=released helps the paper's variants)",
            )
        self.state.losses.append(value)
        if self.state.step % 10 == 0:
            self.events.scalars({"train/loss": value}, self.state.step)
        self.state.position += 1
        self.state.step += 1
        self.state.seconds = self._clock()
        self._whole = True
        if self.listener is not None and self.fabric.is_global_zero:
            self.listener.step(self.state, value, fraction)

    def _clock(self) -> float:
        """Seconds of training so far, the same on all processes."""
        return self._over_processes(time.monotonic() - self._started)

    def _over_processes(self, value: Tensor | float) -> float:
        """The mean over processes, the same number on each."""
        if self.fabric.world_size == 1:
            return float(value)
        sent = torch.as_tensor(value, dtype=torch.float32, device=self.fabric.device)
        return float(self.fabric.all_reduce(sent, reduce_op="mean"))  # type: ignore[arg-type]

    def _fraction(self) -> float:
        """How much of the training is done, 0 to 1: with a time limit of that or of the steps that are enough, whatever
        ends first; otherwise of the epochs."""
        schedule = self.settings.schedule
        if schedule.minutes is not None:
            return self._done(self.state.seconds, self.state.step)
        return (self.state.epoch + self.state.position / self._steps_per_epoch) / schedule.epochs

    def _done(self, seconds: float, steps: int) -> float:
        return max(seconds / (60 * (self.settings.schedule.minutes or math.inf)), steps / self._enough)

    def _validation_is_due(self) -> bool:
        """With a time limit: ten in all, in a tenth of the time at most."""
        last = self.state.rows[-1] if self.state.rows else {"seconds": 0, "step": 0}
        seconds, step = float(last["seconds"]), int(last["step"])
        rested = self.state.seconds - seconds >= 10 * self.state.validation_seconds
        return rested and self._fraction() >= self._done(seconds, step) + 0.1

    def _set_rates(self, fraction: float) -> None:
        factor = rate_factor(self.settings.schedule, fraction, self.state.step, self.state.epoch)
        for optimiser in self.optimisers:
            for group in optimiser.param_groups:
                group["lr"] = group["initial_lr"] * factor

    # Judging and writing ------------------------------------------------------------------------------------------

    def _watched(self) -> Sequence[CachedCase]:
        """The validation cases judged while training: with a time limit as many as take `_A_VALIDATION` of it.

        So there are five validations at least (`_validation_is_due`). The first case is timed once; the number then
        stays, so that the scores of a training can be compared. They lie spread over all: names often go with sites or
        diseases.
        """
        if self.settings.schedule.minutes is None:
            return self.validation
        if not self.state.watched:
            whole = self.state.seconds / max(self._fraction(), 1e-6)
            started = time.monotonic()
            validate(self.model, self.validation[:1], self.settings, self.fabric)
            taken = self._over_processes(time.monotonic() - started)
            affordable = int(whole * _A_VALIDATION * self.fabric.world_size / max(taken, 1e-3))
            self.state.watched = min(max(affordable, 1), len(self.validation))
        return spread(self.validation, self.state.watched)

    def _validate(self) -> None:
        self._save()  # judging may take long, and be killed
        started = time.monotonic()
        self.state.rows = [row for row in self.state.rows if row["step"] != self.state.step]
        since = self.state.rows[-1]["step"] if self.state.rows else 0
        with self._averaged():
            scores = (
                validate(self.model, self._watched(), self.settings, self.fabric) if self.validation else []
            )
            row = self._row(scores, mean([loss for loss in self.state.losses[since:] if math.isfinite(loss)]))
            # What this step reached already, in a run that ended while it validated, is no reason not to write it.
            again = self.state.best_step == self.state.step
            score = row.get("iou")
            # Of equal ones the later: its rates are lower, its average is longer.
            better = again or score is None or score >= self.state.best
            if better and self.fabric.is_global_zero:
                self.model.metadata["metrics"] = _scores_only(row)
                self.model.save(self.out / "model")
            # Not before the model is written: what a second Ctrl-C ends here is judged again.
            self.state.rows.append(row)
            if better:
                self.state.best_step = self.state.step
                self.state.best = self.state.best if score is None else score
            if self.fabric.is_global_zero:
                self._write_log()
                if self.validation:
                    self.pictures.draw(self.model, self.validation[0], self.state.step)
                self.events.scalars(row, self.state.step)
                if self.listener is not None:
                    self.listener.validated(row)
        self.network.train()
        self.network.requires_grad_(True)
        self.state.validation_seconds = self._over_processes(time.monotonic() - started)
        self.state.seconds = self._clock()

    def _row(self, scores: Sequence[SampledScores], loss: float) -> dict[str, Any]:
        row: dict[str, Any] = {
            "step": self.state.step,
            "epoch": self.state.epoch + self.state.position // self._steps_per_epoch,
            "seconds": round(self.state.seconds, 2),
            "loss": loss,
            "skipped": self.state.skipped,
            "lr": self.optimisers[0].param_groups[0]["lr"],
        }
        found = {
            "iou": mean_of_known([s.mean_iou for s in scores]),
            "dice": mean_of_known([s.mean_dice for s in scores]),
        }
        if len(self.model.label_names) > 1:
            for index, name in enumerate(self.model.label_names.values()):
                found[f"dice {name}"] = mean_of_known([s.dice[index] for s in scores])
        return row | {key: value for key, value in found.items() if math.isfinite(value)}

    @contextmanager
    def _averaged(self) -> Iterator[None]:
        """The averaged weights in the network, for judging and saving."""
        self.network.eval()
        if self.average is None:
            yield
            return
        self._whole = False
        kept = {k: v.detach().clone() for k, v in self.network.state_dict().items()}
        try:
            self.network.load_state_dict(self.average.values)
            for optimiser in self.optimisers:
                if isinstance(optimiser, Muon):
                    optimiser.restore_norms()
            yield
        finally:
            self.network.load_state_dict(kept)
            self._whole = True

    def _save(self) -> None:
        started = time.monotonic()
        if self.fabric.is_global_zero:
            self._write_state()
        ended = time.monotonic()
        # Not before ten times as long as it took, on a slow disk: the time is for training.
        self._next_save = ended + max(self.settings.runtime.checkpoint_seconds, 10 * (ended - started))

    def _write_state(self) -> None:
        plain = asdict(self.state)
        plain["losses"] = torch.tensor(self.state.losses, dtype=torch.float64)
        save_state(
            {
                "settings": self.settings.model_dump(mode="json"),
                "data": self._learnt_from(),
                "state": plain,
                "network": self.network.state_dict(),
                "optimisers": [o.state_dict() for o in self.optimisers],
                "average": self.average.state() if self.average else None,
                "torch_rng": torch.get_rng_state(),
            },
            self.out / STATE,
        )
        self._write_log()

    def _learnt_from(self) -> dict[str, Any]:
        """What the network takes and answers, which follows from the data set."""
        return {
            "structures": [f"{k} {name}" for k, name in self.model.label_names.items()],
            "channels": list(self.model.channel_names),
            "preparation": json.loads(self.model.preparation.model_dump_json()),
        }

    def _restore(self, tree: dict[str, Any]) -> None:
        now = self._learnt_from()
        # States of earlier versions do not say.
        for key, value in tree.get("data", now).items():
            if not _alike(value, now[key]):
                raise SettingsError(
                    self.out,
                    f"the data set has changed: {key} {_shown(value)} when the run was started, now {_shown(now[key])}",
                    "Resume with the data as they were, or start another run",
                )
        plain = tree["state"]
        plain["losses"] = plain["losses"].tolist()
        self.state = State(**plain)
        self.network.load_state_dict(tree["network"])
        for optimiser, state in zip(self.optimisers, tree["optimisers"], strict=True):
            optimiser.load_state_dict(state)
        if self.average is not None and tree["average"] is not None:
            self.average.restore(tree["average"])
        torch.set_rng_state(tree["torch_rng"])

    def _write_log(self) -> None:
        """`log.csv` and `losses.csv`, whole: after a resume they hold what the state holds."""
        keys = list(dict.fromkeys(key for row in self.state.rows for key in row))
        table = io.StringIO(newline="")
        writer = csv.DictWriter(table, keys, restval="", lineterminator="\n")
        writer.writeheader()
        writer.writerows(self.state.rows)
        write_text(self.out / "log.csv", table.getvalue())
        steps = "".join(f"{i},{loss!r}\n" for i, loss in enumerate(self.state.losses, 1))
        write_text(self.out / "losses.csv", f"step,loss\n{steps}")

    def _finish_last(self) -> None:
        self._save()
        with self._averaged():
            if self.fabric.is_global_zero:
                row = self.state.rows[-1]
                self.model.metadata["metrics"] = _scores_only(row)
                self.model.save(self.out / "last")


def _alike(one: Any, other: Any) -> bool:
    """Whether plain values are the same; numbers but for what another machine adds up otherwise."""
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(_alike(one[key], other[key]) for key in one)
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(map(_alike, one, other))
    if isinstance(one, int | float) and isinstance(other, int | float):
        return math.isclose(one, other, rel_tol=1e-4, abs_tol=1e-6)
    return bool(one == other)


def _shown(value: Any) -> str:
    return ", ".join(value) if isinstance(value, list) else json.dumps(value)


def _scores_only(row: dict[str, Any]) -> dict[str, Any]:
    kept = {k: v for k, v in row.items() if k not in ("loss", "lr", "seconds", "skipped")}
    return {"validation, sampled locations": kept}
