"""A CLIP folder says what transformers' own code says of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

pytest.importorskip("transformers")

import transformers

from fewstep.eval.clip import Clip, load_clip, middle, text_vectors
from fewstep.eval.prompt_scores import alignment
from fewstep.training.progress import heard
from tests.tiny_text import save_clip

SIDE = 16


def test_vectors_are_those_of_transformers(tmp_path: Path) -> None:
    """Of texts, long ones cut, and of pictures that need no resizing; of length one."""
    ours = load_clip(save_clip(tmp_path / "clip"))
    theirs = transformers.CLIPModel.from_pretrained(tmp_path / "clip")
    words = transformers.CLIPTokenizer.from_pretrained(tmp_path / "clip")
    pictures = torch.randint(256, (3, SIDE, SIDE, 3), generator=torch.Generator().manual_seed(1))
    pictures = pictures.to(torch.uint8)
    for text, picture in (("a red cube", 0), ("a small ball on the red cube of the ball", 2)):
        tokens = words([text], truncation=True, max_length=8, return_tensors="pt")
        x = (
            pictures[picture] / 255 - torch.tensor(ours.mean.flatten())
        ) / ours.deviation.flatten()
        with torch.no_grad():
            found = theirs(**tokens, pixel_values=x.permute(2, 0, 1)[None])
        texts, seen = ours.text(["a", text]), ours(pictures)[0]
        assert torch.allclose(texts[1], found.text_embeds[0], atol=1e-6)
        assert torch.allclose(seen[picture], found.image_embeds[0], atol=1e-6)
        expected = float((found.text_embeds * found.image_embeds).sum())
        assert alignment(seen[picture][None], texts[1:]) == pytest.approx(expected, abs=1e-6)
    assert torch.allclose(seen.norm(dim=1), torch.ones(3))


def test_texts_that_are_cut_are_told(tmp_path: Path) -> None:
    """Once, with their number, and which become equal by that; their vectors are equal then."""
    ours = load_clip(save_clip(tmp_path / "clip"))
    long = "a red cube on the red ball of the cube"
    told: list[str] = []
    with heard(told.append):
        vectors = text_vectors(ours, ["a", f"{long} a", f"{long} b", "a ball"])
        text_vectors(ours, ["a", "a ball"])
    assert told == [
        "2 of 4 different prompts are longer than the 8 tokens that CLIP hears, and cut there; "
        "1 cannot be told from an earlier one by CLIP"
    ]
    assert torch.equal(vectors[1], vectors[2])
    assert not torch.allclose(vectors[0], vectors[3], atol=1e-2)


def test_pictures_are_brought_to_size_as_clips_own_code_does() -> None:
    """Its bicubic filter rounds to whole numbers between its two passes: less than one of 255."""
    generator = torch.Generator().manual_seed(2)
    for height, width in ((40, 60), (33, 20), (7, 9)):
        coarse = 60 + 130 * torch.rand(1, 3, 5, 5, generator=generator)  # far from both ends
        smooth = torch.nn.functional.interpolate(coarse, (height, width), mode="bicubic")
        whole = smooth.clamp(0, 255).round()
        processor = transformers.CLIPImageProcessorPil(
            size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE}
        )
        image = Image.fromarray(whole[0].permute(1, 2, 0).numpy().astype(np.uint8))
        told = processor(image, do_rescale=False, do_normalize=False, return_tensors="pt")
        found = middle(whole, SIDE)
        assert (found - told["pixel_values"]).abs().max() < 1.5


def change(folder: Path, **facts: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **facts}))


def test_other_folders_are_no_clip(tmp_path: Path) -> None:
    clip = save_clip(tmp_path / "clip")
    change(clip, model_type="bert")
    with pytest.raises(ValueError, match="does not describe a CLIP"):
        load_clip(clip)
    change(clip, model_type="clip")
    assert isinstance(load_clip(clip), Clip)
    (clip / "model.safetensors").rename(clip / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"holds no model.safetensors"):
        load_clip(clip)
