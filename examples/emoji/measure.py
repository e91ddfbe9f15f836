"""How pictures are judged: by an encoder that the pipeline has never met.

    alignment         share of pictures of a name whose own name is among the five nearest names
    alignment_words   share of pictures of a shared word whose nearest real picture has that word
    fd                Frechet distance of the features of named pictures to those of real ones
    diversity         mean distance between the features of two pictures of a shared word
    diversity_names   root-mean-square difference between two pictures of a name
    sharpness         mean absolute Laplacian of named pictures over that of real ones: below 1
                      they are blurred, above it noisy

The encoder is trained to tell a picture from a blurred copy, so that blur counts in all of these.
A name belongs to one picture, mirrored or not and anywhere within two pixels; a shared word
("bird") belongs to several. Real pictures are moved likewise before they are measured.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save
from torch import Tensor

from examples.emoji.contrast import BagText, Pair, fit
from examples.emoji.data import Emoji, views
from examples.emoji.sizes import Sizes
from examples.emoji.words import numbers
from fewstep.diffusion.generator import Generator
from fewstep.eval.metrics import frechet
from fewstep.storage.files import write

NEAREST = 5
VIEWS = 16
"""Of each real picture, behind the moments that distances are taken to."""
SEED = 1_000
"""Of the judge; the text encoder of the pipeline has another."""


class Judge:
    """The encoder, and the features of the real pictures."""

    def __init__(self, pair: Pair, emoji: Emoji, words: Any) -> None:
        self.pair, self.emoji = pair.eval(), emoji
        with torch.no_grad():
            self.texts = pair.read(numbers(words, emoji.names))
        self.real = self.see(emoji.pictures)
        moved = torch.cat(views(emoji.pictures, VIEWS))
        self.moved, self.edges = self.see(moved), edges(moved)

    @torch.no_grad()
    def see(self, x: Tensor) -> Tensor:
        """Pictures (N, 3, 32, 32) in [-1, 1] -> features (N, width) of length one."""
        return torch.cat([self.pair.see(part) for part in x.split(200)])

    def ranks(self, features: Tensor, names: Tensor) -> Tensor:
        """How many names are nearer to each of the features (N, width) than its own: (N,)."""
        near = features @ self.texts.T
        return (near > near.gather(1, names[:, None])).sum(1)

    def scores(self, named: Tensor, worded: Tensor) -> dict[str, float]:
        """named: (names, R, 3, 32, 32); worded: (shared words, R, ...), R pictures of each."""
        features, of_words = (
            self.see(x.flatten(0, 1)).unflatten(0, x.shape[:2]) for x in (named, worded)
        )
        own = torch.arange(len(named)).repeat_interleave(named.shape[1])
        found = features.flatten(0, 1)
        return {
            "alignment": float((self.ranks(found, own) < NEAREST).double().mean()),
            "alignment_words": self.has_word(of_words),
            "fd": frechet(found, self.moved),
            "diversity": spread(of_words),
            "diversity_names": spread(named.flatten(2)) / named[0, 0].numel() ** 0.5,
            "sharpness": edges(named.flatten(0, 1)) / self.edges,
        }

    def draw(self, generator: Generator, repeats: int) -> Sequence[Tensor]:
        """(named, worded), what `scores` takes, as a text-to-image generator draws them."""
        assert generator.text is not None
        texts = [text for text in self.emoji.texts for _ in range(repeats)]
        x = generator.sample(range(len(texts)), batch=200, cond=generator.text(texts))
        counts = len(self.emoji.names), len(self.emoji.shared)
        return x.clamp(-1, 1).unflatten(0, (-1, repeats)).split(counts)

    def has_word(self, features: Tensor) -> float:
        """Share of features (words, R, width) whose nearest real picture has the word."""
        having = torch.zeros(len(features), len(self.real))
        for row, word in enumerate(self.emoji.shared):
            having[row, self.emoji.having(word)] = 1
        found = (features @ self.real.T).argmax(2)
        return float(having.gather(1, found).double().mean())


def spread(features: Tensor) -> float:
    """Mean distance between two of the R features of a prompt: (prompts, R, width), R > 1."""
    gaps = torch.cdist(features, features)
    pairs = features.shape[1] * (features.shape[1] - 1)
    return float((gaps.sum((1, 2)) / pairs).mean())


def edges(x: Tensor) -> float:
    """Mean absolute Laplacian of pictures (N, C, H, W), by four neighbours, off the border."""
    kernel = torch.tensor([[0.0, 1.0, 0.0], [1.0, -4.0, 1.0], [0.0, 1.0, 0.0]]).to(x)
    return float(F.conv2d(x.flatten(0, 1)[:, None], kernel[None, None]).abs().mean())


def judge(file: Path, emoji: Emoji, words: Any, sizes: Sizes) -> Judge:
    """The judge in `file`, trained first if it is not there."""
    torch.manual_seed(SEED)
    pair = Pair(BagText(len(words), sizes.width), sizes.width, channels=32)
    if not file.is_file():
        ids = dict(zip(emoji.texts, numbers(words, emoji.texts), strict=True))
        for step, loss in fit(pair, emoji, ids, sizes.contrast_steps, SEED, hears_blur=True):
            print(f"judge: step {step}, loss {loss:.3f}", flush=True)
        write(file, save(pair.state_dict()))
    pair.load_state_dict(load_file(file))
    return Judge(pair, emoji, words)


def of_words(emoji: Emoji, x: Tensor) -> Tensor:
    """Of pictures x (names, 3, H, W), as many of each shared word as the rarest word has.

    (words, R, 3, H, W), spread evenly over the pictures that have the word.
    """
    having = [emoji.having(word) for word in emoji.shared]
    count = min(map(len, having))
    return x[
        torch.tensor([[some[i * len(some) // count] for i in range(count)] for some in having])
    ]


def by_prompt(images: Any, names: int, words: int) -> Sequence[Tensor]:
    """uint8 (prompts x repeats, H, W, 3), names first, as (named, worded) for `Judge.scores`."""
    x = torch.from_numpy(images).permute(0, 3, 1, 2).float() / 127.5 - 1
    return x.unflatten(0, (names + words, -1)).split([names, words])


def rounded(row: dict[str, float]) -> dict[str, float]:
    """Four digits of each score."""
    return {name: float(f"{value:.4g}") for name, value in row.items()}
