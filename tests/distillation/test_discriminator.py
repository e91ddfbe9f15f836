"""The discriminator as one object: what it reads, trains, pays and tells, whatever its kind."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fewstep.diffusion.encoder_features import layer_features
from fewstep.diffusion.noise_path import VE, VP
from fewstep.diffusion.rng import Draws
from fewstep.diffusion.samplers import FewStep
from fewstep.diffusion.time_distributions import Discrete, LogNormal
from fewstep.diffusion.types import Batch
from fewstep.distillation.critic import Critic
from fewstep.distillation.discriminator import Discriminator
from fewstep.distillation.discriminator_head import DenoiserWithHead, Heads
from fewstep.distillation.fake_score import Rollout
from fewstep.distillation.guidance_scales import Unguided
from fewstep.distillation.method import Nets
from fewstep.distillation.pictures import PictureFeatures, give_decoder
from fewstep.losses.adversarial import GradientPenalty
from fewstep.losses.weight import Power
from fewstep.methods.dmd2 import DMD2
from fewstep.methods.f_distill import FDistill
from fewstep.methods.sida import SiDA
from fewstep.nets.lora import LoRA
from fewstep.training.modes import training_only
from tests.distillation.test_discriminator_head import MODELS, Bare, stirred

F64 = torch.float64
ROLLOUT = Rollout(FewStep(2.5), 1)
LAYERS = ("net.first", "net.blocks.0")
TEACHER = Discriminator(features="teacher")
OWN = Discriminator(features="own")
KINDS = {
    "teacher": TEACHER,
    "layers": Discriminator(layers=LAYERS, loss="relativistic"),
    "own": OWN,
    "clean": replace(OWN, times=None, pool="channels", loss="least_squares"),
    "joint": replace(OWN, joint=True),
    "joint layers": Discriminator(layers=LAYERS, joint=True),
    "hinge": replace(TEACHER, loss="hinge", penalty=GradientPenalty(0.3, 0.2)),
}
each_kind = pytest.mark.parametrize("kind", KINDS)


def batch(count: int = 6, start: int = 0) -> Batch:
    draws = Draws.range(start, count, 0)
    z, x0 = draws.normal("z", (2,), F64), draws.normal("x0", (2,), F64)
    return Batch(z, draws.integers("label", 3), x0, draws)


def scene(judge: Discriminator) -> tuple[Nets, Any]:
    """A student and what judges it, in double precision, far from their start."""
    teacher = stirred(MODELS["mlp"].build().double(), 0).requires_grad_(False)
    nets = judge.equipped(Nets({"student": stirred(MODELS["mlp"].build().double(), 1)}), teacher)
    return nets.double(), teacher  # type: ignore[return-value]


def fooled(judge: Discriminator, nets: Nets, teacher: Any, b: Batch) -> Any:
    n = judge.noised(teacher.path, ROLLOUT(nets, b), b)
    return judge.fool(nets, teacher, b, n, b.cond)


@each_kind
def test_gradients_are_those_of_differences(kind: str) -> None:
    """Of both sides, each in its own net; a frozen teacher hands the student's on."""
    judge, b = KINDS[kind], batch()
    nets, teacher = scene(judge)
    sides = {
        "discriminator": lambda: judge.turn(ROLLOUT).loss(nets, teacher, b).total,
        "student": lambda: fooled(judge, nets, teacher, b).total,
    }
    for name, loss in sides.items():
        with training_only(nets, name) as trained:
            parameters = list(trained.parameters())
            found = torch.autograd.grad(loss(), parameters, allow_unused=True)
            pairs = [(p, g) for p, g in zip(parameters, found, strict=True) if g is not None]
            norm = math.sqrt(sum(float(g.square().sum()) for _, g in pairs))
            assert norm > 1e-6
            ends = []
            for step in (1e-5, -2e-5, 1e-5):
                with torch.no_grad():
                    for p, g in pairs:
                        p.add_(g, alpha=step / norm)
                ends.append(float(loss().detach()))
        assert (ends[0] - ends[1]) / 2e-5 == pytest.approx(norm, rel=1e-4)


