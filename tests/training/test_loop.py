"""The training loop on a net so small that every number can be worked out by hand."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn

from fewstep.data.batches import Latents
from fewstep.diffusion.model import Model
from fewstep.diffusion.samplers import FewStep
from fewstep.diffusion.types import Batch, Sampler
from fewstep.distillation.method import Loss, Method, Nets, Step, Turn
from fewstep.methods.pretrain import Pretrain
from fewstep.methods.sid import SiD
from fewstep.nets.mlp import MLP
from fewstep.teachers.gaussian import GaussianMixture
from fewstep.training.ema import EMA
from fewstep.training.loop import Diverged, Record, State, train
from fewstep.training.modes import training_only
from fewstep.training.optim import Optim

F64 = torch.float64
BATCH = 8


class Pair(nn.Module):
    """Two numbers and a buffer."""

    def __init__(self, first: float = 0.0, second: float = 0.0) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.tensor([first, second], dtype=F64))
        self.register_buffer("seen", torch.zeros((), dtype=F64))


@dataclass(frozen=True)
class Pull(Method):
    """Moves "student" down a constant slope; losses or gradients of chosen updates are broken."""

    output: ClassVar[str] = "student"

    sampler: Sampler = FewStep()
    slope: tuple[float, float] = (3.0, 4.0)
    broken: tuple[int, ...] = ()
    """Batches, counted over all turns, whose loss is not a number."""
    steep: tuple[int, ...] = ()
    """Batches whose loss is finite and whose gradient is infinite."""
    two: bool = False

    def turns(self, step: int) -> Sequence[Turn]:
        fake = (Turn("fake", self.loss),) if self.two else ()
        return (*fake, Turn("student", self.loss))

    def loss(self, nets: Nets, teacher: Any, batch: Batch) -> Loss:
        trained: Any = nets["student"] if nets["student"].training else nets["fake"]
        trained.seen += 1
        assert batch.draws is not None
        number = int(batch.draws.index[0]) // BATCH
        total = trained.w @ torch.tensor(self.slope, dtype=F64) + 0 * batch.z.mean()
        if number in self.broken:
            total = total * math.nan
        if number in self.steep:
            total = total + (trained.w * 0).sqrt().sum()
        return Loss(total, {"mean z": batch.z.mean()})


def run(method: Method, steps: int, **changes: Any) -> list[Record]:
    """All records; their weights are those of the last step, since the state is one object."""
    settings: dict[str, Any] = {"batch": BATCH, "optim": Optim(0.1), **changes}
    net = settings.pop("net", None) or Pair()
    return list(train(method, None, net, Latents((2,)), steps=steps, **settings))


def weights(state: State, name: str = "student") -> list[float]:
    net: Any = state.nets[name]
    return net.w.tolist()


def test_ema_decay() -> None:
    ema = EMA(halflife=1000.0, ramp=0.05)
    assert ema.decay(100, 0) == 0.0
    assert ema.decay(100, 10_000) == pytest.approx(0.5 ** (100 / 500))
    assert ema.decay(100, 20_000) == ema.decay(100, 10**9) == pytest.approx(0.5**0.1)
    assert EMA(halflife=0.0).decay(100, 10**9) == 0.0
    with pytest.raises(ValueError, match="halflife >= 0 and ramp >= 0"):
        EMA(-1.0)


def test_ema_forgets_half_in_one_halflife() -> None:
    """After `halflife` images at a new value, in any batches, the average is half way there."""
    for batch in (10, 40):
        average, net, images = Pair(0.0, 8.0), Pair(1.0, 0.0), 10**9
        for _ in range(1000 // batch):
            EMA(1000.0).update(average, net, batch, images)
            images += batch
        assert average.w.tolist() == pytest.approx([0.5, 4.0], rel=1e-12)


def test_first_ema_update_copies_and_buffers_are_always_copied() -> None:
    average, net = Pair(0.3, 0.4), Pair(1.7, -0.1)
    net.seen += 5
    EMA().update(average, net, 1, 0)
    assert torch.equal(average.w, net.w)
    net.seen += 1
    EMA(1e9).update(average, Pair(0, 0), 1, 10**12)
    EMA(1e9).update(average, net, 1, 10**12)
    assert average.seen.item() == 6


@pytest.mark.parametrize(
    ("optim", "rates"),
    [
        (Optim(2.0), {0: 2.0, 9: 2.0}),
        (Optim(2.0, warmup=4), {0: 0.5, 1: 1.0, 3: 2.0, 9: 2.0}),
        (Optim(2.0, decay="linear"), {0: 2.0, 5: 1.0, 9: 0.2, 10: 0.0, 11: 0.0}),
        (Optim(2.0, decay="cosine"), {0: 2.0, 5: 1.0, 10: 0.0, 2: 1 + math.cos(0.2 * math.pi)}),
        (Optim(2.0, decay="linear", warmup=4), {1: 0.9, 5: 1.0}),
    ],
)
def test_learning_rates(optim: Optim, rates: dict[int, float]) -> None:
    for step, rate in rates.items():
        assert optim.rate(step, 10) == pytest.approx(rate, abs=1e-15)


def test_impossible_optimisers_are_refused() -> None:
    bad = {"lr": 0.0, "eps": 0.0, "clip": 0.0, "clip_value": -1, "warmup": -1, "weight_decay": -1}
    for name, value in bad.items():
        with pytest.raises(ValueError, match=f"Optim needs .*{name} >"):
            Optim(**{name: value})  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"betas are in \[0, 1\), got \(0.9, 1.0\)"):
        Optim(betas=(0.9, 1.0))
    with pytest.raises(ValueError, match="got 'exponential'"):
        Optim(decay="exponential")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("optim", "expected"),
    [  # beta_1 = beta_2 = 0 makes Adam's update lr g/(|g| + eps)
        (Optim(0.1, (0.0, 0.0), eps=1.0), (-0.1 * 3 / 4, -0.1 * 4 / 5)),
        (Optim(0.1, (0.0, 0.0), eps=1.0, clip=1.0), (-0.1 * 0.6 / 1.6, -0.1 * 0.8 / 1.8)),
        (Optim(0.1, (0.0, 0.0), eps=1.0, clip=6.0), (-0.1 * 3 / 4, -0.1 * 4 / 5)),
        (Optim(0.1, (0.0, 0.0), eps=1.0, clip_value=3.5), (-0.1 * 3 / 4, -0.1 * 3.5 / 4.5)),
        (Optim(0.1, (0.0, 0.0), eps=1.0, clip_value=1.0), (-0.1 / 2, -0.1 / 2)),
        (  # (3, 4) is clamped to (2, 2), which is scaled to norm 1; the other order differs
            Optim(0.1, (0.0, 0.0), eps=1.0, clip_value=2.0, clip=1.0),
            (-0.1 / (1 + math.sqrt(2)), -0.1 / (1 + math.sqrt(2))),
        ),
        (Optim(0.1, (0.0, 0.0), eps=1.0, warmup=2), (-0.05 * 3 / 4, -0.05 * 4 / 5)),
    ],
)
def test_one_update_by_hand(optim: Optim, expected: tuple[float, float]) -> None:
    (record,) = run(Pull(), 1, optim=optim)
    assert weights(record.state) == pytest.approx(expected, rel=1e-5)
    assert record.logs["student/grad_norm"] == 5.0
    assert record.logs["student/lr"] == pytest.approx(optim.rate(0, 1))


def test_weight_decay_is_decoupled() -> None:
    optim = Optim(0.1, (0.0, 0.0), eps=1.0, weight_decay=0.5)
    (record,) = run(Pull(), 1, optim=optim, net=Pair(1.0, 1.0))
    assert weights(record.state) == pytest.approx([0.95 - 0.1 * 3 / 4, 0.95 - 0.1 * 4 / 5])


def test_counters_turns_and_moving_average() -> None:
    """Both nets move by lr a step; the average is the EMA of the student's trajectory."""
    optim = {"student": Optim(0.1, (0.0, 0.0)), "fake": Optim(0.01, (0.0, 0.0))}
    ema = EMA(halflife=20.0, ramp=0.5)
    records = run(Pull(two=True), 5, optim=optim, ema=ema)
    state = records[-1].state
    assert [(r.step, r.images) for r in records] == [(k, k * BATCH) for k in range(1, 6)]
    assert (state.drawn, state.skipped) == (10 * BATCH, 0)
    assert weights(state) == pytest.approx([-0.5, -0.5], rel=1e-6)
    assert weights(state, "fake") == pytest.approx([-0.05, -0.05], rel=1e-6)
    average = 0.0
    for k in range(5):
        beta = ema.decay(BATCH, k * BATCH)
        average = beta * average + (1 - beta) * -0.1 * (k + 1)
    found: Any = state.average
    assert found.w.tolist() == pytest.approx([average] * 2, rel=1e-6)
    assert found.seen.item() == 5
    assert not found.training
    assert not found.w.requires_grad
    keys = {f"{net}/{key}" for net in optim for key in ("loss", "grad_norm", "lr", "mean z")}
    assert set(records[0].logs) == {*keys, "skipped"}


