"""Power-function averages beside a run: kept, stored with each checkpoint, combined afterwards.

    averages/step-00000500/   sigma-0.05.safetensors   sigma-0.1.safetensors   manifest.json

`Averages` belongs to the caller of the training loop and reads its state after every step. A run
that was stopped between two checkpoints stores a step that an undisturbed run does not have; it
serves to continue and is not used for reconstruction, so that both give the same bits.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from fewstep.config import decode, encode
from fewstep.diffusion.model import Model
from fewstep.diffusion.types import Sampler
from fewstep.distillation.method import Method
from fewstep.nets.lora import LoRA
from fewstep.runs.run_folder import RunFolder
from fewstep.runs.teacher import adapted_of, base_weights
from fewstep.storage.checkpoint import find_checkpoints
from fewstep.storage.files import (
    Damaged,
    nothing,
    of_run,
    origin_of,
    pack,
    read_folder,
    read_manifest,
    require_vacant,
    unpack,
    write_folder,
)
from fewstep.storage.model_folder import load_weights, save_model
from fewstep.storage.user_code import decoded
from fewstep.training.distributed import local_tensor, on_rank_zero, rank
from fewstep.training.loop import State
from fewstep.training.power_ema import PowerEMA, beta, combination, gamma_of, update

KIND = "fewstep averages"
GOOD = 0.05
"""The distance of profiles, relative to the wanted one, up to which nothing need be said."""
MANY = 256
"""Steps with averages beyond which no more are advised."""


class Averages:
    """The averages that `config` names of the net `output` of a training state.

    All ranks make one and call it; rank 0 alone holds networks.
    """

    def __init__(
        self,
        config: PowerEMA,
        folder: Path,
        state: State,
        output: str,
        origin: Mapping[str, Any] = {},
    ) -> None:
        """At step 0 the averages are the net; at a later one those that `folder` has of it.

        Raises `Damaged` (a ValueError) where they are missing or altered, and a ValueError where
        another run than `origin` wrote them.
        """
        self.folder, self.output, self.images = folder, output, state.images
        self.origin = dict(origin)
        if config.sigma_rel and any(
            local_tensor(p) is not p for p in state.nets[output].parameters()
        ):
            raise ValueError("power averages need whole networks: leave out --shard, or --power")
        self.nets: dict[float, nn.Module] = {
            sigma: deepcopy(state.nets[output]).requires_grad_(False).eval()
            for sigma in (config.sigma_rel if rank() == 0 else ())
        }
        if config.sigma_rel and state.step:
            on_rank_zero(lambda: self._load(folder / f"step-{state.step:08d}"))

    def _load(self, path: Path) -> None:
        of_run(path, read_folder(path), self.origin)
        for sigma, net in self.nets.items():
            load_weights(net, unpack(path / _file(sigma)), path)

    def update(self, state: State) -> None:
        """Update the averages after a step; a step that took no samples changes nothing."""
        step, self.images = state.images - self.images, state.images
        for sigma, average in self.nets.items():
            if step:
                update(average, state.nets[self.output], beta(gamma_of(sigma), self.images, step))

    def save(
        self,
        state: State,
        regular: bool,
        check: Callable[[], None] = nothing,
        sampler: Sampler | None = None,
    ) -> None:
        """Store the averages of this step; `regular` ones serve reconstruction and are kept.

        To be called before the checkpoint of the same step is written, which cannot continue
        without them. Of the others two are kept, as of checkpoints. check: as of `write_folder`;
        sampler: of what the run would ship now.
        """
        if not self.nets:
            return
        files = {_file(sigma): pack(net.state_dict()) for sigma, net in self.nets.items()}
        facts = {"kind": KIND, "step": state.step, "images": state.images, "regular": regular}
        facts["sigma_rel"], facts["origin"] = list(self.nets), self.origin
        facts["sampler"] = None if sampler is None else encode(sampler)
        write_folder(self.folder / f"step-{state.step:08d}", files, facts, check)
        check()
        for path in find_checkpoints(self.folder)[:-2]:
            with suppress(Damaged):  # which is told when it is read
                if not read_manifest(path)["regular"]:
                    shutil.rmtree(path)


def even(lengths: Sequence[float], steps: int, sigma_rel: float) -> float:
    """The mismatch of the average `sigma_rel` when `lengths` are stored at `steps` even steps."""
    gammas = [gamma_of(length) for length in lengths for _ in range(steps)]
    times = [float(step + 1) for step in range(steps)] * len(lengths)
    return combination(gammas, times, gamma_of(sigma_rel), float(steps))[1]


def _file(sigma: float) -> str:
    return f"sigma-{sigma}.safetensors"


@dataclass(frozen=True, eq=False)
class Reconstruction:
    """Weights of an average that was not stored, fitted from those that were."""

    weights: dict[str, Tensor]
    facts: dict[str, Any]
    """sigma_rel, images, and `mismatch`, the distance of its profile from the wanted one."""
    lengths: tuple[float, ...]
    """sigma_rel of the averages that it was made of."""
    steps: int
    """How many steps there were averages of."""
    sampler: Any = None
    """How the last of them is sampled, as stored; None: by an older fewstep, without it."""

    @property
    def sentence(self) -> str:
        """How closely the averaging profile is met, with advice where worse than `GOOD`."""
        sigma, mismatch = float(self.facts["sigma_rel"]), float(self.facts["mismatch"])
        said = f"the profile is met to {100 * mismatch:.2g} %"
        if mismatch <= GOOD:
            return said
        kept = " ".join(f"{length:g}" for length in sorted({*self.lengths, sigma}))
        more, expected = self.steps, mismatch
        while expected > GOOD and more < MANY:
            more *= 2
            expected = even(self.lengths, more, sigma)
        return (
            f"{said} only, from {self.steps} steps with averages of "
            f"{', '.join(f'{length:g}' for length in self.lengths)}: train with a smaller "
            f"--save-every ({more} steps meet it to {100 * expected:.2g} %), or keep this length "
            f"itself (--power.sigma-rel {kept})"
        )


def reconstruct(folder: Path, sigma_rel: float, origin: Mapping[str, Any] = {}) -> Reconstruction:
    """The power-function average of length `sigma_rel` at the last step stored in `folder`.

    The stored averages are combined by the least-squares fit of their profiles to the wanted one,
    Karras et al. 2024, https://arxiv.org/abs/2312.02696, section 3.

    Arguments:
        folder: the averages of a run, `RunFolder.averages`.
        sigma_rel: width of the profile relative to training time, such as 0.1.
        origin: the run that must have written them; {}: any.
    Returns the weights, with the mismatch of their profile.
    Raises ValueError where no averages are stored or another run wrote one, `Damaged` where a file
    is not sound.
    """
    gamma = gamma_of(sigma_rel)
    stored: dict[tuple[float, int], Path] = {}
    sampler: Any = None
    for path in find_checkpoints(folder):
        facts = read_folder(path)
        of_run(path, facts, origin)
        if facts.get("kind") != KIND:
            raise Damaged(f"{path} holds no averages")
        if facts["regular"] and facts["images"]:
            # Steps that took in no picture have the averages of the one before.
            stored |= {(s, facts["images"]): path / _file(s) for s in facts["sigma_rel"]}
            sampler = facts.get("sampler")
    if not stored:
        raise ValueError(
            f"{folder.parent} has stored no averages; train with --power.sigma-rel 0.05 0.1"
        )
    images = [time for _, time in stored]
    end = max(images)
    factors, mismatch = combination([gamma_of(s) for s, _ in stored], images, gamma, end)
    total: dict[str, Tensor] = {}
    last: dict[str, Tensor] = {}
    for path, factor in zip(stored.values(), factors.tolist(), strict=True):
        last = unpack(path)
        for name, tensor in last.items():
            if tensor.is_floating_point():
                total[name] = total.get(name, 0) + factor * tensor.double()
    weights = {name: total[name].to(t.dtype) if name in total else t for name, t in last.items()}
    fit = {"sigma_rel": sigma_rel, "images": end, "mismatch": mismatch}
    lengths = tuple(sorted({sigma for sigma, _ in stored}))
    return Reconstruction(weights, fit, lengths, len(set(images)), sampler)


def write_average(run: Path, sigma_rel: float, out: Path) -> str:
    """Write the model of a run with another average of its weights as the folder `out`.

    Arguments:
        run: the run folder; the run must have stored averages (`Run.power`).
        sigma_rel: length of the average, see `reconstruct`.
        out: the model folder to write, new or empty.
    Returns a sentence on how closely the profile is met (`Reconstruction.sentence`).
    Raises ValueError where `out` is in use or the run has no usable averages.
    """
    require_vacant(out)
    folder = RunFolder(run)
    facts = folder.facts()
    method: Method = decoded(facts["run"].get("method"), Method, run)
    trained: Model = decoded(facts["run"].get("model"), Model, run)
    model = method.result(trained)
    made = reconstruct(folder.averages, sigma_rel, origin_of(facts))
    card = {"method": facts["recipe"], "average": made.facts, "seed": facts["run"].get("seed")}
    weights, adapters = made.weights, {}
    if stored := facts["run"].get("lora"):
        lora: LoRA = decode(stored, LoRA)
        adapters, base = weights, base_weights(lora, adapted_of(folder))
        weights = lora.merged(trained.carried(base, model), adapters)
        card |= {"lora": stored}
    sampler: Sampler = (
        method.sampler if made.sampler is None else decoded(made.sampler, Sampler, run)
    )
    save_model(out, weights, model, sampler, card, adapters)
    return made.sentence