def calls(net: Any, names: dict[str, str], seen: list[tuple[str, bool]]) -> None:
    for name, told in names.items():
        net.get_submodule(name).register_forward_hook(
            lambda _m, _a, out, n=told: seen.append((n, out.requires_grad))
        )


@pytest.mark.parametrize("layers", [(), LAYERS])
def test_the_teacher_is_read_twice_or_once_and_not_to_its_end(layers: tuple[str, ...]) -> None:
    """Real and generated samples without a graph; the student's with one; the heads alone train.

    The encoder features of an MLP of one block are that block's output.
    """
    judge, seen = replace(TEACHER, layers=layers), []
    nets, teacher = scene(judge)
    assert isinstance(nets["discriminator"], Heads)
    assert len(nets["discriminator"].heads) == max(len(layers), 1)
    calls(teacher, {"net.blocks.0": "block", "net.last": "end"}, seen)
    judge.turn(ROLLOUT).loss(nets, teacher, batch())
    assert seen == [("block", False)] * 2
    seen.clear()
    with training_only(nets, "student"):
        found = fooled(judge, nets, teacher, batch())
    assert seen == [("block", True)]
    assert found.logits.shape == (6, max(len(layers), 1))
    paired = replace(judge, loss="relativistic")
    with training_only(nets, "student"):
        fooled(paired, nets, teacher, batch())
    assert seen[1:] == [("block", True), ("block", False)]


