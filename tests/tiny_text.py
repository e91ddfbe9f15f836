"""Tiny random tokenizers and text encoders, built offline from configurations."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import transformers

WORDS = ("a", "red", "blue", "small", "cube", "ball", "of", "the", "on")


def clip_tokenizer(folder: Path) -> transformers.CLIPTokenizer:
    """One token a letter, or a whole word of `WORDS`."""
    folder.mkdir(parents=True, exist_ok=True)
    letters = [chr(c) for c in range(33, 127)]
    pieces = [*letters, *(f"{c}</w>" for c in letters)]
    merges: list[str] = []
    for word in WORDS:
        parts = [*word[:-1], f"{word[-1]}</w>"]
        while len(parts) > 1:
            merge = f"{parts[0]} {parts[1]}"
            parts[:2] = ["".join(parts[:2])]
            if merge not in merges:
                merges.append(merge)
                pieces.append(parts[0])
    pieces = list(dict.fromkeys([*pieces, "<|startoftext|>", "<|endoftext|>"]))
    (folder / "vocab.json").write_text(json.dumps({p: i for i, p in enumerate(pieces)}))
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]))
    return transformers.CLIPTokenizer.from_pretrained(folder, model_max_length=8)


def t5_tokenizer() -> transformers.T5Tokenizer:
    """A unigram tokenizer of letters and `WORDS`."""
    pieces = ["<pad>", "</s>", "<unk>", "▁", *(f"▁{w}" for w in WORDS)]
    pieces += [chr(c) for c in range(97, 123)]
    return transformers.T5Tokenizer(
        vocab=[(p, -float(i)) for i, p in enumerate(pieces)], extra_ids=0
    )


def clip(projection: bool, tokenizer: Any, width: int = 16) -> Any:
    config = transformers.CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=32,
        num_hidden_layers=3,
        num_attention_heads=2,
        max_position_embeddings=8,
        projection_dim=width,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    kind = transformers.CLIPTextModelWithProjection if projection else transformers.CLIPTextModel
    return kind(config).eval()


def t5(tokenizer: Any) -> Any:
    config = transformers.T5Config(
        vocab_size=len(tokenizer), d_model=32, d_kv=8, d_ff=32, num_layers=2, num_heads=2
    )
    return transformers.T5EncoderModel(config).eval()


def save_clip(folder: Path, side: int = 16) -> Path:
    """A random CLIP for pictures of `side` pixels, and its tokenizer."""
    torch.manual_seed(0)
    words = clip_tokenizer(folder / "words")
    small = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2}
    small |= {"num_attention_heads": 2}
    text = {"vocab_size": len(words), "max_position_embeddings": 8, **small}
    text |= {"bos_token_id": words.bos_token_id, "eos_token_id": words.eos_token_id}
    text |= {"pad_token_id": words.pad_token_id}
    vision = {"image_size": side, "patch_size": 8, **small}
    config = transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=12)
    model = transformers.CLIPModel(config).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p), alpha=0.2)
    model.save_pretrained(folder)
    words.save_pretrained(folder)
    return folder


CHAT = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
"""A chat template in the form of Qwen's."""


def qwen_tokenizer() -> transformers.Qwen2Tokenizer:
    """One token a byte, and Qwen's marks of a chat."""
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    letters = sorted(bytes_to_unicode().values())
    words = transformers.Qwen2Tokenizer(
        vocab={letter: i for i, letter in enumerate(letters)}, merges=[], model_max_length=4096
    )
    words.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    words.chat_template = CHAT
    return words


def qwen3(tokenizer: Any, layers: int, causal: bool = False) -> Any:
    config = transformers.Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=layers,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=4,
    )
    kind = transformers.Qwen3ForCausalLM if causal else transformers.Qwen3Model
    return kind(config).eval()


def qwen_vl(tokenizer: Any) -> Any:
    text = {"vocab_size": len(tokenizer), "hidden_size": 8, "intermediate_size": 8}
    text |= {"num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1}
    vision = {"depth": 1, "hidden_size": 8, "intermediate_size": 8, "num_heads": 2}
    vision |= {"out_hidden_size": 8, "fullatt_block_indexes": [0]}
    rope = {"rope_type": "default", "mrope_section": [1, 1, 0], "rope_theta": 1e4}
    config = transformers.Qwen2_5_VLConfig(
        text_config={**text, "rope_parameters": rope}, vision_config=vision
    )
    return transformers.Qwen2_5_VLForConditionalGeneration(config).eval()


def bert_tokenizer() -> transformers.BertTokenizer:
    """One token a letter, or a whole word of `WORDS`."""
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    letters = [chr(c) for c in range(97, 123)]
    pieces = [*special, *letters, *(f"##{c}" for c in letters), *(w for w in WORDS if len(w) > 1)]
    return transformers.BertTokenizer(
        vocab={piece: i for i, piece in enumerate(pieces)}, model_max_length=8
    )


def bert(tokenizer: Any) -> Any:
    config = transformers.BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=8,
    )
    return transformers.BertModel(config).eval()
