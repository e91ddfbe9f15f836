"""Execute a `Run` in a folder: prepare, train, evaluate, save, continue, finish.

`execute` is a generator like `train` beneath it: the caller shows progress in its own loop. Run
the same command again to continue an interrupted run; the same folder never mixes two runs.
"""

from __future__ import annotations

from collections.abc import Generator as Steps, Iterator, Mapping
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fewstep.config import encode, own_files, own_sources
from fewstep.diffusion.generator import Generator
from fewstep.diffusion.model import Model
from fewstep.diffusion.noise_path import VP, NoisePath
from fewstep.diffusion.samplers import ladder_of
from fewstep.diffusion.types import Denoiser, Source, device_of
from fewstep.diffusion.without_values import without_values
from fewstep.distillation.method import Method
from fewstep.distillation.pairs import PairSource
from fewstep.nets.activation_checkpointing import has_blocks, recompute
from fewstep.runs.environment import environment
from fewstep.runs.monitor import Monitor, made_so_far
from fewstep.runs.run import Run
from fewstep.runs.run_folder import FORMAT, MODELS, RunFolder
from fewstep.runs.session import Session
from fewstep.runs.teacher import digests, load_finite, load_teacher, notes_on, resolve_run
from fewstep.runs.teacher_pairs import stored_pairs
from fewstep.storage import checkpoint
from fewstep.storage.files import origin_of
from fewstep.storage.folder_lock import locked
from fewstep.storage.user_code import keep
from fewstep.training import distributed
from fewstep.training.compiled import compile_calls
from fewstep.training.convolutions import prepare_convolutions
from fewstep.training.loop import Record, State, require_divisible, train
from fewstep.training.offload import OffloadedModule
from fewstep.training.precision import product_layers, store_in_bf16
from fewstep.training.sharding import copies, shard


class Progress:
    """Base of what `execute` yields: a `Note` in words, or a `Step` for each training step."""


@dataclass(frozen=True)
class Note(Progress):
    """A sentence for the user, such as from which step a run continues."""

    text: str


@dataclass(frozen=True)
class Step(Progress):
    """One finished training step: its number of `steps`, samples so far, and logged values."""

    step: int
    steps: int
    images: int
    logs: dict[str, float]


