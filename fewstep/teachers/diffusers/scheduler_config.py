"""A scheduler's configuration as a noise path: which (alpha_t, sigma_t), predicting what.

The network of a pipeline was trained with the betas, or the flow, that its scheduler's
configuration records; which scheduler it is, and hence how it samples, does not matter here.

    VP     alpha_t^2 = prod (1 - beta),  t a timestep 0 .. 999; the network is told t itself
    flow   alpha_t = 1 - t, sigma_t = t; the network is told 1000 t

"shift" bends no path: it is a change of the sampling times, t = shift u / (1 + (shift - 1) u)
(Esser et al. 2024, https://arxiv.org/abs/2403.03206, equation 23). A dynamic shift is that of the
number of tokens in a picture, exp(mu) with mu linear between two sizes, as FLUX has it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor

from fewstep.diffusion.noise_path import VP, Flow, NoisePath
from fewstep.diffusion.samplers import FewStep, Heun
from fewstep.diffusion.time_distributions import Shifted
from fewstep.diffusion.types import Sampler
from fewstep.teachers.diffusers.completed_config import number

Predicts = Literal["eps", "v", "velocity"]
_PREDICTS: Mapping[str, Predicts] = {
    "epsilon": "eps",
    "v_prediction": "v",
    "flow_prediction": "velocity",
}
READ = (
    *("num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "trained_betas"),
    *("rescale_betas_zero_snr", "prediction_type", "use_flow_sigmas", "flow_shift", "shift"),
    *("use_dynamic_shifting", "base_shift", "max_shift", "base_image_seq_len"),
    *("max_image_seq_len", "time_shift_type"),
)
"""Keys of schedulers that say what the network was trained with, or when it is called."""
ONLY: Mapping[str, tuple[Any, ...]] = {"timestep_type": ("discrete",), "invert_sigmas": (False,)}
"""Keys with which a network is told another time -> the values with which it is not."""
SAMPLING = (
    *("algorithm_type", "solver_order", "solver_p", "solver_type", "lower_order_final"),
    *("euler_at_final", "disable_corrector", "predict_x0", "skip_prk_steps", "variance_type"),
    *("clip_sample", "clip_sample_range", "sample_max_value", "thresholding"),
    *("dynamic_thresholding_ratio", "set_alpha_to_one", "final_sigmas_type", "shift_terminal"),
    *("timestep_spacing", "steps_offset", "interpolation_type", "lambda_min_clipped"),
    *("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas", "use_lu_lambdas"),
    *("sigma_min", "sigma_max", "stochastic_sampling", "original_inference_steps"),
    "timestep_scaling",
)
"""Keys that change how a scheduler samples, and nothing about the network."""
FLOW_STEPS = 28
"""Steps of a teacher on a flow."""
SMALLEST = 2.0**-24
"""abar of a last timestep that should be pure noise; zero would put eps-networks at infinity."""


@dataclass(frozen=True)
class Timesteps(VP):
    """VP path whose network takes the timestep t itself, 0 .. steps - 1."""

    def label(self, t: Tensor) -> Tensor:
        """t itself."""
        return t


@dataclass(frozen=True)
class Schedule:
    """Noise path, prediction type and shift of a network, from its scheduler."""

    path: NoisePath
    predicts: Predicts
    shift: float = 1.0

    def sampler(self) -> Sampler:
        """The default sampler of the teacher: DDIM with 50 steps on betas, 28 of a flow."""
        if isinstance(self.path, Flow):
            return Heun(Shifted(self.shift, self.path.t_min), steps=FLOW_STEPS, order=1)
        top = self.path.t_max
        return FewStep(top, min(50, int(top)), "ddim", unit=True)


def schedule_of(
    config: Mapping[str, Any], kind: str, places: int = 4096, by_steps: bool = False
) -> Schedule:
    """The schedule of a scheduler of class `kind` with this completed configuration.

    places: tokens of a picture, for a shift that depends on them; by_steps: whether it also
    depends on the number of steps, by FLUX.2's formula. Raises ValueError for what is not known
    here.
    """
    for key, values in ONLY.items():
        if config.get(key, values[0]) not in values:
            raise ValueError(
                f"{kind} has {key} {config[key]!r}, with which a network is told another time; "
                f"fewstep knows {' and '.join(map(repr, values))}"
            )
    flow = kind.startswith("FlowMatch") or bool(config.get("use_flow_sigmas"))
    says = str(config.get("prediction_type", "flow_prediction" if flow else "epsilon"))
    if kind.startswith("FlowMatch"):
        says = "flow_prediction"
    if says not in _PREDICTS or flow != (says == "flow_prediction"):
        raise ValueError(
            f"{kind} has prediction_type {says!r}, which fewstep does not know there; it knows "
            "epsilon and v_prediction on betas, and flow_prediction on a flow"
        )
    if flow:
        return Schedule(Flow(), "velocity", _shift(config, kind, places, by_steps))
    return Schedule(_betas(config, kind), _PREDICTS[says])


def _shift(config: Mapping[str, Any], kind: str, places: int, by_steps: bool) -> float:
    """The shift of a flow's times."""
    if number(config, "num_train_timesteps", kind) != 1000:
        raise ValueError(
            f"{kind} has num_train_timesteps {config['num_train_timesteps']}; the network of a "
            "flow is told 1000 t, and with another number it would be told another time"
        )
    if config.get("use_dynamic_shifting"):
        shift = _by_steps(places) if by_steps else _dynamic(config, kind, places)
    else:
        shift = number(config, "shift" if "shift" in config else "flow_shift", kind)
    if not shift > 0:
        raise ValueError(f"{kind} shifts its times by {shift:g}, which should be positive")
    return shift


