"""A recipe on the wrong kind of teacher names the right ones; a dry run refuses nothing."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import torch

from fewstep.cli.dry_run import shortened, tried
from fewstep.config import encode
from fewstep.domains.prompts import Prompted, Prompts
from fewstep.recipes.registry import every
from fewstep.recipes.text_to_image import suit, t2i
from fewstep.runs.run import Run
from fewstep.runs.runner import prepare
from fewstep.runs.teacher import describe_model, resolve_run
from fewstep.teachers.diffusers.hub import name_of
from fewstep.training.progress import heard
from tests.conftest import Folders
from tests.tiny_pipelines import FLOWS


@cache
def prompted() -> dict[str, Run]:
    return {n: run for n, make in every().items() if isinstance((run := make()).domain, Prompted)}


@pytest.mark.parametrize(
    "kind",
    ["sd", "sd_v", "sdxl", "pixart", "sd3", "sana", "flux", "flux2", "qwen_image", "z_image"],
)
def test_a_recipe_of_the_other_kind_names_the_right_one(folders: Folders, kind: str) -> None:
    """Whichever recipe on prompts: it suits betas or flows, and never both."""
    model = describe_model(folders(kind))
    flow = kind in FLOWS
    right, wrong = ("t2i_flow", "t2i") if flow else ("t2i", "t2i_flow")
    suit(replace(prompted()[right], model=model), right, every())
    with pytest.raises(ValueError, match=f"^{wrong} does not suit this teacher") as caught:
        suit(replace(prompted()[wrong], model=model), wrong, every())
    names = str(caught.value).rpartition(" are ")[2].split(", ")
    assert right in names
    assert wrong not in names
    of_betas, of_flows = {"lcm_sd15", "icd_sd15", "tdd_sdxl"}, {"scfm_flux", "ladd_sd3"}
    assert (of_flows if flow else of_betas) <= set(names)
    assert not (of_betas if flow else of_flows) & set(names)


@pytest.mark.slow
def test_a_dry_run_encodes_nothing_and_doubts_in_words(
    folders: Folders, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The tiny teacher knows nothing: a run is refused with the way out, a dry run is told so."""
    monkeypatch.chdir(tmp_path)
    Path("prompts.txt").write_text("a cat\na dog\n")
    pipe = str(folders("sd"))
    run = resolve_run(replace(t2i(), batch=2, accumulate=1), pipe)
    with pytest.raises(ValueError, match="trained too little, go on with --domain"):
        prepare(run, "t2i", pipe)
    said: list[str] = []
    torch.manual_seed(0)
    before = sorted(Path().rglob("*"))
    with heard(said.append):
        work = prepare(tried(run), "t2i", pipe)
    assert len(said) == 1
    assert said[0].startswith("the run itself would stop here: the teacher does not denoise")
    assert sorted(Path().rglob("*")) == before
    assert work.teacher is not None
    unchecked = replace(run, domain=Prompts(check=False))
    with heard(said.append):
        prepare(tried(unchecked), "t2i", pipe)
    assert len(said) == 1


def test_a_dry_run_shows_no_endless_line(folders: Folders) -> None:
    run = t2i()
    shown = shortened(encode(replace(run, model=describe_model(folders("sd")))))
    assert shown["model"]["net"]["config"].endswith(" characters)")
    assert len(shown["model"]["net"]["config"]) < 140
    assert shown["steps"] == run.steps
    assert shown["domain"] == encode(run.domain)


@pytest.mark.parametrize(
    ("folder", "name"),
    [
        ("c/models--some--pipe/snapshots/" + 40 * "a", "some/pipe"),
        ("c/models--some-org--pipe-v1.5/snapshots/main", "some-org/pipe-v1.5"),
        ("c/models--gpt2/snapshots/" + 40 * "a", "gpt2"),
        ("teachers/pipe", ""),
        ("snapshots/pipe", ""),
    ],
)
def test_the_name_of_a_cached_pipeline(folder: str, name: str) -> None:
    assert name_of(Path(folder)) == name