def test_layers_by_name() -> None:
    """Outputs of modules, in the order asked for, tokens with channels first."""

    class Tokens(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = nn.Linear(2, 3), nn.Linear(3, 3)
            self.many, self.unused = nn.Identity(), nn.Linear(1, 1)

        def forward(self, x: Tensor, t: Tensor) -> Tensor:
            h = self.two(self.one(x))
            return self.many((h, h))[0]  # type: ignore[no-any-return]

    net, x = Tokens(), torch.randn(4, 5, 2, generator=torch.Generator().manual_seed(0))
    two, one = layer_features(net, ("two", "one"), x, x)
    assert torch.equal(one, net.one(x).mT)
    assert torch.equal(two, net.two(net.one(x)).mT)
    assert not any(m._forward_hooks for m in net.modules())
    with pytest.raises(ValueError, match=r"^Tokens has no layer 'on'; did you mean 'one'\?$"):
        layer_features(net, ("on",), x, x)
    with pytest.raises(ValueError, match=r"^Tokens does not call its layer 'unused'$"):
        layer_features(net, ("one", "unused"), x, x)
    with pytest.raises(ValueError, match=r"^the layer 'many' returns tuple, not one tensor$"):
        layer_features(net, ("many", "one"), x, x)
    assert not any(m._forward_hooks for m in net.modules())
    judge = Discriminator(layers=("net.last",))
    nets, teacher = scene(judge)
    with pytest.raises(ValueError, match=r"heads for features of shape \(16,\) got \(2,\)"):
        fooled(judge, nets, teacher, batch())


def test_a_network_of_its_own_starts_as_the_fake_score() -> None:
    """Or as the student, where there is none; its adapters share what they do not train."""
    teacher = MODELS["mlp"].build().requires_grad_(False)
    nets = Nets({"student": MODELS["mlp"].build(1), "fake": MODELS["mlp"].build(2)})
    own: Any = replace(OWN, pool="space").equipped(nets)["discriminator"]
    x, t = torch.ones(1, 2), torch.ones(1)
    assert torch.equal(own.encode(x, t), nets["fake"].encode(x, t))  # type: ignore[operator]
    nets = Nets({"student": nets["student"]})
    own = OWN.equipped(nets)["discriminator"]
    assert isinstance(own, DenoiserWithHead)
    assert torch.equal(own.net.encode(x, t), nets["student"].encode(x, t))  # type: ignore
    role = LoRA(2, targets=("*",)).adapt(teacher)
    method = DMD2(fake=Critic(features="own", pool="learned"))
    judge: Any = method.init(teacher, role)["discriminator"]  # type: ignore[arg-type]
    names = judge.state_dict().keys()
    assert sum(name.startswith("head.") for name in names) == 6
    rest = {name for name in names if not name.startswith("head.")}
    assert rest
    assert all(name.endswith((".up", ".down.weight")) for name in rest)
    first: Any = teacher.net.first  # type: ignore[union-attr]
    assert judge.net.net.first.base.weight.data_ptr() == first.weight.data_ptr()


def test_conditions_are_kept_from_a_fake_score_alone() -> None:
    """From one that is used at scale 0 and no other; a teacher hears them always."""
    b, fake = batch(), Discriminator(features="fake", pool="channels")
    assert fake.condition(b, 0.0, 0.0) is None
    for judge, kappas in ((fake, (0.0, 1.0)), (fake, (3.0,)), (TEACHER, (0.0,)), (OWN, (0.0,))):
        assert judge.condition(b, *kappas) is b.cond


def test_clean_samples_are_judged_at_the_first_time() -> None:
    for path in (VE(), VP()):
        x = batch().z
        n = KINDS["clean"].noised(path, x, batch())
        assert torch.equal(n.xt, x)
        assert n.t.tolist() == [path.t_min] * 6


def test_pairs_share_times_and_noise() -> None:
    """A student that returns the data: every pair is a copy, and every loss ln 2."""
    for times in (LogNormal(), None):
        judge = Discriminator(times=times, loss="relativistic")
        nets, teacher = scene(judge)
        b = batch()
        assert b.x0 is not None
        pair = judge.pair(teacher.path, b.x0, b.x0, b)
        found = judge.judge(nets, teacher, b, pair, b.cond).logs
        assert float(found["discriminator"].detach()) == pytest.approx(math.log(2), rel=1e-14)
        assert float(found["discriminator_accuracy"]) == 0
        n = judge.noised(teacher.path, b.x0, b)
        told = judge.fool(nets, teacher, b, n, b.cond)
        assert float(told.total.detach()) == pytest.approx(math.log(2), rel=1e-12)
        other = judge.fool(nets, teacher, b._replace(x0=b.x0.flip(0)), n, b.cond)
        assert abs(float((other.total - told.total).detach())) > 1e-4
        with pytest.raises(ValueError, match=r"Discriminator needs data but Batch\.x0 is None"):
            judge.fool(nets, teacher, b._replace(x0=None), n, b.cond)


def test_pairs_with_noise_of_their_own() -> None:
    """At the same times; both sides of the losses have the same two noises."""
    judge = Discriminator(Discrete((0.7,)), loss="relativistic", share_noise=False)
    nets, teacher = scene(judge)
    b = batch()
    assert b.x0 is not None
    assert b.draws is not None
    pair = judge.pair(teacher.path, b.x0, b.x0, b)
    noises = [(side.xt - b.x0) / 0.7 for side in (pair.fake, pair.real)]
    for noise, name in zip(noises, ("eps", "eps/real"), strict=True):
        torch.testing.assert_close(noise, b.draws.normal(name, (2,)).double())
    n = judge.noised(teacher.path, b.x0, b)
    fake, real = (judge.logits(nets, teacher, x, n.t, b.cond) for x in (n.xt, pair.real.xt))
    found = judge.fool(nets, teacher, b, n, b.cond).total
    torch.testing.assert_close(found, F.softplus(real - fake).mean())


class Curved(nn.Module):
    """A fake score whose encoder says a (1 + x . x) / 2."""

    path = VE()

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.tensor(0.7, dtype=F64))

    def forward(self, xt: Tensor, t: Tensor, cond: Any = None) -> Tensor:
        return xt * self.a

    def encode(self, xt: Tensor, t: Tensor, cond: Any = None) -> Tensor:
        return self.a * (1 + (xt * xt).sum(1, keepdim=True)) / 2

    def forward_with_features(self, *inputs: Any) -> tuple[Tensor, Tensor]:
        return self(*inputs), self.encode(*inputs)


