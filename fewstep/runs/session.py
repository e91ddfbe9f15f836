"""Everything a run does around training: logging, sampling, checkpoints, rollback.

A `Session` is called after every step, on every rank; rank 0 alone writes files.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from fewstep.config import encode
from fewstep.diffusion.generator import Generator
from fewstep.diffusion.pixels import NotFinite
from fewstep.distillation.method import Product
from fewstep.runs.averages import Averages
from fewstep.runs.monitor import Monitor, made_so_far
from fewstep.runs.run import Run
from fewstep.runs.run_folder import RunFolder
from fewstep.runs.teacher import adapted_of, base_weights
from fewstep.storage import checkpoint
from fewstep.storage.model_folder import save_model
from fewstep.training import distributed
from fewstep.training.loop import Diverged, Record, State

COMPARED = 100
"""Steps between two checks that all processes hold the same numbers."""
ROLLBACKS = 3
"""Returns to earlier checkpoints after which a run counts as diverged."""


@dataclass
class Session:
    """One execution of a run: `begin`, `after` each step, then `finish` or `stop`."""

    run: Run
    folder: RunFolder
    teacher: Generator | None
    state: State
    watch: Monitor
    writer: checkpoint.Writer

    def begin(self) -> None:
        """Start from the present state: step 0, or that of a checkpoint."""
        run, state = self.run, self.state
        self.averages = Averages(
            run.power, self.folder.averages, state, run.method.output, self.folder.origin
        )
        seen = self.watch.begin(state)
        if run.best.metric and not state.step:  # a metric that is not there is refused at once
            distributed.on_rank_zero(lambda: [] if seen is None else run.best.judged(seen, [], 0))
        self.saved = state.step
        self.ended = run.best.over(state.memory)

    def after(self, record: Record) -> list[str]:
        """Do what follows a step: check, log, sample, compare, save; returns notes for the user.

        `ended` then says whether this was the last step. Raises ValueError where the folder was
        moved or removed; where it was moved, the step is saved at its new place first.
        """
        run, due = self.run, (self.run.save_every, self.run.sample_every, self.watch.every)
        written = record.step == run.steps or any(record.step % every == 0 for every in due)
        moved = self._moved() if written else ""
        notes = self._after(record)
        if moved:
            self.stop()
        return notes

    def _after(self, record: Record) -> list[str]:
        run, state, notes = self.run, self.state, []
        last = record.step == run.steps
        regular = record.step % run.save_every == 0 or last
        looks = record.step % run.sample_every == 0 or last
        if regular or record.step % COMPARED == 0:
            checkpoint.require_equal_state(state)
        self.averages.update(state)
        far = run.spikes.found(record.logs, state.memory)
        for net in record.restarted:
            run.spikes.forget(net, state.memory)
        if far:
            notes += self._spiked(far)
            if state.step < record.step:
                return notes
        seen = None
        try:
            self.watch.log(record)
            if looks:
                seen = self.watch.look(state)
        except OSError as error:
            notes.append(f"step {record.step} is not in the log: {error}")
        except NotFinite as error:
            notes.append(f"step {record.step} has no pictures: {error}")
        if looks and run.best.metric:
            notes += self._judge(seen)
        self.ended = last or run.best.over(state.memory)
        if regular or self.ended:
            notes += self.save(regular=True)
        return notes

    def save(self, regular: bool) -> list[str]:
        """Start writing a checkpoint; `regular`: an uninterrupted run would save this step too."""
        sampler = made_so_far(self.run.method, self.state, self.teacher).sampler
        self.averages.save(self.state, regular, self.folder.check, sampler)
        self.saved = self.state.step
        return self.writer.save(self.state, self._spared())

    def _moved(self) -> str:
        """The error message if the folder was moved, else "".

        Raises ValueError where it was removed, or where its run.json is of another run.
        """

        def where() -> str | None:
            self.folder.check()
            return self.folder.elsewhere()

        now = distributed.on_rank_zero(where)
        return "" if now is None else self.folder.gone(now)

    def stop(self) -> None:
        """Save what is not saved yet; then raise ValueError if the folder was moved."""
        moved = self._moved()
        checkpoint.require_equal_state(self.state)
        if self.state.step > self.saved:
            self.save(regular=False)
        if moved:
            self.writer.finish()
            raise ValueError(moved)
        self.writer.finish()

    def _spared(self) -> Callable[[int], bool]:
        """A predicate on step numbers: whether that checkpoint is kept when newer ones exist."""
        every, spikes, memory = self.run.keep_every, self.run.spikes, self.state.memory
        kept, alarm = {*memory.get("kept", ())}, spikes.alarm(memory)
        if spikes.rollback:
            kept.add(self._regular(self.state.step))
        return lambda step: alarm or step in kept or (every > 0 and step % every == 0)

    def _regular(self, step: int) -> int:
        """The last step up to `step` at which an uninterrupted run has a checkpoint."""
        return step // self.run.save_every * self.run.save_every

    def _judge(self, seen: dict[str, Any] | None) -> list[str]:
        """Store the model if it scored best so far; returns notes for the user."""
        run, memory, step = self.run, self.state.memory, self.state.step
        before = memory.get("best", [])

        def judged() -> list[float]:
            return before if seen is None else run.best.judged(seen, before, step)

        after = distributed.on_rank_zero(judged)
        better = bool(after) and after[1] == step
        if better and (failed := self._store(self.folder.best, {run.best.metric: after[0]})):
            return [f"the best model so far could not be written: {failed[1]}"]
        memory["best"] = after
        if run.best.over(memory):
            reached = f"{run.best.metric} was {before[0]:.4g} at step {before[1]:.0f}"
            return [f"{reached} and not better in {run.best.patience} looks since: ending"]
        return []

    def finish(self) -> None:
        """Wait for the last checkpoint, then write the finished model."""
        if self._moved():
            self.stop()
        self.writer.finish()
        if failed := self._store(self.folder.student, {}):
            raise OSError(*failed)

    def _store(self, target: Path, told: dict[str, float]) -> list[Any]:
        """Write what the run would ship now as a finished model, with `told` added to its card.

        Returns, on every rank, the arguments of the OSError that occurred, or an empty list.
        """
        product = made_so_far(self.run.method, self.state, self.teacher)
        state = product.net.state_dict()
        weights = {name: distributed.full_tensor(t) for name, t in state.items()}

        def attempt() -> list[Any]:
            try:
                self._write(target, product, weights, told)
            except OSError as error:
                return [error.errno, error.strerror or str(error), error.filename]
            return []

        return distributed.on_rank_zero(attempt)

    def _write(
        self, target: Path, product: Product, weights: dict[str, Tensor], told: dict[str, float]
    ) -> None:
        run, state, adapters = self.run, self.state, dict[str, Tensor]()
        card: dict[str, Any] = {"method": repr(run.method), "images": state.images}
        card |= {"steps": state.step, "seed": run.seed, **told}
        if self.teacher is not None and self.teacher.card:  # its origin, and its licence
            card["teacher"] = dict(self.teacher.card)
        adapted = run.lora is not None and product.net is state.average
        if adapted and run.lora is not None and self.teacher is not None:
            adapters, base = weights, self.teacher.denoiser.state_dict()
            init = self.folder.facts()["init"]
            if init or run.frozen == "bf16":  # those that were read, not what they are held as
                base = base_weights(run.lora, adapted_of(self.folder))
            card |= {"adapts": init} if init else {}
            base = run.model.carried(base, run.result)
            weights, card = run.lora.merged(base, adapters), {**card, "lora": encode(run.lora)}
        origin = (self.folder.origin, self.folder.check)
        save_model(target, weights, run.result, product.sampler, card, adapters, *origin)

    def _spiked(self, names: list[str]) -> list[str]:
        """Keep the checkpoint before a spike, and go back to it if the run says so; notes."""
        run, state = self.run, self.state
        began = state.step - run.spikes.steps
        spike = f"{' and '.join(names)} left the usual range at step {began + 1}"
        if not (step := self._regular(began)):
            return [f"{spike}; no checkpoint is older than that"]
        state.memory["kept"] = sorted({*state.memory.get("kept", []), float(step)})
        if not run.spikes.rollback:
            return [f"{spike}; the checkpoint of step {step} is kept"]
        self._back(step, spike)
        return [f"{spike}; gone back to step {step}, and on with other samples"]

    def _back(self, step: int, told: str) -> None:
        """Return to the state of `step`, except that samples drawn since are not used again.

        It is stored in place of the old checkpoint before newer ones are deleted, so that a run
        that dies in between finds the spike again and does the same. `told` describes the spike.
        Raises `Diverged` after `ROLLBACKS` returns.
        """
        run, state = self.run, self.state
        drawn, kept = state.drawn, state.memory["kept"]
        times = state.memory.get("rollbacks", [0.0])[0] + 1
        if times > ROLLBACKS:
            raise Diverged(
                f"{told}, after {ROLLBACKS} returns to earlier checkpoints; "
                "lower the learning rate"
            )
        self.writer.finish()
        path = checkpoint.checkpoint_path(self.folder.checkpoints, step)
        checkpoint.load_checkpoint(
            path, state, run.method, run.optims(state.nets), self.folder.origin
        )
        state.drawn = drawn
        state.memory |= {"kept": kept, "rollbacks": [times]}
        self.begin()
        self.save(regular=True)
        self.writer.finish()

        def forget() -> None:
            self.folder.check()
            checkpoint.delete_after(self.folder.checkpoints, step)

        distributed.on_rank_zero(forget)
