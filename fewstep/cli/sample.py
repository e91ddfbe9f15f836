"""fewstep sample: pictures from a finished model into a file or a folder."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from pathlib import Path

from torch import Tensor

from fewstep.cli.output import result
from fewstep.cli.pairing import PAIRINGS, Pairing, numbers, paired, texts_of
from fewstep.cli.parser import SIZE, VAE_OR_NONE, code_flag, verb_parser
from fewstep.cli.progress_bar import Bar, say
from fewstep.cli.sample_files import Asked, is_folder, refuse_place, write_pictures
from fewstep.cli.sample_settings import settings_of
from fewstep.cli.sampling_flags import Sampling, sampling_flags
from fewstep.data.autoencoder import are_latents
from fewstep.data.image_grid import class_columns
from fewstep.data.start_picture import read_start
from fewstep.diffusion.around import default_label, variations, walk as walk_between
from fewstep.diffusion.generator import Generator
from fewstep.diffusion.image_to_image import image_to_image, steps_left
from fewstep.report.formatting import count
from fewstep.runs.runner import device_named
from fewstep.runs.teacher import open_model
from fewstep.storage.user_code import trust
from fewstep.teachers.diffusers.adapter_base import adapter_of
from fewstep.teachers.diffusers.negative_prompt import with_negative
from fewstep.teachers.diffusers.prompt_lengths import lost

MOST = 1000
"""Pictures of a walk."""
OF_TEXT = 8
"""Pictures of a model of prompts that are made together."""
LATENT_SCALE = 8
"""Pixels along a side of one position of EDM2's latents."""


def run(args: list[str]) -> int:
    """Make pictures with a finished model."""
    parser = verb_parser("sample", "Make pictures with a finished model: a student or a teacher.")
    parser.add_argument(
        "model",
        type=Path,
        help="a run folder, a folder with model.json, a pipeline folder, or a snapshot",
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("samples.png"),
        help="a .png grid, an .npz of arrays, or a new folder: a PNG for each picture, with its "
        "settings in it (default: samples.png)",
    )
    parser.add_argument("--vae", default="", help=VAE_OR_NONE)
    parser.add_argument("--size", default="", metavar="WIDTHxHEIGHT", help=SIZE)
    _what_flags(parser)
    sampling_flags(parser)
    parser.add_argument("--device", default="cpu", help="such as cuda or mps (default: cpu)")
    code_flag(parser)
    flags = parser.parse_args(args)
    trust(flags.code, [flags.model])
    names = {field.name for field in fields(Wish)} - {"captions", "sampling"}
    given = {name: getattr(flags, name) for name in names}
    wish = Wish(**given, captions=not flags.no_captions, sampling=Sampling.asked(flags))
    make(flags.model, flags.out, wish)
    result({"file": str(flags.out)}, str(flags.out))
    return 0


def _what_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags that say what is to be made."""
    parser.add_argument("--seeds", default="0-63", help="such as 0-63 or 3,7,9 (default: 0-63)")
    parser.add_argument("--labels", default="", help="one class number for all, or one a seed")
    parser.add_argument("--prompts", default="", help="a text for all, or a file of them")
    parser.add_argument(
        "--pairing",
        choices=PAIRINGS,
        default="turn",
        help="of prompts and seeds: in turn (the first with the first, ...), or every prompt with "
        "every seed (default: turn)",
    )
    parser.add_argument(
        "--negative",
        default="",
        metavar="TEXT",
        help="with --guidance: a prompt that is led away from",
    )
    parser.add_argument(
        "--no-captions",
        action="store_true",
        help="leave out the prompts and seeds under the pictures of a grid",
    )
    parser.add_argument(
        "--from",
        type=Path,
        dest="start",
        metavar="PICTURE",
        help="start from a picture in place of noise: a PNG, JPEG or WebP (with --strength)",
    )
    parser.add_argument(
        "--strength",
        type=float,
        help="with --from: the share of the steps that are made, such as 0.6; 1 keeps least of "
        "the picture",
    )
    parser.add_argument(
        "--walk",
        type=int,
        metavar="N",
        help="N pictures on the way from the first of two --seeds to the second",
    )
    parser.add_argument(
        "--vary",
        type=float,
        metavar="SHARE",
        help="variations of the first of --seeds: a share of noise, such as 0.4 of 1, is added by "
        "each of the others and taken away again",
    )


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
    if opened.card.get("method") and generator.sampler.calls != opened.sampler.calls:
        say(f"this student is at its best in its own {count(opened.sampler.calls, 'call')}")
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