def test_only_one_net_is_trainable() -> None:
    nets = Nets({"student": Pair(), "fake": Pair()})
    with training_only(nets, "fake") as trained:
        assert trained is nets["fake"]
        assert [n.training for n in nets.values()] == [False, True]
        assert [p.requires_grad for p in nets.parameters()] == [False, True]
    assert not any(n.training for n in nets.values())
    assert not any(p.requires_grad for p in nets.parameters())


def bits(modules: Iterable[nn.Module]) -> list[Tensor]:
    return [p.detach().clone() for m in modules for p in m.parameters()]


@pytest.mark.parametrize("fault", ["broken", "steep"])
def test_broken_updates_are_skipped_whole(fault: str) -> None:
    """Weights, average and Adam's moments stay as they were, to the bit; the fault is counted."""
    before: list[Tensor] = []
    faulty = Pull(**{fault: (2,)})  # type: ignore[arg-type]
    settings: Any = {"batch": BATCH, "ema": EMA(50.0), "optim": Optim(0.1, (0.9, 0.99))}
    for record in train(faulty, None, Pair(), Latents((2,)), steps=4, **settings):
        state = record.state
        moments = [v for s in state.optimizers["student"].state.values() for v in s.values()]
        now = [*bits([state.nets["student"], state.average]), *(m.clone() for m in moments)]
        same = [torch.equal(a, b) for a, b in zip(before, now, strict=True)] if before else []
        assert all(same) if record.step == 3 else not any(same)
        assert record.logs["skipped"] == (record.step >= 3)
        assert record.images == BATCH * (record.step - (record.step >= 3))
        assert state.streak == (record.step == 3)
        before = now


