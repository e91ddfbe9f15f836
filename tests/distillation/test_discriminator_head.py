"""The learned discriminator head: by hand, against differences, and at the best that can be."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fewstep.diffusion.encoder_features import feature_shape
from fewstep.diffusion.model import Model
from fewstep.diffusion.noise_path import VE
from fewstep.diffusion.rng import Draws
from fewstep.diffusion.samplers import FewStep
from fewstep.diffusion.time_distributions import Discrete, LogNormal
from fewstep.diffusion.types import Batch
from fewstep.distillation.critic import Critic
from fewstep.distillation.discriminator_head import DenoiserWithHead, DiscriminatorHead
from fewstep.distillation.fake_score import Rollout
from fewstep.distillation.guidance_scales import Unguided
from fewstep.distillation.method import Nets
from fewstep.losses.weight import Power
from fewstep.methods.dmd2 import DMD2
from fewstep.methods.sida import SiDA
from fewstep.nets.edm2 import Precond
from fewstep.nets.edm_precond import EDMPrecond
from fewstep.nets.mlp import MLP
from fewstep.nets.patch_unet import PatchUNet
from fewstep.training.modes import training_only

F64 = torch.float64


def silu(x: float) -> float:
    return x / (1 + math.exp(-x))


def test_of_two_tokens_by_hand() -> None:
    """logit = w . silu(norm(W h + b)) + c of each token; of two channels the norm leaves a sign.

    (u, v) -> g (u - v, v - u) / 2 / sqrt((u - v)^2 / 4 + eps) + shift.
    """
    head = DiscriminatorHead((2,)).double()
    state = {
        "layers.0.weight": torch.tensor([[1.0, 2.0], [0.5, -1.0]])[:, :, None, None],
        "layers.0.bias": torch.tensor([0.1, 0.1]),
        "layers.1.weight": torch.tensor([2.0, 0.5]),
        "layers.1.bias": torch.tensor([0.3, -0.4]),
        "layers.3.weight": torch.tensor([[3.0, -2.0]])[:, :, None, None],
        "layers.3.bias": torch.tensor([0.7]),
    }
    head.load_state_dict(state)
    logits = []
    tokens = [(0.001, 0.002), (-0.3, -0.5)]
    for first, second in tokens:
        u, v = first + 2 * second + 0.1, first / 2 - second + 0.1
        unit = (u - v) / 2 / math.sqrt((u - v) ** 2 / 4 + 1e-5)
        logits.append(3 * silu(2 * unit + 0.3) - 2 * silu(-0.5 * unit - 0.4) + 0.7)
    features = torch.tensor(tokens, dtype=F64).mT[None]
    assert head(features).tolist() == [[pytest.approx(sum(logits) / 2, rel=1e-6)]]  # state is fp32
    alone = head(torch.tensor(tokens, dtype=F64))
    assert alone.flatten().tolist() == pytest.approx(logits, rel=1e-6)
    assert abs(logits[0] - logits[1]) > 0.1


def test_of_a_picture_by_hand() -> None:
    """Convolutions that pick: every second pixel of 8x8, of those the corner, then their sum."""
    head, generator = DiscriminatorHead((4, 8, 8)).double(), torch.Generator().manual_seed(0)
    for p in head.parameters():
        nn.init.zeros_(p)
    for layer in (1, 4):
        nn.init.ones_(head.layers[layer].weight)  # type: ignore[arg-type]
    for layer, place in ((0, 1), (3, 0)):
        head.layers[layer].weight.data[range(4), range(4), place, place] = 1  # type: ignore
    slopes = torch.tensor([1.0, -2.0, 0.5, 3.0], dtype=F64)
    head.layers[6].weight.data[0, :, 0, 0] = slopes  # type: ignore
    x = torch.randn(2, 4, 8, 8, dtype=F64, generator=generator)
    for features, logit in zip(x, head(x).flatten().tolist(), strict=True):
        seen = features[:, ::2, ::2]
        seen = (seen - seen.mean()) / (seen.var(correction=0) + 1e-5).sqrt()
        corner = (seen * seen.sigmoid())[:, 0, 0]
        corner = (corner - corner.mean()) / (corner.var(correction=0) + 1e-5).sqrt()
        assert logit == pytest.approx(float(slopes @ (corner * corner.sigmoid())), rel=1e-12)


@pytest.mark.parametrize(
    ("shape", "kernels"),
    [
        ((768, 8, 8), [4, 4, 1]),  # ImageNet 64
        ((1280, 8, 8), [4, 4, 1]),  # Stable Diffusion 1.5
        ((1280, 32, 32), [4, 4, 4, 4, 1]),  # SDXL
        ((48, 2, 2), [2, 1]),
        ((1536,), [1, 1]),
    ],
)
def test_the_published_layers(shape: tuple[int, ...], kernels: list[int]) -> None:
    """Convolutions of all channels, the last large one over 4x4 or what is there; 32 groups."""
    with torch.device("meta"):
        head = DiscriminatorHead(shape)
    convs = [layer for layer in head.layers if isinstance(layer, nn.Conv2d)]
    assert [conv.kernel_size[0] for conv in convs] == kernels
    assert [conv.stride[0] for conv in convs] == [2] * (len(kernels) - 2) + [1, 1]
    assert [conv.out_channels for conv in convs] == [shape[0]] * (len(kernels) - 1) + [1]
    norms = [layer for layer in head.layers if isinstance(layer, nn.GroupNorm)]
    assert {norm.num_groups for norm in norms} == {min(32, shape[0] // 4)}
    assert head(torch.zeros(3, *shape, device="meta")).shape == (3, 1)
    wide, count = shape[0], sum(p.numel() for p in head.parameters())
    assert count == sum((wide * k * k + 3) * wide for k in kernels[:-1]) + wide + 1
    assert (count == 52_437_761) == (shape == (1280, 8, 8))


@pytest.mark.parametrize(
    ("channels", "groups"), [(1, 1), (2, 1), (6, 1), (8, 2), (36, 9), (100, 25), (150, 30)]
)
def test_no_channel_is_normalised_alone(channels: int, groups: int) -> None:
    """A norm over one number would say nothing of it."""
    norm: Any = DiscriminatorHead((channels,)).layers[1]
    assert norm.num_groups == groups


UNET: dict[str, Any] = {"model_channels": 16, "channel_mult": [1, 2], "num_blocks": 1}
NETS: dict[str, Any] = {
    "mlp": lambda: Model(MLP(16, 1), (3,), 2).build(),
    "patches": lambda: Model(PatchUNet(16, (1, 2)), (1, 16, 16), 2).build(),
    "ddpm++": lambda: EDMPrecond(8, 3, 2, model_type="SongUNet", **UNET),
    "adm": lambda: EDMPrecond(8, 3, 2, **UNET),
    "edm2": lambda: Precond(8, 3, 2, **UNET),
}


@pytest.mark.parametrize("name", NETS)
def test_every_network_tells_the_shape_of_its_tap(name: str) -> None:
    """And with a head answers as it did, but for the tap, in the network's own precision."""
    net = NETS[name]().double().eval()
    shape = {"mlp": (3,), "patches": (1, 16, 16)}.get(name, (3, 8, 8))
    x, t, cond = torch.randn(2, *shape, dtype=F64), torch.tensor([0.5, 2.0]), torch.tensor([0, 1])
    inputs = x, t.double(), cond
    features = net.encode(*inputs)
    assert feature_shape(net) == features.shape[1:]
    headed = DenoiserWithHead(net)
    assert headed.path is net.path
    out, logits = headed.forward_with_features(*inputs)
    for answer in (out, headed(*inputs)):
        assert torch.equal(answer, net(*inputs))
    for answer in (logits, headed.encode(*inputs)):
        assert torch.equal(answer, headed.head(features))
        assert (answer.shape, answer.dtype) == ((2, 1), F64)
    if name == "edm2":
        assert torch.equal(headed.logvar(inputs[1]), net.logvar(inputs[1]))


