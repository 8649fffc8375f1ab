"""The steps of a training: rows in, an adapter's checkpoints out. It can be stopped anywhere, and resumed.

    trainer = Trainer(training, trainable, rows, validation, padding, folder, control)
    result = trainer.run()          # from the state in the folder, if there is one

The loop is plain PyTorch over the trainable model. What a step draws (rows, dropout, noise) follows from the seed
and the step's number alone, so a resumed training ends like one that was never stopped. In the folder are

    state.safetensors       parameters and optimizer after some step; replaced now and then
    checkpoints/<step>/     complete adapters
    best/                   the adapter with the least validation loss so far
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from veneer.errors import InvalidRequest
from veneer.training.control import Control, Stopped
from veneer.training.data.batching import batches, packed_batches, steps_per_epoch
from veneer.training.data.batching import pack as pack_rows
from veneer.training.data.collation import Batch, collate, collate_packed, collate_pairs
from veneer.training.data.encoding import Encoded, EncodedPair
from veneer.training.kinds import plus_ratio
from veneer.training.losses import noisy_embeddings, pair_losses, token_losses
from veneer.training.optimizers import make_optimizer, make_schedule
from veneer.training.recipe import Training
from veneer.training.report import Step
from veneer.training.saving import State, read_state, save_adapter, write_state
from veneer.training.trainable import Trainable, parameters

STATE_SECONDS = 20.0  # between two states on disk: what a crash costs
MOST_CHECKPOINTS = 10  # when the recipe does not say how often

Rows = Sequence[Encoded] | Sequence[EncodedPair]


@dataclass(frozen=True)
class Result:
    folder: Path  # the adapter
    step: int  # after which it was taken
    steps: list[Step]
    validations: dict[int, float]  # loss by step
    why: str  # it ended

    @property
    def tokens(self) -> int:
        return self.steps[-1].tokens if self.steps else 0


@dataclass
class _Progress:
    steps: list[Step] = field(default_factory=list)
    validations: dict[int, float] = field(default_factory=dict)
    best_step: int = 0
    without_gain: int = 0  # validations since the best one


def total_steps(training: Training, rows: Rows) -> int:
    """How many optimizer steps the recipe asks for."""
    if training.steps is not None:
        return training.steps
    assert training.epochs is not None  # the recipe has one of them
    return max(1, round(training.epochs * _epoch(training, rows)))


def _epoch(training: Training, rows: Rows) -> int:
    """Steps of one pass over the rows."""
    sequences = len(rows)
    if training.packing:
        sequences = len(pack_rows([row.length for row in rows], training.max_length, training.seed))
    return steps_per_epoch(sequences, training.batch_size * training.accumulation)


class Trainer:
    """One training under way. `run` is called once."""

    def __init__(
        self,
        training: Training,
        trainable: Trainable,
        rows: Rows,
        validation: Rows,
        padding: int,
        folder: Path,
        control: Control,
    ) -> None:
        if training.packing and not trainable.packs:
            raise InvalidRequest(
                f"packing: kind {training.adapter.kind!r} acts on whole prompts, so rows cannot share a sequence; "
                "leave it out",
                param="packing",
            )
        self.training, self.trainable, self.folder, self.control = training, trainable, folder, control
        self.rows, self.validation = rows, validation
        self.total = total_steps(training, rows)
        self._padding = padding
        self._epoch = _epoch(training, rows)
        self._every = training.checkpoint_every or max(self._epoch, -(-self.total // MOST_CHECKPOINTS))
        self._weights = parameters(trainable)
        self._optimizer = make_optimizer(training, self._weights, plus_ratio(training))
        self._schedule = make_schedule(training, self._optimizer, self.total)
        self._progress = _Progress()
        self._tokens, self._seconds = 0, 0.0
        self._device: torch.device = trainable.model.device

    def run(self) -> Result:
        """Train to the end.

        Raises:
            Stopped: `control` asked for it; the state is on disk.
            InvalidRequest: the loss is no number any more.
        """
        self._restore()
        done, why = len(self._progress.steps), "all steps are done"
        saved = time.monotonic()
        with noisy_embeddings(self.trainable.model, self.training.neftune_alpha):
            try:
                for step, micro in self._drawn(done):
                    self._step(step, micro)
                    done = step
                    if self._ends(step):
                        why = f"{self.training.patience} validations in a row were no better"
                        break
                    if step < self.total and time.monotonic() - saved > STATE_SECONDS:
                        self._save_state()
                        saved = time.monotonic()
            except Stopped:
                self._optimizer.zero_grad(set_to_none=True)
                self._save_state()
                raise
        return self._result(done, why)

    # ---- steps ----------------------------------------------------------------------------------

    def _drawn(self, start: int) -> Iterator[tuple[int, list[Batch]]]:
        """Number and micro-batches of each step to come."""
        t = self.training
        size, micro = t.batch_size * t.accumulation, t.batch_size
        if t.packing:
            lengths = [row.length for row in self.rows]
            for packed in packed_batches(lengths, t.max_length, size, t.seed, start):
                packs = [[self.rows[place] for place in pack] for pack in packed.packs]
                yield (
                    packed.step + 1,
                    [self._packed(packs[at : at + micro]) for at in range(0, len(packs), micro)],
                )
                if packed.step + 1 == self.total:
                    return
        for draw in batches(len(self.rows), size, t.seed, start):
            if draw.step == self.total:
                return
            rows = [self.rows[place] for place in draw.rows]
            yield draw.step + 1, [self._batch(rows[at : at + micro]) for at in range(0, len(rows), micro)]

    def _batch(self, rows: Sequence[Any]) -> Batch:
        make: Callable[..., Batch] = collate_pairs if isinstance(rows[0], EncodedPair) else collate
        return make(rows, self._padding)

    def _packed(self, packs: Sequence[Sequence[Any]]) -> Batch:
        return collate_packed(packs, self._padding, mask=None)

    def _step(self, step: int, micro: Sequence[Batch]) -> None:
        begun = time.monotonic()
        total = sum(self._weight(batch) for batch in micro)
        loss = 0.0
        for place, batch in enumerate(micro):
            torch.manual_seed(hash((self.training.seed, step, place)) & ((1 << 63) - 1))  # dropout and noise
            part = self._loss(batch) / total
            loss += float(part.detach())
            penalty = self.trainable.penalty()
            if penalty is not None:
                part = part + penalty / len(micro)
            part.backward()  # type: ignore[no-untyped-call]
        rate = float(self._schedule.get_last_lr()[0])
        if not math.isfinite(loss):
            raise InvalidRequest(
                f"the loss is {loss} at step {step}, so training has failed; lower learning_rate "
                f"({self.training.learning_rate}) or add warmup_steps",
                code="loss_not_finite",
            )
        torch.nn.utils.clip_grad_norm_(self._weights.values(), self.training.max_grad_norm)
        self._optimizer.step()
        self.trainable.stepped(step)
        self._optimizer.zero_grad(set_to_none=True)
        self._schedule.step()
        self._tokens += sum(batch.tokens for batch in micro)
        self._seconds += time.monotonic() - begun
        self._progress.steps.append(Step(step, loss, rate, self._tokens, self._seconds))
        self._after(step)

    def _weight(self, batch: Batch) -> int:
        """What a batch counts in the mean of a step: its learnt tokens, or its pairs."""
        return len(batch.input_ids) // 2 if self.training.method == "dpo" else batch.learnt

    def _loss(self, batch: Batch) -> torch.Tensor:
        """The sum over the batch's learnt tokens, or its pairs."""
        lengths = [int(each) for each in (batch.labels == -100).long().cumprod(1).sum(1)]
        batch = batch.to(self._device)
        self.trainable.begin(lengths)
        with self._precision():
            if self.training.method == "dpo":
                return pair_losses(self.trainable, batch, self.training.dpo_beta)
            return token_losses(self.trainable.model, batch).sum()

    def _precision(self) -> Any:
        """bfloat16 for the adapter's products on a GPU; its weights stay float32."""
        if self._device.type == "cuda":
            return torch.autocast("cuda", torch.bfloat16)
        return nullcontext()

    # ---- between steps --------------------------------------------------------------------------

    def _after(self, step: int) -> None:
        """Report a step; validate and write a checkpoint when it is time."""
        t, last = self.training, self._progress.steps[-1]
        is_checkpoint = step % self._every == 0 or step == self.total
        validates = step % t.evaluate_every == 0 if t.evaluate_every else is_checkpoint
        if self.validation and (validates or step == self.total):
            self._validate(step)
        news = self._measured(step)
        self._report_step(last, news)
        if is_checkpoint:
            folder = self.folder / "checkpoints" / str(step)
            save_adapter(self.trainable, folder, t.save_dtype)
            self.control.report("checkpoint", step=step, folder=str(folder), train_loss=last.loss, **news)

    @torch.no_grad()
    def _validate(self, step: int) -> None:
        """Note the mean loss on the validation rows; keep the best adapter."""
        self.trainable.model.eval()
        size = self.training.batch_size
        found = [self._batch(self.validation[at : at + size]) for at in range(0, len(self.validation), size)]
        loss = sum(float(self._loss(batch)) for batch in found) / sum(self._weight(batch) for batch in found)
        self.trainable.model.train()
        progress = self._progress
        best = min(progress.validations.values(), default=math.inf)
        progress.validations[step] = loss
        progress.without_gain = 0 if loss < best else progress.without_gain + 1
        if loss < best:
            progress.best_step = step
            if self.training.keep_best:
                save_adapter(self.trainable, self.folder / "best", self.training.save_dtype)

    def _ends(self, step: int) -> bool:
        patience = self.training.patience
        return patience is not None and self._progress.without_gain >= patience

    def _result(self, step: int, why: str) -> Result:
        progress = self._progress
        folder = self.folder / "checkpoints" / str(step)
        if self.training.keep_best and progress.validations:
            folder, step = self.folder / "best", progress.best_step
        elif not folder.exists():  # it ended between two checkpoints
            save_adapter(self.trainable, folder, self.training.save_dtype)
        return Result(folder, step, progress.steps, progress.validations, why)

    # ---- state ----------------------------------------------------------------------------------

    def _save_state(self) -> None:
        progress = self._progress
        state = State(
            steps=[list(step) for step in progress.steps],
            validations={str(step): loss for step, loss in progress.validations.items()},
            best_step=progress.best_step,
            without_gain=progress.without_gain,
        )
        tensors = {f"more/{name}": each for name, each in self.trainable.state().items()}
        write_state(self.folder, state, self._weights, self._optimizer, tensors)

    def _restore(self) -> None:
        found = read_state(self.folder, self._weights, self._optimizer)
        if found is None:
            return
        state, tensors = found
        more = {
            name.removeprefix("more/"): each for name, each in tensors.items() if name.startswith("more/")
        }
        self.trainable.load_state({name: each.to(self._device) for name, each in more.items()})
        self._progress = _Progress(
            [
                Step(int(step), loss, rate, int(tokens), seconds)
                for step, loss, rate, tokens, seconds in state.steps
            ],
            {int(step): loss for step, loss in state.validations.items()},
            state.best_step,
            state.without_gain,
        )
        last = self._progress.steps[-1]
        self._tokens, self._seconds = last.tokens, last.seconds
        self._schedule = make_schedule(self.training, self._optimizer, self.total, len(self._progress.steps))
        self.control.report("notice", f"resumed after step {last.step}")
        self._report_again()

    def _report_again(self) -> None:
        """What the state and the checkpoints tell: reports of the run before may not have arrived."""
        for step in self._progress.steps:
            news = self._measured(step.step)
            self._report_step(step, news)
            folder = self.folder / "checkpoints" / str(step.step)
            if folder.is_dir():
                self.control.report(
                    "checkpoint", step=step.step, folder=str(folder), train_loss=step.loss, **news
                )

    def _measured(self, step: int) -> dict[str, Any]:
        loss = self._progress.validations.get(step)
        return {} if loss is None else {"valid_loss": loss}

    def _report_step(self, step: Step, news: dict[str, Any]) -> None:
        self.control.report(
            "progress",
            step=step.step,
            total_steps=self.total,
            train_loss=step.loss,
            learning_rate=step.learning_rate,
            tokens=step.tokens,
            seconds=step.seconds,
            **news,
        )
