"""A teacher from a folder says what stock diffusers computes with the same folder.

The reference is diffusers' own pipeline, loaded by its own `from_pretrained`, and its scheduler's
own prediction of x_0; tolerances are a few roundings of float32.
"""

from __future__ import annotations

import inspect
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.conftest import Folders

pytest.importorskip("diffusers")
pytest.importorskip("transformers")

import diffusers

from fewstep.config import decode, encode
from fewstep.diffusion.guidance import CFG
from fewstep.diffusion.noise_path import Flow, coefficients
from fewstep.teachers.diffusers.adapters import ADAPTERS
from fewstep.teachers.diffusers.load import load_pipeline
from fewstep.teachers.diffusers.scheduler_config import Timesteps
from tests.tiny_pipelines import FLOWS, KINDS

PROMPTS = ["a red cube", "the small ball on a blue cube"]
TIMES = (3, 261, 500, 958)
each_kind = pytest.mark.parametrize("kind", KINDS)


def stock(folder: Any) -> Any:
    """The folder as diffusers loads it."""
    return diffusers.DiffusionPipeline.from_pretrained(folder, local_files_only=True)


def encoded(pipe: Any, kind: str) -> dict[str, Tensor]:
    """What the whole stock pipeline makes of PROMPTS, conditional and null."""
    more: dict[str, Any] = {"device": "cpu", "num_images_per_prompt": 1}
    if kind.startswith("flux"):
        with torch.no_grad():
            out = *pipe.encode_prompt(PROMPTS, **more)[:2], *pipe.encode_prompt([""], **more)[:2]
        return dict(zip(("prompt", "pooled", "-prompt", "-pooled"), out, strict=True))
    more["do_classifier_free_guidance"] = True
    if kind == "sd3":
        more |= {"prompt_2": None, "prompt_3": None}
    if kind == "sana":
        defaults = inspect.signature(type(pipe).__call__).parameters
        more["complex_human_instruction"] = defaults["complex_human_instruction"].default
    with torch.no_grad():
        out = pipe.encode_prompt(prompt=PROMPTS, **more)
    if kind in ("sd", "sd_v"):
        names = ("prompt", "-prompt")
    elif kind in ("sdxl", "sd3"):
        names = ("prompt", "-prompt", "pooled", "-pooled")
    else:
        names = ("prompt", "mask", "-prompt", "-mask")
    return dict(zip(names, out, strict=True))


def raw(pipe: Any, kind: str, xt: Tensor, t: Tensor, told: dict[str, Tensor]) -> Tensor:
    """The output of the stock network, called as its pipeline calls it."""
    net = getattr(pipe, "unet", None) or pipe.transformer
    named: dict[str, Any] = {"encoder_hidden_states": told["prompt"], "return_dict": False}
    if kind == "sdxl":
        ids = pipe._get_add_time_ids((16, 16), (0, 0), (16, 16), xt.dtype, 16)
        named["added_cond_kwargs"] = {
            "text_embeds": told["pooled"],
            "time_ids": ids.repeat(len(xt), 1),
        }
    if kind == "sd3" or kind.startswith("flux"):
        named["pooled_projections"] = told["pooled"].expand(len(xt), -1)
    if kind.startswith("flux"):
        return packed(pipe, kind, xt, t, named)
    if kind.startswith(("pixart", "sana")):
        named["encoder_attention_mask"] = told["mask"]
    if kind == "pixart_sized":
        size = torch.tensor([16.0, 16.0]).repeat(len(xt), 1)
        aspect = torch.tensor([1.0]).repeat(len(xt), 1)
        named["added_cond_kwargs"] = {"resolution": size, "aspect_ratio": aspect}
    if kind in ("pixart", "pixart_sigma"):
        named["added_cond_kwargs"] = {"resolution": None, "aspect_ratio": None}
    with torch.no_grad():
        out = net(xt, timestep=t.expand(len(xt)), **named)[0]
    return out[:, : xt.shape[1]]


def packed(pipe: Any, kind: str, xt: Tensor, t: Tensor, named: dict[str, Any]) -> Tensor:
    """FLUX as its pipeline calls it, by the pipeline's own packing and numbering."""
    named["encoder_hidden_states"] = named["encoder_hidden_states"].expand(len(xt), -1, -1)
    named["txt_ids"] = torch.zeros(named["encoder_hidden_states"].shape[1], 3)
    named["img_ids"] = pipe._prepare_latent_image_ids(2, 4, 4, "cpu", xt.dtype)
    if kind == "flux_guided":
        named["guidance"] = torch.full([1], 3.5).expand(len(xt))
    tokens = pipe._pack_latents(xt, 2, 4, 8, 8)
    with torch.no_grad():
        out = pipe.transformer(tokens, timestep=t.expand(len(xt)) / 1000, **named)[0]
    return pipe._unpack_latents(out, 16, 16, 2)


