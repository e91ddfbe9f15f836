"""A student for ComfyUI: its network, and a workflow of stock nodes with the right steps.

    OUT/workflow.json                        in ComfyUI's API format
    OUT/diffusion_models/OUT.safetensors     the network, under diffusers' names
    OUT/README.md

ComfyUI counts in sigma = sigma_t / alpha_t on betas and in t on flows, and begins with sigma z;
only at the last timestep of betas does it begin with unit noise. `ManualSigmas` gives it any
steps, "lcm" renoises with fresh noise, and "euler" goes on with the noise that was found, which
on betas is DDIM. There is no guidance: `BasicGuider` makes one call a step.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fewstep.diffusion.generator import Generator
from fewstep.diffusion.model import Model
from fewstep.diffusion.noise_path import Flow
from fewstep.diffusion.samplers import FewStep
from fewstep.export.atomic_output import new_output
from fewstep.export.client_metadata import PUBLISHED, example, sidecars
from fewstep.export.diffusers_pipeline import network_file, or_else, plain_of_pipeline
from fewstep.export.model_card import card
from fewstep.export.traced_generator import Given, examples, within
from fewstep.storage.files import read_json, write, write_json
from fewstep.storage.model_folder import load_student
from fewstep.teachers.diffusers.folder import PipelineFolder
from fewstep.teachers.diffusers.load import origin_folder
from fewstep.teachers.diffusers.network import DiffusersNet
from fewstep.teachers.diffusers.scheduler_config import Timesteps
from fewstep.teachers.diffusers.text_and_vae import TextAndVAE

Workflow = dict[str, dict[str, Any]]
PIPELINES = ("StableDiffusionPipeline", "StableDiffusionXLPipeline", "StableDiffusion3Pipeline")
"""Of which ComfyUI reads the networks under diffusers' names."""
NODES: Mapping[str, tuple[Mapping[str, str], tuple[str, ...]]] = {
    "UNETLoader": ({"unet_name": "", "weight_dtype": ""}, ("MODEL",)),
    "CheckpointLoaderSimple": ({"ckpt_name": ""}, ("MODEL", "CLIP", "VAE")),
    "LoraLoaderModelOnly": (
        {"model": "MODEL", "lora_name": "", "strength_model": ""},
        ("MODEL",),
    ),
    "ModelSamplingDiscrete": ({"model": "MODEL", "sampling": "", "zsnr": ""}, ("MODEL",)),
    "T5TokenizerOptions": ({"clip": "CLIP", "min_padding": "", "min_length": ""}, ("CLIP",)),
    "CLIPTextEncode": ({"clip": "CLIP", "text": ""}, ("CONDITIONING",)),
    "EmptyLatentImage": ({"width": "", "height": "", "batch_size": ""}, ("LATENT",)),
    "EmptySD3LatentImage": ({"width": "", "height": "", "batch_size": ""}, ("LATENT",)),
    "RandomNoise": ({"noise_seed": ""}, ("NOISE",)),
    "BasicGuider": ({"model": "MODEL", "conditioning": "CONDITIONING"}, ("GUIDER",)),
    "KSamplerSelect": ({"sampler_name": ""}, ("SAMPLER",)),
    "ManualSigmas": ({"sigmas": ""}, ("SIGMAS",)),
    "SamplerCustomAdvanced": (
        {
            **{"noise": "NOISE", "guider": "GUIDER", "sampler": "SAMPLER"},
            **{"sigmas": "SIGMAS", "latent_image": "LATENT"},
        },
        ("LATENT", "LATENT"),
    ),
    "VAEDecode": ({"samples": "LATENT", "vae": "VAE"}, ("IMAGE",)),
    "SaveImage": ({"images": "IMAGE", "filename_prefix": ""}, ()),
}
"""The stock nodes that are used: what each takes, "" for a value, and what it gives."""
NUMBER = re.compile(r"[-+]?\d*\.*\d+")
"""What ManualSigmas takes for a number; there are no exponents."""
TOLERANCE = 1e-5


def to_comfyui(run: Path, out: Path) -> float:
    """Write network and workflow of the student of a run into the folder `out`, new or empty.

    The workflow's own numbers are followed as ComfyUI follows them. Returns the largest difference
    from the student, relative to the student's largest number.
    """
    student = plain_of_pipeline(load_student(run), run)
    folder = origin_folder(student)
    if folder.pipeline not in PIPELINES:
        raise ValueError(
            f"ComfyUI reads no network of a {folder.pipeline} under diffusers' names; "
            f"it reads those of {', '.join(PIPELINES)}"
        )
    shown = example(student, run)
    with new_output(out) as place:
        (place / "diffusion_models").mkdir(parents=True)
        name, base = f"{out.name}.safetensors", f"{folder.path.name}.safetensors"
        with or_else():
            flow = workflow(student, name, base, t5=t5_tokens(folder))
        write_json(place / "workflow.json", flow)
        file = place / "diffusion_models" / name
        network_file(student, folder, file, shown)
        sidecars(student, folder.pipeline, file, shown)
        difference = workflow_difference(read_json(place / "workflow.json"), student)
        within(difference, TOLERANCE, student, "workflow")
        assert student.model is not None
        cautions = [text for text in (caution(student.model), without_t5(folder)) if text]
        facts = {"sigmas": sigmas(student), "caution": "; ".join(cautions) or None}
        picture = (shown.prompt, f"diffusion_models/{out.name}.png")
        text = card(student, run, _use(out.name, name, base), facts, picture=picture)
        write(place / "README.md", text)
    return difference


