"""A negative prompt: what guidance leads away from, in place of the null prompt.

    f_kappa = f(x_t, negative) + kappa (f(x_t, c) - f(x_t, negative))

The network of a pipeline holds the embedding of its null prompt, which guidance calls it with; a
negative prompt takes its place. It is encoded as the stock pipeline encodes its `negative_prompt`,
which some prepare otherwise than a prompt (SANA adds no instruction to it). Guidance is Ho &
Salimans 2022, https://arxiv.org/abs/2207.12598.
"""

from __future__ import annotations

from fewstep.diffusion.generator import Generator
from fewstep.teachers.diffusers.adapter_base import adapter_of
from fewstep.teachers.diffusers.load import origin_folder
from fewstep.teachers.diffusers.text_and_vae import TextAndVAE


def with_negative(generator: Generator, negative: str) -> Generator:
    """The same generator, guided away from the prompt `negative`; its network is changed.

    ValueError for a model that takes no prompts, and for an empty prompt.
    """
    net = adapter_of(generator.denoiser)
    if net is None or generator.text is None:
        raise ValueError("this model takes no prompts, and no negative prompt; leave it out")
    if not negative.strip():
        raise ValueError("the negative prompt is empty; leave it out")
    net.set_null(TextAndVAE(origin_folder(generator), generator.device).null(negative))
    return generator
