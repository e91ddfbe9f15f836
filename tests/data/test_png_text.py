"""Settings in PNG files, read back as the programs that people use read them."""

from __future__ import annotations

import io
import json
import re
from typing import Any

import pytest
from PIL import Image

from fewstep.data.png_text import parameters, png_with

SETTINGS: dict[str, Any] = {
    "prompt": 'a "red" cube, 3:4,\n on blue',
    "negative": "blurry, Steps: 9",
    "steps": 4,
    "sampler": "LCM",
    "guidance": 1.0,
    "seed": 2**40,
    "size": "512x768",
    "strength": 0.6,
    "model": "fast, my: run",
    "version": "fewstep 0.1.0",
    "calls": 4,
}


def read(text: str) -> dict[str, str]:
    """As the web UIs read it: prompt lines, a negative one, and pairs of a last line."""
    *lines, last = text.strip().split("\n")
    pairs = re.findall(r'\s*(\w[\w \-/]+):\s*("(?:\\.|[^\\"])+"|[^,]*)(?:,|$)', last)
    if len(pairs) < 3:
        lines, pairs = [*lines, last], []
    found = {key: json.loads(value) if value[:1] == '"' else value for key, value in pairs}
    at = next((i for i, line in enumerate(lines) if line.startswith("Negative prompt:")), None)
    found["prompt"] = "\n".join(lines[:at])
    found["negative"] = "" if at is None else "\n".join(lines[at:])[16:].strip()
    return found


def test_other_programs_read_every_setting() -> None:
    assert read(parameters(SETTINGS)) == {
        "prompt": 'a "red" cube, 3:4, on blue',
        "negative": "blurry, Steps: 9",
        "Steps": "4",
        "Sampler": "LCM",
        "CFG scale": "1",
        "Seed": str(2**40),
        "Size": "512x768",
        "Denoising strength": "0.6",
        "Model": "fast, my: run",
        "Version": "fewstep 0.1.0",
    }
    bare = {"steps": 1, "sampler": "LCM", "seed": 3, "size": "8x8"}
    assert read(parameters(bare))["prompt"] == ""
    assert read(parameters(bare))["Seed"] == "3"


@pytest.mark.parametrize("prompt", ["a red cube", "ein Würfel", "赤い立方体 🎲"])
def test_in_a_file(prompt: str) -> None:
    """The picture is as it was; text of any script comes back, and all settings in JSON."""
    picture = Image.effect_noise((9, 7), 80)
    with Image.open(io.BytesIO(png_with(picture, {**SETTINGS, "prompt": prompt}))) as found:
        assert found.tobytes() == picture.tobytes()
        assert read(found.text["parameters"])["prompt"] == prompt  # type: ignore[attr-defined]
        assert json.loads(found.text["fewstep"]) == {  # type: ignore[attr-defined]
            **SETTINGS,
            "prompt": prompt,
        }