def caution(model: Model) -> str:
    """What a person should know of a network whose sizes are not the published ones, or ""."""
    net = model.net
    assert isinstance(net, DiffusersNet)
    config, known = json.loads(net.config), [sizes for _, sizes in PUBLISHED[net.class_name]]
    if any(all(config.get(key) == size for key, size in sizes.items()) for sizes in known):
        return ""
    square = config.get("num_layers") == config.get("num_attention_heads")
    if (
        net.class_name == "SD3Transformer2DModel"
        and square
        and config.get("attention_head_dim") == 64
    ):
        return ""  # ComfyUI takes an SD3 to have a block for every 64 channels, as many as heads
    dimensions = ", ".join(f"{key} {config.get(key)}" for key in known[0])
    return (
        "ComfyUI's UNETLoader tells a network by the published sizes of Stable Diffusion 1 and 2, "
        f"SDXL and SD3, and this one has others ({dimensions}); it will likely not be loaded"
    )


def workflow(
    student: Generator, network: str, base: str, adapter: bool = False, t5: int = 0
) -> Workflow:
    """The nodes of one picture.

    Arguments:
        network: the name of the student's file in ComfyUI's folder of networks, or of adapters.
        base: the name of the teacher's checkpoint.
        adapter: whether the student is an adapter of the network in `base`.
        t5: of `t5_tokens`.
    ValueError where stock nodes cannot follow the student's steps.
    """
    sampler, path, model = student.sampler, student.denoiser.path, student.model
    assert model is not None
    if not isinstance(sampler, FewStep):
        raise ValueError(f"the student is sampled by {sampler}, which no stock nodes follow")
    if sampler.noise == "fixed" and sampler.steps > 1:
        raise ValueError(
            f"no sampler of ComfyUI repeats the same noise, as {sampler} does; --to pt2 can"
        )
    (height, width), flow = student.denoiser.net.size, isinstance(path, Flow)
    nodes: Workflow = {}

    def add(kind: str, **inputs: Any) -> str:
        nodes[str(len(nodes) + 1)] = {"class_type": kind, "inputs": inputs}
        return str(len(nodes))

    rest = add("CheckpointLoaderSimple", ckpt_name=base)
    if adapter:
        net = add("LoraLoaderModelOnly", model=[rest, 0], lora_name=network, strength_model=1.0)
    else:
        net = add("UNETLoader", unet_name=network, weight_dtype="default")
    if not flow:
        kind = {"eps": "eps", "v": "v_prediction"}[model.predicts]
        net = add("ModelSamplingDiscrete", model=[net, 0], sampling=kind, zsnr=False)
    words: list[Any] = [rest, 1]
    if t5:
        words = [add("T5TokenizerOptions", clip=words, min_padding=0, min_length=t5), 0]
    prompt = add("CLIPTextEncode", clip=words, text="a prompt")
    empty = "EmptySD3LatentImage" if flow else "EmptyLatentImage"
    drawn = add(
        "SamplerCustomAdvanced",
        noise=[add("RandomNoise", noise_seed=0), 0],
        guider=[add("BasicGuider", model=[net, 0], conditioning=[prompt, 0]), 0],
        sampler=[add("KSamplerSelect", sampler_name=_sampler(sampler)), 0],
        sigmas=[add("ManualSigmas", sigmas=sigmas(student)), 0],
        latent_image=[add(empty, width=width, height=height, batch_size=1), 0],
    )
    picture = add("VAEDecode", samples=[drawn, 0], vae=[rest, 2])
    add("SaveImage", images=[picture, 0], filename_prefix=Path(network).stem)
    check_workflow(nodes)
    return nodes


def t5_tokens(folder: PipelineFolder) -> int:
    """Tokens of T5 that the network hears of every prompt, 0 where the pipeline has no T5.

    ComfyUI fills up to 77 by itself, diffusers to 256, and no mask hides the empty ones.
    """
    if "text_encoder_3" not in folder.encoders:
        return 0
    return int(TextAndVAE(folder).settings["max_sequence_length"])


def without_t5(folder: PipelineFolder) -> str:
    """What a person should know of a pipeline that could have a T5 and has none, or ""."""
    if "text_encoder_3" not in folder.left_out:
        return ""
    return (
        "diffusers has empty tokens in the place of a T5 that is missing, and ComfyUI has none: "
        "its pictures differ from the student's"
    )


def _sampler(sampler: FewStep) -> str:
    return "lcm" if sampler.noise == "fresh" and sampler.steps > 1 else "euler"