@dataclass(frozen=True, eq=False)
class PreparedRun:
    """A run with everything it needs loaded: teacher, network and batches."""

    run: Run
    teacher: Generator | None
    net: nn.Module
    """What training starts from: the teacher's network, or a fresh one."""
    source: Source
    parts: int = 1
    """How many processes share a copy of every net; 0: all of them."""
    fake: nn.Module | None = None
    """What the fake score starts as, where that is neither the teacher nor `net`."""

    def __post_init__(self) -> None:
        copies(self.parts)
        optims = (self.run.optim, self.run.fake_optim or self.run.optim)
        if self.sharded and any(optim.offload for optim in optims):
            raise ValueError(
                "the moments of nets in parts stay where these are; leave out --shard, or "
                "Optim.offload"
            )
        if self.sharded and any(optim.bits == 8 for optim in optims):
            raise ValueError(
                "moments of 8 bits are of whole weights, not of parts; leave out --shard, or "
                "Optim.bits"
            )
        if self.sharded and self.run.compile:
            raise ValueError(
                "nets in parts are put together as they are called, which --compile has not been "
                "made for; leave out --shard, or --compile"
            )

    @property
    def denoiser(self) -> Denoiser | None:
        """The teacher's denoiser, or None."""
        return None if self.teacher is None else self.teacher.denoiser

    def init(self) -> State:
        """The training state at step 0, made of copies of the starting network; call it once.

        Stores frozen weights in bf16, shards networks and compiles their calls where the run asks
        for it. Raises ValueError where the method makes a result that `run.result` does not
        describe, and where a network cannot be compiled.
        """
        described = self._described()
        state = State.init(self.run.method, self.denoiser, self.net, self.fake)
        product = made_so_far(self.run.method, state, self.teacher)
        if product.net is not state.average:
            self._refuse_of_trained()
        refuse_other(self.run.method, described, anatomy(product.net))
        if self.run.frozen == "bf16" and self.run.lora is None and self.teacher is not None:
            store_in_bf16(self.teacher.denoiser)
        if self.sharded:
            whole = self.run.lora is not None  # adapters need all of the teacher
            every = (*state.nets.values(), state.average, None if whole else self.denoiser)
            for net in every:
                if isinstance(net, nn.Module):
                    shard(net, self.parts, self.run.offload and id(net) == id(self.denoiser))
        if self.run.compile:  # not the average, which is a copy that no step calls
            for net in (*state.nets.values(), self.denoiser):
                if isinstance(net, nn.Module) and hasattr(net, "path"):
                    compile_calls(net)
        return state

    def rehearsal(self) -> PreparedRun:
        """The same with zeros for the teacher's samples, for a look at what steps cost."""
        pairs = self.run.method.needs_pairs()
        if pairs is None:
            return self
        zeros = torch.zeros(1, *self.run.model.shape, device=device_of(self.net))
        return replace(self, source=PairSource(self.source, pairs, zeros))

    def _described(self) -> dict[str, str]:
        """`anatomy` of the network that the run says it makes."""
        run = self.run
        if run.result == run.model:
            return anatomy(self.net)
        with without_values():
            net = run.result.build()
        return anatomy(net if run.lora is None else run.lora.adapt(net))

    def _refuse_of_trained(self) -> None:
        """Raise ValueError where the run asks for what is done to a network that is trained."""
        run = self.run
        asked = {"lora": run.lora, "power": run.power.sigma_rel, "frozen": run.frozen == "bf16"}
        for flag in (flag for flag, value in asked.items() if value):
            name = type(run.method).__name__
            raise ValueError(f"{name} trains no network that it ships: leave out --{flag}")

    @property
    def sharded(self) -> bool:
        """Whether each process holds only a shard of every network."""
        return self.parts != 1 and distributed.world_size() > 1

    def records(self, state: State) -> Iterator[Record]:
        """Train from `state` on: the record of each step.

        With `run.offload` the teacher is moved back to main memory after each step.
        """
        run, teacher = self.run, self.denoiser
        records = train(
            run.method,
            self.denoiser,
            self.net,
            self.source,
            batch=run.batch,
            steps=run.steps,
            optim=run.optims(state.nets),
            accumulate=run.accumulate,
            ema=run.ema,
            seed=run.seed,
            patience=run.patience,
            precision=run.precision,
            state=state,
        )
        if run.offload and not self.sharded and isinstance(teacher, nn.Module):
            return _offloaded(records, OffloadedModule(teacher, device_of(state.average)))
        return records


def _offloaded(records: Iterator[Record], teacher: OffloadedModule) -> Iterator[Record]:
    """The records; after each of them, whoever looked may have called the teacher."""
    for record in records:
        yield record
        teacher.rest()


def anatomy(net: nn.Module) -> dict[str, str]:
    """What a network consists of, by name: classes of modules, shapes of tensors, noise path."""
    modules = {name or "it": type(module).__name__ for name, module in net.named_modules()}
    modules |= {name: f"of shape {tuple(t.shape)}" for name, t in net.state_dict().items()}
    return {**modules, "its path": f"{getattr(net, 'path', 'none')}"}


def refuse_other(method: Method, described: dict[str, str], made: dict[str, str]) -> None:
    """Raise ValueError unless `method` makes the network that its run describes.

    The result is stored under that description, so no other network could be read again.

    Arguments:
        method: the method, whose `init` made the network.
        described: `anatomy` of the network that the run describes.
        made: `anatomy` of the network that training produces.
    """
    names = [n for n in {**described, **made} if described.get(n) != made.get(n)]
    if not names:
        return
    shown = [
        f"{name} is {made.get(name, 'missing')}, described as {described.get(name, 'not there')}"
        for name in names[:3]
    ]
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    raise ValueError(
        f"{type(method).__name__}.init makes a {method.output!r} that is not the network of the "
        f"run ({'; '.join(shown)}{more}), so that it could not be read when it is finished; start "
        "from `net`, or describe the other network in the method's `result`, or by --model"
    )


