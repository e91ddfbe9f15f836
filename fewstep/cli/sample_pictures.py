"""The pictures of fewstep sample: of seeds, of prompts, on the way between two, or around one."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from pathlib import Path

from torch import Tensor

from fewstep.cli.pairing import Pairing, numbers, paired, texts_of
from fewstep.cli.progress_bar import Bar, say
from fewstep.cli.sample_files import Asked, is_folder, refuse_place, write_pictures
from fewstep.cli.sample_settings import settings_of
from fewstep.cli.sampling import Sampling
from fewstep.data.autoencoder import are_latents
from fewstep.data.image_grid import class_columns
from fewstep.data.start_picture import read_start
from fewstep.diffusion.around import default_label, variations, walk as walk_between
from fewstep.diffusion.generator import Generator
from fewstep.diffusion.image_to_image import image_to_image, steps_left
from fewstep.report.formatting import count
from fewstep.runs.runner import device_named
from fewstep.runs.teacher import open_model
from fewstep.teachers.diffusers.adapter_base import adapter_of
from fewstep.teachers.diffusers.negative_prompt import with_negative
from fewstep.teachers.diffusers.prompt_lengths import lost

MOST = 1000
"""Pictures of a walk."""
OF_TEXT = 8
"""Pictures of a model of prompts that are made together."""
LATENT_SCALE = 8
"""Pixels along a side of one position of EDM2's latents."""


@dataclass(frozen=True)
class Wish:
    """What is to be made, as the flags of `fewstep sample` say it."""

    seeds: str = "0-63"
    labels: str = ""
    prompts: str = ""
    pairing: Pairing = "turn"
    negative: str = ""
    captions: bool = True
    vae: str = ""
    size: str = ""
    start: Path | None = None
    """A picture to start from."""
    strength: float | None = None
    walk: int | None = None
    vary: float | None = None
    sampling: Sampling = Sampling()
    device: str = "cpu"

    @classmethod
    def asked(cls, flags: argparse.Namespace) -> Wish:
        """Of the flags of the command."""
        names = {field.name for field in fields(cls)} - {"captions", "sampling"}
        given = {name: getattr(flags, name) for name in names}
        return cls(**given, captions=not flags.no_captions, sampling=Sampling.asked(flags))

    def __post_init__(self) -> None:
        if (self.start is None) != (self.strength is None):
            raise ValueError("--from PICTURE and --strength S go together, such as 0.6")
        if self.start is not None and self.sampling.assist is not None:
            raise ValueError("--from and --assist are two things: leave one of them out")
        others = (self.walk is not None, self.vary is not None, self.start is not None)
        if sum(others) > 1:
            raise ValueError("--walk, --vary and --from are different things: leave all but one")
        if self.pairing != "turn" and (not self.prompts or any(others[:2])):
            raise ValueError("--pairing is for --prompts, without --walk and --vary; leave it out")
        if self.negative and self.sampling.guidance == 1:
            raise ValueError(
                "--negative is what guidance leads away from: give --guidance, too, such as 7.5"
            )


def make(model: Path, out: Path, wish: Wish = Wish()) -> None:
    """Sample `model` and write what `fewstep.cli.sample_files` describes to `out`.

    What is no picture is written as floats x, as `fewstep.domains.arrays` reads them. Latents are
    decoded by the model's own autoencoder, or by that in the folder `wish.vae`.
    """
    refuse_place(out)
    index = numbers(wish.seeds, "--seeds")
    if not index:
        raise ValueError("--seeds names no sample")
    opened = open_model(model, device_named(wish.device), wish.vae, wish.size)
    if wish.negative:
        if cut := lost(opened.card, [wish.negative]):
            say(f"of the negative prompt: {cut}")
        opened = with_negative(opened, wish.negative)
    generator = wish.sampling.applied(opened, model)
    if bool(wish.prompts) != (generator.text is not None):
        what = (
            "takes no --prompts" if wish.prompts else "needs --prompts, a text or a file of them"
        )
        raise ValueError(f"{model} {what}")
    steps, own = wish.sampling.steps, opened.sampler.calls
    if steps is not None and opened.card.get("method") and generator.sampler.calls != own:
        say(f"this model is at its best in its own {count(own, 'call')}")
    chosen = numbers(wish.labels, "--labels") or None
    if wish.walk is None and wish.vary is None:
        parts, asked = _samples(generator, model, index, chosen, out, wish)
    elif is_folder(out):
        raise ValueError("--walk and --vary write a .png or an .npz, not a folder")
    else:
        parts, asked = _around(generator, index, chosen, wish)
    write_pictures(out, parts, asked)


