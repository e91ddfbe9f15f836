"""Power-function averages beside a run: kept, stored with each checkpoint, combined afterwards.

    averages/step-00000500/   sigma-0.05.safetensors   sigma-0.1.safetensors   manifest.json

`Averages` belongs to the caller of the training loop and reads its state after every step. A run
that was stopped between two checkpoints stores a step that an undisturbed run does not have; it
serves to continue and is not used for reconstruction, so that both give the same bits.
"""

from __future__ import annotations

import shutil
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from fewstep.checkpoint import load_weights
from fewstep.core import Sampler
from fewstep.ema_power import PowerEMA, beta, combination, gamma_of, update
from fewstep.files import Damaged, pack, read_folder, unpack, vacant, write_folder
from fewstep.lora import LoRA
from fewstep.model import Model
from fewstep.own_code import decoded
from fewstep.parallel import first, local, rank
from fewstep.run_folder import RunFolder
from fewstep.spec import decode
from fewstep.student import save_model
from fewstep.teaching import base_weights
from fewstep.training import State

KIND = "fewstep averages"


class Averages:
    """The averages that `config` names of the net `output` of a training state.

    All ranks make one and call it; rank 0 alone holds networks.
    """

    def __init__(self, config: PowerEMA, folder: Path, state: State, output: str) -> None:
        """At step 0 the averages are the net; at a later one those that `folder` has of it.

        Raises `Damaged` (a ValueError) where they are missing or altered.
        """
        self.folder, self.output, self.images = folder, output, state.images
        if config.sigma_rel and any(local(p) is not p for p in state.nets[output].parameters()):
            raise ValueError("power averages need whole networks: leave out --shard, or --power")
        self.nets: dict[float, nn.Module] = {
            sigma: deepcopy(state.nets[output]).requires_grad_(False).eval()
            for sigma in (config.sigma_rel if rank() == 0 else ())
        }
        if config.sigma_rel and state.step:
            first(lambda: self._load(folder / f"step-{state.step:08d}"))

    def _load(self, path: Path) -> None:
        read_folder(path)
        for sigma, net in self.nets.items():
            load_weights(net, unpack(path / _file(sigma)), path)

    def update(self, state: State) -> None:
        """Take the net in as it is after a step; a step that was skipped changes nothing."""
        step, self.images = state.images - self.images, state.images
        for sigma, average in self.nets.items():
            if step:
                update(average, state.nets[self.output], beta(gamma_of(sigma), self.images, step))

    def save(self, state: State, regular: bool) -> None:
        """Store the averages of this step; `regular` ones serve reconstruction and are kept.

        To be called before the checkpoint of the same step is written, which cannot continue
        without them. Of the others two are kept, as of checkpoints.
        """
        if not self.nets:
            return
        files = {_file(sigma): pack(net.state_dict()) for sigma, net in self.nets.items()}
        facts = {"kind": KIND, "step": state.step, "images": state.images, "regular": regular}
        facts["sigma_rel"] = list(self.nets)
        write_folder(self.folder / f"step-{state.step:08d}", files, facts)
        for path in sorted(self.folder.glob("step-*"))[:-2]:
            if not read_folder(path)["regular"]:
                shutil.rmtree(path)


def _file(sigma: float) -> str:
    return f"sigma-{sigma}.safetensors"


@dataclass(frozen=True, eq=False)
class Reconstruction:
    """Weights of an average that was not kept."""

    weights: dict[str, Tensor]
    facts: dict[str, Any]
    """sigma_rel, images, and `mismatch`, the distance of its profile from the wanted one."""


def reconstruct(folder: Path, sigma_rel: float) -> Reconstruction:
    """The average of length `sigma_rel` at the last step that `folder` has averages of.

    Raises ValueError where there are none, and `Damaged` where one is not sound.
    """
    gamma = gamma_of(sigma_rel)
    paths, gammas, times = [], [], []
    for path in sorted(folder.glob("step-*")):
        facts = read_folder(path)
        if facts.get("kind") != KIND:
            raise Damaged(f"{path} holds no averages")
        if facts["regular"] and facts["images"]:
            for sigma in facts["sigma_rel"]:
                paths.append(path / _file(sigma))
                gammas.append(gamma_of(sigma))
                times.append(facts["images"])
    if not paths:
        raise ValueError(
            f"{folder.parent} has stored no averages; train with --power.sigma-rel 0.05 0.1"
        )
    factors, mismatch = combination(gammas, times, gamma, times[-1])
    total: dict[str, Tensor] = {}
    last: dict[str, Tensor] = {}
    for path, factor in zip(paths, factors.tolist(), strict=True):
        last = unpack(path)
        for name, tensor in last.items():
            if tensor.is_floating_point():
                total[name] = total.get(name, 0) + factor * tensor.double()
    weights = {name: total[name].to(t.dtype) if name in total else t for name, t in last.items()}
    found = {"sigma_rel": sigma_rel, "images": times[-1], "mismatch": mismatch}
    return Reconstruction(weights, found)


def write(run: Path, sigma_rel: float, out: Path) -> float:
    """Write the model of a run with another average as the folder `out`; the mismatch."""
    vacant(out)
    folder = RunFolder(run)
    facts = folder.facts()
    model: Model = decoded(facts["run"].get("model"), Model, run)
    method = facts["run"].get("method")
    called = method.get("sampler") if isinstance(method, dict) else {}
    sampler: Sampler = decoded(called, Sampler, run)
    made = reconstruct(folder.averages, sigma_rel)
    card = {"method": facts["recipe"], "average": made.facts, "seed": facts["run"].get("seed")}
    weights, adapters = made.weights, {}
    if stored := facts["run"].get("lora"):
        lora: LoRA = decode(stored, LoRA)
        adapters, base = weights, base_weights(lora, facts["teacher"])
        weights, card = lora.merged(base, adapters), {**card, "lora": stored}
    save_model(out, weights, model, sampler, card, adapters)
    return float(made.facts["mismatch"])
