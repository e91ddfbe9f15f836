"""Text to image: distil a diffusers pipeline from prompts alone.

The network, its noise path and its conditions are the teacher's; a run needs a pipeline folder
and a file of prompts. `t2i` is for models on betas (Stable Diffusion, SDXL, PixArt), `t2i_flow`
for flows (SD3, SANA, FLUX). The published runs are in `fewstep.recipes.published_t2i`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor

from fewstep.core import Source, rows_of
from fewstep.data.embeddings import Conditioned, Embeddings, key
from fewstep.data.prompts import read_prompts
from fewstep.ema import EMA
from fewstep.eval.clip import weights_of
from fewstep.eval.judge import Judge
from fewstep.fake_score import FakeScore
from fewstep.files import digest, unchanged
from fewstep.generator import Generator
from fewstep.guidance import LSG
from fewstep.losses.weight import Power
from fewstep.methods.sid import SiD
from fewstep.model import Model, OfTeacher
from fewstep.optim import Optim
from fewstep.path import Flow, NoisePath
from fewstep.pipelines.lengths import lost
from fewstep.pipelines.load import root
from fewstep.pipelines.net import Diffusers
from fewstep.preflight import preflight
from fewstep.preparation import remark
from fewstep.recipes.run import Domain, Run
from fewstep.run_folder import locked
from fewstep.sample import FewStep
from fewstep.times import LogitNormal, Whole

EXAMINED = 4
"""Prompts whose samples the teacher is examined on."""


@dataclass(frozen=True, kw_only=True)
class Prompted(Domain):
    """What domains with prompts have in common: how looks at a run are judged."""

    clip: str = ""
    """A CLIP (folder, or my_file.py:Name) that tells at each look how well pictures fit their
    prompts: quick.clip in gauges.jsonl, which --best.metric can follow."""
    judged: int = 64
    """Pictures that it is asked about, of the first prompts in turn."""

    def __post_init__(self) -> None:
        if self.judged < 1:
            raise ValueError(f"{type(self).__name__}.judged must be at least 1, got {self.judged}")

    check: bool = True
    """Whether the teacher is examined first (see fewstep.preflight)."""

    def refuse(self, data_free: bool) -> None:
        """A ValueError where the domain has not what a method needs."""

    def doubts(self, teacher: Generator) -> str:
        """Why a run would refuse the teacher, on samples of its own for a few prompts, or ""."""
        if not self.check or teacher.text is None:
            return ""
        prompts = self.shown(EXAMINED)
        cond = teacher.text([prompts[i % len(prompts)] for i in range(EXAMINED)])
        teacher.release()
        try:
            preflight(
                teacher, rows_of(cond, torch.arange(EXAMINED), teacher.device), None, EXAMINED
            )
        except ValueError as error:
            return str(error)
        return ""

    def settled(self) -> Domain:
        """Refuses a folder without a CLIP in it, before anything is loaded."""
        self._judging()
        return self

    def _judging(self) -> Path | None:
        """The file that says how looks are judged: weights, or code; a ValueError if none does."""
        file, _, name = self.clip.rpartition(":")
        if file.endswith(".py"):
            if not Path(file).is_file():
                raise ValueError(f"there is no file {file} with {name} in it")
            return Path(file)
        return weights_of(Path(self.clip)) if self.clip else None

    def digests(self) -> dict[str, str]:
        """That of the CLIP, which can end a run."""
        file = self._judging()
        return {} if file is None else {"clip": digest(file)}

    def judge(self) -> Judge | None:
        if not self.clip:
            return None
        texts = self.shown(self.judged)
        return Judge(self.clip, [texts[i % len(texts)] for i in range(self.judged)])


@dataclass(frozen=True)
class Prompts(Prompted):
    """Prompts from a file, and no pictures."""

    example: ClassVar[str] = "Prompts('prompts.txt')"
    places: ClassVar[tuple[str, ...]] = ("file", "cache", "clip")
    file: str = "prompts.txt"
    """.txt, .jsonl, .csv or .parquet (see fewstep.data.prompts)."""
    cache: str = ""
    """Folder of their embeddings; by default beside the file, FILE.embeddings."""
    sha256: str = ""
    """Digest of the file, recorded by the run; another file of that name is refused."""

    def settled(self) -> Domain:
        """With the digest of the file as it is now."""
        if not Path(self.file).is_file():
            raise ValueError(
                f"there is no file {self.file} of prompts; name one with --prompts FILE"
            )
        super().settled()
        return replace(self, sha256=unchanged(self.file, self.sha256, digest(Path(self.file))))

    def refuse(self, data_free: bool) -> None:
        if not data_free:
            raise ValueError(
                "a file of prompts has no pictures; choose a method without data, or say "
                "--domain \"Captions('FOLDER')\""
            )

    def shown(self, count: int) -> list[str]:
        return read_prompts(self.file)[:count]

    def source(self, model: Model, data_free: bool) -> Source:
        raise ValueError("prompts need a teacher that understands them; pass its pipeline folder")

    def source_for(self, teacher: Generator | None, model: Model, data_free: bool) -> Source:
        """Noise and prompts; encodes what is not in the cache, and examines the teacher."""
        self.refuse(data_free)
        if teacher is None or teacher.text is None:
            return self.source(model, data_free)
        home = Path(self.cache or f"{self.file}.embeddings")
        source = conditioned(read_prompts(self.file), home, teacher, model.shape)
        teacher.release()  # the encoders' memory
        if self.check:
            examine_on(teacher, source)
        return source


def conditioned(
    prompts: Sequence[str], cache: Path, teacher: Generator, shape: tuple[int, ...]
) -> Conditioned:
    """Noise of `shape` and these prompts; encodes those that are not in the folder `cache`."""
    assert teacher.text is not None
    remark(lost(teacher.card, prompts))
    home = cache / str(root(teacher.card)["text"])[:16]
    with locked(home, wait=True):
        table = Embeddings(home)
        for _ in table.fill(prompts, teacher.text):
            pass
    return Conditioned(shape, table, [key(prompt) for prompt in prompts])


def examine_on(teacher: Generator, source: Conditioned, x: Tensor | None = None) -> None:
    """The pre-flight check on latents x of the first prompts, or on samples of the teacher."""
    index = torch.arange(EXAMINED)
    cond = rows_of(source.condition(index), index, teacher.device)
    preflight(teacher, cond, x, count=EXAMINED)


def suit(run: Run, recipe: str, others: Mapping[str, Callable[[], Run]]) -> None:
    """Refuse a run on prompts whose few steps start outside the times of its teacher's noise.

    Whole timesteps of betas and the times 0 to 1 of a flow are numbers of another kind: 625 is no
    time of a flow, and at t = 1 of 1000 a picture is hardly noisy. others: recipes by name, of
    which those that do suit are named in the ValueError.
    """
    if not isinstance(run.model.net, Diffusers) or _starts_noisy(run, run.model.path):
        return
    fit = [
        name
        for name, make in others.items()
        if isinstance((other := make()).domain, Prompted) and _starts_noisy(other, run.model.path)
    ]
    kind = "a flow" if isinstance(run.model.path, Flow) else "a model on betas"
    fit.sort(key=len)
    times = f"{run.model.path.t_min:g} to {run.model.path.t_max:g}"
    remedy = "start where there is more noise than signal"
    if recipe not in fit:
        remedy = f"recipes for {kind} are {', '.join(fit)}"
    raise ValueError(
        f"{recipe} does not suit this teacher, which is {kind}: {run.method.sampler} does not fit "
        f"the times {times}, since it does not start from noise there; {remedy}"
    )


def _starts_noisy(run: Run, path: NoisePath) -> bool:
    """Whether a run's few-step sampler starts where there is more noise than signal."""
    sampler = run.method.sampler
    if not isinstance(sampler, FewStep):
        return True
    try:
        t = torch.tensor(sampler.ladder(path)[0], dtype=torch.float64)
    except ValueError:
        return False
    return float(path.sigma(t)) >= float(path.alpha(t))


