"""A transformer in one file: SD3's, whose other parts come from a folder.

The layouts of Stable Diffusion and SDXL are in tests/export/test_checkpoint.py, with the export
that writes them. diffusers converts FLUX.1 at its published width alone, too large for a test.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from fewstep.teachers.diffusers.load import load_pipeline
from fewstep.teachers.diffusers.single_file import convert_checkpoint, layout_of
from tests.conftest import Folders

pytest.importorskip("diffusers")
pytest.importorskip("transformers")

PLAIN = {
    "pos_embed.proj": "x_embedder.proj",
    "context_embedder": "context_embedder",
    "time_text_embed.timestep_embedder.linear_1": "t_embedder.mlp.0",
    "time_text_embed.timestep_embedder.linear_2": "t_embedder.mlp.2",
    "time_text_embed.text_embedder.linear_1": "y_embedder.mlp.0",
    "time_text_embed.text_embedder.linear_2": "y_embedder.mlp.2",
    "proj_out": "final_layer.linear",
}
SAMPLE = {
    "attn.to_out.0": "attn.proj",
    "norm1.linear": "adaLN_modulation.1",
    "ff.net.0.proj": "mlp.fc1",
    "ff.net.2": "mlp.fc2",
}
CONTEXT = {
    "attn.to_add_out": "attn.proj",
    "norm1_context.linear": "adaLN_modulation.1",
    "ff_context.net.0.proj": "mlp.fc1",
    "ff_context.net.2": "mlp.fc2",
}


def swapped(tensor: Tensor) -> Tensor:
    """Scale and shift, which diffusers has the other way round."""
    return torch.cat(list(reversed(tensor.chunk(2))))


def sd3_names(state: dict[str, Tensor], layers: int = 2) -> dict[str, Tensor]:
    """A tiny SD3 transformer's tensors under the names of Stability's code."""
    out = {"pos_embed": state["pos_embed.pos_embed"]}
    for end in ("weight", "bias"):
        out |= {f"{its}.{end}": state[f"{mine}.{end}"] for mine, its in PLAIN.items()}
        out[f"final_layer.adaLN_modulation.1.{end}"] = swapped(state[f"norm_out.linear.{end}"])
        for i in range(layers):
            here, there = f"transformer_blocks.{i}", f"joint_blocks.{i}"
            joined = [state[f"{here}.attn.to_{letter}.{end}"] for letter in "qkv"]
            added = [state[f"{here}.attn.add_{letter}_proj.{end}"] for letter in "qkv"]
            out[f"{there}.x_block.attn.qkv.{end}"] = torch.cat(joined)
            out[f"{there}.context_block.attn.qkv.{end}"] = torch.cat(added)
            for mine, its in SAMPLE.items():
                out[f"{there}.x_block.{its}.{end}"] = state[f"{here}.{mine}.{end}"]
            for mine, its in CONTEXT.items():
                if i < layers - 1:
                    out[f"{there}.context_block.{its}.{end}"] = state[f"{here}.{mine}.{end}"]
        last = f"transformer_blocks.{layers - 1}.norm1_context.linear.{end}"
        place = f"joint_blocks.{layers - 1}.context_block.adaLN_modulation.1.{end}"
        out[place] = swapped(state[last])
    return {f"model.diffusion_model.{k}": t.contiguous().clone() for k, t in out.items()}


def test_sd3_from_its_transformer_alone(folders: Folders, tmp_path: Path) -> None:
    """Text encoders and autoencoder are the folder's; the network is the file's."""
    folder = folders("sd3")
    state = load_file(folder / "transformer" / "diffusion_pytorch_model.safetensors")
    moved = {name: tensor * 1.1 for name, tensor in state.items()}
    save_file(sd3_names(moved), tmp_path / "sd3.safetensors")
    layout = convert_checkpoint(tmp_path / "sd3.safetensors", tmp_path / "made", folder)
    assert layout.name == "Stable Diffusion 3"
    again = load_file(tmp_path / "made" / "transformer" / "diffusion_pytorch_model.safetensors")
    assert again.keys() == moved.keys()
    assert all(torch.equal(again[name], tensor) for name, tensor in moved.items())
    teacher: Any = load_pipeline(tmp_path / "made")
    old: Any = load_pipeline(folder)
    for name, words in teacher.text(["a cat"]).items():
        assert torch.equal(words, old.text(["a cat"])[name])
    z = torch.randn(1, 4, 8, 8)
    assert torch.equal(teacher.decode(z), old.decode(z))
    x, t = torch.randn(1, 4, 8, 8), torch.tensor([0.5])
    assert not torch.allclose(teacher.denoiser(x, t), old.denoiser(x, t), atol=1e-4)


def test_a_folder_without_what_the_file_lacks(folders: Folders, tmp_path: Path) -> None:
    """Configurations alone do not make a pipeline of a transformer."""
    folder = tmp_path / "words"
    shutil.copytree(folders("sd3"), folder)
    (folder / "vae" / "diffusion_pytorch_model.safetensors").unlink()
    state = load_file(folder / "transformer" / "diffusion_pytorch_model.safetensors")
    save_file(sd3_names(state), tmp_path / "sd3.safetensors")
    told = r"lacks vae, text_encoder, text_encoder_2, text_encoder_3, which a whole pipeline"
    with pytest.raises(ValueError, match=told):
        convert_checkpoint(tmp_path / "sd3.safetensors", tmp_path / "made", folder)
    assert not (tmp_path / "made").exists()


def test_flux_is_told_by_its_names(tmp_path: Path) -> None:
    """FLUX.1, in both ways that its files are written; and not FLUX.2."""
    one = torch.zeros(1)
    for prefix in ("", "model.diffusion_model."):
        names = ("double_blocks.0.img_attn.qkv.weight", "double_blocks.0.img_mod.lin.weight")
        save_file({prefix + name: one.clone() for name in names}, tmp_path / "flux.safetensors")
        assert layout_of(tmp_path / "flux.safetensors").name == "FLUX.1"
    save_file(
        {"double_blocks.0.img_attn.x": one, "single_stream_modulation.lin.weight": one.clone()},
        tmp_path / "flux2.safetensors",
    )
    with pytest.raises(ValueError, match="in a layout that is known here"):
        layout_of(tmp_path / "flux2.safetensors")
