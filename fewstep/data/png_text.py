"""The settings of a picture within its PNG file, where other programs look for them.

Two text chunks:

    parameters    the text that AUTOMATIC1111's web UI began with, and that Forge, Civitai and
                  most viewers of such pictures read: the prompt, a line "Negative prompt: ...",
                  and a last line of "Key: value" with "Steps", "Sampler", "CFG scale", "Seed",
                  "Size"
    fewstep       JSON of all settings, under plain names

A value with a comma, a colon or a line break stands in JSON's quotes, which those readers undo.
Text beyond Latin-1 goes into an iTXt chunk, in UTF-8 (PNG specification, 11.3.3).
"""

from __future__ import annotations

import io
import json
from collections.abc import Mapping
from typing import Any

from PIL import Image
from PIL.PngImagePlugin import PngInfo

OWN = "fewstep"
PARAMETERS = "parameters"
KEYS: Mapping[str, str] = {
    "steps": "Steps",
    "sampler": "Sampler",
    "guidance": "CFG scale",
    "seed": "Seed",
    "size": "Size",
    "strength": "Denoising strength",
    "model": "Model",
    "version": "Version",
}
"""Our names of settings -> those of the last line, in its order."""


def parameters(settings: Mapping[str, Any]) -> str:
    """The text of the chunk "parameters".

    settings: "prompt" and "negative" where there are some, and values by the names of `KEYS`;
    other names are left to the chunk "fewstep".
    """
    lines = [_one_line(settings["prompt"])] if settings.get("prompt") else []
    if settings.get("negative"):
        lines.append(f"Negative prompt: {_one_line(settings['negative'])}")
    pairs = (f"{key}: {_quoted(settings[name])}" for name, key in KEYS.items() if name in settings)
    return "\n".join([*lines, ", ".join(pairs)])


def _one_line(text: str) -> str:
    return " ".join(str(text).split())


def _quoted(value: object) -> str:
    """A value that ends at the next comma, or stands in quotes."""
    text = f"{value:g}" if isinstance(value, float) else str(value)
    return json.dumps(text, ensure_ascii=False) if set(text) & set(',:"\n') else text


def png_with(image: Image.Image, settings: Mapping[str, Any]) -> bytes:
    """The bytes of a PNG file with its settings, as the module describes."""
    chunks, buffer = PngInfo(), io.BytesIO()
    chunks.add_text(PARAMETERS, parameters(settings))
    chunks.add_text(OWN, json.dumps(dict(settings), ensure_ascii=False))
    image.save(buffer, "PNG", optimize=True, pnginfo=chunks)
    return buffer.getvalue()
