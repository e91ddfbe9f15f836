"""A teacher from a folder says what stock diffusers computes with the same folder.

The reference is diffusers' own pipeline, loaded by its own `from_pretrained`, and its scheduler's
own prediction of x_0; tolerances are a few roundings of float32.
"""

from __future__ import annotations

import inspect
import json
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from tests.conftest import Folders

pytest.importorskip("diffusers")
pytest.importorskip("transformers")

import diffusers

from fewstep.config import decode, encode
from fewstep.diffusion.generator import Generator
from fewstep.diffusion.guidance import CFG
from fewstep.diffusion.model import Model, OfTeacher
from fewstep.diffusion.noise_path import Flow, coefficients
from fewstep.diffusion.samplers import FewStep
from fewstep.teachers.diffusers.adapters import ADAPTERS
from fewstep.teachers.diffusers.load import at_shape, load_pipeline, sized
from fewstep.teachers.diffusers.scheduler_config import Timesteps
from tests.parameters import families
from tests.tiny_pipelines import FLOWS, KINDS

PROMPTS = ["a red cube", "the small ball on a blue cube"]
TIMES = (3, 261, 500, 958)
MODERN = ("flux2", "qwen_image", "z_image")
"""Kinds whose stock pipelines are called as a whole: one Euler step from t to 0 gives x_0."""


def stock(folder: Any) -> Any:
    """The folder as diffusers loads it."""
    return diffusers.DiffusionPipeline.from_pretrained(folder, local_files_only=True)


class Loaded(NamedTuple):
    """A folder by its kind, as diffusers loads it and as a teacher. Leave both as they are."""

    kind: str
    pipe: Any
    teacher: Generator


@pytest.fixture(scope="module", params=families(KINDS))
def loaded(folders: Folders, request: pytest.FixtureRequest) -> Loaded:
    folder = folders(request.param)
    return Loaded(request.param, stock(folder), load_pipeline(folder))


def encoded(pipe: Any, kind: str) -> dict[str, Tensor]:
    """What the whole stock pipeline makes of PROMPTS, conditional and null."""
    more: dict[str, Any] = {"device": "cpu", "num_images_per_prompt": 1}
    if kind in MODERN:
        return {**side_by_side(pipe, kind, PROMPTS, ""), **side_by_side(pipe, kind, [""], "-")}
    if kind.startswith("flux"):
        with torch.no_grad():
            out = *pipe.encode_prompt(PROMPTS, **more)[:2], *pipe.encode_prompt([""], **more)[:2]
        return dict(zip(("prompt", "pooled", "-prompt", "-pooled"), out, strict=True))
    more["do_classifier_free_guidance"] = True
    if kind in ("sd3", "sd35"):
        more |= {"prompt_2": None, "prompt_3": None}
    if kind == "sana":
        defaults = inspect.signature(type(pipe).__call__).parameters
        more["complex_human_instruction"] = defaults["complex_human_instruction"].default
    with torch.no_grad():
        out = pipe.encode_prompt(prompt=PROMPTS, **more)
    if kind in ("sd", "sd_v", "sd_bert"):
        names = ("prompt", "-prompt")
    elif kind in ("sdxl", "sd3", "sd35"):
        names = ("prompt", "-prompt", "pooled", "-pooled")
    else:
        names = ("prompt", "mask", "-prompt", "-mask")
    return dict(zip(names, out, strict=True))


def side_by_side(pipe: Any, kind: str, texts: list[str], sign: str) -> dict[str, Tensor]:
    """Prompts each encoded alone by the stock pipeline, 512 places each, and where words are."""
    with torch.no_grad():
        rows = [pipe.encode_prompt([text], device="cpu")[0][0] for text in texts]
    if kind == "flux2":
        return {f"{sign}prompt": torch.stack(rows)}
    words, mask = torch.zeros(len(rows), 512, rows[0].shape[1]), torch.zeros(len(rows), 512)
    for i, row in enumerate(rows):
        words[i, : len(row)], mask[i, : len(row)] = row, 1
    return {f"{sign}prompt": words, f"{sign}mask": mask}


def whole(pipe: Any, kind: str, xt: Tensor, t: float, texts: list[str]) -> Tensor:
    """x_0 by the stock pipeline: one step of its own loop from t to 0, without guidance."""
    pipe.set_progress_bar_config(disable=True)
    plain = diffusers.FlowMatchEulerDiscreteScheduler(shift=1.0)
    own, pipe.scheduler = pipe.scheduler, plain
    given = {"sigmas": [t], "num_inference_steps": 1, "output_type": "latent"}
    scale = {"qwen_image": "true_cfg_scale"}.get(kind, "guidance_scale")
    latents = pipe._pack_latents(xt, 2, 4, 8, 8) if kind == "qwen_image" else xt
    size = {"height": 16, "width": 16, scale: 0.0}
    out: Tensor = pipe(prompt=list(texts), latents=latents.clone(), **size, **given).images
    pipe.scheduler = own
    if kind == "qwen_image":
        return pipe._unpack_latents(out, 16, 16, pipe.vae_scale_factor)[:, :, 0]
    if kind == "flux2":
        mean, std = normalisation(pipe.vae)
        return (pipe._patchify_latents(out) - mean) / std
    return out


