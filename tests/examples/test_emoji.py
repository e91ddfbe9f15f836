"""The example of text to image, shrunk to seconds: its stages, and how pictures are judged."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("diffusers")
pytest.importorskip("transformers")

from diffusers import DiffusionPipeline
from PIL import Image

from examples.emoji import contrast, data, measure, picture, study, vae, words
from examples.emoji.__main__ import main
from examples.emoji.data import Emoji
from examples.emoji.teacher import Latents
from fewstep.diffusion.rng import Draws
from fewstep.storage.model_folder import load_student

pytestmark = pytest.mark.slow

COLOURS = {"red": (220, 30, 30), "green": (20, 160, 40), "blue": (30, 60, 200)}
SHAPES = ("disc", "ring", "bar", "frame")


def drawn(shape: str, colour: tuple[int, int, int]) -> np.ndarray:
    """(32, 32, 3) uint8 on white."""
    y, x = np.mgrid[:32, :32] - 15.5
    radius, widest = np.hypot(x, y), np.maximum(abs(x), abs(y))
    inside = {
        "disc": radius < 11,
        "ring": abs(radius - 9) < 3,
        "bar": (abs(y) < 4) & (abs(x) < 13),
        "frame": abs(widest - 9) < 3,
    }[shape]
    return np.where(inside[..., None], colour, 255).astype(np.uint8)


def archive(path: Path) -> Path:
    """A file as the example takes it: twelve shapes, and rows that are to be left out."""
    named = [(f"{c} {s}", f"{c}|{s}", drawn(s, COLOURS[c])) for s in SHAPES for c in COLOURS]
    others = 4  # of another group, for validation, with a skin tone, a double
    names, keywords, images = zip(*named, *[named[0]] * others, strict=True)
    wrong = np.arange(len(names)) - len(named)
    np.savez(
        path,
        images=np.stack(images),
        captions=np.array([*names[: len(named)], *"abcd"]),
        keywords=np.array(keywords),
        label_names=np.array(["Animals & Nature", "Flags", "Food & Drink"]),
        labels=(wrong == 0).astype(np.int64),
        split=(wrong == 1).astype(np.uint8),
        skin_tone=(wrong == 2).astype(np.uint8),
        duplicate_of=np.where(wrong == 3, 0, -1),
    )
    return path


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return archive(tmp_path_factory.mktemp("data") / "emoji.npz")


@pytest.fixture(scope="module")
def emoji(file: Path) -> Emoji:
    return data.load(file, ["Animals & Nature"], 100)


def test_what_is_learnt(emoji: Emoji) -> None:
    """Training pictures of the group, and those keywords that three others share."""
    assert emoji.names == [f"{c} {s}" for s in SHAPES for c in COLOURS]
    assert set(emoji.shared) == {*COLOURS, *SHAPES}
    assert emoji.words[4] == ["green", "ring"]
    assert emoji.having("ring") == [3, 4, 5]
    assert emoji.texts == [*emoji.names, *emoji.shared]
    assert torch.equal(emoji.pictures[0, :, 16, 16], torch.tensor([220, 30, 30]) / 127.5 - 1)
    assert bool((emoji.pictures[:, :, 0, 0] == 1).all())


def test_moved_pictures(emoji: Emoji) -> None:
    """Shifted by two pixels at most and flipped or not: every one is one of 50."""
    x = emoji.pictures[2:3]
    seen = data.moved(x.expand(400, -1, -1, -1), torch.Generator().manual_seed(0))
    wide = torch.nn.functional.pad(torch.cat([x, x.flip(3)]), (2, 2, 2, 2), value=1.0)
    every = {
        wide[f, :, j : j + 32, i : i + 32].numpy().tobytes()
        for f in (0, 1)
        for i in range(5)
        for j in range(5)
    }
    found = {p.numpy().tobytes() for p in seen}
    assert found <= every
    assert len(found) == len(every)


def test_how_pictures_are_called(emoji: Emoji) -> None:
    """By name three times in four, else by one of their words: within four standard errors."""
    draws = torch.Generator().manual_seed(0)
    texts = contrast.called(emoji, [4] * 4000, draws)
    assert set(texts) == {"green ring", "green", "ring"}
    assert abs(texts.count("green ring") / 4000 - 0.75) < 4 * (0.75 * 0.25 / 4000) ** 0.5
    assert abs(texts.count("ring") / 4000 - 0.125) < 4 * (0.125 * 0.875 / 4000) ** 0.5
    alone = replace(emoji, words=[[] for _ in emoji.names])
    assert set(contrast.called(alone, [4] * 50, draws)) == {"green ring"}


def test_training_pairs() -> None:
    """Each latent with its own texts alone, a tenth with none; the same draws, the same batch."""
    x0 = torch.arange(3.0).reshape(3, 1, 1, 1, 1) + torch.tensor([0.0, 0.5]).reshape(2, 1, 1, 1)
    x0 = x0.expand(3, 2, 4, 8, 8)
    prompts = torch.arange(6.0).reshape(6, 1, 1)  # 5: the empty one
    called = torch.tensor([[0, 3, 4], [1, 3, -1], [2, -1, -1]])
    batch = Latents(x0, prompts, called, drop=0.1)(Draws.range(0, 6000))
    assert abs((batch.x0[:, 0, 0, 0] % 1).mean() - 0.25) < 4 * 0.25 / 6000**0.5  # either view
    pairs = torch.stack([batch.x0[:, 0, 0, 0], batch.cond["prompt"][:, 0, 0]], 1).long()
    counts = {
        tuple(p): n
        for p, n in zip(
            *(t.tolist() for t in pairs.unique(dim=0, return_counts=True)), strict=True
        )
    }
    share = {(0, 0): 0.675, (0, 3): 0.1125, (0, 4): 0.1125, (1, 1): 0.675, (1, 3): 0.225}
    share |= {(2, 2): 0.9, (0, 5): 0.1, (1, 5): 0.1, (2, 5): 0.1}
    assert counts.keys() == share.keys()
    for pair, p in share.items():
        assert abs(counts[pair] / 2000 - p) < 4 * (p * (1 - p) / 2000) ** 0.5
    again = Latents(x0, prompts, called, drop=0.1)(Draws.range(3000, 10))
    assert torch.equal(again.x0, batch.x0[3000:3010])
    assert torch.equal(again.cond["prompt"], batch.cond["prompt"][3000:3010])


class Known(torch.nn.Module):
    """A judge that sees the mean colour, and reads the first two names as red and green."""

    def see(self, x: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.normalize(x.mean((2, 3)) + 1.001, dim=1)

    def read(self, ids: torch.Tensor) -> torch.Tensor:
        return torch.eye(3)[torch.arange(len(ids)) % 3]


def test_scores_of_known_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Alignment, distance and diversity by hand; with other names the alignment is zero."""
    monkeypatch.setattr(measure, "numbers", lambda words, texts: torch.zeros(len(texts), 1))
    monkeypatch.setattr(measure, "NEAREST", 1)
    pure = 2 * torch.eye(3).reshape(3, 3, 1, 1).expand(3, 3, 32, 32) - 1
    emoji = Emoji(pure, ["red", "green", "blue"], [["w"], ["w"], []])
    judge = measure.Judge(Known(), emoji, None)
    twice = pure[:, None].expand(3, 2, 3, 32, 32)
    mixed = pure[:2][None]
    right, wrong = judge.scores(twice, mixed), judge.scores(twice.flip(0), mixed)
    assert right["alignment"] == 1.0
    assert wrong["alignment"] == pytest.approx(1 / 3)
    assert right["diversity_names"] == 0.0
    assert right["diversity"] == pytest.approx(2**0.5, rel=1e-2)
    assert right["alignment_words"] == 1.0
    assert judge.scores(twice, pure[1:][None])["alignment_words"] == 0.5
    assert right["fd"] < 0.05 < 0.3 < judge.scores(twice[[0, 0, 0]], mixed)["fd"]
    other = torch.stack([pure, pure.flip(0)], 1)  # red and blue change places: 2 of 3 colours by 2
    assert judge.scores(other, mixed)["diversity_names"] == pytest.approx((8 / 3) ** 0.5 * 2 / 3)
    assert torch.equal(measure.of_words(emoji, pure), pure[:2][None])