MODELS = {
    "mlp": Model(MLP(width=16, blocks=1), (2,), 3),
    "patches": Model(PatchUNet(8, (1, 2), patch=1), (1, 8, 8), 3),
}
METHOD = DMD2(
    FewStep(2.5),
    Discrete((0.7,)),
    fake=Critic(LogNormal(), judging=Power(), average="sample", pool="learned"),
    ratio=2,
    gan=0.5,
)


def stirred(net: nn.Module, seed: int) -> Any:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in net.parameters():
            p += 0.2 * torch.randn(p.shape, generator=generator, dtype=p.dtype)
    return net


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("method", [METHOD, SiDA(fake=METHOD.fake, gan=0.5)], ids=["DMD2", "SiDA"])
def test_gradients_are_those_of_differences(name: str, method: Any) -> None:
    """Of the student's adversarial term through the head; of the critic's loss in the head."""
    model = MODELS[name]
    teacher = stirred(model.build().double(), 0).requires_grad_(False)
    nets = method.init(teacher, teacher)
    for seed, net in enumerate(nets.values()):
        stirred(net, 1 + seed)
    draws = Draws.range(0, 4, 0)
    z, x0 = (draws.normal(n, model.shape, F64) for n in ("z", "x0"))
    batch = Batch(z, draws.integers("label", 3), x0, draws)
    fake, student = method.turns(0)[0], method.turns(0)[-1]
    for turn, term in ((student, "gan_loss"), (fake, "discriminator")):
        with training_only(nets, turn.net) as trained:
            net = trained.head if turn is fake else trained
            parameters = list(net.parameters())  # type: ignore[union-attr]

            def loss(turn: Any = turn, term: str = term) -> Tensor:
                return turn.loss(nets, teacher, batch).logs[term]  # type: ignore[no-any-return]

            grads = torch.autograd.grad(loss(), parameters)
            norm = math.sqrt(sum(float(g.square().sum()) for g in grads))
            assert norm > 1e-6
            ends = []
            with torch.no_grad():
                for step in (1e-5, -2e-5, 1e-5):
                    for p, g in zip(parameters, grads, strict=True):
                        p.add_(g, alpha=step / norm)
                    ends.append(float(loss()))
        assert (ends[0] - ends[1]) / 2e-5 == pytest.approx(norm, rel=1e-4)


