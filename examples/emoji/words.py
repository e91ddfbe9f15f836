"""A tokenizer of its own vocabulary, and a small CLIP text encoder that speaks it.

Byte-pair encoding (Sennrich et al. 2015, https://arxiv.org/abs/1508.07909) as CLIP does it: lower
case, whole bytes, "</w>" at the end of a word.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer


def tokenizer(texts: Sequence[str], vocabulary: int, tokens: int) -> Any:
    """A CLIPTokenizer of at most `vocabulary` tokens learnt on texts, for `tokens` a prompt."""
    made = CLIPTokenizer().train_new_from_iterator(texts, vocabulary, show_progress=False)
    made.model_max_length = tokens
    return made


def text_encoder(words: Any, width: int) -> Any:
    """A CLIPTextModel of two layers with weights drawn from torch's own state."""
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(words),
            hidden_size=width,
            intermediate_size=2 * width,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=words.model_max_length,
            projection_dim=width,
            bos_token_id=words.bos_token_id,
            eos_token_id=words.eos_token_id,
            pad_token_id=words.pad_token_id,
        )
    )


def numbers(words: Any, texts: Sequence[str]) -> Tensor:
    """(N, tokens) int64: the texts as the stock pipeline tokenizes them."""
    told = words(
        list(texts),
        padding="max_length",
        max_length=words.model_max_length,
        truncation=True,
        return_tensors="pt",
    )
    ids: Tensor = told.input_ids
    return ids