def test_the_encoders_learn(emoji: Emoji) -> None:
    """Sixty steps: all twelve pictures are nearest to their own name; before, chance."""
    tokens = words.tokenizer(emoji.texts, 540, 8)
    ids = dict(zip(emoji.texts, words.numbers(tokens, emoji.texts), strict=True))
    torch.manual_seed(0)
    pair = contrast.Pair(contrast.BagText(len(tokens), 32), 32, channels=8)

    def right() -> int:
        near = measure.Judge(pair, emoji, tokens)
        return int((near.ranks(near.real, torch.arange(12)) == 0).sum())

    before = right()
    for _ in contrast.fit(pair, emoji, ids, 60, seed=0):
        pass
    assert before < 6 < 10 <= right()


def trained(emoji: Emoji, hears_blur: bool) -> measure.Judge:
    """A judge of the twelve shapes, after 600 steps."""
    tokens = words.tokenizer(emoji.texts, 540, 8)
    ids = dict(zip(emoji.texts, words.numbers(tokens, emoji.texts), strict=True))
    torch.manual_seed(0)
    pair = contrast.Pair(contrast.BagText(len(tokens), 32), 32, channels=8)
    for _ in contrast.fit(pair, emoji, ids, 600, 0, hears_blur):
        pass
    return measure.Judge(pair, emoji, tokens)