def test_diverged_names_net_and_cause() -> None:
    with pytest.raises(Diverged, match=r"student: loss and grad_norm not finite in 3 updates"):
        run(Pull(broken=(2, 3, 4)), 10, patience=3)
    with pytest.raises(Diverged, match=r"student: grad_norm not finite .* up to step 3"):
        run(Pull(steep=(2,)), 10, patience=1)


def test_a_clean_step_resets_patience() -> None:
    records = run(Pull(broken=(1, 2, 4, 5, 7, 8)), 9, patience=3)
    assert records[-1].state.skipped == 6
    assert records[-1].images == 3 * BATCH


def test_a_healthy_net_does_not_hide_a_broken_one() -> None:
    """The student fails at every step while the fake score's updates succeed."""
    with pytest.raises(Diverged, match="student"):
        run(Pull(two=True, broken=tuple(range(1, 99, 2))), 40, patience=4)


def test_impossible_loops_are_refused() -> None:
    with pytest.raises(ValueError, match="batch 8 must be a positive multiple of accumulate 3"):
        run(Pull(), 1, accumulate=3)
    with pytest.raises(ValueError, match="no optimiser for net 'student'; optim has fake"):
        run(Pull(), 1, optim={"fake": Optim()})


def last(steps: int, seed: int = 0, state: State | None = None, accumulate: int = 1) -> Record:
    teacher, net = GaussianMixture.ring(3), Model(MLP(16, 1), (2,)).build(1)
    records = train(
        SiD(),
        teacher.double(),
        net.double(),
        lambda draws: Latents((2,))(draws)._replace(z=draws.normal("z", (2,), F64)),
        batch=16,
        steps=steps,
        seed=seed,
        state=state,
        accumulate=accumulate,
        optim=Optim(1e-3, eps=1e-3, warmup=3),
    )
    return [*records][-1]


def distil(steps: int, **changes: Any) -> State:
    return last(steps, **changes).state


def flat(state: State) -> Tensor:
    return torch.cat([p.flatten() for p in bits([state.nets, state.average])])


def test_runs_are_functions_of_their_seed_alone() -> None:
    torch.manual_seed(1)
    first = flat(distil(4))
    torch.manual_seed(2)
    noise = torch.random.get_rng_state()
    assert torch.equal(flat(distil(4)), first)
    assert torch.equal(torch.random.get_rng_state(), noise)
    assert (flat(distil(4, seed=1)) - first).abs().max() > 1e-4


def test_a_continued_run_is_the_run() -> None:
    assert torch.equal(flat(distil(5, state=distil(2))), flat(distil(5)))


def test_accumulated_gradients_are_those_of_one_batch() -> None:
    """Four parts of four against one of sixteen, five steps of both nets, in double precision."""
    parts, whole = last(5, accumulate=4), last(5)
    torch.testing.assert_close(flat(parts.state), flat(whole.state), rtol=1e-9, atol=1e-11)
    assert parts.logs == pytest.approx(whole.logs, rel=1e-6)  # logs are in float32


def test_one_net_methods_average_their_output() -> None:
    state = State.init(Pretrain(), None, Pair(1.0, 2.0))
    assert list(state.nets) == ["denoiser"]
    average: Any = state.average
    assert average.w.tolist() == [1.0, 2.0]