@pytest.mark.parametrize("step", [0.0, 0.3])
def test_gradient_penalties_by_hand(step: float) -> None:
    """Of x_t, real and generated, in the critic's own update: a^2 |x_t|^2, or by noise on x_t."""
    t, b, net = 0.8, batch(), Curved()
    nets: Any = {"student": Curved(), "fake": net}
    critic = Critic(Discrete((t,)), judging=Power(0, -1), scale=3.0)
    paid = replace(critic, penalty=GradientPenalty(0.5, 0.25, step))
    plain, found = (
        one.turn(ROLLOUT, Unguided()).loss(nets, net, b)  # type: ignore[arg-type]
        for one in (critic, paid)
    )
    assert b.draws is not None
    assert b.x0 is not None
    noise = t * b.draws.normal("eps", (2,)).double()
    total = 0.0
    for name, x, weight in (("real", b.x0, 0.5), ("fake", ROLLOUT(nets, b).detach(), 0.25)):
        xt = x + noise
        if step:
            n = b.draws.under("penalty").normal(name, (2,)).double()
            square = ((net.encode(xt + step * n, xt) - net.encode(xt, xt)) / step) ** 2
        else:
            square = (net.a * xt).square().sum(1)
        half = weight / 2 * float(square.detach().mean())
        assert float(found.logs[f"penalty_{name}"].detach()) == pytest.approx(half, rel=1e-6)
        total += half / t  # weighted as the loss of the sample is
    more = (found.logs["discriminator"] - plain.logs["discriminator"]).detach()
    assert float(more) == pytest.approx(total, rel=1e-6)
    assert float((found.total - plain.total).detach()) == pytest.approx(1.5 * total, rel=1e-6)
    slopes = [
        torch.autograd.grad(one.total, net.a, retain_graph=True)[0] for one in (plain, found)
    ]
    assert float(slopes[1] - slopes[0]) == pytest.approx(2 * 1.5 * total / 0.7, rel=1e-6)
    assert not b.x0.requires_grad


@pytest.mark.parametrize(
    ("features", "loss"),
    [
        *(("teacher", name) for name in ("nonsaturating", "hinge", "least_squares")),
        *(("teacher", "relativistic"), ("own", "nonsaturating")),
    ],
)
def test_two_gaussians(features: Any, loss: Any) -> None:
    """N(m, 1) and N(-m, 1), |m| = 2: the best judge is right with Phi(2) = 0.977.

    Of pairs with Phi(2 sqrt 2) = 0.9977. Standard error at 20,000 of each: 0.0011.
    """
    m = torch.tensor([1.0, -1.0, 1.0, -1.0])

    class Still(nn.Module):
        path = VE()

        def forward(self, xt: Tensor, t: Tensor, cond: Any = None) -> Tensor:
            return xt

    judge = Discriminator(Discrete((0.01,)), features, loss=loss)
    teacher: Any = Bare().requires_grad_(False)
    nets = judge.equipped(Nets({"student": Still(), "fake": Bare()}), teacher)
    turn = judge.turn(Rollout(FewStep(1e-4), 1))
    optimizer = torch.optim.Adam(nets["discriminator"].parameters(), 1e-2)

    def step(start: int, count: int) -> Any:
        draws = Draws.range(start, count, 5)
        z = (draws.normal("z", (4,)) - m) / 1e-4  # the student's x is sigma z
        return turn.loss(nets, teacher, Batch(z, None, draws.normal("x0", (4,)) + m, draws))

    for number in range(150):
        optimizer.zero_grad()
        step(number * 64, 64).total.backward()
        optimizer.step()
    with torch.no_grad():
        right = float(step(10**6, 20_000).logs["discriminator_accuracy"])
    best = 0.9977 if loss == "relativistic" else 0.9772
    assert best - 0.017 < right < best + 3 * 0.0011


def test_a_critic_has_one_update_or_two() -> None:
    for features, names in (
        ("fake", ["fake"]),
        ("teacher", ["fake", "discriminator"]),
        ("own", ["fake", "discriminator"]),
    ):
        critic = Critic(average="sample", pool="learned", features=features)  # type: ignore
        assert [turn.net for turn in critic.turns(ROLLOUT, Unguided())] == names
        for method in (SiDA(fake=critic), DMD2(fake=critic), FDistill(fake=critic)):
            assert isinstance(method.ratio, int)
            assert [turn.net for turn in method.turns(0)] == names * method.ratio + ["student"]
            assert not method.couples_samples
            assert replace(method, fake=replace(critic, average="batch")).couples_samples


