"""The example of scenes: its captions, its pictures, and how they are judged."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch

from examples.scenes import judge as judging
from examples.scenes.captions import (
    COLOURS,
    PLACES,
    SIZES,
    WORDS,
    Caption,
    doubles,
    singles,
    split,
    strange,
    unseen_colours,
    unseen_objects,
)
from examples.scenes.draw import Objects, boxes, cut_out, draw, read, shrink
from examples.scenes.stream import Stream
from fewstep.diffusion.rng import Draws


@pytest.fixture(scope="module")
def stream() -> Stream:
    return Stream()


def test_captions_as_they_are_written() -> None:
    fox, cat, star, apple = (WORDS.index(word) for word in ("fox", "cat", "star", "apple"))
    blue, red = (tuple(COLOURS).index(name) for name in ("blue", "red"))
    assert Caption(fox, blue, size="small", place="at the left").text == (
        "a small fox at the left on blue"
    )
    assert Caption(cat, red, star, relation="above").text == "a cat above a star on red"
    assert Caption(apple, red).text == "an apple on red"
    assert Caption(cat, red, apple, relation="left of").text == "a cat left of an apple on red"
    every = [c.text for c in [*singles(), *doubles()]]
    assert len(set(every)) == len(every) == 32 * 8 * 3 * 6 + 32 * 31 * 8 * 2


def test_an_eighth_of_the_pairs_is_unseen() -> None:
    """Each word lacks one colour, each colour four words; no learnt caption has such a pair."""
    colours, objects = unseen_colours(), unseen_objects()
    assert Counter(word for word, _ in colours) == dict.fromkeys(range(32), 1)
    assert Counter(colour for _, colour in colours) == dict.fromkeys(range(8), 4)
    assert len(objects) == 32 * 31 // 2 // 8
    made = split()
    for some in (made.learnt, made.validation, made.seen):
        assert not any(strange(c, colours, objects) for c in some)
    assert all(strange(c, colours, objects) for c in made.unseen)


def test_lists_of_captions_are_apart() -> None:
    made = split()
    parts = [made.single, made.double, made.validation, made.seen, made.unseen]
    texts = [c.text for some in parts for c in some]
    assert len(texts) == len(set(texts))
    for some in parts[2:]:
        assert sum(c.second < 0 for c in some) == len(some) / 2
    assert [c.text for c in split(5).seen] == [c.text for c in made.seen[:5]]


def test_how_often_captions_are_drawn(stream: Stream) -> None:
    """Half have one object, of which half say a size, and half a place: within four errors."""
    captions = stream.captions(Draws.range(0, 8000))
    alone = [c for c in captions if c.second < 0]
    error = 4 * (0.25 / 8000) ** 0.5
    assert abs(len(alone) / 8000 - 0.5) < error
    assert abs(sum(bool(c.size) for c in alone) / len(alone) - 0.5) < 1.5 * error
    assert abs(sum(bool(c.place) for c in alone) / len(alone) - 0.5) < 1.5 * error
    assert {c.first for c in captions} == set(range(32))


def test_pictures_are_a_function_of_their_number(stream: Stream) -> None:
    some = Draws.range(0, 12)
    captions = stream.captions(some)
    x, found = draw(stream.objects, captions, some)
    again, _ = draw(stream.objects, captions[5:], Draws.range(5, 7))
    assert torch.equal(x[5:], again)
    assert [len(f) for f in found] == [len(c.objects) for c in captions]
    other, _ = draw(stream.objects, captions, Draws.range(0, 12, 1))
    assert not torch.equal(x, other)


def test_objects_are_where_the_caption_has_them() -> None:
    """For extreme and middling numbers: inside, of the size said, at the place said."""
    for u in ([0.0] * 6, [0.999999] * 6, [0.5] * 6, [0.9, 0.1, 0.8, 0.2, 0.7, 0.3]):
        for place in PLACES:
            for size, (low, high) in SIZES.items():
                ((left, top, side),) = boxes(Caption(0, 0, size=size, place=place), u)
                assert 0 <= left <= 32 - side
                assert 0 <= top <= 32 - side
                assert low <= side <= high
                x, y = left + side / 2 - 16, top + side / 2 - 16
                said = {"left": x < 0, "right": x > 0, "top": y < 0, "bottom": y > 0}
                assert said.get(place.rpartition(" ")[2], True)
                if place == "in the middle":
                    assert max(abs(x), abs(y)) <= 4
        for relation, axis in (("left of", 0), ("above", 1)):
            first, second = boxes(Caption(0, 0, 1, relation=relation), u)
            assert first[axis] + first[2] <= second[axis]


def test_cutting_out_by_hand() -> None:
    """A red square with a white hole: outside is gone, the hole stays, the rim is shared."""
    image = np.full((32, 32, 3), 255, np.uint8)
    image[8:24, 8:24] = (200, 0, 0)
    image[14:18, 14:18] = 255
    image[7, 8:24] = (228, 128, 128)  # half red, half white
    cut = cut_out(image)
    assert cut[0, 0, 3] == 0
    assert cut[15, 15].tolist() == [1, 1, 1, 1]
    assert cut[12, 12].tolist() == pytest.approx([200 / 255, 0, 0, 1])
    assert cut[7, 12, 3] == pytest.approx(127 / 255, abs=1e-6)
    assert cut[7, 12, :3].tolist() == pytest.approx([200 / 255 * 127 / 255, 0, 0], abs=1e-6)
    small = shrink(cut, 16)
    assert small[7, 5].tolist() == pytest.approx([200 / 255, 0, 0, 1], abs=0.02)
    assert bool((small[..., :3] <= small[..., 3:]).all())


def test_every_word_has_a_picture_and_no_white_halo() -> None:
    """On a dark background no emoji's rim is brighter than what it has inside, or is outside."""
    objects = Objects()
    assert all(objects.of)
    for cut in objects.cut:
        share = cut[..., 3]
        assert 0.15 < share.mean() < 0.9
        assert bool((cut[..., :3] <= share[..., None] + 1e-9).all())