def sigmas(student: Generator) -> str:
    """What ManualSigmas is given: the student's ladder in ComfyUI's sigma, and 0.

    ValueError where ComfyUI has no such sigmas.
    """
    sampler, path = student.sampler, student.denoiser.path
    assert isinstance(sampler, FewStep)
    ladder = sampler.ladder(path)
    if isinstance(path, Flow):
        found = ladder
    elif path != Timesteps():
        raise ValueError(
            f"ComfyUI has betas of its own for such models, {Timesteps()}, not those of {path}"
        )
    else:
        found = [float(sigma_table()[int(t)]) for t in ladder]
        if sampler.unit != (ladder[0] == path.t_max):
            raise ValueError(
                f"ComfyUI begins with unit noise at {path.t_max:g} and with sigma z below, but "
                f"{sampler} does not; say unit=True there and nowhere else"
            )
    return ", ".join(f"{sigma:.9f}" for sigma in [*found, 0.0])


def sigma_table() -> Tensor:
    """sigma of every timestep of Stable Diffusion, as ComfyUI has it: (1000,)."""
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    abar = (1 - betas).cumprod(0)
    return ((1 - abar) / abar).sqrt().float()


def check_workflow(nodes: Workflow) -> None:
    """A ValueError unless every node has the inputs it takes, of the types they have."""
    for number, node in nodes.items():
        inputs, _ = NODES[node["class_type"]]
        if node["inputs"].keys() != inputs.keys():
            raise ValueError(f"{node['class_type']} takes {', '.join(inputs)}")
        for name, kind in inputs.items():
            value = node["inputs"][name]
            if isinstance(value, list) != bool(kind):
                raise ValueError(f"node {number}: {name} is not of type {kind or 'value'}")
            if kind and NODES[nodes[value[0]]["class_type"]][1][value[1]] != kind:
                raise ValueError(f"node {number}: {name} is not of type {kind}")


def workflow_difference(nodes: Workflow, student: Generator) -> float:
    """Largest difference of what ComfyUI would make of the same noise, relative."""
    inputs = examples(student, 2)
    z, noise = inputs.pop("z"), inputs.pop("noise", None)
    noises = () if noise is None else noise.unbind(1)
    with torch.no_grad():
        reference = student.sampler(student.denoiser, z, inputs, Given(z, noises=noises))
        theirs = run_workflow(nodes, student.denoiser.net, z, noises, inputs)
    return float((theirs - reference).abs().max() / reference.abs().max())


def run_workflow(
    nodes: Workflow, net: Any, z: Tensor, noises: tuple[Tensor, ...], cond: dict[str, Tensor]
) -> Tensor:
    """Latents of a workflow: ComfyUI's arithmetic with the network F(x, label, cond).

    z: (B, *) what RandomNoise draws; noises: what the sampler draws later.
    """
    given = {node["class_type"]: node["inputs"] for node in nodes.values()}
    sigmas = [float(s) for s in NUMBER.findall(given["ManualSigmas"]["sigmas"])]
    kind = given.get("ModelSamplingDiscrete", {}).get("sampling", "flow")
    unit = kind != "flow" and sigmas[0] >= float(sigma_table()[-1]) * (1 - 1e-5)
    x = z * ((1 + sigmas[0] ** 2) ** 0.5 if unit else sigmas[0])
    left = iter(noises)
    for sigma, after in pairwise(sigmas):
        denoised = _denoised(kind, net, x, sigma, cond)
        if given["KSamplerSelect"]["sampler_name"] == "euler":
            x = x + (x - denoised) / sigma * (after - sigma)
        elif after:
            x = (1 - after if kind == "flow" else 1) * denoised + after * next(left)
        else:
            x = denoised
    return x


def _denoised(kind: str, net: Any, x: Tensor, sigma: float, cond: dict[str, Tensor]) -> Tensor:
    """x_0 at sigma, of x = x_0 + sigma eps on betas, (1 - sigma) x_0 + sigma eps on flows."""
    if kind == "flow":
        velocity: Tensor = net(x, x.new_full((len(x),), sigma), cond)
        return x - sigma * velocity
    size = (1 + sigma**2) ** 0.5
    t = (sigma_table().log() - torch.tensor(sigma).log()).abs().argmin()
    out: Tensor = net(x / size, t.expand(len(x)).to(x), cond)
    return x - sigma * out if kind == "eps" else x / size**2 - sigma / size * out


def _use(folder: str, network: str, base: str) -> str:
    return f"""# {network} goes into ComfyUI's models/diffusion_models. Text encoders and VAE
# come from {base} in its models/checkpoints: the teacher as one file, which is not
# written here and which you have to have; give CheckpointLoaderSimple the name of yours.
# Then drop workflow.json onto ComfyUI, or:
import json
import urllib.request
from pathlib import Path

work = {{"prompt": json.loads(Path("{folder}/workflow.json").read_text())}}
urllib.request.urlopen("http://127.0.0.1:8188/prompt", json.dumps(work).encode())
"""