def test_the_students_side_is_the_methods_own() -> None:
    """DMD2 and SiDA with the teacher's features: softplus(-l) of its heads, at their x_t."""
    b = batch()
    assert b.draws is not None
    critic = Critic(Discrete((0.7,)), average="sample", pool="learned", features="teacher")
    for method, draws in (
        (DMD2(FewStep(2.5), fake=critic), b.draws.under("gan")),
        (SiDA(FewStep(2.5), times=Discrete((0.7,)), fake=critic), b.draws),
    ):
        teacher: Any = stirred(MODELS["mlp"].build().double(), 0)
        nets = method.init(teacher, stirred(MODELS["mlp"].build().double(), 1))
        stirred(nets["discriminator"].double(), 2)
        found = method.turns(0)[-1].loss(nets, teacher, b).logs["gan_loss"]
        xt = FewStep(2.5)(nets["student"], b.z, b.cond) + 0.7 * draws.normal("eps", (2,)).double()  # type: ignore[arg-type]
        t = torch.full((6,), 0.7, dtype=F64)
        logit = nets["discriminator"]([teacher.encode(xt, t, b.cond)])
        torch.testing.assert_close(found, F.softplus(-logit).mean())


@pytest.mark.parametrize("kind", ["joint", "joint layers"])
def test_a_joint_discriminator_reads_both_states(kind: str) -> None:
    """A head on the features of the one, then of the other; zeros where it is not told of it."""
    judge, b = KINDS[kind], batch()
    nets, teacher = scene(judge)
    t, other = torch.full((6,), 0.7, dtype=F64), torch.full((6,), 2.0, dtype=F64)
    beside = (b.z * 2, other)
    one = judge.logits(nets, teacher, b.z, t, b.cond, beside=beside)
    alone = judge.logits(nets, teacher, b.z, t, b.cond)
    net: Any = nets["discriminator"]

    def read(x: Tensor, t: Tensor) -> list[Tensor]:
        if kind == "joint":
            return [net.net.encode(x, t, b.cond)]
        return layer_features(teacher, LAYERS, x, t, b.cond)

    heads = [net.head] if kind == "joint" else net.heads
    zipped = list(zip(heads, read(b.z, t), read(*beside), strict=True))
    by_hand = [head(torch.cat([f, g], 1)) for head, f, g in zipped]
    torch.testing.assert_close(one, torch.cat(by_hand, 1))
    by_hand = [head(torch.cat([f, 0 * g], 1)) for head, f, g in zipped]
    torch.testing.assert_close(alone, torch.cat(by_hand, 1))
    n = judge.noised(teacher.path, b.z, b)
    for given in (None, beside):
        told = judge.fool(nets, teacher, b, n, b.cond, beside=given)
        expected = judge.logits(nets, teacher, n.xt, n.t, b.cond, beside=given)
        assert torch.equal(told.logits, expected)
        pair = judge.compared(b.z, n, n, given)
        found = judge.judge(nets, teacher, b, pair, b.cond).total
        by_hand_loss = (F.softplus(-expected) + F.softplus(expected)).mean() / 2
        torch.testing.assert_close(found, by_hand_loss)


