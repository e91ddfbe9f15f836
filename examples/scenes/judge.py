"""The judge: what is where in a picture, and on which colour; the pipeline never meets it.

A small convolutional network has a map of 8x8 for each word. The largest value says whether the
object is there, the map's softmax where; a second map says how large it is. A summary of 64
numbers learns the same, and how blurred and how noisy the picture is: distances are taken between
summaries, so that they hear place, kind, colour, blur and noise.

The pictures it learns from are of all captions, those of unseen pairs too: a judge that had never
seen a penguin on red would take one for a mistake. Half of them are blurred or noisy.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from examples.scenes.captions import COLOURS, SIZES, WORDS, Caption
from examples.scenes.draw import SIDE, draw
from examples.scenes.stream import Stream
from fewstep.diffusion.rng import Draws

BATCH = 64
"""Pictures of a step."""
TAUGHT = 2
"""Seed of these pictures."""
CELLS, WIDTH = 8, 64
RATE = 2e-3
NOISE = 0.15
"""The most noise that a spoilt picture has."""


@dataclass(frozen=True)
class Answers:
    """What the judge says of B pictures."""

    there: Tensor
    """(B, words), positive where the object is there."""
    centre: Tensor
    """(B, words, 2), x and y of each object in pixels, if it is there."""
    side: Tensor
    """(B, words), its side in pixels."""
    colour: Tensor
    """(B, colours), the largest of the background."""
    summary: Tensor
    """(B, 64)."""
    spoilt: Tensor
    """(B, 2), how blurred and how noisy."""
    also: Tensor
    """(B, words), as `there`, of the summary alone."""
    about: Tensor
    """(B, 2), mean of the objects' centres, of the summary alone, in halves of the picture."""


class Judge(nn.Module):
    """Pictures (B, 3, 32, 32) in [-1, 1] -> `Answers`."""

    def __init__(self, channels: int = 32) -> None:
        super().__init__()
        c = channels
        layers: list[nn.Module] = []
        for a, b, stride in ((3, c, 2), (c, 2 * c, 1), (2 * c, 3 * c, 2), (3 * c, 3 * c, 1)):
            layers += [nn.Conv2d(a, b, 3, stride, 1), nn.GroupNorm(4, b), nn.GELU()]
        self.trunk = nn.Sequential(*layers)
        self.maps = nn.Conv2d(3 * c, 2 * len(WORDS), 3, 1, 1)
        self.summary = nn.Sequential(
            nn.AvgPool2d(2), nn.Flatten(), nn.Linear(48 * c, 128), nn.GELU(), nn.Linear(128, WIDTH)
        )
        self.told = nn.Linear(WIDTH, len(WORDS) + len(COLOURS) + 4)

    def forward(self, x: Tensor) -> Answers:
        h = self.trunk(x)
        heat, size = self.maps(h).flatten(2).chunk(2, 1)
        share = heat.softmax(2)
        step = SIDE / CELLS
        axis = (torch.arange(CELLS, device=x.device) + 0.5) * step
        grid = torch.stack([axis.repeat(CELLS), axis.repeat_interleave(CELLS)], 1)
        summary = self.summary(h)
        parts = self.told(summary).split([len(WORDS), len(COLOURS), 2, 2], 1)
        also, colour, spoilt, about = parts
        side = 10 + 8 * (share * size).sum(2)
        return Answers(heat.amax(2), share @ grid, side, colour, summary, spoilt, also, about)


@dataclass(frozen=True)
class Labels:
    """What is true of pictures."""

    there: Tensor
    centre: Tensor
    side: Tensor
    colour: Tensor

    def rows(self, rows: Tensor) -> Labels:
        """Those of some pictures."""
        return Labels(self.there[rows], self.centre[rows], self.side[rows], self.colour[rows])


def labels(captions: Sequence[Caption], boxes: Sequence[Sequence[tuple[int, int, int]]]) -> Labels:
    """By captions, and the boxes (left, top, side) of their objects."""
    count = len(captions), len(WORDS)
    there, centre, side = torch.zeros(count), torch.zeros(*count, 2), torch.zeros(count)
    for row, (caption, some) in enumerate(zip(captions, boxes, strict=True)):
        for word, (left, top, size) in zip(caption.objects, some, strict=True):
            there[row, word], side[row, word] = 1, size
            centre[row, word] = torch.tensor([left + size / 2, top + size / 2])
    return Labels(there, centre, side, torch.tensor([c.colour for c in captions]))