@dataclass(frozen=True)
class Staged(Pull):
    """A turn at half the rate, two that measure, and a new stage after three steps."""

    def turns(self, step: int) -> Sequence[Turn]:
        return (
            Turn("student", self.loss, 0.5),
            Turn("student", self.counted),
            Turn("meter", self.counted),
        )

    def init(self, teacher: Any, net: nn.Module) -> Nets:
        nets = super().init(teacher, net)
        nets["meter"] = Meter()
        return nets

    def counted(self, nets: Nets, teacher: Any, batch: Batch) -> Loss:
        assert batch.draws is not None
        index = batch.draws.index.double()
        if int(index[0]) // BATCH in self.broken:
            index = index * math.nan
        sums = {"count": torch.ones_like(index).sum(), "index": index.sum()}
        return Loss(None, {"first": index[0]}, sums)

    def after_step(self, step: Step) -> None:
        meter: Any = step.nets["meter"]
        meter.seen.append({name: float(value) for name, value in step.sums.items()})
        meter.steps.append((step.step, step.images, step.batch))
        if step.step == 2:
            step.restart("student")


class Meter(nn.Module):
    """A net without parameters, which remembers what it was told."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[dict[str, float]] = []
        self.steps: list[tuple[int, int, int]] = []


@pytest.mark.parametrize("accumulate", [1, 2, 4])
def test_sums_are_over_the_whole_batch_of_all_turns(accumulate: int) -> None:
    """Twice 8 samples a step, whose numbers are added; not their means over microbatches."""
    *_, last = run(Staged(), 2, accumulate=accumulate)
    meter: Any = last.state.nets["meter"]
    expected = [sum(range(24 * s + 8, 24 * s + 24)) for s in range(2)]
    assert meter.seen == [{"count": 16.0, "index": float(total)} for total in expected]
    assert meter.steps == [(0, 16, 8), (1, 32, 8)]


def test_a_turn_that_measures_updates_nothing() -> None:
    """And has no learning rate or norm to log; its samples count as seen by the output net."""
    records = run(Staged(), 3)
    logs = records[0].logs
    assert {"meter/lr", "meter/grad_norm", "meter/loss"}.isdisjoint(logs)
    assert logs["meter/first"] == 16
    assert records[-1].images == 48
    assert "meter" not in run(Staged(), 2)[-1].state.optimizers


def test_the_rate_of_a_turn_is_a_factor() -> None:
    moved = [weights(run(method, 1, optim=Optim(0.1))[-1].state) for method in (Pull(), Staged())]
    assert moved[1] == pytest.approx([x / 2 for x in moved[0]])
    assert run(Staged(), 1, optim=Optim(0.1))[-1].logs["student/lr"] == pytest.approx(0.05)


def test_sums_of_refused_updates_do_not_count() -> None:
    """The second turn of the first step is not a number."""
    *_, last = run(Staged(broken=(1,)), 1)
    meter: Any = last.state.nets["meter"]
    assert meter.seen == [{"count": 8.0, "index": float(sum(range(16, 24)))}]
    assert last.logs["skipped"] == 1


def test_a_stage_begins_anew() -> None:
    """Moments, warm-up and the average, from the weights as they are."""
    rates, ages = [], []
    settings: Any = {"optim": Optim(0.1, warmup=4), "ema": EMA(1e9, 1e9)}
    for record in train(Staged(), None, Pair(), Latents((2,)), batch=8, steps=6, **settings):
        state = record.state
        average: Any = state.average
        student: Any = state.nets["student"]
        rates.append(record.logs["student/lr"])
        ages.append([int(e["step"]) for o in state.optimizers.values() for e in o.state.values()])
        assert record.restarted == (("student",) if record.step == 3 else ())
        if record.step == 3:
            assert torch.equal(average.w, student.w)
            assert state.restarts == {"student": (3, 48)}
            begun = student.w.detach().clone()
    assert rates == pytest.approx([0.05 * k / 4 for k in (1, 2, 3, 1, 2, 3)])
    assert ages == [[1], [2], [], [1], [2], [3]]
    beta = [EMA(1e9, 1e9).decay(8, 16 * n) for n in range(3)]
    assert beta[0] == 0  # the ramp of the average begins anew too
    assert not torch.equal(begun, student.w)


def test_a_restart_of_nothing_is_refused() -> None:
    step = Step(Nets({"student": Pair()}), Pair(), 0, 0, 8, {})
    with pytest.raises(ValueError, match=r"no net 'critic' to restart; there are \['student'\]"):
        step.restart("critic")


def test_a_loss_that_does_nothing_is_refused() -> None:
    @dataclass(frozen=True)
    class Idle(Pull):
        def loss(self, nets: Nets, teacher: Any, batch: Batch) -> Loss:
            return Loss(None)

    with pytest.raises(ValueError, match="neither a total to minimise nor sums"):
        run(Idle(), 1)
