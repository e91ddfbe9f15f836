"""A model that takes prompts, measured on prompts, and shown by its own: values, and refusals.

A tiny random CLIP stands for the real one; what it must say is what transformers' own code says.
"""

from __future__ import annotations

import base64
import html
import io
import json
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from tests.conftest import Folders

pytest.importorskip("diffusers")

from fewstep.diffusion.guidance import CFG
from fewstep.diffusion.pixels import to_uint8
from fewstep.eval.clip import load_clip
from fewstep.eval.metrics import frechet
from fewstep.eval.prompt_scores import Joined, Resized, alignment, diversity, resized
from fewstep.report.formatting import short
from fewstep.storage.model_folder import load_student
from fewstep.teachers.diffusers.load import load_pipeline, with_text_and_vae
from fewstep.teachers.diffusers.prompt_lengths import lost
from tests.command import fewstep, tree
from tests.tiny_text import save_clip

pytestmark = pytest.mark.slow

COUNT = 20
TEXTS = [f"a {colour} {thing}" for colour in ("red", "blue") for thing in "abcdefghij"]
MINE = """
import torch

class Corners:
    name, dim = "corners", 3

    def __call__(self, pictures):
        return pictures[:, 0, 0].float(), None
"""


@pytest.fixture(scope="module")
def ready(folders: Folders, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a run, its pipeline and prompts, a CLIP and other features."""
    home = tmp_path_factory.mktemp("prompted")
    shutil.copytree(folders("sd"), home / "pipe")
    save_clip(home / "clip")
    (home / "mine.py").write_text(MINE)
    (home / "prompts.txt").write_text("\n".join(TEXTS))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(home)
        domain = "Prompts('prompts.txt', check=False)"
        command = ("distill", "t2i", "--teacher", "pipe", "--domain", domain, "--steps", "1")
        done = fewstep(*command, "--batch", "2", "--accumulate", "1", "--out", "run")
        assert done.code == 0, done.err
    return home


@pytest.fixture
def place(ready: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of it, which is where we are; the pipeline stays where the run knows it."""
    for name in ("run", "clip"):
        shutil.copytree(ready / name, tmp_path / name)
    for name in ("mine.py", "prompts.txt"):
        shutil.copy(ready / name, tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_scores_by_hand() -> None:
    a = torch.tensor([[1.0, 0.0], [0.6, 0.8]])
    b = torch.tensor([[0.0, 1.0], [0.6, 0.8]])
    assert alignment(a, b) == pytest.approx((0.0 + 1.0) / 2)
    assert alignment(a, a.flip(0)) == pytest.approx(0.6)
    assert alignment(a, -a) == pytest.approx(-1.0)  # not cut at zero
    assert diversity([a, a]) == 0.0
    assert diversity([a, b]) == pytest.approx((2**0.5 + 0.0) / 2)
    c = torch.tensor([[1.0, 0.0], [-0.6, -0.8]])
    assert diversity([a, b, c]) == pytest.approx((2**0.5 + (0 + 2) + (2**0.5 + 2)) / 6)
    with pytest.raises(ValueError, match="needs two pictures of each prompt"):
        diversity([a])
    with pytest.raises(ValueError, match="2 pictures of"):
        alignment(a, b[:1])


def test_resizing_is_that_of_packed_pictures(tmp_path: Path) -> None:
    """Generated pictures are treated as 'fewstep data pack' treats the real ones: to the bit."""
    rng = np.random.default_rng(0)
    x = rng.integers(256, size=(2, 24, 24, 3), dtype=np.uint8)
    for i, picture in enumerate(x):
        (tmp_path / "real").mkdir(exist_ok=True)
        Image.fromarray(picture).save(tmp_path / "real" / f"{i}.png")
    packed = ("data", "pack", str(tmp_path / "real"), str(tmp_path / "real.zip"))
    assert fewstep(*packed, "--resolution", "10").code == 0
    from fewstep.data.readers import reader_of

    reader = reader_of(tmp_path / "real.zip")
    stored = np.stack([np.asarray(reader.image(i)) for i in range(2)])
    assert np.array_equal(resized(torch.from_numpy(x), 10).numpy(), stored)
    grey = resized(torch.from_numpy(x[..., :1]), 10)
    assert torch.equal(grey, resized(torch.from_numpy(x[..., :1].copy()), 10))
    assert grey.shape == (2, 10, 10, 1)

    class Count:
        name, dim = "count", 1

        def __call__(self, pictures: Tensor) -> tuple[Tensor, None]:
            return torch.tensor([[float(p.numel())] for p in pictures]), None

    both = Joined((Resized(Count(), 10), Resized(Count(), 0)))
    assert (both.name, both.dim) == ("count-at-10+count", 2)
    assert both(torch.from_numpy(x))[0].tolist() == [[300.0, 1728.0]] * 2


def made(run: Path, seeds: range) -> Tensor:
    """uint8 pictures of the prompts in turn, computed without the command."""
    student = with_text_and_vae(load_student(run))
    assert student.text is not None
    texts = [TEXTS[seed % COUNT] for seed in seeds]
    return to_uint8(student.sample(seeds, cond=student.text(texts)))


EVALUATE = ("evaluate", "run", "--prompts", "prompts.txt", "--clip", "clip")


def test_evaluate_with_prompts(place: Path) -> None:
    """CLIP score, Frechet distance and diversity as computed by hand; kept, and shown."""
    Path("real").mkdir()
    rng = np.random.default_rng(3)
    for i in range(30):
        Image.fromarray(rng.integers(256, size=(8, 8, 3), dtype=np.uint8)).save(f"real/{i}.png")
    stats = ("stats", "real", "--features", "mine.py:Corners", "--out", "ref.npz")
    assert fewstep(*stats).code == 0
    more = ("--features", "mine.py:Corners", "--reference", "ref.npz", "--side", "8")
    done = fewstep(*EVALUATE, *more, "--runs", "2", "--batch", "7")
    assert done.code == 0, done.err
    clip = load_clip(Path("clip"))
    name = f"prompts-{clip.name}+corners-at-8-20"
    stored = json.loads(Path(f"run/evaluation/{name}.json").read_text())
    seen, texts = [], clip.text(TEXTS)
    real = np.stack([np.asarray(Image.open(f"real/{i}.png"))[0, 0] for i in range(30)])
    for run in range(2):
        pictures = made(Path("run"), range(run * COUNT, (run + 1) * COUNT))
        seen.append(clip(pictures)[0])
        scores = stored["runs"][run]
        assert scores["seeds"] == [run * COUNT, run * COUNT + COUNT - 1]
        value = scores[f"CLIP({clip.name}, 20)"]
        assert value == pytest.approx(float((seen[run] * texts).sum(1).mean()), abs=1e-5)
        assert value != pytest.approx(float((seen[run] * texts.flip(0)).sum(1).mean()), abs=1e-5)
        corners = resized(pictures, 8)[:, 0, 0].float()
        expected = frechet(corners, torch.from_numpy(real).float())
        assert scores["FD(corners, 20)"] == pytest.approx(expected, rel=1e-2)
        assert scores["KID(corners, 20)"] > 0
    gap = float((seen[0] - seen[1]).norm(dim=1).mean())
    assert stored["diversity"] == pytest.approx(gap, abs=1e-5)
    assert f"diversity of a prompt's pictures: {gap:.3g}"[:-1] in done.out
    kept = tree(Path(f"run/evaluation/{name}"))
    again = fewstep(*EVALUATE, *more, "--runs", "2", "--batch", "7")
    assert again.out == done.out
    assert "40 of" not in again.err
    assert tree(Path(f"run/evaluation/{name}")) == kept

    assert fewstep("report", "run").code == 0
    page = html.unescape(Path("run/report.html").read_text(encoding="utf-8"))
    assert f"CLIP({clip.name}, 20)" in page
    assert "Prompts: prompts.txt, SHA-256" in page
    assert f"<h3>On prompts: {name.removeprefix('prompts-')}</h3>" in page
    mean = short(stored["mean"][f"CLIP({clip.name}, 20)"])
    assert f'<p class="lead">CLIP({clip.name}, 20) {mean}, the mean of 2 runs.</p>' in page
    assert "a column is one noise and one prompt" in page
    for word in ("same label", "a pixel", "of the pixels", "As papers report it"):
        assert word not in page
    rows = "; ".join(f"“{text}”" for text in TEXTS[:4])
    assert f"The rows' prompts, from the top: {rows}." in page
    assert "16 pictures in 4 columns" in page
    assert "the same noise for teacher and student" in page
    assert "<h3>Teacher <span>50 calls, without guidance</span></h3>" in page
    assert "<h3>Student <span>1 call, at t = 625</span></h3>" in page


def test_the_report_shows_prompts_and_not_the_null_prompt(ready: Path, place: Path) -> None:
    """Its pictures are those of `fewstep sample` with the first prompts, of the teacher too."""
    from fewstep.report.run_data import read_run
    from fewstep.report.sample_images import Making, sample, side_by_side

    shown = to_uint8(sample(read_run(Path("run"))).x["student"])
    student = with_text_and_vae(load_student("run"))
    assert student.text is not None
    texts = [text for text in TEXTS[:4] for _ in range(4)]
    expected = to_uint8(student.sample(range(16), cond=student.text(texts)))
    assert (shown.int() - expected.int()).abs().max() <= 1
    null = to_uint8(student.decode(load_student("run").sample(range(16))))
    assert (shown.int() - null.int()).abs().max() > 5
    teacher = load_pipeline(ready / "pipe")
    assert teacher.text is not None
    cond = teacher.text(texts)
    for making, sampler, note in (
        (Making(), teacher.sampler, "50 calls, without guidance"),
        (Making(guidance=7.5), CFG(teacher.sampler, 7.5), "100 calls, guidance 7.5"),
    ):
        both = sample(read_run(Path("run")), making)
        made_by_hand = replace(teacher, sampler=sampler).sample(range(16), cond=cond)
        gap = to_uint8(both.x["teacher"]).int() - to_uint8(made_by_hand).int()
        assert gap.abs().max() <= 1
        assert (to_uint8(both.x["student"]).int() - expected.int()).abs().max() <= 1
        assert both.calls == {"student": "1 call, at t = 625", "teacher": note}
        teachers, students = side_by_side(both)
        assert (teachers.title, students.title) == ("Teacher", "Student")
        assert (teachers.width, teachers.height) == (students.width, students.height)
    assert set(sample(read_run(Path("run")), Making(teacher=False)).x) == {"student"}
    Path("prompts.txt").unlink()
    gone = sample(read_run(Path("run")))
    assert not gone.x
    assert "Pictures are not shown: there is no file prompts.txt." in gone.notes


def test_the_report_shows_whole_pictures_over_time(place: Path) -> None:
    """Both rows of a look, side by side: decoded pictures, of another side than the latents."""
    from fewstep.report.run_data import read_run
    from fewstep.report.sample_images import film

    shape, side = load_student("run").shape, made(Path("run"), range(1)).shape[1]
    assert side != shape[1]
    tile = side * round(48 / side) + 4  # and its border
    shown = film(read_run(Path("run")))
    assert [p.title for p in shown] == ["step 0", "step 1"]
    for p, name in zip(shown, ("step-00000000.png", "step-00000001.png"), strict=True):
        look = np.asarray(Image.open(Path("run/grids") / name))
        assert look.shape == (2 * tile + 4, 10 * tile + 4, 3)
        uri = base64.b64decode(p.uri.removeprefix("data:image/png;base64,"))
        strip = np.asarray(Image.open(io.BytesIO(uri)))
        assert strip.shape == (tile + 4, 20 * tile + 4, 3)
        for i in range(20):
            row, column = divmod(i, 10)
            there = look[
                4 + row * tile : (row + 1) * tile, 4 + column * tile : (column + 1) * tile
            ]
            assert there.std() > 1  # a picture, no border
            assert np.array_equal(strip[4:tile, 4 + i * tile : (i + 1) * tile], there)


def test_prompts_that_are_cut_are_counted_once(place: Path) -> None:
    """By the pipeline's text encoder and by the CLIP, of 8 tokens each; short ones are not."""
    long = "a red cube on the red ball of the cube of "
    prompts = [*TEXTS[:18], f"{long} a", f"{long} b"]
    Path("prompts.txt").write_text("\n".join(prompts))
    cut = (
        "2 of 20 different prompts are longer than the 8 tokens that {0} hears, and cut there; "
        "1 cannot be told from an earlier one by {0}\n"
    )
    assert lost(load_student("run").card, prompts) + "\n" == cut.format("the text encoder")
    done = fewstep(*EVALUATE, "--runs", "2")
    assert done.code == 0, done.err
    assert [done.err.count(cut.format(of)) for of in ("the text encoder", "CLIP")] == [1, 1]
    Path("prompts.txt").write_text("\n".join(TEXTS))
    assert "hears" not in fewstep(*EVALUATE).err


def test_the_teacher_is_measured_alike(ready: Path, place: Path) -> None:
    """A pipeline folder: nothing is written into it."""
    shutil.copytree(ready / "pipe", "pipe")
    before = tree(Path("pipe"))
    few = ("evaluate", "pipe", *EVALUATE[2:], "--samples", "20")
    done = fewstep(*few)
    assert done.code == 0, done.err
    assert tree(Path("pipe")) == before
    (stored,) = Path("pipe.evaluation").glob("*.json")
    plain = json.loads(stored.read_text())
    assert (plain["diversity"], plain["guidance"]) == (None, 1.0)
    done = fewstep(*few, "--guidance", "7.5")
    assert done.code == 0, done.err
    assert "parts are there already" not in done.err  # those are of another scale
    guided = json.loads(stored.with_name(f"{stored.stem}-cfg7.5.json").read_text())
    assert guided["guidance"] == 7.5
    score = f"CLIP({load_clip(Path('clip')).name}, 20)"
    assert guided["best"][score] != pytest.approx(plain["best"][score], abs=1e-5)
    teacher = load_pipeline("pipe")
    cond = teacher.text(TEXTS)
    pictures = replace(teacher, sampler=CFG(teacher.sampler, 7.5)).sample(range(20), cond=cond)
    clip = load_clip(Path("clip"))
    cosine = (clip(to_uint8(pictures))[0] * clip.text(TEXTS)).sum(1).mean()
    assert guided["best"][score] == pytest.approx(float(cosine), abs=1e-4)


def test_wrong_input_is_one_sentence(place: Path, finished: Path) -> None:
    Path("few.txt").write_text("a red cube")
    Path("other.py").write_text(MINE)
    refused: dict[Sequence[str], str] = {
        EVALUATE[:4]: "--prompts needs --clip FOLDER, a CLIP of transformers",
        (*EVALUATE, "--features", "mine.py:Corners"): "need both --features and --reference FILE",
        (*EVALUATE, "--samples", "21"): "prompts.txt has 20 prompts, fewer than --samples",
        (*EVALUATE, "--protocol", "fid50k"): "--prompts has a protocol of its own",
        (
            *EVALUATE[:3],
            "few.txt",
            *EVALUATE[4:],
        ): "too few prompts to be measured on: 1, at",
        (*EVALUATE[:5], "mine.py:Corners"): "Corners has no text(prompts)",
        (*EVALUATE[:5], "pipe"): "pipe is no folder of a CLIP of transformers",
        ("evaluate", "run", "--clip", "clip"): "--clip needs --prompts FILE",
        ("evaluate", "run", "--guidance", "2"): "--guidance needs --protocol fid50k, or --prompts",
        (*EVALUATE, "--guidance", "nan"): "--guidance is a finite scale, got nan",
        ("evaluate", "run"): "by --prompts those of models that take prompts",
        ("report", "run", "--guidance", "inf"): "--guidance is a finite scale, got inf",
        ("report", str(finished / "runs" / "sid"), "--guidance", "2"): (
            "--guidance is for models that take prompts; leave it out"
        ),
        ("evaluate", str(finished / "runs" / "sid"), *EVALUATE[2:]): "takes no prompts",
        ("evaluate", "run", "--protocol", "fid50k", "--reference", "x.npz"): (
            "run takes prompts, and --protocol fid50k knows labels alone"
        ),
    }
    for command, message in refused.items():
        done = fewstep(*command)
        assert (done.code, done.out) == (2, ""), (command, done.err)
        assert message in done.err, done.err
        assert len(done.err.splitlines()) <= 2
