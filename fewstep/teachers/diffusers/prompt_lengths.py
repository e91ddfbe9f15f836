"""Which prompts a pipeline truncates, and which become equal by that.

A text encoder hears so many tokens (77 of CLIP, 120 to 512 of T5 and Gemma) and is not told the
rest. Stock pipelines cut prompts there; two prompts that differ only behind it are one condition.
The tokenizers alone say where, so nothing is encoded here.
"""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Callable, Mapping, Sequence
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
    if hasattr(stock.kind, "_text_preprocessing"):
        return counted(words, limits, prompts, lambda text: text.lower().strip())
    return counted(words, limits, prompts)


def counted(
    tokenizers: Sequence[Any],
    limits: Sequence[int],
    prompts: Sequence[str],
    prepared: Callable[[str], str] = str,
) -> Heard:
    """Count the prompts that are truncated by text encoders; duplicates count once.

    Arguments:
        tokenizers, limits: those of the encoders, and how many tokens each of them takes.
        prompts: any number of them.
        prepared: what is done to a prompt first.
    """
    different = list(dict.fromkeys(prompts))
    seen: set[bytes] = set()
    cut = equal = 0
    for start in range(0, len(different), PART):
        texts = [prepared(text) for text in different[start : start + PART]]
        whole = [tokenizer(texts, verbose=False)["input_ids"] for tokenizer in tokenizers]
        short = [
            tokenizer(texts, truncation=True, max_length=limit)["input_ids"]
            for tokenizer, limit in zip(tokenizers, limits, strict=True)
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
    # SANA: the instruction takes the place of the start
    return int(long.default) - instructed - stock.folder.family.template


def lost(card: Mapping[str, Any], prompts: Sequence[str]) -> str:
    """A sentence on prompts that the pipeline of a card truncates, or ""."""
    where = pipeline_card(card).get("folder")
    if where is None or not is_pipeline(where):
        return ""
    return sentence(heard(open_folder(where), prompts), "the text encoder")


def sentence(counts: Heard, hearer: str) -> str:
    """What `hearer` does not hear of prompts as a sentence, or "" where it hears all."""
    parts = []
    if counts.cut:
        are = "is" if counts.cut == 1 else "are"
        parts.append(
            f"{counts.cut:,} of {counts.prompts:,} different prompts {are} longer than the "
            f"{counts.tokens} tokens that {hearer} hears, and cut there"
        )
    if counts.equal:
        which = f"{counts.equal:,}" + (
            "" if parts else f" of {counts.prompts:,} different prompts"
        )
        parts.append(f"{which} cannot be told from an earlier one by {hearer}")
    return "; ".join(parts)
