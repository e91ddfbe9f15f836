"""Every method and preset from the command line, against what it starts from, on 8x8 digits.

    python benchmarks/claims/presets.py

A few hundred steps each: whether it learns, not how well it may become. The start is the network
that training starts from, under the sampler of the student. A preset that was measured is not run
again. Results: benchmarks/results/claims/digits-presets.json.
"""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from dataclasses import replace

import digits
import lab

from fewstep.runs.run_folder import RunFolder
from fewstep.storage.files import read_json, write_json
from fewstep.storage.model_folder import load_student

STEPS, SAMPLES = 300, 2000
TIMES = "times=Karras(tmax=500)"
SLOW = "--optim.lr 5e-4"
GUIDANCE = ("LSG(1.5)", "RandomLSG(1, 2)", "ZeroCFG()", "AntiCFG(-1)", "Kappas(1, 1, 1, 1.5)")
DISTANCES = (*("PseudoHuber()", "SquaredL2()", "NormPower()", "SumOfPowers()", "Exponential()"),)
PRESETS = {
    "SiD": "",
    "SiD, alpha 0.5": "--method.alpha 0.5",
    **{f"SiD, {each}": f"--method.guidance '{each}'" for each in GUIDANCE},
    **{f"SIM, {each}": f"--method 'SIM(distance={each}, {TIMES})'" for each in DISTANCES},
    "SiDA": f"--method 'SiDA(gan=0.01, {TIMES})'",
    "SiDA, a loss for each sample": (
        f"--method 'SiDA(gan=0.01, {TIMES}, fake=Critic(average=\"sample\"))'"
    ),
    "SiD2A": f"--method 'SiDA(gan=0.01, {TIMES})' --init {{SiD}}",
    "DiffInstruct": f"--method 'DiffInstruct({TIMES}, weight=L1())'",
    "DMD2": f"--method 'DMD2(FewStep(2.5), {TIMES}, fake=Critic(average=\"sample\"))'",
    "2 calls, uniform": f"--method.sampler 'FewStep(2.5, 2)' {SLOW}",
    "2 calls, final": f"--method.sampler 'FewStep(2.5, 2)' --method.matching final {SLOW}",
    "2 calls, fixed noise": f"--method.sampler 'FewStep(2.5, 2, \"fixed\")' {SLOW}",
    "2 calls, ddim": f"--method.sampler 'FewStep(2.5, 2, \"ddim\")' {SLOW}",
}


def main() -> None:
    teacher, sample_metrics = digits.teacher(), digits.SETTING.domain.sample_metrics()
    out = lab.RESULTS / "digits-presets.json"
    found = read_json(out) if out.is_file() else {}
    place = {name: lab.WORK / "digits" / "presets" / re.sub(r"\W+", "-", name) for name in PRESETS}
    for name, flags in PRESETS.items():
        command = f"fewstep distill digits --steps {STEPS} {flags}".strip()
        measured = found.get(name, {}).get("command") == command
        if measured and RunFolder(place[name]).finished:
            continue
        home = lab.WORK / "digits" / "teacher"
        told = flags.format(**{key: path for key, path in place.items() if " " not in key})
        told += f" --teacher {home} --out {place[name]} --sample-every {STEPS}"
        words = [*shlex.split(command)[1:3], "--steps", str(STEPS), *shlex.split(told)]
        subprocess.run([sys.executable, "-m", "fewstep", *words], check=True, capture_output=True)
        student = load_student(place[name])
        start = load_student(place["SiD"]) if "--init" in flags else teacher
        first = replace(start, sampler=student.sampler)
        begins, ends = (lab.scored(each, sample_metrics, SAMPLES) for each in (first, student))
        found[name] = {
            "command": command,
            "start": lab.rounded(begins),
            "end": lab.rounded(ends),
            "better": ends["fd_digits"] < begins["fd_digits"],
        }
        print(f"{name:32} {begins['fd_digits']:8.3f} -> {ends['fd_digits']:.3f}", flush=True)
        write_json(out, found)


if __name__ == "__main__":
    main()
