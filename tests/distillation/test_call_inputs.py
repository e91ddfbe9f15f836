"""What calls are given: noised data at their times, and the sampler's own start at the first."""

from __future__ import annotations

import pytest
import torch

from fewstep.diffusion.noise_path import VE, VP, Flow, NoisePath, perturb
from fewstep.diffusion.rng import Draws
from fewstep.diffusion.samplers import FewStep, Jumps
from fewstep.distillation.call_inputs import (
    call_input,
    call_times,
    require_few_steps,
    require_shares,
    require_trajectory,
)
from fewstep.methods.sid import SiD

F64 = torch.float64
DRAWS = Draws.range(0, 4000, 3)
X0, Z = DRAWS.normal("x0", (2,), F64), DRAWS.normal("z", (2,), F64)


@pytest.mark.parametrize(
    ("path", "sampler"),
    [
        (VE(), FewStep(2.5, 3)),
        (Flow(), FewStep(1.0, 4)),
        (VP(), FewStep(999.0, 4)),
        (VP(), FewStep(999.0, 4, unit=True)),
    ],
)
def test_noised_data_but_at_the_first_time(path: NoisePath, sampler: FewStep) -> None:
    """There the data are not heard; elsewhere x_t is theirs, of the same noise."""
    ladder = sampler.ladder(path)
    t = call_times(sampler, path, (), DRAWS, X0)
    assert sorted(set(t.tolist()), reverse=True) == ladder
    found, other = (call_input(sampler, path, x, Z, t) for x in (X0, X0 + 1))
    first = t == ladder[0]
    sigma = 1.0 if sampler.unit else path.sigma(t[first])[:, None]
    torch.testing.assert_close(found[first], sigma * Z[first])
    assert torch.equal(found[first], other[first])
    torch.testing.assert_close(found[~first], perturb(path, X0, Z, t)[~first])
    moved = (other - found)[~first]
    torch.testing.assert_close(moved, path.alpha(t[~first])[:, None].expand_as(moved))
    for share in (first.double().mean(), (~first).double().mean() / (len(ladder) - 1)):
        assert float(share) == pytest.approx(1 / len(ladder), abs=0.025)


def test_shares_of_calls() -> None:
    """Four standard errors: 0.03. A call of share zero never comes."""
    sampler, shares = FewStep(1.0, 4), (0.7, 0.1, 0.0, 0.2)
    t = call_times(sampler, Flow(), shares, DRAWS, X0)
    for at, share in zip((1.0, 0.75, 0.5, 0.25), shares, strict=True):
        assert float((t == at).double().mean()) == pytest.approx(share, abs=0.03 if share else 0)
    last = call_times(sampler, Flow(), (0.0, 0.0, 0.0, 1.0), DRAWS, X0)
    assert set(last.tolist()) == {0.25}


def test_what_does_not_fit_is_refused() -> None:
    method = SiD()
    for shares in ((1.0,), (0.5, 0.6), (1.5, -0.5)):
        with pytest.raises(ValueError, match=r"SiD.shares has a share of each of the sampler's 2"):
            require_shares(method, "shares", shares, 2)
    require_shares(method, "shares", (), 2)
    with pytest.raises(ValueError, match=r"SiD.sampler is a FewStep, as its calls are trained"):
        require_few_steps(method, None)  # type: ignore[arg-type]
    for sampler in (FewStep(2.5, 2), Jumps(2.5, 2)):
        with pytest.raises(ValueError, match=r"SiD.sampler is a FewStep\(noise='ddim'\), got"):
            require_trajectory(method, sampler)
    trajectory = FewStep(2.5, 2, "ddim")
    assert require_trajectory(method, trajectory) is trajectory