def starting_point(run: Run, init: str) -> nn.Module:
    """The network in `init`, which must be what `run.model` or `run.result` describes."""
    generator = load_finite(init, model=run.model)
    if generator.model not in (run.model, run.result):
        raise ValueError(f"{init} holds {generator.model}, but the run's network is {run.model}")
    net: nn.Module = generator.denoiser
    return net


def refuse_unlike(model: Model, teacher: Model, where: str) -> None:
    """Raise ValueError unless a student `model` can learn from a network `teacher` at all.

    It may be another network, but has samples of the same shape on the same noise path, and the
    same classes.
    """
    for name in ("shape", "path", "classes"):
        mine, its = getattr(model, name), getattr(teacher, name)
        if mine != its:
            raise ValueError(
                f"the student's {name} is {mine}, but its teacher in {where} has {its}; a student "
                f"may have another network (--model.net ...), with the same {name}"
            )


def with_adapters(run: Run, teacher: Generator | None, init: str) -> nn.Module:
    """The teacher's network, or that in `init`, with the LoRA adapters of `run.lora`."""
    assert run.lora is not None
    if init:
        net = starting_point(run, init)
        if run.frozen == "bf16":
            store_in_bf16(net)
        return run.lora.adapt(net, run.seed)
    if teacher is None or teacher.model is None:
        raise ValueError("LoRA adapts a network, and this teacher is none; leave it out")
    if teacher.model != run.model:
        raise ValueError(
            f"LoRA adapts the teacher's network, {teacher.model.net}, and the run's is another, "
            f"{run.model.net}; leave out --lora, or --model"
        )
    if run.frozen == "bf16":
        store_in_bf16(teacher.denoiser)
    return run.lora.adapt(teacher.denoiser, run.seed)


def device_named(device: str) -> torch.device:
    """The device called "cpu", "cuda", "cuda:1" or "mps"; ValueError if it is not there."""
    try:
        torch_device = torch.device(device)
        torch.zeros(1, device=torch_device).item()  # "meta" has no numbers
    except (RuntimeError, AssertionError, NotImplementedError, ImportError):
        raise ValueError(
            f"this machine has no device {device!r}; leave --device out for the CPU"
        ) from None
    return torch_device


def prepare(
    run: Run, recipe: str, teacher: str, device: str = "cpu", init: str = "", fake_init: str = ""
) -> PreparedRun:
    """Load the teacher, the network and the data of a run that `resolve_run` has completed.

    Arguments:
        run: the resolved run.
        recipe: its name, for error messages.
        teacher: folder or snapshot of the teacher; "" where the domain has an exact one or none is
            distilled.
        device: where networks are placed.
        init: folder or snapshot whose weights training starts from; "": the teacher's, or new
            ones.
        fake_init: folder or snapshot whose weights the fake score starts from; "": the teacher's.
    Raises ValueError where something is missing or does not fit.
    """
    where = device_named(device)
    require_divisible(run.batch, run.accumulate)
    model = load_teacher(run.domain, teacher, where, run.model) if run.distils else None
    if run.distils and model is None:
        raise ValueError(
            f"{recipe} needs a teacher: train one first (see 'fewstep recipes'), then pass its "
            "run folder with --teacher"
        )
    if model is not None and model.model is not None:
        refuse_unlike(run.model, model.model, teacher)
    if model is not None and run.frozen == "bf16":
        product_layers(model.denoiser)
    if model is not None:
        model.denoiser.to(where)
        prepare_convolutions(model.denoiser, where, run.precision)  # adapters share its weights
        _refuse_path(run.method, model.denoiser.path)
        try:
            ladder_of(run.method.sampler, model.denoiser.path)
        except ValueError as error:
            raise ValueError(f"{recipe} does not suit this teacher: {error}") from None
    source = run.domain.source_for(model, run.model, data_free=not run.method.needs_data)
    if run.lora is not None:
        net = with_adapters(run, model, init)
    elif init:
        net = starting_point(run, init)
    elif model is not None and model.model == run.model:
        net = model.denoiser
    else:
        with where if where.type == "meta" else nullcontext():
            net = run.model.build(run.seed)
    fake = _fake_start(run, model, fake_init)
    if run.recompute:  # the copies of it that are trained do so too
        recompute(net)
        if fake is not None:
            recompute(fake)
        if model is not None and has_blocks(model.denoiser):
            recompute(model.denoiser)
    fake = None if fake is None else fake.to(where)
    for started in (net.to(where), fake):
        if started is not None:
            prepare_convolutions(started, where, run.precision)
    return PreparedRun(run, model, net, source, fake=fake)


