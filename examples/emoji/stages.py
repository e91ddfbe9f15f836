"""The stages of the work, each of which leaves a file or a folder, and is skipped where it is.

    words/   text_encoder/   vae/   judge.safetensors   latents.safetensors
    teacher/                      a run of fewstep, continued where it stopped
    pipe/   prompts.txt           the teacher, as stock diffusers knows it
    one/   four/                  the students' runs, continued likewise
    one-pipe/   four-pipe/        what is exported of them

The networks before the teacher train for minutes, and start again if they are stopped.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL
from safetensors.torch import save
from torch import Tensor
from transformers import CLIPTextModel, CLIPTokenizer

from examples.emoji import contrast, teacher, vae, words
from examples.emoji.data import Emoji, views
from examples.emoji.measure import Judge, judge
from examples.emoji.sizes import Sizes
from fewstep import cli
from fewstep.cli.recipe_run import perform
from fewstep.runs.command_line import command_line
from fewstep.storage.files import write


@dataclass(frozen=True)
class Student:
    """What is asked of `fewstep distill t2i`."""

    title: str
    sampler: str
    guidance: str
    matching: str
    lr: float


STUDENTS = {
    "one": Student("one step", "FewStep(625)", "Unguided()", "uniform", 3e-4),
    "four": Student("four steps", "FewStep(999, 4, unit=True)", "Unguided()", "final", 2e-4),
}
"""Name -> settings, found by a few short trials."""


@dataclass(frozen=True)
class Work:
    """What all stages share."""

    out: Path
    emoji: Emoji
    sizes: Sizes

    @cached_property
    def words(self) -> Any:
        """The tokenizer, learnt first if need be."""
        where = self.out / "words"
        if not where.is_dir():
            sizes = self.sizes
            made = words.tokenizer(self.emoji.texts, sizes.vocabulary, sizes.tokens)
            finish(made, where)
        return CLIPTokenizer.from_pretrained(where)

    @cached_property
    def encoder(self) -> Any:
        """The pipeline's text encoder, trained first if need be."""
        where = self.out / "text_encoder"
        if not where.is_dir():
            torch.manual_seed(2)
            sizes, emoji = self.sizes, self.emoji
            encoder = words.text_encoder(self.words, sizes.width)
            pair = contrast.Pair(contrast.ClipText(encoder), sizes.width, channels=24)
            ids = dict(zip(emoji.texts, words.numbers(self.words, emoji.texts), strict=True))
            for step, loss in contrast.fit(pair, emoji, ids, sizes.contrast_steps, seed=2):
                print(f"text encoder: step {step}, loss {loss:.3f}", flush=True)
            finish(encoder, where)
        return CLIPTextModel.from_pretrained(where).eval()

    @cached_property
    def vae(self) -> Any:
        """The autoencoder, trained first if need be."""
        where = self.out / "vae"
        if not where.is_dir():
            x, sizes = self.emoji.pictures, self.sizes
            for step, made in vae.fit(x, sizes.vae_channels, sizes.vae_steps):
                print(f"autoencoder: step {step}, {vae.psnr(made, x):.1f} dB", flush=True)
            finish(made, where)
        return AutoencoderKL.from_pretrained(where).eval()

    @cached_property
    def judge(self) -> Judge:
        """The judge, trained first if need be."""
        return judge(self.out / "judge.safetensors", self.emoji, self.words, self.sizes)

    @property
    def prompts(self) -> Path:
        """All texts, one a line: the names, then the words."""
        where = self.out / "prompts.txt"
        if not where.is_file():
            write(where, "\n".join(self.emoji.texts) + "\n")
        return where


def finish(part: Any, where: Path) -> None:
    """Save a part of the pipeline; `where` holds all of it or is not there."""
    partial = where.with_name(f".{where.name}.partial")
    part.save_pretrained(partial)
    partial.replace(where)


def latents(work: Work) -> dict[str, Tensor]:
    """What the teacher learns from (see `teacher.Latents`), latents scaled to unit size."""
    emoji, texts = work.emoji, work.emoji.texts
    seen = views(emoji.pictures, work.sizes.views)
    x0 = torch.stack([vae.encoded(work.vae, x) for x in seen], 1) * work.vae.config.scaling_factor
    encoder = work.encoder
    with torch.no_grad():
        prompts = encoder(words.numbers(work.words, [*texts, ""])).last_hidden_state
    place = {text: i for i, text in enumerate(texts)}
    called = [[place[t] for t in [n, *w]] for n, w in zip(emoji.names, emoji.words, strict=True)]
    most = max(map(len, called))
    rows = [[*some, *[-1] * (most - len(some))] for some in called]
    return {"x0": x0.contiguous(), "prompts": prompts, "called": torch.tensor(rows)}


def teach(work: Work) -> None:
    """The teacher's pipeline folder, from nothing."""
    if (work.out / "pipe").is_dir():
        return
    file = work.out / "latents.safetensors"
    if not file.is_file():
        write(file, save(latents(work)))
    trained = work.out / "teacher"
    again = "the same command"
    if code := perform(teacher.run(work.sizes, file), trained, "emoji_teacher", "", again):
        sys.exit(code)
    finish(teacher.assemble(trained, work.vae, work.encoder, work.words), work.out / "pipe")


def distil(work: Work, name: str) -> None:
    """A student, and its pipeline folder; by the commands that anybody would type."""
    run, sizes, student = work.out / name, work.sizes, STUDENTS[name]
    steps = {"one": sizes.one_steps, "four": sizes.four_steps}[name]
    if (work.out / f"{name}-pipe").is_dir():
        return
    fewstep(
        *("distill", "t2i", "--teacher", str(work.out / "pipe"), "--out", str(run)),
        *("--domain", f"Prompts('{work.prompts}')", "--method.sampler", student.sampler),
        *("--method.guidance", student.guidance, "--method.matching", student.matching),
        *("--steps", str(steps), "--batch", str(sizes.batch), "--accumulate", "1"),
        *("--optim", f"Optim({student.lr}, (0.0, 0.99), warmup=20, decay='linear')"),
        *("--ema.halflife", str(20 * sizes.batch), "--sample-every", "100", "--save-every", "50"),
    )
    fewstep("export", str(run), str(work.out / f"{name}-pipe"))


def fewstep(*args: str) -> None:
    """A command of fewstep, shown and done; ends the program where it fails or is stopped."""
    print(f"fewstep {command_line(args)}", flush=True)
    try:
        cli.main(list(args))
    except SystemExit as end:
        if end.code:
            raise
