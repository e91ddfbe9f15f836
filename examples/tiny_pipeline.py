"""Distil a diffusers pipeline from prompts, and sample the result with stock diffusers.

The pipeline is built here, tiny and untrained, so its pictures mean nothing; with a folder of your
own, such as stable-diffusion-v1-5, everything below `tiny` stays as it is but for the batch.
Needs pip install 'fewstep[t2i]'. Run: python examples/tiny_pipeline.py
"""

import json
import tempfile
from dataclasses import replace
from pathlib import Path

import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from fewstep import FewStep, Optim
from fewstep.domains.prompts import Prompts
from fewstep.export.formats import export
from fewstep.recipes.text_to_image import t2i
from fewstep.runs.runner import Step, execute


def tiny(folder: Path) -> Path:
    """A Stable Diffusion pipeline of 70 thousand weights; its output layer is small, so that it
    is nearly the exact denoiser of standard normal latents, as a trained one is of pictures."""
    letters = [chr(c) for c in range(97, 123)]
    words = [*letters, *(f"{c}</w>" for c in letters), "<|startoftext|>", "<|endoftext|>"]
    (folder / "words").mkdir(parents=True)
    (folder / "words/vocab.json").write_text(json.dumps({w: i for i, w in enumerate(words)}))
    (folder / "words/merges.txt").write_text("#version: 0.2\n")
    tokenizer = CLIPTokenizer.from_pretrained(folder / "words", model_max_length=16)
    encoder = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=16,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    unet = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8, 16),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=16,
        attention_head_dim=4,
        norm_num_groups=4,
    )
    with torch.no_grad():
        unet.conv_out.weight.mul_(0.05)
        unet.conv_out.bias.mul_(0.05)
    scheduler = DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type="v_prediction",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
    )
    pipeline = StableDiffusionPipeline(
        vae=AutoencoderKL(
            block_out_channels=(8, 8),
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            norm_num_groups=4,
        ),
        text_encoder=CLIPTextModel(encoder),
        tokenizer=tokenizer,
        unet=unet,
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.save_pretrained(folder / "teacher")
    return folder / "teacher"


if __name__ == "__main__":
    torch.manual_seed(0)
    home = Path(tempfile.mkdtemp(prefix="tiny-pipeline-"))
    teacher = tiny(home)
    prompts = home / "prompts.txt"
    prompts.write_text("a red cube\na blue ball\na small fox\n")

    run = t2i()
    run = replace(
        run,
        domain=Prompts(str(prompts)),
        method=replace(run.method, sampler=FewStep(999.0, 4, unit=True)),
        steps=40,
        batch=8,
        accumulate=2,
        optim=Optim(lr=1e-4, betas=(0.0, 0.999)),
        sample_every=20,
        save_every=20,
    )
    for progress in execute(run, home / "run", recipe="t2i", teacher=str(teacher)):
        if isinstance(progress, Step) and progress.step % 10 == 0:
            print(f"step {progress.step} of {progress.steps}")

    difference = export(home / "run", home / "student", "diffusers")
    print(f"the exported pipeline differs from the student by {difference:.0e} of its range")
    student = StableDiffusionPipeline.from_pretrained(home / "student")
    student.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    four = student("a small fox", num_inference_steps=4, guidance_scale=1.0, generator=generator)
    print(f"one picture of {four.images[0].size} pixels in {home}/student")