class Bare(nn.Module):
    """A fake score whose encoder is the identity: what the head cannot learn, nothing can."""

    feature_shape = (4,)
    path = VE()

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.zeros(()))

    def forward(self, xt: Tensor, t: Tensor, cond: Any = None) -> Tensor:
        return xt * self.scale

    def encode(self, xt: Tensor, t: Tensor, cond: Any = None) -> Tensor:
        return xt

    def forward_with_features(self, *inputs: Any) -> tuple[Tensor, Tensor]:
        return self(*inputs), self.encode(*inputs)


def judged(pool: Any) -> float:
    """How often a trained critic is right of N(m, 1) and N(-m, 1), m = (1, -1, 1, -1)."""
    m = torch.tensor([1.0, -1.0, 1.0, -1.0])

    class Still(nn.Module):
        path = VE()

        def forward(self, xt: Tensor, t: Tensor, cond: Any = None) -> Tensor:
            return xt

    critic = Critic(Discrete((0.01,)), judging=Power(), scale=4.0, average="sample", pool=pool)
    nets = critic.equipped(Nets({"student": Still(), "fake": Bare()}))
    teacher: Any = Still()
    turn = critic.turn(Rollout(FewStep(1e-4), 1), Unguided())
    optimizer = torch.optim.Adam(nets["fake"].parameters(), 1e-2)

    def step(start: int, count: int) -> Any:
        draws = Draws.range(start, count, 5)
        z = (draws.normal("z", (4,)) - m) / 1e-4  # the student's x is sigma z
        return turn.loss(nets, teacher, Batch(z, None, draws.normal("x0", (4,)) + m, draws))

    for number in range(150):
        optimizer.zero_grad()
        step(number * 64, 64).total.backward()
        optimizer.step()
    with torch.no_grad():
        return float(step(10**6, 20_000).logs["discriminator_accuracy"])


def test_two_gaussians_of_equal_means_over_channels() -> None:
    """The best judge is right with Phi(|m|) = Phi(2) = 0.977; the mean over channels is blind.

    Standard error of the share at 20,000 real and 20,000 fake samples: 0.0025 at most.
    """
    learned, mean = judged("learned"), judged("channels")
    assert 0.96 < learned < 0.977 + 3 * 0.001
    assert abs(mean - 0.5) < 4 * 0.0025


def test_what_cannot_have_a_head_is_refused() -> None:
    nets = Nets({"student": MODELS["mlp"].build(), "fake": MODELS["mlp"].build()})
    draws = Draws.range(0, 4, 0)
    batch = Batch(draws.normal("z", (2,)), None, draws.normal("x0", (2,)), draws)
    for turn in METHOD.turns(0):
        with pytest.raises(
            ValueError, match=r"leaves one channel, got 16: the fake score has none"
        ):
            turn.loss(nets, MODELS["mlp"].build(), batch)  # type: ignore[arg-type]

    class Silent(Bare):
        feature_shape = None  # type: ignore[assignment]

    with pytest.raises(ValueError, match=r"shape of the features, which Silent does not tell"):
        DenoiserWithHead(Silent())
    with pytest.raises(ValueError, match=r"but Linear has no encoder features"):
        DenoiserWithHead(nn.Linear(1, 1))


def test_the_start_is_the_same_everywhere() -> None:
    """Whatever torch's generator was at, which is left where it was."""
    found = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        before = torch.get_rng_state()
        found.append(DenoiserWithHead(MODELS["mlp"].build()).head.state_dict())
        assert torch.equal(before, torch.get_rng_state())
    assert all(map(torch.equal, found[0].values(), found[1].values()))
    first, second = itertools.islice(found[0].values(), 2)
    assert float(first.std()) > 0 < float(second.std())
