"""Check that the parts of a pipeline folder fit each other, before anything is loaded.

A part of another pipeline often does not fail: prompts are cut or padded, latents have another
scale, tokens that the encoder does not have become the unknown one. So sizes are compared, from
configurations, headers and tokenizers alone:

    tokenizer's vocabulary  =  encoder's      its longest text  <=  encoder's positions
    encoders' widths        =  network's      VAE's latent channels  =  network's in and out
    every file's tensors    =  those of its configuration
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fewstep.teachers.diffusers import parts
from fewstep.teachers.diffusers.adapter_base import Adapter
from fewstep.teachers.diffusers.completed_config import number
from fewstep.teachers.diffusers.folder import PipelineFolder

PADDED = (64, 128, 256, 512)
"""Vocabularies are filled up to a multiple of one of these, for the speed of it."""
LONGEST = 10_000
"""Tokens that a tokenizer may say its encoder hears."""


def check(folder: PipelineFolder, adapter: Adapter) -> None:
    """Raise ValueError, in a sentence, where parts of `folder` do not fit each other.

    adapter: its network, on any device; no number of it is read.
    """
    home = folder.path / folder.family.network
    stored = parts.tensors(folder.files[folder.family.network], meta=True)
    parts.fit(adapter.net.state_dict(), stored, home)
    _latents(folder, adapter)
    encoders = {part: folder.text_config(part) for part in folder.encoders}
    _widths(folder, adapter, encoders)
    for part in folder.encoders:
        name = part.replace("text_encoder", "tokenizer")
        _words(folder, name, parts.tokenizer(folder, name), part, encoders[part])
    for part in folder.encoders:
        parts.text_encoder(folder, part, meta=True)
    parts.vae(folder, meta=True)


def _latents(folder: PipelineFolder, adapter: Adapter) -> None:
    """The VAE's latents are the network's samples, and are scaled by numbers."""
    config, where, kind = folder.config("vae"), folder.config_path("vae"), folder.vae_kind
    name, net = folder.family.network, folder.config(folder.family.network)
    made, taken = config[kind.channels] * kind.folded**2, adapter.shape(net)[0]
    if made != taken:
        raise ValueError(
            f"{folder.path}: {name} takes {taken} channels, but the latents of vae have {made}; "
            "networks that take more than the latents, such as those of inpainting, are not "
            "distilled, and a VAE of another pipeline does not fit"
        )
    given = adapter.channels(net)
    if given != taken and not (adapter.learned_variance and given == 2 * taken):
        raise ValueError(f"{folder.path}: {name} takes {taken} channels and answers with {given}")
    colours = config[kind.colours], config.get("out_channels", 3)
    if colours != (3, 3):
        raise ValueError(f"{where}: pictures have 3 channels, not {colours[0]} and {colours[1]}")
    moments(folder)


def moments(folder: PipelineFolder) -> tuple[list[float], list[float]]:
    """Mean and standard deviation of the VAE's own latents where x_0 has 0 and 1, by channel.

    As the stock pipeline has them: it reads some keys and passes over others.
    """
    family, config, where = folder.family, folder.config("vae"), folder.config_path("vae")
    if folder.vae_kind.normalised:
        return _normalisation(folder, config)
    scale, shift = 1.0, 0.0
    if "scaling_factor" in family.vae_keys:
        scale = number(config, "scaling_factor", where)
    if not scale > 0:
        raise ValueError(f"{where}: scaling_factor should be positive, got {scale:g}")
    if "shift_factor" in family.vae_keys:
        shift = number(config, "shift_factor", where)
    means, stds = config.get("latents_mean"), config.get("latents_std")
    if "latents_mean" not in family.vae_keys or means is None or stds is None:
        return [shift], [1 / scale]
    channels = config[folder.vae_kind.channels]
    for key, values in (("latents_mean", means), ("latents_std", stds)):
        if not isinstance(values, list | tuple) or len(values) != channels:
            raise ValueError(f"{where}: {key} should be {channels} numbers, got {values!r:.80}")
    return (
        [number({"latents_mean": v}, "latents_mean", where) for v in means],
        [number({"latents_std": v}, "latents_std", where) / scale for v in stds],
    )


def _normalisation(
    folder: PipelineFolder, config: Mapping[str, Any]
) -> tuple[list[float], list[float]]:
    """The statistics of a VAE's layer `bn`, as numbers by channel."""
    mean, variance = parts.stored(folder.files["vae"], "bn.running_mean", "bn.running_var")
    added = number(config, "batch_norm_eps", folder.config_path("vae"))
    return mean.tolist(), (variance + added).sqrt().tolist()


def _widths(folder: PipelineFolder, adapter: Adapter, encoders: dict[str, Any]) -> None:
    """Check that the widths of the encoders are those that the network's condition has."""
    family = folder.family
    shapes = adapter.shapes(1)
    if shapes.keys() != set(family.tensors):
        raise ValueError(
            f"{folder.path}: {family.network} hears {', '.join(shapes)}, but a {folder.pipeline} "
            f"says {', '.join(family.tensors)}; this network is of another kind of pipeline"
        )
    for tensor, sources in family.widths.items():
        there = [part for part in sources if part in encoders]
        if there != list(sources):
            continue  # an encoder that may be missing, whose words are zeros then
        width = sum(_width(folder, part, encoders[part], tensor) for part in there)
        if width != shapes[tensor][-1]:
            raise ValueError(
                f"{folder.path}: {' and '.join(there)} {'make' if len(there) > 1 else 'makes'} "
                f"a {tensor} of width {width}, but {family.network} hears "
                f"{shapes[tensor][-1]}; they are of different pipelines"
            )
    padded = sum(_width(folder, part, encoders[part], "prompt") for part in family.padded)
    if padded > shapes["prompt"][-1]:
        raise ValueError(
            f"{folder.path}: {' and '.join(family.padded)} make a prompt of width {padded}, more "
            f"than the {shapes['prompt'][-1]} that {family.network} hears"
        )


def _width(folder: PipelineFolder, part: str, config: Any, tensor: str) -> int:
    """Width of what an encoder gives to a tensor of the condition."""
    projected = tensor == "pooled" and folder.parts[part].endswith("WithProjection")
    if projected:
        return int(config.projection_dim)
    return int(config.get_text_config().hidden_size) * folder.family.layers


def _words(folder: PipelineFolder, name: str, words: Any, part: str, config: Any) -> None:
    """The tokenizer's tokens, and as many as it makes of a text, are those of its encoder."""
    config = config.get_text_config()
    known, heard = len(words), int(config.vocab_size)
    padded = {-(-known // size) * size for size in PADDED}
    if heard != known and heard not in padded:
        raise ValueError(
            f"{folder.path}: {name} has {known} tokens, but {part} hears {heard}; the vocabulary "
            "is of another model, or not all of it is there"
        )
    positions = getattr(config, "max_position_embeddings", None)
    if "CLIP" in folder.parts[part] and positions is not None:
        length = longest(folder, name, words)
        if length > positions:
            raise ValueError(
                f"{folder.path}: {name} makes {length} tokens of a text, but {part} hears "
                f"{positions} at most"
            )


def longest(folder: PipelineFolder, name: str, words: Any) -> int:
    """The largest number of tokens that a tokenizer makes of a text, by its configuration."""
    length = words.model_max_length
    if isinstance(length, bool) or not isinstance(length, int) or not 1 <= length <= LONGEST:
        raise ValueError(
            f"{folder.path / name / 'tokenizer_config.json'}: model_max_length should be 1 to "
            f"{LONGEST}, got {length}"
        )
    return length
