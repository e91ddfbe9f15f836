"""A solver with numbers of its own as a scheduler of diffusers, which needs nothing of fewstep.

    x_(n+1) = sum_(j <= n) a_nj x_j + c_nj f_j,    x_1 = start z,

f_j being the prediction of x_0 by call j and the last row the sample. Its configuration holds
every number. This file lies beside it in an exported pipeline, which is therefore loaded with
`trust_remote_code=True`: read it first.
"""

from __future__ import annotations

from typing import Any

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from torch import Tensor


class FewstepSolver(SchedulerMixin, ConfigMixin):  # type: ignore[misc]
    """The scheduler.

    Args:
        timesteps: what the network is told, K numbers.
        alphas, sigmas: x_t = alpha x_0 + sigma eps, at these.
        a, c: rows of 1, 2, ..., K numbers, for states and for predictions of x_0.
        start: the first input, in units of normal noise.
        prediction_type: "epsilon", "v_prediction" or "flow_prediction": what the network says.
        num_train_timesteps: of the network.
    """

    order = 1

    @register_to_config  # type: ignore[untyped-decorator]
    def __init__(
        self,
        timesteps: list[float],
        alphas: list[float],
        sigmas: list[float],
        a: list[list[float]],
        c: list[list[float]],
        start: float = 1.0,
        prediction_type: str = "epsilon",
        num_train_timesteps: int = 1000,
    ) -> None:
        self.init_noise_sigma = start
        self.set_timesteps()

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: Any = None,
        timesteps: Any = None,
        sigmas: Any = None,
        mu: Any = None,
    ) -> None:
        """Begin anew; ValueError for another number of steps than its own.

        Times that a pipeline proposes are not taken: they are part of the solver.
        """
        config = self.settings
        count = len(config.timesteps)
        if num_inference_steps not in (None, count):
            raise ValueError(f"this solver has {count} steps, got {num_inference_steps}")
        self.num_inference_steps = count
        self.timesteps = torch.tensor(config.timesteps, device=device)
        self.states: list[Tensor] = []
        self.predictions: list[Tensor] = []

    @property
    def settings(self) -> Any:
        """Its configuration, as attributes."""
        return self.config

    def set_begin_index(self, begin_index: int = 0) -> None:
        """Some pipelines ask for it; ValueError unless it is 0."""
        if begin_index:
            raise ValueError("this solver starts at its first step")

    def scale_model_input(self, sample: Tensor, timestep: Any = None) -> Tensor:
        """The sample itself."""
        return sample

    def step(
        self, model_output: Tensor, timestep: Any, sample: Tensor, return_dict: bool = True
    ) -> Any:
        """The next state; the steps are taken in order."""
        n, config = len(self.states), self.settings
        alpha, sigma = config.alphas[n], config.sigmas[n]
        said = model_output.to(sample.dtype)
        if config.prediction_type == "epsilon":
            x0 = (sample - sigma * said) / alpha
        elif config.prediction_type == "v_prediction":
            x0 = alpha * sample - sigma * said
        else:
            x0 = sample - sigma * said
        self.states.append(sample)
        self.predictions.append(x0)
        out = torch.zeros_like(sample)
        for a, x in zip(config.a[n], self.states, strict=True):
            out = out + a * x if a else out
        for c, x in zip(config.c[n], self.predictions, strict=True):
            out = out + c * x if c else out
        # the second is what the pipelines of PixArt take where there is one step
        return {"prev_sample": out} if return_dict else (out, out)

    def __len__(self) -> int:
        return int(self.settings.num_train_timesteps)