def test_the_judge_hears_blur(emoji: Emoji) -> None:
    """The more a copy of real pictures is blurred, the farther off and the less sharp it is.

    Its name is still found. The text encoder's training, which is to be deaf to blur, hears less
    than a quarter of it.
    """
    real = torch.stack(data.views(emoji.pictures, 4), 1)
    worded = measure.of_words(emoji, emoji.pictures)

    def rows(judge: measure.Judge) -> list[dict[str, float]]:
        copies = [contrast.blurred(real.flatten(0, 1), torch.tensor(a)) for a in (0.0, 0.5, 1.0)]
        return [judge.scores(x.unflatten(0, real.shape[:2]), worded) for x in copies]

    hears, deaf = rows(trained(emoji, True)), rows(trained(emoji, False))
    sharp, half, whole = (row["fd"] for row in hears)
    assert 1.3 * sharp < half < whole / 1.3
    assert deaf[2]["fd"] - deaf[0]["fd"] < (whole - sharp) / 4
    assert [row["alignment"] for row in hears] == [1, 1, 1]
    sharpness = [row["sharpness"] for row in hears]
    assert sharpness[0] == pytest.approx(1, abs=0.02)
    assert 0.9 > sharpness[1] > 1.5 * sharpness[2]


def test_sharpness_by_hand() -> None:
    """A dot of height h, off the border: |-4h| and four times h, over 9 inner pixels of 25."""
    x = torch.zeros(2, 3, 5, 5)
    x[:, :, 2, 2] = 0.5
    assert measure.edges(x) == pytest.approx((4 + 4) * 0.5 / 9)
    slope = torch.arange(5.0).expand(1, 1, 5, 5)
    assert measure.edges(slope + 3) == 0  # neither brightness nor a slope is an edge
    assert measure.edges(contrast.blurred(x, torch.tensor(1.0))) < measure.edges(x) / 2


def test_blur_by_hand() -> None:
    """Half of a dot's blur: half of it stays, and each of nine pixels has a ninth of the rest."""
    x = torch.zeros(1, 1, 5, 5)
    x[..., 2, 2] = 18.0
    wanted = torch.zeros(1, 1, 5, 5)
    wanted[..., 1:4, 1:4] = 1.0
    wanted[..., 2, 2] = 10.0
    torch.testing.assert_close(contrast.blurred(x, torch.tensor(0.5)), wanted)


def test_wrong_pictures_are_chosen_by_no_text(emoji: Emoji) -> None:
    """The loss with wrong pictures is that of a text that may choose them too; by hand for two."""
    pair = Known()
    loss = partial(contrast.Pair.loss, pair)
    pure = 2 * torch.eye(3).reshape(3, 3, 1, 1).expand(3, 3, 32, 32) - 1
    pair.scale = torch.tensor(0.0)
    ids = torch.arange(2)[:, None]
    near = pair.see(pure) @ torch.eye(3)[:2].T  # (pictures, texts)
    other = torch.nn.functional.cross_entropy(near.T, torch.arange(2))
    plain = torch.nn.functional.cross_entropy(near[:2], torch.arange(2))
    torch.testing.assert_close(loss(pure[:2], ids, pure[2:]), (plain + other) / 2)
    assert loss(pure[:2], ids) < loss(pure[:2], ids, pure[2:]) < loss(pure[:2], ids, pure[:2])