SAME = Model(OfTeacher(), ())
"""The teacher's network."""


def t2i() -> Run:
    """Distil a text-to-image model on betas to one step with SiD-LSG, from prompts alone.

    The published setting of https://arxiv.org/abs/2406.01561 for Stable Diffusion: t_init 625,
    t uniform on 20 .. 979, both losses in eps-space, Adam at 1e-6. A flow is refused; its recipe
    is t2i_flow.
    """
    times = Whole(20, 979)
    return Run(
        method=SiD(
            sampler=FewStep(625.0),
            alpha=1.0,
            times=times,
            fake=FakeScore(times, Power(2, -2)),
            guidance=LSG(1.5),
        ),
        model=SAME,
        domain=Prompts(),
        steps=20_000,
        batch=512,
        accumulate=512,
        optim=Optim(lr=1e-6, betas=(0.0, 0.999)),
        ema=EMA(halflife=50_000),
        draw_every=500,
        save_every=500,
    )


def t2i_flow() -> Run:
    """Distil a text-to-image flow (SD3, SANA, FLUX) to four steps with SiD, from prompts alone.

    The published setting of https://arxiv.org/abs/2509.25127: t log-normal in its odds around 2,
    the student's loss weighted by 1 - t, the fake score's by 1/t^2 (plain velocities).
    """
    times = LogitNormal(math.log(2), 1.6)
    return Run(
        method=SiD(
            sampler=FewStep(1.0, 4),
            alpha=1.0,
            times=times,
            weight=Power(1, 0),
            fake=FakeScore(times, Power(0, -2)),
            guidance=LSG(4.5),
        ),
        model=SAME,
        domain=Prompts(),
        steps=20_000,
        batch=256,
        accumulate=256,
        optim=Optim(lr=5e-6, betas=(0.0, 0.999)),
        ema=EMA(halflife=0.0),
        draw_every=500,
        save_every=500,
    )