def normalisation(vae: Any) -> tuple[Tensor, Tensor]:
    """Of FLUX.2's folded latents."""
    variance = vae.bn.running_var.view(1, -1, 1, 1) + vae.config.batch_norm_eps
    return vae.bn.running_mean.view(1, -1, 1, 1), variance.sqrt()


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
    if kind in ("sd3", "sd35") or kind.startswith("flux"):
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
    shape = (2, 16, 4, 4) if kind == "flux2" else (2, 4, 8, 8)
    return torch.randn(shape), torch.tensor(0.4 if kind in FLOWS else 400.0)


def test_x0_is_that_of_the_stock_network_and_scheduler(loaded: Loaded) -> None:
    kind, pipe, teacher = loaded
    told = encoded(pipe, kind)
    ours = teacher.text(PROMPTS)
    null = {name[1:]: told[name] for name in told if name[0] == "-"}
    flow = isinstance(teacher.denoiser.path, Flow)
    torch.manual_seed(1)
    for t in TIMES[kind in MODERN :: 2 if kind in MODERN else 1]:
        xt = torch.randn(2, *teacher.shape)
        at = torch.tensor(t / 1000 if flow else float(t))
        for cond, reference in ((ours, told), (None, null)):
            if kind in MODERN:
                texts = [""] * 2 if cond is None else PROMPTS
                out = expected = whole(pipe, kind, xt, t / 1000, texts)
            else:
                out = raw(pipe, kind, xt, torch.tensor(t), reference)
                expected = x0(pipe, out, t, xt)
            found = teacher.denoiser(xt, at, cond)
            assert (found - expected).abs().max() <= 2e-5 * expected.abs().max(), (t, cond is None)
        assert (found - teacher.denoiser(xt, at, ours)).abs().max() > 1e-3 * min(
            1, t / 1e3
        )  # heard


def test_conditions_are_the_pipelines_own(loaded: Loaded) -> None:
    kind, pipe, teacher = loaded
    told = encoded(pipe, kind)
    ours, null = teacher.text(PROMPTS), teacher.denoiser.net.null()
    assert ours.keys() == null.keys() == {name for name in told if name[0] != "-"}
    for name, value in ours.items():
        if kind in MODERN:  # whose prompts were encoded one by one
            torch.testing.assert_close(value, told[name], rtol=1e-5, atol=1e-5)
        else:
            assert torch.equal(value, told[name].float()), name
        assert torch.allclose(null[name], told[f"-{name}"][0].float(), atol=1e-6), name
    if kind == "sdxl":
        assert not null["prompt"].any()  # force_zeros_for_empty_prompt
    elif kind != "sana":  # the tiny Gemma hears nothing in nothing
        assert null["prompt"].any()