def _refuse_path(method: Method, path: NoisePath) -> None:
    """Raise ValueError where timesteps, 0 to 999, are nothing the method's times could mean."""
    if method.paths and isinstance(path, VP) and not isinstance(path, method.paths):
        kinds = " or ".join(kind.__name__ for kind in method.paths)
        raise ValueError(
            f"{type(method).__name__} is for teachers on the noise path {kinds}, and this one's "
            f"is {type(path).__name__}: choose another --method"
        )


def _fake_start(run: Run, teacher: Generator | None, fake_init: str) -> nn.Module | None:
    """What the fake score starts as, if that is named."""
    if not fake_init:
        return None
    if run.lora is not None:
        return with_adapters(run, teacher, fake_init)
    return starting_point(run, fake_init)


def execute(
    run: Run,
    out: Path,
    *,
    recipe: str,
    teacher: str = "",
    command: str = "",
    device: str = "cpu",
    init: str = "",
    fake_init: str = "",
    parts: int = 1,
) -> Steps[Progress, None, None]:
    """Train `run` in the folder `out`, continuing what an earlier call left there.

    Yields a `Note` for what the user should know and a `Step` after each training step. Closing
    the generator saves a checkpoint and stops; a finished run yields one note and nothing else.
    All processes of a distributed run call it alike; rank 0 writes.

    Arguments:
        run: the complete description; what it takes from its teacher and its files is filled in.
        out: the run folder, new, empty, or of the same run (see `RunFolder`).
        recipe: the recipe's name, recorded in run.json.
        teacher: folder, snapshot or pipeline of the teacher; "" for none, or the domain's exact
            one.
        command: the command line that continues the run, recorded for people.
        device: "cpu", "cuda", "cuda:1" or "mps".
        init: folder or snapshot whose weights training starts from; "": the teacher's, or new
            ones.
        fake_init: folder or snapshot whose weights the fake score starts from; "": the teacher's.
        parts: number of processes that share a copy of every network; 1: each holds its own, 0:
            all processes share one.
    Raises ValueError where the run, the teacher or the folder is not usable, OSError where the
    folder cannot be written, and `Diverged` where updates stay non-finite.
    """
    for optim in (run.optim, run.fake_optim or run.optim):
        optim.refuse_missing()
    asked, run = run.steps, resolve_run(run, teacher, init)
    models = {"teacher": teacher, "init": init, "fake_init": fake_init}
    facts: dict[str, Any] = {
        "format": FORMAT,
        "recipe": recipe,
        "run": encode(run),
        "distils": run.distils,
        **{key: str(Path(path).resolve()) if path else "" for key, path in models.items()},
        "files": own_files(run),
        "command": command,
        "environment": environment(),
    }
    places, folder = type(run.domain).places, RunFolder(out)
    facts["digests"] = distributed.on_rank_zero(lambda: _digests(run, models, folder, facts))
    if not facts["run"]["domain"].get("sha256"):
        places = ()
    with ExitStack() as held:

        def claim() -> tuple[dict[str, Any], bool, list[str]]:
            nonlocal folder
            folder = RunFolder(out, held.enter_context(locked(out)))
            stored, continues, notes = folder.open(facts, places)
            keep(out, own_sources(run).values())
            return stored, continues, [*notes, *folder.changes(facts["environment"])]

        if distributed.on_rank_zero(lambda: folder.continues(facts, places) and folder.complete()):
            if distributed.on_rank_zero(lambda: folder.moved(facts)):
                yield from map(Note, distributed.on_rank_zero(claim)[2])
                yield from map(Note, distributed.on_rank_zero(lambda: folder.remember(facts)))
            yield Note(f"{out} is finished already")
            return
        if run.steps < asked:
            yield Note(f"{type(run.method).__name__} is finished after step {run.steps}")
        yield from map(Note, notes_on(teacher))
        work = replace(prepare(run, recipe, teacher, device, init, fake_init), parts=parts)
        yield from _notes_on_start(work, init)
        stored, continues, notes = distributed.on_rank_zero(claim)
        yield from map(Note, notes)
        folder = replace(folder, origin=origin_of(stored))
        work = replace(work, source=_with_pairs(work, folder))
        state = work.init()
        if continues:
            yield from map(Note, _continue(work, state, folder))
            yield from map(Note, distributed.on_rank_zero(lambda: folder.remember(facts)))
        yield from _train(work, state, folder)


