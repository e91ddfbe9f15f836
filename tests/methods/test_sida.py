"""SiDA beside SiD, its schedule, and the networks it can listen to."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from fewstep.diffusion.denoisers import EDM
from fewstep.diffusion.encoder_features import HasEncoderFeatures, require_encoder_features
from fewstep.diffusion.model import Model
from fewstep.diffusion.noise_path import VE, VP
from fewstep.diffusion.samplers import FewStep
from fewstep.distillation.critic import Critic
from fewstep.distillation.fake_score import FakeScore
from fewstep.distillation.guidance_scales import LSG, AntiCFG, Kappas, RandomLSG
from fewstep.distillation.method import Loss, Nets, Turn
from fewstep.losses.weight import SNR
from fewstep.methods.sid import SiD
from fewstep.methods.sida import SiDA
from fewstep.nets.mlp import MLP
from fewstep.teachers.gaussian import GaussianMixture
from fewstep.training.modes import training_only
from tests.instances import PARAMETERISATIONS
from tests.losses.test_adversarial import CLASSES, F64, MODEL, batch, network, scene

INDEX = torch.arange(12)


def run(turn: Turn, nets: Nets, teacher: Any) -> tuple[Loss, Tensor]:
    """A turn's loss, and its gradient as one vector."""
    teacher.requires_grad_(False)
    with training_only(nets, turn.net) as trained:
        loss = turn.loss(nets, teacher, batch(INDEX))
        grads = torch.autograd.grad(loss.total, [*trained.parameters()], allow_unused=True)
    return loss, torch.cat([g.flatten() for g in grads if g is not None])


@pytest.mark.parametrize("sampler", [FewStep(2.5), FewStep(2.5, 4)], ids=repr)
@pytest.mark.parametrize("guidance", [None, LSG(3.0)], ids=repr)
def test_without_its_share_it_is_sid(sampler: FewStep, guidance: Any) -> None:
    """Bit for bit: share = 0, and plain SiD before the adversarial term begins."""
    nets, teacher = scene()
    more = {"guidance": guidance} if guidance else {}
    sid = SiD(sampler, alpha=1.0, **more)
    none, later = SiDA(sampler, share=0.0, **more), SiDA(sampler, adversarial_from=9, **more)
    for step in range(4):
        expected, reference = run(sid.turns(step)[1], nets, teacher)
        for method in (none, later):
            loss, found = run(method.turns(step)[1], nets, teacher)
            assert torch.equal(loss.total, expected.total)
            assert torch.equal(found, reference)
        _, whole = run(replace(none, share=0.5, gan=1.0).turns(step)[1], nets, teacher)
        assert (whole - reference).norm() > 1e-2 * reference.norm()


def test_a_critic_that_does_not_judge_is_a_fake_score() -> None:
    nets, teacher = scene()
    quiet, loud = SiDA(fake=Critic(scale=0.0)), SiDA()
    loss, reference = run(SiD(fake=FakeScore()).turns(0)[0], nets, teacher)
    found, gradient = run(quiet.turns(0)[0], nets, teacher)
    assert torch.equal(found.total, loss.total)
    assert torch.equal(gradient, reference)
    _, other = run(loud.turns(0)[0], nets, teacher)
    assert (other - reference).norm() > 1e-2 * reference.norm()


def test_gradients_are_the_sum_of_both_terms() -> None:
    """(1 - share) SiD + share gan A: linear in share, and in gan."""
    nets, teacher = scene()

    def at(share: float, gan: float) -> Tensor:
        return run(SiDA(share=share, gan=gan, gan_weight=SNR()).turns(0)[1], nets, teacher)[1]

    score, adversarial = at(0.0, 1.0), at(1.0, 1.0)
    for share, gan in ((0.5, 1.0), (0.5, 0.02), (0.9, 3.0)):
        expected = (1 - share) * score + share * gan * adversarial
        torch.testing.assert_close(at(share, gan), expected, rtol=1e-9, atol=1e-12)
    with pytest.raises(ValueError, match=r"share is between 0 and 1, got 1\.5"):
        SiDA(share=1.5)
    for wrong in ({"gan": -1.0}, {"student_from": -1}, {"adversarial_from": -1}):
        with pytest.raises(ValueError, match=r"are 0 or more, got"):
            SiDA(**wrong)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"Critic.scale is 0 or more, got -1"):
        Critic(scale=-1.0)