def test_the_codec_is_the_pipelines_own(loaded: Loaded) -> None:
    kind, pipe, teacher = loaded
    torch.manual_seed(2)
    z = torch.randn(1, *teacher.shape)
    picture = torch.rand(1, 3, 32, 32) * 2 - 1
    if kind in ("flux2", "qwen_image"):
        with torch.no_grad():
            expected, latent = unusual_codec(pipe, kind, z, picture)
        torch.testing.assert_close(teacher.decode(z), expected, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(teacher.encode(picture), latent, rtol=1e-5, atol=1e-5)
        return
    config = pipe.vae.config
    shift = getattr(config, "shift_factor", None) or 0.0
    with torch.no_grad():
        expected = pipe.vae.decode(z / config.scaling_factor + shift, return_dict=False)[0]
        found = pipe.vae.encode(picture)
        latent = found.latent if kind == "sana" else found.latent_dist.mean
    assert torch.allclose(teacher.decode(z), expected, atol=1e-6)
    assert torch.allclose(teacher.encode(picture), (latent - shift) * config.scaling_factor)


def unusual_codec(pipe: Any, kind: str, z: Tensor, picture: Tensor) -> tuple[Tensor, Tensor]:
    """(decoded z, encoded picture) by the formulas of the stock pipelines."""
    if kind == "flux2":
        mean, std = normalisation(pipe.vae)
        decoded = pipe.vae.decode(pipe._unpatchify_latents(z * std + mean), return_dict=False)[0]
        return decoded, pipe._encode_vae_image(picture, None)
    config = pipe.vae.config
    mean, std = (
        torch.tensor(values).view(1, -1, 1, 1, 1)
        for values in (config.latents_mean, config.latents_std)
    )
    decoded = pipe.vae.decode(z[:, :, None] * std + mean, return_dict=False)[0][:, :, 0]
    latent = pipe.vae.encode(picture[:, :, None]).latent_dist.mean
    return decoded, ((latent - mean) / std)[:, :, 0]


def test_the_description_rebuilds_the_network(loaded: Loaded) -> None:
    """From its JSON, as a student's folder does; null prompt included."""
    kind, _, teacher = loaded
    again = decode(encode(teacher.model), type(teacher.model)).build()
    again.load_state_dict(teacher.denoiser.state_dict())
    xt, t = some(kind)
    assert torch.equal(again(xt, t), teacher.denoiser(xt, t))


def test_the_tap_hears_the_middle(loaded: Loaded) -> None:
    """The same features alone and beside the answer; the answer depends on them and the label."""
    kind, denoiser = loaded.kind, loaded.teacher.denoiser
    xt, t = some(kind)
    features = denoiser.encode(xt, t)
    out, beside = denoiser.forward_with_features(xt, t)
    assert torch.equal(features, beside)
    assert torch.equal(out, denoiser(xt, t))
    assert features.shape[:2] == (2, 24 if "pixart" in kind else 16)
    assert loaded.teacher.denoiser.net.feature_shape[0] == features.shape[1]
    moved = denoiser.encode(xt, t * 0.5)
    assert (moved - features).abs().max() > 1e-4
    net, gone = denoiser.net.net, []
    last = next(getattr(net, n) for n in ("conv_out", "proj_out", "layers") if hasattr(net, n))
    last = last[-1] if kind == "z_image" else last
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
    with pytest.raises(ValueError, match="these networks need an even sample_size"):
        load_pipeline(folder)


@pytest.mark.parametrize(("kind", "scale"), [("sd", 1.0), ("sdxl", 4.0)])
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
    adapter.scale = 1  # half the size
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


@pytest.mark.parametrize(
    "kind", ["sd", "sdxl", "pixart_sized", "sd3", "flux", "flux2", "qwen_image"]
)
def test_another_size_is_what_stock_makes_of_it(folders: Folders, kind: str) -> None:
    """16 x 24 pixels: one step of the stock pipeline, which is told the size, gives our x_0."""
    folder = folders(kind)
    pipe, teacher = stock(folder), load_pipeline(folder)
    square = teacher.sampler
    shape = sized(teacher.model, "24x16")
    assert shape == (teacher.shape[0], teacher.shape[1], teacher.shape[2] * 3 // 2)
    teacher = at_shape(teacher, shape)
    assert (teacher.sampler != square) == (kind in ("flux2", "qwen_image"))  # by number of tokens
    pipe.set_progress_bar_config(disable=True)
    torch.manual_seed(5)
    net, z = teacher.denoiser.net, torch.randn(1, *shape)
    flow = isinstance(teacher.denoiser.path, Flow)
    told = {"num_inference_steps": 1, "output_type": "latent", "latents": net.to_stock(z)}
    if flow:
        pipe.scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=1.0)
    else:
        kept = {"timestep_spacing": "trailing", "set_alpha_to_one": True, "clip_sample": False}
        betas = {"trained_betas": pipe.scheduler.betas.tolist()}
        pipe.scheduler = diffusers.DDIMScheduler(**betas, **kept)
    if kind == "pixart_sized":
        told["use_resolution_binning"] = False
        pipe.transformer.register_to_config(sample_size=128)  # of which alone stock tells sizes
    out = pipe(prompt="a red cube", **{"height": 16, "width": 24, **net.call}, **told).images
    found = teacher.denoiser(z, torch.tensor(1.0 if flow else 999.0), teacher.text(["a red cube"]))
    if net.scaled_latents:
        mean, std = normalisation(pipe.vae)
        out = (pipe._patchify_latents(out) - mean) / std
    torch.testing.assert_close(
        found, net.from_stock(out), rtol=1e-4, atol=1e-4 * float(found.abs().max())
    )
    with torch.no_grad():
        assert teacher.decode(z).shape == (1, 3, 16, 24)


def test_sizes_that_cannot_be_are_refused(folders: Folders) -> None:
    model = load_pipeline(folders("sd3")).model
    for size, message in {
        "24": "a size is WIDTHxHEIGHT in pixels, such as 1024x768, got '24'",
        "24x17": "this model makes pictures of multiples of 2 pixels, got 24x17",
        "0x16": "this model makes pictures of multiples of 2 pixels, got 0x16",
        "18x16": r"cut into squares of 2 x 2, which \(4, 8, 9\) does not allow",
        "36x16": r"has positions for 16 x 16, not for \(4, 8, 18\)",
    }.items():
        with pytest.raises(ValueError, match=message):
            sized(model, size)
    other = Model(OfTeacher(), (1, 8, 8))
    with pytest.raises(ValueError, match="--size is for text-to-image pipelines"):
        sized(other, "8x8")
    with pytest.raises(ValueError, match="only models of text-to-image pipelines are of any size"):
        at_shape(Generator(torch.nn.Identity(), FewStep(), (1, 8, 8), model=other), (1, 8, 16))