def test_refusals(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"there is no file .*none.npz of emoji"):
        read(tmp_path / "none.npz")
    (tmp_path / "bad.npz").write_text("x")
    with pytest.raises(ValueError, match=r"bad.npz is no .npz with images and words"):
        read(tmp_path / "bad.npz")
    np.savez(tmp_path / "few.npz", images=np.zeros((1, 32, 32, 3)), words=np.array(["cat"]))
    with pytest.raises(ValueError, match="has no picture of 'apple'"):
        read(tmp_path / "few.npz")


def said(labels: judging.Labels) -> judging.Answers:
    """What a judge that is always right says."""
    colour = torch.nn.functional.one_hot(labels.colour, len(COLOURS)).float()
    empty = torch.zeros(len(colour), 2)
    return judging.Answers(
        *(labels.there - 0.5, labels.centre, labels.side, colour),
        *(empty, empty, labels.there, empty),
    )


def test_true_answers_are_right_and_others_wrong(stream: Stream) -> None:
    """All real pictures are right by their labels; with the next one's captions few are."""
    numbers = Draws.range(0, 400, 9)
    captions = stream.captions(numbers)
    _, found = draw(stream.objects, captions, numbers)
    labels = judging.labels(captions, found)
    right = judging.right(said(labels), captions)
    assert {name: float(v.double().mean()) for name, v in right.items()} == dict.fromkeys(
        ("objects", "place", "colour", "all"), 1.0
    )
    wrong = judging.right(said(labels), captions[1:] + captions[:1])
    assert float(wrong["all"].double().mean()) < 0.02
    assert 0.05 < float(wrong["colour"].double().mean()) < 0.25


def test_one_fault_each_is_seen(stream: Stream) -> None:
    """A third object, another colour, the wrong side, the wrong size."""
    fox, cat = WORDS.index("fox"), WORDS.index("cat")
    caption = Caption(fox, 4, size="small", place="at the left")
    labels = judging.labels([caption], [[(1, 8, 13)]])

    def right(**changed: torch.Tensor) -> dict[str, bool]:
        answers = said(judging.Labels(**{**labels.__dict__, **changed}))
        return {name: bool(v) for name, v in judging.right(answers, [caption]).items()}

    assert right() == {"objects": True, "place": True, "colour": True, "all": True}
    there = labels.there.clone()
    there[0, cat] = 1
    assert right(there=there) == {"objects": False, "place": True, "colour": True, "all": False}
    assert not right(colour=torch.tensor([3]))["colour"]
    assert not right(centre=32 - labels.centre)["place"]
    assert not right(side=labels.side * 2)["place"]
    double = Caption(fox, 4, cat, relation="above")
    found = judging.labels([double], [[(3, 1, 13), (9, 17, 13)]])
    assert bool(judging.right(said(found), [double])["all"])
    swapped = Caption(cat, 4, fox, relation="above")
    assert not bool(judging.right(said(found), [swapped])["place"])


def test_the_judge_learns(stream: Stream) -> None:
    """Sixty steps halve its loss."""
    losses = [
        float(judging.loss(j(x), true, amount).detach())
        for j, x, true, amount in _looks(stream, steps=60)
    ]
    assert losses[1] < losses[0] / 2


def _looks(stream: Stream, steps: int) -> list[tuple]:
    numbers = Draws.range(0, 64, 9)
    captions = stream.captions(numbers)
    x, found = draw(stream.objects, captions, numbers)
    true, clean = judging.labels(captions, found), torch.zeros(64, 2)
    torch.manual_seed(5)
    before = judging.Judge().eval()
    after = list(judging.fit(stream, steps, pool=512))[-1][2].eval()
    return [(before, x, true, clean), (after, x, true, clean)]