def test_schedule() -> None:
    """The critic alone, then plain SiD, then both: told apart by what they log."""
    nets, teacher = scene()
    method = SiDA(student_from=3, adversarial_from=5, share=0.25, gan=1.0)
    for step in range(8):
        turns = method.turns(step)
        assert [turn.net for turn in turns] == ["fake", "student"][: 1 + (step >= 3)]
        assert set(run(turns[0], nets, teacher)[0].logs) == {
            "denoising",
            "discriminator",
            "discriminator_accuracy",
        }
        if step >= 3:
            loss, _ = run(turns[1], nets, teacher)
            assert bool(loss.logs) == (step >= 5)
            plain, _ = run(SiD(alpha=1.0).turns(0)[1], nets, teacher)
            assert torch.equal(loss.total, plain.total) == (step < 5)
    early = SiDA(student_from=5, adversarial_from=2)  # the later of both decides
    assert [len(early.turns(step)) for step in range(6)] == [1, 1, 1, 1, 1, 2]
    assert run(early.turns(5)[1], nets, teacher)[0].logs


def test_untapped_networks_are_refused() -> None:
    """As the fake score itself, and inside a denoiser."""

    class Deaf(torch.nn.Module):
        def forward(self, x: Tensor, label: Tensor, cond: Any = None) -> Tensor:
            return x

    nets, teacher = scene()
    mixture: Any = GaussianMixture.ring(CLASSES).double()
    for fake, name in ((mixture, "GaussianMixture"), (EDM(Deaf(), VE()), "Deaf")):
        nets["fake"] = fake
        sentence = (
            f"a discriminator reads an encoder, but {name} has no encoder features; "
            "give it the methods encode and forward_with_features "
            "(fewstep.diffusion.encoder_features)"
        )
        for turn in SiDA().turns(0):
            with pytest.raises(ValueError) as caught:  # noqa: PT011 (compared whole)
                turn.loss(nets, teacher, batch(INDEX))
            assert str(caught.value) == sentence
        for turn in SiDA(adversarial_from=9).turns(0)[1:]:
            assert turn.loss(nets, teacher, batch(INDEX)).total.isfinite()
    assert not isinstance(mixture, HasEncoderFeatures)
    net = network(1)
    assert require_encoder_features(net) is net


def test_data_are_needed_by_the_critic_alone() -> None:
    nets, teacher = scene()
    fake, student = SiDA().turns(0)
    without = batch(INDEX)._replace(x0=None)
    assert student.loss(nets, teacher, without).total.isfinite()
    with pytest.raises(ValueError, match=re.escape("Critic needs data but Batch.x0 is None")):
        fake.loss(nets, teacher, without)


@pytest.mark.parametrize("blocks", [0, 1, 2, 3, 4])
def test_the_tap_of_an_mlp(blocks: int) -> None:
    """Half of the blocks, rounded up, are heard; the answer is the network's."""
    model = Model(MLP(width=16, blocks=blocks), (2, 3), CLASSES)
    net = network(1, model).net
    x, label = torch.linspace(-1, 2, 30, dtype=F64).reshape(5, 2, 3), torch.linspace(0.1, 2, 5)
    label = label.double()
    for cond in (torch.arange(5) % CLASSES, None):
        answer, features = net.forward_with_features(x, label, cond)
        assert features.shape == (5, 16)
        assert torch.equal(answer, net(x, label, cond))
        assert torch.equal(features, net.encode(x, label, cond))
    for out, count in ((features, (blocks + 1) // 2), (answer, blocks)):
        net.zero_grad()
        out.sum().backward(retain_graph=True)
        named = [name.split(".") for name, p in net.named_parameters() if p.grad is not None]
        heard = {parts[1] for parts in named if parts[0] == "blocks"}
        assert heard == {str(k) for k in range(count)}


@pytest.mark.parametrize("predicts", PARAMETERISATIONS)
def test_the_tap_of_a_wrapped_network(predicts: Any) -> None:
    """encode and forward_with_features agree with the denoiser, and with the net within."""
    path = VP()
    net = network(1, replace(MODEL, path=path, predicts=predicts))
    b = batch(INDEX)
    for t in (torch.full((12,), 300.0, dtype=F64), torch.tensor(300.0, dtype=F64)):
        for cond in (b.cond, None):
            answer, features = net.forward_with_features(b.z, t, cond)
            assert torch.equal(answer, net(b.z, t, cond))
            assert torch.equal(features, net.encode(b.z, t, cond))
            label = path.label(t.expand(12))
            into = b.z / net.into(b.z, t) if predicts == "edm" else torch.ones_like(b.z)
            inner = net.net.encode(b.z / into, label, cond)
            torch.testing.assert_close(features, inner, rtol=1e-12, atol=1e-12)
        other = net.encode(b.z, t, (b.cond + 1) % CLASSES)
        assert (other - net.encode(b.z, t, b.cond)).abs().max() > 1e-2


@pytest.mark.parametrize("kind", [LSG, AntiCFG, RandomLSG, Kappas])
def test_a_share_of_one_or_more_is_refused(kind: Any) -> None:
    with pytest.raises(ValueError, match=rf"^{kind.__name__}.drop is a share below 1, got 1.5$"):
        kind(drop=1.5)