@pytest.mark.parametrize("layers", [(), LAYERS])
def test_several_heads_on_one_frozen_network(layers: tuple[str, ...]) -> None:
    """Of the fake score as it is: each head gives its own logits, and is trained alone."""
    judge, b = Discriminator(features="frozen_fake", layers=layers, heads=3), batch()
    fake: Any = stirred(MODELS["mlp"].build().double(), 5)
    nets = judge.equipped(Nets({"fake": fake})).double()
    stirred(nets["discriminator"], 6)
    count = len(layers) or 1
    assert len(nets["discriminator"].heads) == 3 * count  # type: ignore[arg-type]
    assert judge.net == "discriminator"
    t = torch.full((6,), 0.7, dtype=F64)
    read = (
        layer_features(fake, layers, b.z, t, b.cond) if layers else [fake.encode(b.z, t, b.cond)]
    )
    for number in range(3):
        one = replace(judge, head=number)
        with training_only(nets, "discriminator"):  # type: ignore[arg-type]
            found = one.logits(nets, None, b.z, t, b.cond)  # type: ignore[arg-type]
            found.sum().backward()
        heads: Any = nets["discriminator"].heads
        mine = heads[number * count : (number + 1) * count]
        by_hand = torch.cat([head(f) for head, f in zip(mine, read, strict=True)], 1)
        torch.testing.assert_close(found, by_hand)
        moved = [any(p.grad is not None for p in head.parameters()) for head in heads]
        assert moved == [index // count == number for index in range(3 * count)]
        assert all(p.grad is None for p in fake.parameters())
        nets["discriminator"].zero_grad()


@pytest.mark.parametrize("step", [0.0, 0.1, 1e-4])
def test_the_penalty_of_what_heads_read(step: float) -> None:
    """The mean over heads of |grad l|^2 in each one's own features, times r1 / 2.

    By noise it is the same in the mean; of heads that are linear it is known for each noise.
    """
    weights = [torch.linspace(-1, 1, 16, dtype=F64), torch.linspace(0, 2, 16, dtype=F64)]

    class Linear(nn.Module):
        def forward(self, features: Any, first: int = 0) -> Tensor:
            logits = [f @ w for f, w in zip(features, weights[first:], strict=False)]
            return torch.stack(logits, 1)[:, None]

    penalty = GradientPenalty(0.5, 0.25, step, "features")
    judge, b = Discriminator(layers=LAYERS, penalty=penalty), batch()
    nets, teacher = scene(judge)
    nets["discriminator"] = Linear()
    assert b.x0 is not None
    assert b.draws is not None
    pair = judge.pair(teacher.path, b.z, b.x0, b)
    assert not pair.real.xt.requires_grad
    found = judge.judge(nets, teacher, b, pair, b.cond).logs
    for name, weight in (("real", 0.5), ("fake", 0.25)):
        if step:
            draws = b.draws.under("penalty")
            noises = [draws.normal(f"{name}{k}", (16,)).double() for k in (0, 1)]
            slopes = [(n @ w) ** 2 for n, w in zip(noises, weights, strict=True)]
        else:
            slopes = [w @ w for w in weights]
        expected = weight / 2 * torch.stack(slopes).mean()
        torch.testing.assert_close(found[f"penalty_{name}"], expected, rtol=1e-6, atol=1e-9)
    lots = torch.randn(100_000, 16, generator=torch.Generator().manual_seed(0)).double()
    assert float(((lots @ weights[0]) ** 2).mean()) == pytest.approx(
        float(weights[0] @ weights[0]), rel=0.02
    )


def test_the_penalty_of_features_trains_heads() -> None:
    """Its gradient in their weights against differences, with both layers' own heads."""
    judge = Discriminator(layers=LAYERS, penalty=GradientPenalty(0.5, 0.0, 0.0, "features"))
    b, (nets, teacher) = batch(), scene(judge)
    weight: Any = nets["discriminator"].heads[1].layers[0].weight  # type: ignore[union-attr,index]

    def loss() -> Tensor:
        assert b.x0 is not None
        pair = judge.pair(teacher.path, b.z, b.x0, b)
        return judge.judge(nets, teacher, b, pair, b.cond).logs["penalty_real"]

    (slope,) = torch.autograd.grad(loss(), weight)
    ends = []
    for move in (1e-5, -2e-5):
        weight.data.add_(slope, alpha=move)
        ends.append(float(loss().detach()))
    found = (ends[0] - ends[1]) / 2e-5
    assert found == pytest.approx(float(slope.square().sum()), rel=1e-4)


@dataclass(frozen=True)
class Mean(PictureFeatures):
    """The mean brightness of a picture, as its only feature."""

    def __call__(self, pictures: Tensor) -> list[Tensor]:
        return [pictures.mean((1, 2, 3))[:, None]]


def test_features_of_pictures_are_those_of_decoded_latents() -> None:
    """Latents v become pictures of brightness 2 v + 1; a frozen network sees no latents."""
    teacher: Any = MODELS["mlp"].build(0)
    give_decoder(teacher, lambda x: (2 * x.mean(1) + 1)[:, None, None, None].expand(-1, 3, 4, 4))
    xt = Draws.range(0, 6).normal("x", (2,), F64)
    judge = Discriminator(features=Mean(), times=None)
    (read,) = judge.read(Nets({}), teacher, xt, torch.zeros(6, dtype=F64), None)
    torch.testing.assert_close(read[:, 0], 2 * xt.mean(1) + 1)


def test_real_samples_under_other_conditions() -> None:
    """They are a share of what is called generated."""
    b = batch()
    assert b.x0 is not None
    other = (b.cond + 1) % 3  # type: ignore[operator]
    nets, teacher = scene(OWN)
    pair = OWN.pair(teacher.path, b.z, b.x0, b)
    found = replace(OWN, mismatch=0.25).judge(nets, teacher, b, pair, b.cond, other=other).total
    wrong = OWN.logits(nets, teacher, pair.real.xt, pair.real.t, other)
    fake = OWN.logits(nets, teacher, pair.fake.xt, pair.fake.t, b.cond)
    real = OWN.logits(nets, teacher, pair.real.xt, pair.real.t, b.cond)
    generated = 0.75 * F.softplus(fake) + 0.25 * F.softplus(wrong)
    torch.testing.assert_close(found, (F.softplus(-real) + generated).mean() / 2)
    with pytest.raises(ValueError, match=r"mismatch needs samples with conditions"):
        replace(OWN, mismatch=0.25).judge(nets, teacher, b, pair, b.cond)


class Blank(PictureFeatures):
    """It sees nothing."""

    def __call__(self, pictures: Tensor) -> list[Tensor]:
        return []


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: Discriminator(features="fake", joint=True),
            "a joint discriminator has features='teacher' or",
        ),
        (lambda: replace(OWN, pool="space", joint=True), "and pool='learned', got 'own' and"),
        (lambda: Discriminator(heads=2, head=2), "head is one of them, from 0; got features="),
        (lambda: replace(OWN, heads=2), "several heads are on frozen features, and"),
        (lambda: GradientPenalty(of="all"), "of is 'input' or 'features', got 'all'"),  # type: ignore
        (
            lambda: replace(OWN, penalty=GradientPenalty(1.0, of="features")),
            "is for heads on a frozen network, and features='own' is trained",
        ),
        (lambda: Discriminator(features=Blank()), "of pictures says times=None, and has no"),
        (
            lambda: Discriminator(None, Blank()).equipped(Nets({"s": nn.Linear(1, 1)})),
            "Blank does not tell the shapes of its features",
        ),
        (lambda: Discriminator(mismatch=1.0), r"Discriminator.mismatch is in \[0, 1\), got 1"),
        (lambda: Critic(loss="wgan"), "the adversarial loss is one of nonsaturating, hinge"),  # type: ignore
        (
            lambda: Critic(features="all"),
            "features is 'fake', 'teacher', 'frozen_fake' or 'own', got 'all'",
        ),  # type: ignore
        (lambda: Critic(features="teacher"), "pool='channels' has nothing to train; say"),
        (lambda: Critic(layers=("a",)), "and features='fake' reads none"),
        (lambda: TEACHER.equipped(Nets({})), "needs a teacher; say features='own'"),
        (
            lambda: TEACHER.equipped(Nets({}), nn.Linear(1, 1)),  # type: ignore[arg-type]
            "but Linear has no encoder features",
        ),
        (
            lambda: FDistill(fake=Critic(loss="hinge")),
            "loss='hinge' do not tell the density ratio; choose from nonsaturating, least_squares",
        ),
    ],
)
def test_what_cannot_be_is_refused(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()