def x0(pipe: Any, out: Tensor, t: int, xt: Tensor) -> Tensor:
    """x_0 by the stock scheduler; a flow's is the end of one Euler step from t to 0."""
    s = pipe.scheduler
    if isinstance(s, diffusers.DDIMScheduler):
        s.set_timesteps(10)
        return s.step(out, t, xt).pred_original_sample
    if isinstance(s, diffusers.FlowMatchEulerDiscreteScheduler):
        plain = diffusers.FlowMatchEulerDiscreteScheduler(shift=1.0)
        plain.set_timesteps(sigmas=[t / 1000])
        return plain.step(out, plain.timesteps[0], xt).prev_sample
    s.set_timesteps(1000)
    index = int((s.timesteps - t).abs().argmin())
    s._step_index = index
    if s.config.use_flow_sigmas:
        s.sigmas[index] = t / 1000  # shifted sigmas do not meet t itself
    return s.convert_model_output(out, sample=xt)


def some(kind: str) -> tuple[Tensor, Tensor]:
    """An x_t and a t."""
    torch.manual_seed(3)
    return torch.randn(2, 4, 8, 8), torch.tensor(0.4 if kind in FLOWS else 400.0)


@each_kind
def test_x0_is_that_of_the_stock_network_and_scheduler(folders: Folders, kind: str) -> None:
    pipe, teacher = stock(folders(kind)), load_pipeline(folders(kind))
    told = encoded(pipe, kind)
    ours = teacher.text(PROMPTS)
    null = {name[1:]: told[name] for name in told if name[0] == "-"}
    flow = isinstance(teacher.denoiser.path, Flow)
    torch.manual_seed(1)
    for t in TIMES:
        xt = torch.randn(2, 4, 8, 8)
        at = torch.tensor(t / 1000 if flow else float(t))
        for cond, reference in ((ours, told), (None, null)):
            out = raw(pipe, kind, xt, torch.tensor(t), reference)
            expected = x0(pipe, out, t, xt)
            found = teacher.denoiser(xt, at, cond)
            assert (found - expected).abs().max() <= 2e-5 * expected.abs().max(), (t, cond is None)
        assert (out - raw(pipe, kind, xt, torch.tensor(t), told)).abs().max() > 1e-3  # heard


@each_kind
def test_conditions_are_the_pipelines_own(folders: Folders, kind: str) -> None:
    teacher = load_pipeline(folders(kind))
    told = encoded(stock(folders(kind)), kind)
    ours, null = teacher.text(PROMPTS), teacher.denoiser.net.null()
    assert ours.keys() == null.keys() == {name for name in told if name[0] != "-"}
    for name, value in ours.items():
        assert torch.equal(value, told[name].float()), name
        assert torch.allclose(null[name], told[f"-{name}"][0].float(), atol=1e-6), name
    if kind == "sdxl":
        assert not null["prompt"].any()  # force_zeros_for_empty_prompt
    elif kind != "sana":  # the tiny Gemma hears nothing in nothing
        assert null["prompt"].any()


@each_kind
def test_the_codec_is_the_pipelines_own(folders: Folders, kind: str) -> None:
    pipe, teacher = stock(folders(kind)), load_pipeline(folders(kind))
    torch.manual_seed(2)
    z = torch.randn(1, 4, 8, 8)
    config = pipe.vae.config
    shift = getattr(config, "shift_factor", None) or 0.0
    with torch.no_grad():
        expected = pipe.vae.decode(z / config.scaling_factor + shift, return_dict=False)[0]
        picture = torch.rand(1, 3, 32, 32) * 2 - 1
        found = pipe.vae.encode(picture)
        latent = found.latent if kind == "sana" else found.latent_dist.mean
    assert torch.allclose(teacher.decode(z), expected, atol=1e-6)
    assert torch.allclose(teacher.encode(picture), (latent - shift) * config.scaling_factor)


@each_kind
def test_the_description_rebuilds_the_network(folders: Folders, kind: str) -> None:
    """From its JSON, as a student's folder does; null prompt included."""
    teacher = load_pipeline(folders(kind))
    again = decode(encode(teacher.model), type(teacher.model)).build()
    again.load_state_dict(teacher.denoiser.state_dict())
    xt, t = some(kind)
    assert torch.equal(again(xt, t), teacher.denoiser(xt, t))


