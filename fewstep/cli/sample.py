"""fewstep sample: pictures from a finished model into one file."""

from __future__ import annotations

import io
import re
from dataclasses import replace
from pathlib import Path

import numpy as np

from fewstep.cli.parser import GUIDANCE, VAE, code_flag, verb_parser
from fewstep.cli.progress_bar import say
from fewstep.data.autoencoder import as_pictures
from fewstep.data.image_grid import grid, png
from fewstep.data.prompts import read_prompts
from fewstep.diffusion.generator import Generator
from fewstep.diffusion.guidance import CFG
from fewstep.diffusion.pixels import to_uint8
from fewstep.runs.runner import device_named
from fewstep.runs.teacher import open_generator
from fewstep.storage.files import write
from fewstep.storage.user_code import trust
from fewstep.teachers.diffusers.load import with_text_and_vae
from fewstep.teachers.diffusers.prompt_lengths import lost


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
    parser.add_argument("--vae", default="", help=VAE)
    parser.add_argument("--guidance", type=float, default=1.0, help=GUIDANCE)
    parser.add_argument("--device", default="cpu", help="such as cuda or mps (default: cpu)")
    code_flag(parser)
    flags = parser.parse_args(args)
    trust(flags.code, [flags.model])
    given = (flags.vae, flags.prompts, flags.guidance, flags.device)
    make(flags.model, flags.seeds, flags.labels, flags.out, *given)
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


def at_scale(generator: Generator, kappa: float) -> Generator:
    """The same generator, sampled with classifier-free guidance; 1: without."""
    if kappa == 1:
        return generator
    if not generator.classes and generator.text is None:
        raise ValueError("--guidance needs prompts or labels, and this model takes none")
    return replace(generator, sampler=CFG(generator.sampler, kappa))


def make(
    model: Path,
    seeds: str,
    labels: str,
    out: Path,
    vae: str = "",
    prompts: str = "",
    guidance: float = 1.0,
    device: str = "cpu",
) -> None:
    """Sample `model` and write a grid (.png) or arrays (.npz: images uint8, seeds, labels).

    Latents are decoded by the model's own autoencoder, or by that in the folder `vae`. `prompts`:
    a text, or a file of them, for a model of text to image.
    """
    if out.suffix not in (".png", ".npz"):
        raise ValueError(f"--out must end in .png or .npz, got {out}")
    if not out.parent.is_dir():
        raise ValueError(f"there is no folder {out.parent} to write {out.name} to")
    index = numbers(seeds, "--seeds")
    if not index:
        raise ValueError("--seeds names no sample")
    generator = at_scale(with_text_and_vae(open_generator(model, device_named(device))), guidance)
    if bool(prompts) != (generator.text is not None):
        what = "takes no --prompts" if prompts else "needs --prompts, a text or a file of them"
        raise ValueError(f"{model} {what}")
    if generator.text is None:
        generator, _ = as_pictures(generator, vae)
    elif vae:
        raise ValueError(f"{model} decodes its latents itself: leave out --vae")
    cond = None
    if generator.text is not None:
        texts = spoken(prompts, len(index))
        say(paired(prompts, texts, index))
        if cut := lost(generator.card, texts):
            say(cut)
        cond = generator.text(texts)
    chosen = numbers(labels, "--labels") or None
    if chosen is not None and len(chosen) == 1:
        chosen = chosen * len(index)
    x = generator.sample(index, chosen, batch=1000 if cond is None else 8, cond=cond).cpu()
    if out.suffix == ".png":
        columns = 10 if generator.classes == 10 and not chosen else None
        write(out, png(grid(x, columns)))
        return
    arrays = {
        "images": to_uint8(x).numpy() if x.ndim == 4 else x.numpy(),
        "seeds": np.array(index),
    }
    if generator.classes:
        arrays["labels"] = np.array(chosen or [i % generator.classes for i in index])
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **arrays)  # type: ignore[arg-type]
    write(out, buffer.getvalue())
