"""fewstep sample: pictures from a finished model into one file."""

from __future__ import annotations

import io
import re
from pathlib import Path
from typing import NamedTuple

import numpy as np
from torch import Tensor

from fewstep.cli.parser import SIZE, VAE_OR_NONE, code_flag, verb_parser
from fewstep.cli.progress_bar import say
from fewstep.cli.sampling_flags import Sampling, sampling_flags
from fewstep.data.image_grid import class_columns, grid, png
from fewstep.data.prompts import read_prompts
from fewstep.diffusion.around import default_label, variations, walk as walk_between
from fewstep.diffusion.generator import Generator
from fewstep.diffusion.pixels import to_uint8
from fewstep.report.formatting import count
from fewstep.runs.runner import device_named
from fewstep.runs.teacher import open_model
from fewstep.storage.files import write
from fewstep.storage.user_code import trust
from fewstep.teachers.diffusers.prompt_lengths import lost

MOST = 1000
"""Pictures of a walk."""


def run(args: list[str]) -> int:
    """Make pictures with a finished model."""
    parser = verb_parser("sample", "Make pictures with a finished model: a student or a teacher.")
    parser.add_argument(
        "model",
        type=Path,
        help="a run folder, a folder with model.json, a pipeline folder, or a snapshot",
    )
    parser.add_argument("--seeds", default="0-63", help="such as 0-63 or 3,7,9 (default: 0-63)")
    parser.add_argument("--labels", default="", help="one class number for all, or one a seed")
    parser.add_argument(
        "--prompts", default="", help="a text for all, or a file of them to take in turn"
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("samples.png"),
        help="a .png grid or an .npz of arrays (default: samples.png)",
    )
    parser.add_argument("--vae", default="", help=VAE_OR_NONE)
    parser.add_argument("--size", default="", metavar="WIDTHxHEIGHT", help=SIZE)
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
    sampling_flags(parser)
    parser.add_argument("--device", default="cpu", help="such as cuda or mps (default: cpu)")
    code_flag(parser)
    flags = parser.parse_args(args)
    trust(flags.code, [flags.model])
    given = (flags.vae, flags.prompts, Sampling.asked(flags), flags.device, flags.size)
    make(flags.model, flags.seeds, flags.labels, flags.out, *given, flags.walk, flags.vary)
    print(flags.out)
    return 0


def numbers(text: str, what: str) -> list[int]:
    """ "0-3,7" -> [0, 1, 2, 3, 7]."""
    out: list[int] = []
    for part in filter(None, text.split(",")):
        match = re.fullmatch(r"\s*(\d+)(?:-(\d+))?\s*", part)
        if not match or (match[2] and int(match[2]) < int(match[1])):
            raise ValueError(f"{what} are written like 0-63 or 3,7,9, got {text!r}")
        first, last = int(match[1]), int(match[2] or match[1])
        if last >= 2**63:
            raise ValueError(f"{what} end at 2^63 - 1, got {last}")
        if len(out) + last - first >= 1_000_000:
            raise ValueError(f"{what}: more than a million numbers in {text!r}")
        out += range(first, last + 1)
    return out


def _texts(prompts: str) -> list[str]:
    named = Path(prompts).suffix in (".txt", ".jsonl", ".csv", ".parquet")
    return read_prompts(prompts) if named else [prompts]


def spoken(prompts: str, count: int) -> list[str]:
    """One prompt for each of `count` samples: of a file of them in turn, or the text itself."""
    texts = _texts(prompts)
    return [texts[i % len(texts)] for i in range(count)]


def paired(prompts: str, texts: list[str], index: list[int]) -> str:
    """Which prompt goes with which seed, and which prompts are left out, as a sentence."""
    few = 3
    pairs = [f"seed {seed}: {text[:40]!r}" for seed, text in zip(index, texts, strict=True)]
    more = ", ..." if len(pairs) > few else ""
    sentence = f"prompts and seeds are paired in order ({', '.join(pairs[:few])}{more})"
    total = len(_texts(prompts))
    if total > len(index):
        left = total - len(index)
        sentence += f"; the last {left:,} of {total:,} prompts have no seed and get no picture"
    elif 1 < total < len(index):
        sentence += f"; the {total:,} prompts are taken in turn for {len(index):,} seeds"
    return sentence