def blurred(x: Tensor, amount: Tensor) -> Tensor:
    """Pictures (B, 3, H, W) mixed with their means over 3x3; `amount` (B, 1, 1, 1) is 0 to 1."""
    smooth = F.avg_pool2d(F.pad(x, (1, 1, 1, 1), mode="replicate"), 3, 1)
    return torch.lerp(x, smooth, amount)


def spoilt(x: Tensor, draws: torch.Generator) -> tuple[Tensor, Tensor]:
    """Half of the pictures blurred and noisy, and how much each is: (B, 2) in 0 .. 1."""
    amount = torch.rand(len(x), 2, generator=draws)
    amount *= torch.rand(len(x), 1, generator=draws) < 0.5
    blur, noise = amount[:, :, None, None, None].unbind(1)
    x = blurred(x, blur)
    return x + NOISE * noise * torch.randn(x.shape, generator=draws), amount


def loss(said: Answers, true: Labels, amount: Tensor) -> Tensor:
    """What is there, where, how large, on what, how spoilt; the summary learns it twice."""
    where = true.there[..., None] / true.there.sum()
    about = (true.there[..., None] * true.centre).sum(1) / true.there.sum(1, keepdim=True)
    return (
        10 * F.binary_cross_entropy_with_logits(said.there, true.there)
        + 10 * F.binary_cross_entropy_with_logits(said.also, true.there)
        + 0.1 * (where * (said.centre - true.centre).abs()).sum()
        + 0.1 * (where[..., 0] * (said.side - true.side).abs()).sum()
        + F.cross_entropy(said.colour, true.colour)
        + 3 * F.mse_loss(said.about, about / (SIDE / 2) - 1)
        + 3 * F.mse_loss(said.spoilt, amount)
    )


def fit(stream: Stream, steps: int, pool: int) -> Iterator[tuple[int, float, Judge]]:
    """(step, loss, judge) after each hundredth step and at the end; pool: so many pictures."""
    torch.manual_seed(5)
    draws = torch.Generator().manual_seed(5)
    judge = Judge()
    numbers = Draws.range(0, pool, TAUGHT)
    captions = stream.captions(numbers)
    x, boxes = draw(stream.objects, captions, numbers)
    true = labels(captions, boxes)
    optimizer = torch.optim.AdamW(judge.parameters(), RATE, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, steps, pct_start=0.1)
    for step in range(1, steps + 1):
        rows = torch.randint(pool, (BATCH,), generator=draws)
        seen, amount = spoilt(x[rows], draws)
        error = loss(judge(seen), true.rows(rows), amount)
        optimizer.zero_grad()
        error.backward()
        optimizer.step()
        schedule.step()
        if step % 100 == 0 or step == steps:
            yield step, float(error.detach()), judge.eval()
            judge.train()
    judge.eval()


def right(said: Answers, captions: Sequence[Caption]) -> dict[str, Tensor]:
    """(B,) bool of "objects", "place" (with size and relation), "colour" and "all" of them.

    Objects are right where those asked for are there, and no other.
    """
    asked = torch.zeros_like(said.there, dtype=torch.bool)
    for row, caption in enumerate(captions):
        asked[row, list(caption.objects)] = True
    found = {
        "objects": ((said.there > 0) == asked).all(1),
        "place": torch.tensor(
            [
                well_placed(c, said.centre[i].tolist(), said.side[i].tolist())
                for i, c in enumerate(captions)
            ]
        ),
        "colour": said.colour.argmax(1) == torch.tensor([c.colour for c in captions]),
    }
    return found | {"all": found["objects"] & found["place"] & found["colour"]}


def well_placed(
    caption: Caption, centre: Sequence[Sequence[float]], side: Sequence[float]
) -> bool:
    """Whether objects with these centres and sides, by word, are where the caption has them."""
    x, y = centre[caption.first]
    middle = SIDE / 2
    if caption.second >= 0:
        other = centre[caption.second]
        return y < other[1] if caption.relation == "above" else x < other[0]
    small, large = SIZES["small"][1], SIZES["large"][0]
    if caption.size and (side[caption.first] > (small + large) / 2) != (caption.size == "large"):
        return False
    if caption.place == "in the middle":
        return max(abs(x - middle), abs(y - middle)) < 4
    ends = {"left": x < middle, "right": x > middle, "top": y < middle, "bottom": y > middle}
    return ends.get(caption.place.rpartition(" ")[2], True)
