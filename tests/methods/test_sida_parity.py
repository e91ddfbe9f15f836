"""One whole iteration of the official SiDA code, replayed by our method, network and loop.

Both of its adversarial losses are compared sample by sample too. They are averaged over the
batch as recorded, four samples in one part: the parts of an accumulated batch are another loss.
With L_D in units of its sum over the batch and n pixels, the official total of the fake score is
s (sum over pixels) + s_D L_D, so that `Critic.scale` = s_D / s; the student's is one half of
s_G (sum over pixels) + s_GAN n L_GAN, so that `SiDA.gan` = s_GAN / s_G and `share` = 1/2.

Not seen here: the clamp at logits of 10, since the recorded ones are near 0, and the clipping of
the fake score's gradients to 1, since they are recorded before it and Adam's first step does not
feel it. Augment labels are zeros in both halves.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from fewstep.diffusion.samplers import FewStep
from fewstep.diffusion.time_distributions import Karras
from fewstep.diffusion.types import Batch
from fewstep.distillation import discriminator
from fewstep.distillation.critic import Critic
from fewstep.distillation.fake_score import NoisedSamples
from fewstep.losses.weight import L1
from fewstep.methods.sida import SiDA
from tests.recorded_steps import (
    MARKS,
    Recording,
    Replay,
    Replayed,
    Unaugmented,
    errors,
    in_double,
    missed,
)

ALL = {"x_g", "elem", "judged", "total", "grads", "after"}


@pytest.fixture(scope="module", params=["step_sida", "step_sida_cond"])
def gold(request: pytest.FixtureRequest) -> Recording:
    return Recording.named(request.param)


def method(gold: Recording, controls: Any = None, critic: Any = None, **changes: Any) -> Replayed:
    """SiDA as recorded, but for `changes` and those of its `critic`."""
    c = gold.config
    fake = Critic(**{"scale": c["lsd"] / c["ls"]} | (critic or {}))
    settings = {"alpha": c["alpha"], "times": Karras(tmax=c["tmax"]), "fake": fake}
    settings["gan"] = c["lsg_gan"] / c["lsg"]
    inner = SiDA(FewStep(c["init_sigma"]), **settings | changes)
    return Replayed(inner.sampler, inner, ("fake", "student"), **controls or {})


def missing(gold: Recording, *changes: Any, accumulate: int = 1, **more: Any) -> set[str]:
    return missed(errors(gold, method(gold, *changes, **more), accumulate=accumulate))


def test_iteration_is_the_recorded_one(gold):
    found = errors(gold, method(gold))
    assert set(found) == {f"{half}/{key}" for half in ("psi", "gen") for key in ALL} | {
        "gen/ema",
        "gen/ema move",
    }
    assert missed(found) == set()


def test_recorded_student_loss_is_itself_rounded_by_as_much(gold):
    """As for SiD: float64 is 1.3e-5 away from the recording too."""
    assert MARKS["elem"] < in_double(gold, method(gold)) < MARKS["gen/elem"]


def test_the_defaults_are_the_recorded_settings(gold):
    assert method(gold).inner == SiDA()


def test_recorded_gradients_were_not_yet_clipped(gold):
    """Their values exceed the official bound of 1, so that the marks hold without clipping."""
    largest = max(float(g.abs().max()) for g in gold["grads_fake"].values())
    assert largest > 100


def test_features_are_compared_with_augment_labels_of_zeros(gold):
    net, x, t = gold.net("fake"), gold["draws"]["z_g"], torch.tensor(2.5)
    assert torch.equal(Unaugmented(net).encode(x, t), net.encode(x, t))
    for one, other in zip(
        Unaugmented(net).forward_with_features(x, t),
        net.forward_with_features(x, t),
        strict=True,
    ):
        assert torch.equal(one, other)
    for net in ("fake", "student"):
        assert not gold[f"grads_{net}"]["model.map_augment.weight"].any()


def test_control_each_sample_judged_by_itself(gold):
    """The weight of sample i must not multiply the loss of sample i."""
    found = missing(gold, None, {"average": "sample"})
    assert found >= {"psi/judged", "psi/grads", "gen/judged", "gen/grads"}
    assert not found & {"psi/elem", "psi/x_g", "gen/x_g"}


def test_control_accumulated_parts_are_another_loss(gold):
    found = missing(gold, accumulate=2)
    assert found >= {"psi/judged", "psi/grads", "gen/judged", "gen/grads"}
    assert not found & {"psi/elem", "psi/x_g", "gen/x_g"}


def test_control_real_samples_with_noise_of_their_own(gold, monkeypatch):
    beside = discriminator.Discriminator._beside

    def own(self: Any, path: Any, x0: Tensor, n: NoisedSamples, batch: Batch) -> Tensor:
        draws: Any = batch.draws
        other = {**draws.values, "eps": draws.values["eps"].flip(0)}
        return beside(self, path, x0, n, batch._replace(draws=Replay(other)))  # type: ignore[arg-type]

    monkeypatch.setattr(discriminator.Discriminator, "_beside", own)
    found = missing(gold)
    assert found >= {"psi/judged", "psi/grads"}
    assert not found & {"psi/elem", "psi/x_g"}


def test_control_real_samples_without_their_labels(gold, monkeypatch):
    """Where there are labels, the judgement of real samples must hear them."""
    real = Unaugmented.encode
    monkeypatch.setattr(Unaugmented, "encode", lambda self, xt, t, cond: real(self, xt, t))
    found = missing(gold)
    assert ({"psi/judged", "psi/grads"} <= found) == bool(gold.kwargs["label_dim"])
    assert not found & {"psi/elem", "psi/x_g"}


def test_control_student_first(gold):
    """The student's half must see the critic after its update."""
    found = missing(gold, {"order": ("student", "fake")})
    assert found >= {"gen/elem", "gen/total", "gen/grads", "psi/elem"}


@dataclass(frozen=True)
class Attached(L1):
    """An L1 weight that passes gradient on to the sample and to the teacher's prediction."""

    def __call__(self, x: Tensor, real: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        return (x - real).abs().mean((1, 2, 3), keepdim=True).reciprocal()


@pytest.mark.parametrize("name", ["weight", "gan_weight"])
def test_control_gradient_through_a_weight(gold, name):
    """Losses are the same; gradients are not."""
    found = missing(gold, **{name: Attached()})
    assert "gen/grads" in found
    assert not found & {"gen/elem", "gen/judged", "gen/total"}


def test_control_features_without_gradient(gold, monkeypatch):
    """A student that does not feel the critic; a critic that feels nothing of its judgement."""
    real = Unaugmented.forward_with_features

    def cut(self: Unaugmented, *args: Any) -> tuple[Tensor, Tensor]:
        told, features = real(self, *args)
        return told, features.detach()

    monkeypatch.setattr(Unaugmented, "forward_with_features", cut)
    found = missing(gold)
    assert {"psi/grads", "gen/grads"} <= found
    assert not found & {"psi/elem", "psi/judged", "psi/total"}


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"critic": {"scale": 1.01}}, {"psi/total", "psi/grads"}),
        ({"critic": {"pool": "space"}}, {"psi/judged", "psi/grads", "gen/judged"}),
        ({"gan": 1e-2}, {"gen/total", "gen/grads"}),
        ({"share": 0.51}, {"gen/total", "gen/grads"}),
        ({"alpha": 1.2}, {"gen/elem", "gen/total"}),
    ],
)
def test_control_other_settings(gold, changes, expected):
    assert expected <= missing(gold, **changes)