def make(
    model: Path,
    seeds: str,
    labels: str,
    out: Path,
    vae: str = "",
    prompts: str = "",
    sampling: Sampling = Sampling(),
    device: str = "cpu",
    size: str = "",
    walk: int | None = None,
    vary: float | None = None,
) -> None:
    """Sample `model` and write a grid (.png) or arrays (.npz: images uint8, seeds, labels).

    What is no picture is written as floats x, as `fewstep.domains.arrays` reads them.

    Latents are decoded by the model's own autoencoder, or by that in the folder `vae`. `prompts`:
    a text, or a file of them, for a model of text to image; `size`: of its pictures, such as
    "1024x768". `walk`, `vary`: as the flags say.
    """
    if out.suffix not in (".png", ".npz"):
        raise ValueError(f"--out must end in .png or .npz, got {out}")
    if not out.parent.is_dir():
        raise ValueError(f"there is no folder {out.parent} to write {out.name} to")
    index = numbers(seeds, "--seeds")
    if not index:
        raise ValueError("--seeds names no sample")
    opened = open_model(model, device_named(device), vae, size)
    generator = sampling.applied(opened, model)
    if bool(prompts) != (generator.text is not None):
        what = "takes no --prompts" if prompts else "needs --prompts, a text or a file of them"
        raise ValueError(f"{model} {what}")
    if opened.card.get("method") and generator.sampler.calls != opened.sampler.calls:
        say(f"this student is at its best in its own {count(opened.sampler.calls, 'call')}")
    chosen = numbers(labels, "--labels") or None
    if walk is None and vary is None:
        made = _samples(generator, index, chosen, prompts)
    else:
        made = _around(generator, index, chosen, prompts, walk, vary)
    if out.suffix == ".png":
        write(out, png(grid(made.x, made.columns)))
        return
    pictures = made.x.ndim == 4 and made.x.shape[1] in (1, 3)
    arrays = {
        **({"images": to_uint8(made.x).numpy()} if pictures else {"x": made.x.numpy()}),
        "seeds": np.array(index),
    }
    if generator.classes:
        arrays["labels"] = np.array(made.labels)
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **arrays)  # type: ignore[arg-type]
    write(out, buffer.getvalue())


class Made(NamedTuple):
    """Samples (N, *), the label of each where there are classes, and columns of their grid."""

    x: Tensor
    labels: list[int]
    columns: int | None


def _samples(
    generator: Generator, index: list[int], chosen: list[int] | None, prompts: str
) -> Made:
    """A sample of each seed."""
    cond = None
    if generator.text is not None:
        texts = spoken(prompts, len(index))
        say(paired(prompts, texts, index))
        if cut := lost(generator.card, texts):
            say(cut)
        cond = generator.text(texts)
    if chosen is not None and len(chosen) == 1:
        chosen = chosen * len(index)
    x = generator.sample(index, chosen, batch=1000 if cond is None else 8, cond=cond).cpu()
    columns = None if chosen else class_columns(generator.classes, len(index))
    labels = chosen or [i % generator.classes for i in index if generator.classes]
    return Made(x, labels, columns)


def _around(
    generator: Generator,
    index: list[int],
    chosen: list[int] | None,
    prompts: str,
    steps: int | None,
    share: float | None,
) -> Made:
    """The samples of --walk and --vary; ValueError where the seeds, or a label, are too many."""
    if steps is not None and share is not None:
        raise ValueError("--walk and --vary are two things: leave one of them out")
    flag = "--vary" if steps is None else "--walk"
    if len(index) < 2 or (steps is not None and len(index) > 2):
        such = "two or more --seeds, such as 3,100-107" if steps is None else "two --seeds: 3,8"
        raise ValueError(f"{flag} needs {such}; got {len(index)}")
    if chosen is not None and len(chosen) > 1:
        raise ValueError(f"{flag} makes pictures of one label, got {len(chosen)}")
    label = chosen[0] if chosen else None
    text = _texts(prompts)[0] if prompts else None
    if steps is not None:
        if steps > MOST:
            raise ValueError(f"--walk makes {MOST:,} pictures at most, got {steps:,}")
        x = walk_between(generator, index[0], index[1], steps, label, text)
    else:
        x = variations(generator, index[0], index[1:], share or 0.0, label, text)
    label = default_label(generator, index[0], label)
    return Made(x.cpu(), [] if label is None else [label] * len(x), None)
