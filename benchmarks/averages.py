"""How well stored averages make others: python benchmarks/averages.py, into results/averages.json

Profiles of 0.05 and 0.1, stored at even intervals of a training, and the distance of their best
combination from the profile that is wanted at its end, relative to its norm, in percent. It is a
formula, the same on every machine.
"""

from __future__ import annotations

from pathlib import Path

from fewstep.storage.files import write_json
from fewstep.training.power_ema import combination, gamma_of

OUT = Path(__file__).parent / "results" / "averages.json"
STORED = (0.05, 0.1)
COUNTS = (3, 8, 16, 32, 64)
WANTED = (0.03, 0.07, 0.13, 0.2, 0.25)


def percent(count: int, wanted: float) -> float:
    """The mismatch of one length after `count` stored times."""
    times = [time / count for time in range(1, count + 1) for _ in STORED]
    gammas = [gamma_of(length) for _ in range(count) for length in STORED]
    return 100 * combination(gammas, times, gamma_of(wanted), 1.0)[1]


def main() -> None:
    """All counts and lengths."""
    found = {str(n): {str(wanted): percent(n, wanted) for wanted in WANTED} for n in COUNTS}
    write_json(OUT, found)
    for count, row in found.items():
        print(count, {wanted: round(value, 3) for wanted, value in row.items()})


if __name__ == "__main__":
    main()
