"""Which classes of text encoders and tokenizers a folder may name."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from tests.conftest import Folders

pytest.importorskip("transformers")

from fewstep.teachers.diffusers.families import is_text_class
from fewstep.teachers.diffusers.folder import open_folder
from fewstep.teachers.diffusers.load import load_pipeline


@pytest.mark.parametrize(
    ("name", "encoder", "tokenizer"),
    [
        ("BertModel", True, False),
        ("Qwen3ForCausalLM", True, False),
        ("BertTokenizer", False, True),
        ("Qwen2TokenizerFast", False, True),
        ("AutoModel", False, False),  # which would choose a class by the folder's words
        ("PretrainedConfig", False, False),
        ("pipeline", False, False),
        ("utils", False, False),
        ("models.bert.BertModel", False, False),
        ("NoSuchModel", False, False),
    ],
)
def test_classes_of_transformers(name: str, encoder: bool, tokenizer: bool) -> None:
    assert is_text_class(name, "text_encoder") is encoder
    assert is_text_class(name, "tokenizer_2") is tokenizer


def test_a_text_encoder_that_nobody_published_is_heard(folders: Folders, tmp_path: Path) -> None:
    """Its own words; a class that is none, and an encoder that stock cannot call, are refused."""
    teacher = load_pipeline(folders("sd_bert"))
    found = teacher.text(["red", "blue"])["prompt"]
    assert found.shape == (2, 8, 16)
    assert (found[0] - found[1]).abs().max() > 1e-2
    folder = tmp_path / "pipe"
    shutil.copytree(folders("sd_bert"), folder)
    path = folder / "model_index.json"
    index = json.loads(path.read_text())
    for entry, message in (
        (
            ["transformers", "AutoModel"],
            "transformers.AutoModel, which fewstep does not load; it ",
        ),
        (
            ["pipe", "BertModel"],
            "pipe.BertModel, which fewstep does not load; it knows the models",
        ),
    ):
        path.write_text(json.dumps({**index, "text_encoder": entry}))
        with pytest.raises(ValueError, match=message):
            open_folder(folder)
    path.write_text(json.dumps({**index, "text_encoder": ["transformers", "BertForMaskedLM"]}))
    with pytest.raises(ValueError, match=r"do not fit the configuration"):
        load_pipeline(folder)