@each_kind
def test_the_tap_hears_the_middle(folders: Folders, kind: str) -> None:
    """The same features alone and beside the answer; the answer depends on them and the label."""
    denoiser = load_pipeline(folders(kind)).denoiser
    xt, t = some(kind)
    features = denoiser.encode(xt, t)
    out, beside = denoiser.forward_with_features(xt, t)
    assert torch.equal(features, beside)
    assert torch.equal(out, denoiser(xt, t))
    assert features.shape[:2] == (2, 24 if "pixart" in kind else 16)
    moved = denoiser.encode(xt, t * 0.5)
    assert (moved - features).abs().max() > 1e-4
    net, gone = denoiser.net.net, []
    last = net.conv_out if kind.startswith("sd") and kind != "sd3" else net.proj_out
    handle = last.register_forward_hook(lambda *_: gone.append(1))
    denoiser.encode(xt, t)
    handle.remove()
    assert gone == []  # what comes after is not computed


def test_the_size_of_flux(folders: Folders, tmp_path: Path) -> None:
    """What its folder says, or its pipeline's own; odd sizes are refused."""
    folder = tmp_path / "pipe"
    shutil.copytree(folders("flux"), folder)
    path = folder / "transformer" / "config.json"
    config = json.loads(path.read_text())
    for size, shape in ((32, (4, 32, 32)), (None, (4, 128, 128))):
        told = {key: value for key, value in config.items() if key != "sample_size"}
        path.write_text(json.dumps(told if size is None else {**told, "sample_size": size}))
        model = load_pipeline(folder).model
        assert (model.shape, model.net.pixels) == (shape, 2 * shape[1])
    path.write_text(json.dumps({**config, "sample_size": 9}))
    with pytest.raises(ValueError, match="FLUX needs an even sample_size"):
        load_pipeline(folder)


@pytest.mark.parametrize(("kind", "scale"), [("sd", 1.0), ("sd", 7.5), ("sdxl", 4.0)])
def test_the_default_sampler_is_ddim(folders: Folders, kind: str, scale: float) -> None:
    """Fifty steps of the stock pipeline, unguided or guided, on the same noise."""
    pipe, teacher = stock(folders(kind)), load_pipeline(folders(kind))
    config = {**pipe.scheduler.config, "timestep_spacing": "trailing", "set_alpha_to_one": True}
    pipe.scheduler = diffusers.DDIMScheduler.from_config(config)
    pipe.set_progress_bar_config(disable=True)
    torch.manual_seed(7)
    z = torch.randn(1, 4, 8, 8)
    named = {"num_inference_steps": 50, "guidance_scale": scale, "output_type": "latent"}
    expected = pipe("a red cube", latents=z, height=16, width=16, **named).images
    cond = teacher.text(["a red cube"])
    found = CFG(teacher.sampler, scale)(teacher.denoiser, z, cond)
    assert (found - expected).abs().max() < 1e-4 * expected.abs().max()
    if scale > 1:
        plain = teacher.sampler(teacher.denoiser, z, cond)
        assert (plain - expected).abs().max() > 1e-3 * expected.abs().max()


def test_sizes_reach_sdxl(folders: Folders) -> None:
    """Other added conditions, other answers."""
    adapter = load_pipeline(folders("sdxl")).denoiser.net
    torch.manual_seed(6)
    x, label = torch.randn(1, 4, 8, 8), torch.tensor([500.0])
    told = {k: v[None] for k, v in adapter.null().items()}
    base = adapter(x, label, told)
    assert (adapter(x, label, {**told, "pooled": told["pooled"] + 1}) - base).abs().max() > 1e-4
    adapter.time_ids[4:] = 8.0
    assert (adapter(x, label, told) - base).abs().max() > 1e-4


@pytest.mark.parametrize(
    ("cond", "message"),
    [
        (torch.zeros(2), "a condition is a mapping of prompt; got Tensor"),
        ({"text": torch.zeros(2)}, "a condition is a mapping of prompt; got text"),
        (
            {"prompt": torch.zeros(2, 7, 16)},
            r"cond\['prompt'\] has shape \(2, 7, 16\), expected \(2, 8, 16\)",
        ),
    ],
)
def test_wrong_conditions_are_refused(folders: Folders, cond: Any, message: str) -> None:
    teacher = load_pipeline(folders("sd"))
    with pytest.raises(ValueError, match=message):
        teacher.denoiser(torch.zeros(2, 4, 8, 8), torch.tensor(5.0), cond)


def test_adapters_cover_the_known_families() -> None:
    from fewstep.teachers.diffusers.families import FAMILIES

    assert {family.network_class for family in FAMILIES.values()} == set(ADAPTERS)
    alpha, sigma = coefficients(Timesteps(), torch.zeros(1, 1), torch.tensor([625.0]))
    assert abs(float(sigma) - 0.9286) < 1e-3  # SiD-LSG's first call
    assert abs(float(alpha) - 0.3711) < 1e-3