def _by_steps(places: int) -> float:
    """FLUX.2's shift for so many tokens in a teacher's steps, as diffusers has it."""
    from diffusers.pipelines.flux2.pipeline_flux2_klein import compute_empirical_mu

    return math.exp(compute_empirical_mu(image_seq_len=places, num_steps=FLOW_STEPS))


def _dynamic(config: Mapping[str, Any], kind: str, places: int) -> float:
    """The shift for so many tokens, from a line through two of them.

    A scheduler of betas and flows has no such line: its pipeline's is FLUX's.
    """
    line: dict[str, Any] = {"base_image_seq_len": 256, "max_image_seq_len": 4096}
    line |= {"base_shift": 0.5, "max_shift": 1.15, **config}
    few, many = (number(line, f"{end}_image_seq_len", kind) for end in ("base", "max"))
    low, high = number(line, "base_shift", kind), number(line, "max_shift", kind)
    if few == many:
        raise ValueError(f"{kind} has a shift by size, of two sizes that are both {few:g}")
    mu = low + (high - low) * (places - few) / (many - few)
    return math.exp(mu) if config.get("time_shift_type", "exponential") == "exponential" else mu


def _betas(config: Mapping[str, Any], kind: str) -> Timesteps:
    """The VP path of a DDPM-like scheduler."""
    law = config["beta_schedule"]
    start, end = number(config, "beta_start", kind), number(config, "beta_end", kind)
    steps = int(number(config, "num_train_timesteps", kind))
    if not (2 <= steps <= 100_000 and 0 < start < 1 and 0 < end < 1):
        raise ValueError(f"{kind} has no sensible betas: {start:g} to {end:g} in {steps} steps")
    rescale = bool(config.get("rescale_betas_zero_snr"))
    trained = config.get("trained_betas")
    if trained is None and not rescale and law in ("linear", "scaled_linear"):
        return Timesteps(start, end, steps, law)
    if trained is not None:
        betas = _trained(trained, kind)
    elif law == "squaredcos_cap_v2":
        betas = _cosine(steps)
    elif law in ("linear", "scaled_linear"):
        betas = _even(start, end, steps, 0.5 if law == "scaled_linear" else 1.0)
    else:
        raise ValueError(f"{kind} has beta_schedule {law!r}, which fewstep does not know")
    return Timesteps(betas=_zero_snr(betas) if rescale else betas)


def _trained(betas: Any, kind: str) -> tuple[float, ...]:
    """Betas that are listed one by one."""
    if not isinstance(betas, list | tuple) or not 2 <= len(betas) <= 100_000:
        raise ValueError(f"{kind}: trained_betas should be a list of numbers, got {betas!r:.80}")
    trained = tuple(number({"trained_betas": beta}, "trained_betas", kind) for beta in betas)
    if not all(0 < beta < 1 for beta in trained):
        raise ValueError(f"{kind}: trained_betas should be between 0 and 1")
    return trained


def _even(start: float, end: float, steps: int, power: float) -> tuple[float, ...]:
    a, b = start**power, end**power
    return tuple((a + (b - a) * i / (steps - 1)) ** (1 / power) for i in range(steps))


def _cosine(steps: int) -> tuple[float, ...]:
    """abar = cos^2 (Nichol & Dhariwal 2021, https://arxiv.org/abs/2102.09672, equation 17)."""

    def abar(u: float) -> float:
        return math.cos((u + 0.008) / 1.008 * math.pi / 2) ** 2

    return tuple(min(1 - abar((i + 1) / steps) / abar(i / steps), 0.999) for i in range(steps))


def _zero_snr(betas: tuple[float, ...]) -> tuple[float, ...]:
    """Betas whose last alpha is (almost) zero (Lin et al. 2023, 2305.08891, algorithm 1)."""
    roots, product = [], 1.0
    for beta in betas:
        product *= 1 - beta
        roots.append(math.sqrt(product))
    first, last = roots[0], roots[-1]
    abars = [((r - last) * first / (first - last)) ** 2 for r in roots]
    abars[-1] = SMALLEST
    return tuple(1 - now / before for before, now in zip([1.0, *abars], abars, strict=False))
