"""The stages of the work, each of which leaves a file or a folder, and is skipped where it is.

    vae/   tokenizer/   text_encoder/   prompts.safetensors
    judge.safetensors
    teacher/                      a run of fewstep, continued where it stopped
    pipe/   prompts.txt           the teacher, as stock diffusers knows it
    drawn/                        pictures with captions, for students that learn from data
    four/   one/                  the students' runs, continued likewise, and others
    four-pipe/   one-pipe/        what is exported of them

The networks before the teacher train for minutes, and start again if they are stopped.
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from PIL import Image
from safetensors.torch import load_file, save
from torch import Tensor
from transformers import BertModel, BertTokenizerFast

from examples.scenes import judge, teacher, trained, vae, words
from examples.scenes.captions import everything, split
from examples.scenes.draw import draw
from examples.scenes.judge import Judge
from examples.scenes.sizes import Sizes
from examples.scenes.stream import Stream
from examples.scenes.students import STUDENTS, flags
from fewstep import cli
from fewstep.cli.recipe_run import perform
from fewstep.diffusion.pixels import to_uint8
from fewstep.diffusion.rng import Draws
from fewstep.runs.command_line import command_line
from fewstep.storage.files import write
from fewstep.storage.model_folder import load_student

CHECKED = 1_000_000
"""Number of the first picture that the autoencoder is measured on."""
ASKED = 1000
"""Captions of one object, and of two, that students are trained on."""


@dataclass(frozen=True)
class Work:
    """What all stages share."""

    out: Path
    sizes: Sizes
    taught: bool = False
    """Take autoencoder, teacher and judge from `trained.FILE`."""

    @cached_property
    def stream(self) -> Stream:
        """Captions and their pictures."""
        return Stream(split(self.sizes.captions))

    @cached_property
    def vae(self) -> Any:
        """The autoencoder, trained first if need be."""
        where = self.out / "vae"
        if not where.is_dir() and self.taught:
            finish(trained.taught("vae", vae.build(self.sizes.vae_channels)), where)
        if not where.is_dir():
            x = self.stream.pictures(CHECKED, 500)
            scenes, sizes = self.stream.pictures, self.sizes
            for step, made in vae.fit(scenes, sizes.vae_channels, sizes.vae_steps):
                if step % 500 == 0 or step == sizes.vae_steps:
                    print(f"autoencoder: step {step}, {vae.psnr(made, x):.2f} dB", flush=True)
            finish(made, where)
        return AutoencoderKL.from_pretrained(where).eval()

    @cached_property
    def reader(self) -> tuple[Any, Any]:
        """(tokenizer, text encoder), standardised over a thousand captions."""
        home, where = self.out / "tokenizer", self.out / "text_encoder"
        if not where.is_dir():
            learnt = self.stream.split.learnt
            every = max(1, len(learnt) // 1000)
            tokenizer, encoder = words.minilm([c.text for c in learnt[::every]])
            finish(tokenizer, home)
            finish(encoder, where)
        loaded = BertModel.from_pretrained(where).eval()
        return BertTokenizerFast.from_pretrained(home), loaded

    @cached_property
    def judge(self) -> Judge:
        """The judge, trained first if need be."""
        file = self.out / "judge.safetensors"
        if not file.is_file() and self.taught:
            write(file, save(trained.taught("judge", Judge()).state_dict()))
        if not file.is_file():
            sizes, made, scenes = self.sizes, Judge(), Stream(everything())
            for step, loss, now in judge.fit(scenes, sizes.judge_steps, sizes.judged):
                made = now
                if step % 500 == 0:
                    print(f"judge: step {step}, loss {loss:.3f}", flush=True)
            write(file, save(made.state_dict()))
        found = Judge()
        found.load_state_dict(load_file(file))
        return found.eval()

    @property
    def drawn(self) -> Path:
        """A folder of pictures with captions, for students that learn from data."""
        where = self.out / "drawn"
        if not where.is_dir():
            numbers = Draws.range(0, self.sizes.drawn)
            captions = self.stream.captions(numbers)
            x, _ = draw(self.stream.objects, captions, numbers)
            partial = self.out / ".drawn.partial"
            partial.mkdir(exist_ok=True)
            lines = []
            for i, (caption, picture) in enumerate(
                zip(captions, to_uint8(x).numpy(), strict=True)
            ):
                Image.fromarray(np.ascontiguousarray(picture)).save(partial / f"{i:05d}.png")
                lines.append(json.dumps({"file_name": f"{i:05d}.png", "text": caption.text}))
            write(partial / "metadata.jsonl", "".join(f"{line}\n" for line in lines))
            partial.replace(where)
        return where

    @property
    def prompts(self) -> Path:
        """Learnt captions of the students, one a line, as many of each kind."""
        where = self.out / "prompts.txt"
        if not where.is_file():
            some = self.stream.split.single[:ASKED], self.stream.split.double[:ASKED]
            write(where, "".join(f"{caption.text}\n" for part in some for caption in part))
        return where


def finish(part: Any, where: Path) -> None:
    """Save a part of the pipeline; `where` holds all of it or is not there."""
    partial = where.with_name(f".{where.name}.partial")
    part.save_pretrained(partial)
    partial.replace(where)


def latents(work: Work) -> dict[str, Tensor]:
    """What the teacher learns from: encoded scenes, and the rows of their captions."""
    x0, rows = [], []
    stream = work.stream
    for first in range(0, work.sizes.pictures, 512):
        draws = Draws.range(first, min(512, work.sizes.pictures - first))
        rows.append(stream.rows(draws))
        captions = [stream.split.learnt[row] for row in rows[-1].tolist()]
        x0.append(vae.encoded(work.vae, draw(stream.objects, captions, draws)[0]).half())
    return {"x0": torch.cat(x0).contiguous(), "rows": torch.cat(rows)}


def teach(work: Work) -> None:
    """The teacher's pipeline folder, from nothing."""
    if (work.out / "pipe").is_dir():
        return
    coder, (tokenizer, encoder) = work.vae, work.reader
    if work.taught:
        unet = trained.taught("unet", teacher.network(work.sizes).build(teacher.SHAPE, 0).net)
        finish(teacher.assemble(unet, coder, encoder, tokenizer), work.out / "pipe")
        return
    file = work.out / "prompts.safetensors"
    if not file.is_file():
        texts = [*(caption.text for caption in work.stream.split.learnt), ""]
        print(f"reading {len(texts)} captions", flush=True)
        states = [part.half() for part in words.read(encoder, tokenizer, texts)]
        write(file, save({"prompts": torch.cat(states)}))
    file = work.out / "latents.safetensors"
    if not file.is_file():
        print(f"drawing and encoding {work.sizes.pictures} scenes", flush=True)
        write(file, save(latents(work)))
    folder = work.out / "teacher"
    run = teacher.run(work.sizes, work.out)
    if code := perform(run, folder, "scenes_teacher", "", "the same command"):
        sys.exit(code)
    unet = load_student(folder).denoiser.net.net
    finish(teacher.assemble(unet, coder, encoder, tokenizer), work.out / "pipe")


def keep(work: Work) -> None:
    """Put autoencoder, teacher and judge into `trained.FILE`."""
    unet = UNet2DConditionModel.from_pretrained(work.out / "pipe" / "unet")
    trained.keep({"vae": work.vae, "unet": unet, "judge": work.judge})


def distil(work: Work, name: str) -> None:
    """A student, and its pipeline folder; by the commands that anybody would type."""
    run, student = work.out / name, STUDENTS[name]
    pipe = work.out / f"{name}-pipe"
    if pipe.is_dir():
        return
    if student.after:
        distil(work, student.after)
    data = f"Captions('{work.drawn}')" if student.pictures else f"Prompts('{work.prompts}')"
    fewstep(
        *("distill", "t2i", "--teacher", str(work.out / "pipe"), "--out", str(run)),
        *("--domain", data),
        *(("--init", str(work.out / student.after)) if student.after else ()),
        *flags(student, work.sizes),
    )
    fewstep("export", str(run), str(pipe))


def fewstep(*args: str) -> None:
    """A command of fewstep, shown and done; ends the program where it fails or is stopped."""
    print(f"fewstep {command_line(args)}", flush=True)
    try:
        cli.main(list(args))
    except SystemExit as end:
        if end.code:
            raise