def _samples(
    generator: Generator,
    model: Path,
    index: list[int],
    chosen: list[int] | None,
    out: Path,
    wish: Wish,
) -> tuple[Iterator[Tensor], Asked]:
    """A sample of each seed, or of each prompt with each seed."""
    told = generator if wish.strength is None else steps_left(generator, wish.strength)
    x0 = _start(generator, wish.start) if wish.start else None
    columns = None if chosen else class_columns(generator.classes, len(index))
    texts: Sequence[str] = ()
    seeds: Sequence[int] = index
    if generator.text is not None:
        pairs = paired(wish.prompts, index, wish.pairing)
        texts, seeds, columns = pairs.texts, pairs.seeds, pairs.columns
        say(pairs.told)
        if cut := lost(generator.card, texts):
            say(cut)
    if chosen is not None and len(chosen) == 1:
        chosen = chosen * len(seeds)
    settings = {}
    if is_folder(out):
        settings = settings_of(told, model, wish.negative, wish.start, wish.strength)
    labels = chosen or [i % generator.classes for i in seeds if generator.classes]
    asked = Asked(seeds, labels, texts, columns, bool(texts) and wish.captions, settings)
    return _parts(generator, seeds, chosen, texts, x0, wish.strength), asked


def _parts(
    generator: Generator,
    seeds: Sequence[int],
    labels: list[int] | None,
    texts: Sequence[str],
    x0: Tensor | None,
    strength: float | None,
) -> Iterator[Tensor]:
    """The samples on the CPU, some at a time: (B, *) each."""
    if labels is not None and len(labels) != len(seeds):
        raise ValueError(f"got {len(labels)} labels for {len(seeds)} seeds")
    step = OF_TEXT if texts else 1000
    with Bar("making pictures", len(seeds)) as bar:
        for start in range(0, len(seeds), step):
            rows = slice(start, start + step)
            here = None if labels is None else labels[rows]
            words = list(texts[rows]) or None
            if x0 is not None and strength is not None:
                x = image_to_image(generator, x0, seeds[rows], strength, here, words)
            else:
                cond = generator.text(words) if generator.text and words else None
                x = generator.sample(seeds[rows], here, cond=cond)
            bar.update(min(start + step, len(seeds)))
            yield x.cpu()


def _start(generator: Generator, picture: Path) -> Tensor:
    """The picture in a file as the model's own x_0, (1, *); what is done to it is told.

    ValueError where the model makes no pictures.
    """
    net, shape = adapter_of(generator.denoiser), generator.shape
    if net is not None:
        height, width, channels = *net.size, 3
    elif are_latents(shape):  # those that --vae decodes
        height, width, channels = LATENT_SCALE * shape[1], LATENT_SCALE * shape[2], 3
    elif len(shape) == 3 and shape[0] in (1, 3):
        channels, height, width = shape
    else:
        raise ValueError(f"--from is for models of pictures; this one makes samples of {shape}")
    x, notes = read_start(picture, width, height, channels)
    for note in notes:
        say(note)
    return generator.encode(x.to(generator.device))


def _around(
    generator: Generator, index: list[int], chosen: list[int] | None, wish: Wish
) -> tuple[Iterator[Tensor], Asked]:
    """The samples of --walk and --vary; ValueError where seeds, labels or prompts are too many."""
    flag = "--vary" if wish.walk is None else "--walk"
    if len(index) < 2 or (wish.walk is not None and len(index) > 2):
        such = (
            "two or more --seeds, such as 3,100-107" if wish.walk is None else "two --seeds: 3,8"
        )
        raise ValueError(f"{flag} needs {such}; got {len(index)}")
    if chosen is not None and len(chosen) > 1:
        raise ValueError(f"{flag} makes pictures of one label, got {len(chosen)}")
    texts = texts_of(wish.prompts) if wish.prompts else []
    if len(texts) > 1:
        raise ValueError(f"{flag} makes pictures of one prompt; {wish.prompts} has {len(texts)}")
    label, text = chosen[0] if chosen else None, texts[0] if texts else None
    if wish.walk is not None:
        if wish.walk > MOST:
            raise ValueError(f"--walk makes {MOST:,} pictures at most, got {wish.walk:,}")
        x = walk_between(generator, index[0], index[1], wish.walk, label, text)
    else:
        x = variations(generator, index[0], index[1:], wish.vary or 0.0, label, text)
    label = default_label(generator, index[0], label)
    labels = [] if label is None else [label] * len(x)
    return iter([x.cpu()]), Asked(index, labels, [], None, False, {})
