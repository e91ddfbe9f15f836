"""Which prompts a pipeline truncates, and which become equal by that.

A text encoder hears so many tokens (77 of CLIP, 120 to 512 of T5 and Gemma) and is not told the
rest. Stock pipelines cut prompts there; two prompts that differ only behind it are one condition.
The tokenizers alone say where, so nothing is encoded here.
"""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from fewstep.teachers.diffusers.folder import PipelineFolder, is_pipeline, open_folder
from fewstep.teachers.diffusers.load import pipeline_card
from fewstep.teachers.diffusers.network import require_library
from fewstep.teachers.diffusers.text_and_vae import TextAndVAE

PART = 1000
"""Prompts that are looked at together."""


class Heard(NamedTuple):
    """How many prompts are truncated or become equal."""

    prompts: int
    """Different ones."""
    tokens: int
    """Tokens of each prompt that are used, at most."""
    cut: int
    """Prompts of which no tokenizer of the pipeline takes all."""
    equal: int
    """Prompts that are the same as an earlier one to every tokenizer."""


def heard(folder: PipelineFolder, prompts: Sequence[str]) -> Heard:
    """Count the prompts that the pipeline in `folder` truncates; duplicates count once."""
    words, stock = _tokenizers(folder), TextAndVAE(folder)
    limits = [_limit(stock, tokenizer) for tokenizer in words]
    lowers = hasattr(stock.kind, "_text_preprocessing")
    different = list(dict.fromkeys(prompts))
    seen: set[bytes] = set()
    cut = equal = 0
    for start in range(0, len(different), PART):
        texts = different[start : start + PART]
        if lowers:
            texts = [text.lower().strip() for text in texts]
        whole = [tokenizer(texts, verbose=False)["input_ids"] for tokenizer in words]
        short = [
            tokenizer(texts, truncation=True, max_length=limit)["input_ids"]
            for tokenizer, limit in zip(words, limits, strict=True)
        ]
        for i in range(len(texts)):
            cut += all(len(ids[i]) > limit for ids, limit in zip(whole, limits, strict=True))
            name = hashlib.sha256(repr([ids[i] for ids in short]).encode()).digest()
            equal += name in seen
            seen.add(name)
    return Heard(len(different), max(limits), cut, equal)


def _tokenizers(folder: PipelineFolder) -> list[Any]:
    transformers = require_library("transformers")
    return [
        getattr(transformers, folder.parts[part]).from_pretrained(
            folder.path / part, local_files_only=True
        )
        for part in sorted(folder.parts)
        if part.startswith("tokenizer")
    ]


def _limit(stock: TextAndVAE, tokenizer: Any) -> int:
    """The number of tokens of a prompt that its encoder takes, start and end included."""
    long = inspect.signature(stock.kind.__call__).parameters.get("max_sequence_length")
    if long is None or type(tokenizer).__name__.startswith("CLIP"):
        return int(tokenizer.model_max_length)
    instructed = bool(stock.settings.get("complex_human_instruction"))
    return int(long.default) - instructed  # SANA: the instruction takes the place of the start


def lost(card: Mapping[str, Any], prompts: Sequence[str]) -> str:
    """A sentence on prompts that the pipeline of a card truncates, or ""."""
    where = pipeline_card(card).get("folder")
    if where is None or not is_pipeline(where):
        return ""
    counts = heard(open_folder(where), prompts)
    parts = []
    if counts.cut:
        are = "is" if counts.cut == 1 else "are"
        parts.append(
            f"{counts.cut:,} of {counts.prompts:,} different prompts {are} longer than the "
            f"{counts.tokens} tokens that the text encoder hears, and cut there"
        )
    if counts.equal:
        which = f"{counts.equal:,}" + (
            "" if parts else f" of {counts.prompts:,} different prompts"
        )
        parts.append(f"{which} cannot be told from an earlier one by the text encoder")
    return "; ".join(parts)