def test_every_stage(file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From the file of emoji to measured pictures of stock diffusers, in a process of its own."""
    monkeypatch.setattr(study, "CHOICES", {"LSG 3": study.CHOICES["LSG 3"]})
    out = tmp_path / "out"
    main([str(file), "--out", str(out), "--small"])
    result = json.loads((out / "results.json").read_text())
    rows = list(result["scores"].values())
    assert result["pictures"] == 12
    assert rows[0]["fd"] < 0.01
    control, teacher, four = rows[3], rows[4], rows[6]
    for row, key in ((four, "mark_met"), (control, "mark_met_without_distillation")):
        near = row["fd"] <= 1.3 * teacher["fd"] * (1 + 1e-3)
        assert result[key] == (near and row["alignment"] >= teacher["alignment"] - 0.05)
    assert rows[0]["sharpness"] == pytest.approx(1, abs=0.1)
    assert result["four_steps_distance_ratio"] == pytest.approx(
        four["fd"] / teacher["fd"], rel=0.02
    )
    one = DiffusionPipeline.from_pretrained(out / "one-pipe", local_files_only=True)
    weights, student = one.unet.state_dict(), load_student(out / "one").denoiser.net.net
    for name, value in student.state_dict().items():
        assert torch.equal(weights[name], value)
    images = np.load(out / "one-pipe.npz")["images"]
    assert images.shape == ((12 + 7) * 2, 32, 32, 3)
    torch.manual_seed(0)
    texts = [t for t in (out / "prompts.txt").read_text().splitlines() for _ in range(2)]
    again = one(texts, num_inference_steps=1, guidance_scale=0, output_type="np").images
    assert np.array_equal((again * 255).round().astype(np.uint8), images)
    assert json.loads((out / "study.json").read_text())["students"]["LSG 3"]["curve"].keys() == {
        "1"
    }
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*.safetensors")}
    main([str(file), "--out", str(out), "--small"])  # nothing is done again
    assert before == {path: path.stat().st_mtime_ns for path in out.rglob("*.safetensors")}
    with pytest.raises(ValueError, match="was begun with other sizes; choose another with --out"):
        main([str(file), "--out", str(out)])


def test_the_table_of_pictures(emoji: Emoji, tmp_path: Path) -> None:
    """Each cell holds its own picture, twice as large; margins are white."""
    rows = {"a": emoji.pictures[:3, None], "b": emoji.pictures[3:6, None]}
    picture.table(rows, emoji.names[:3], tmp_path / "table.png")
    canvas = np.asarray(Image.open(tmp_path / "table.png")).astype(int)
    side = 64
    for row, x in enumerate(rows.values()):
        top = picture.HEAD + row * (picture.GAP * 3 // 2 + side + 2)
        for column in range(3):
            left = picture.MARGIN + column * (side + picture.GAP + 12)
            cell = canvas[top : top + side : 2, left : left + side : 2]
            wanted = (x[column, 0].permute(1, 2, 0).numpy() + 1) * 127.5
            assert abs(cell - wanted).max() < 0.51
            assert bool((canvas[top : top + side, left + side : left + side + 6] == 255).all())


def test_refusals(file: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"there is no file .*none.npz; name the .npz of emoji"):
        data.load(tmp_path / "none.npz", [], 1)
    (tmp_path / "bad.npz").write_text("x")
    with pytest.raises(ValueError, match=r"bad.npz is not readable as an .npz of arrays"):
        data.load(tmp_path / "bad.npz", [], 1)
    np.savez(tmp_path / "other.npz", images=np.zeros(1))
    with pytest.raises(ValueError, match="is no file of emoji: it has no captions, duplicate_of"):
        data.load(tmp_path / "other.npz", [], 1)
    with pytest.raises(ValueError, match="has no group 'Birds' of emoji"):
        data.load(file, ["Birds"], 1)


def test_latents_of_unit_size(emoji: Emoji) -> None:
    """Standardised latents have mean 0 and deviation 1 in each channel, and decode as before."""
    torch.manual_seed(0)
    made, x = vae.build((8, 8, 8)), emoji.pictures
    with torch.no_grad():
        made.quant_conv.bias.add_(torch.arange(8.0))
        before = made.decode(vae.encoded(made, x)).sample
        log_variance = made.encode(x).latent_dist.logvar
        std = vae.encoded(made, x).std((0, 2, 3), keepdim=True)
        vae.standardise(made, x)
        z = vae.encoded(made, x)
        assert z.mean((0, 2, 3)).abs().max() < 1e-4
        assert (z.std((0, 2, 3)) - 1).abs().max() < 1e-4
        assert (made.decode(z).sample - before).abs().max() < 1e-4
        told = made.encode(x).latent_dist.logvar
        assert (told - log_variance + 2 * std.log()).abs().max() < 1e-4