def _notes_on_start(work: PreparedRun, init: str) -> Iterator[Note]:
    """A note where a student has neither its teacher's network nor weights to start from."""
    model = None if work.teacher is None else work.teacher.model
    if not init and model not in (None, work.run.model):
        yield Note(
            f"the student's network is {work.run.model.net}, another than its teacher's: it "
            "starts from new weights"
        )


def _with_pairs(work: PreparedRun, folder: RunFolder) -> Source:
    """The source of a run, whose batches carry pairs of the teacher where its method needs them.

    They are made on the way, and kept in the run folder.
    """
    pairs, run = work.run.method.needs_pairs(), work.run
    if pairs is None or work.teacher is None:
        return work.source
    part = run.batch // run.accumulate // distributed.world_size()
    return stored_pairs(pairs, work.teacher, work.source, folder, part)


def _digests(
    run: Run, models: Mapping[str, str], folder: RunFolder, facts: dict[str, Any]
) -> dict[str, Any]:
    """Digests of the files a run depends on; as recorded, if a finished run lost its teacher."""
    try:
        return digests(run, models)
    except ValueError:
        if not folder.finished or all(Path(facts[key]).exists() for key in MODELS if facts[key]):
            raise
        stored = folder.facts()
        if any(stored.get(key) != facts[key] for key in MODELS):
            raise
        return dict(stored.get("digests") or {})


def _train(work: PreparedRun, state: State, folder: RunFolder) -> Iterator[Progress]:
    """Train from `state` to the end on every rank; yields notes and steps."""
    run, folder = work.run, folder.anchored()
    watch = Monitor(run, folder, work.teacher, work.source)
    guards = (folder.origin, folder.check, folder.note_saved)
    with checkpoint.Writer(folder.checkpoints, run.method, *guards) as writer:
        session = Session(run, folder, work.teacher, state, watch, writer)
        session.begin()
        try:
            for record in () if session.ended else work.records(state):
                yield from (Note(folder.readable(text)) for text in session.after(record))
                distributed.heartbeat()
                yield Step(record.step, run.steps, record.images, record.logs)
                if session.ended:
                    break
            session.finish()
        except GeneratorExit:
            session.stop()
            raise
        except OSError as error:
            where = folder.readable(str(error.filename2 or error.filename or ""))
            why = error.strerror or folder.readable(str(error))
            facts = (error.errno, why, where) if where else (error.errno, why)
            raise OSError(*facts) from error


def _continue(work: PreparedRun, state: State, folder: RunFolder) -> list[str]:
    """Load the newest sound checkpoint that rank 0 finds on every rank; returns notes on it.

    Without a checkpoint `state` stays at step 0.
    """
    run = work.run
    same = (state, run.method, run.optims(state.nets), folder.origin)

    def newest() -> tuple[str, list[str]]:
        newest_path, notes = checkpoint.resume_newest(folder.checkpoints, *same)
        if newest_path is None:
            return "", folder.start_anew()
        began = f"continuing from step {state.step} of {run.steps}"
        return str(newest_path), [*notes, began, *folder.again(state.step)]

    path, notes = distributed.on_rank_zero(newest)
    if path and distributed.rank():
        checkpoint.load_checkpoint(Path(path), *same)
    return notes
