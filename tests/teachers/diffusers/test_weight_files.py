"""A folder in any state gives what stock diffusers makes of it, or is refused in a sentence.

Refused by what `plan` asks and by what training loads alike, before a prompt is encoded.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.conftest import Folders

pytest.importorskip("diffusers")

import diffusers
import transformers
from safetensors.torch import load_file, save_file

from fewstep.diffusion.samplers import FewStep
from fewstep.export.diffusers_pipeline import against, to_diffusers
from fewstep.runs.inspection import inspect_model
from fewstep.runs.teacher import describe_model, notes_on, open_generator
from fewstep.storage.files import digest
from fewstep.storage.model_folder import load_student
from fewstep.teachers.diffusers.compatibility import moments
from fewstep.teachers.diffusers.folder import open_folder
from fewstep.teachers.diffusers.load import load_pipeline, with_text_and_vae
from fewstep.teachers.diffusers.text_and_vae import TextAndVAE
from tests import tiny_pipelines
from tests.export.test_diffusers_pipeline import ran, student
from tests.parameters import families
from tests.teachers.diffusers.test_folder import edit, shard
from tests.teachers.diffusers.test_load import PROMPTS, encoded
from tests.tiny_text import clip, clip_tokenizer, t5_tokenizer

each_kind = pytest.mark.parametrize(
    "kind", families(("sd", "sd3", "sdxl", "pixart", "pixart_sigma", "sana", "flux"))
)
Change = Callable[[Path], Any]
BASE = "diffusion_pytorch_model"


def files_of(folder: Path) -> list[Path]:
    """The single files of weights of all parts."""
    return sorted(p for p in folder.rglob("*.safetensors") if "-of-" not in p.name)


def network_of(folder: Path) -> Path:
    return next(folder / name for name in ("unet", "transformer") if (folder / name).is_dir())


def halved(path: Path) -> None:
    """A file as the variant fp16, in place of the plain one."""
    state = {name: t.half() for name, t in load_file(path).items()}
    save_file(state, path.with_name(f"{path.stem}.fp16.safetensors"), {"format": "pt"})
    path.unlink()


def stale(path: Path) -> None:
    """Other numbers under the same names, beside a file: plain shards without an index."""
    state = {name: torch.full_like(t, 7.0) for name, t in load_file(path).items()}
    for number in (1, 2):
        save_file(state, path.with_name(f"{path.stem}-0000{number}-of-00002.safetensors"))


def stale_beside_an_index(path: Path) -> None:
    """Shards and their index, beside those of an older download in more parts."""
    other = {name: torch.full_like(t, 7.0) for name, t in load_file(path).items()}
    shard(path)
    save_file(other, path.with_name(f"{path.stem}-00009-of-00009.safetensors"))


def beside_an_index(path: Path) -> None:
    """Shards and their index, beside an older single file of other numbers."""
    other = {name: torch.full_like(t, 7.0) for name, t in load_file(path).items()}
    shard(path)
    save_file(other, path, {"format": "pt"})


def all_of(change: Callable[[Path], None], names: str = "*") -> Change:
    """Change the weights of every part whose name fits."""

    def act(folder: Path) -> None:
        for path in files_of(folder):
            if path.parent.match(names):
                change(path)

    return act


def sharded_variant(folder: Path) -> None:
    for path in files_of(folder):
        halved(path)
    for path in files_of(folder):
        shard(path)


def both_variants(folder: Path) -> None:
    """Weights in half precision beside the plain ones, except in the network, which has no plain
    ones: stock reads all parts in half precision, since it is told one variant."""
    for path in files_of(folder):
        plain = path.read_bytes()
        halved(path)
        if path.parent != network_of(folder):
            path.write_bytes(plain)


STATES: dict[str, tuple[Change, str | None]] = {
    "sharded": (all_of(shard), None),
    "half precision": (all_of(halved), "fp16"),
    "half precision, sharded": (sharded_variant, "fp16"),
    "half network": (lambda f: all_of(halved, network_of(f).name)(f), "fp16"),
    "half vae": (all_of(halved, "vae"), "fp16"),
    "half text": (all_of(halved, "text_encoder*"), "fp16"),
    "both variants": (both_variants, "fp16"),
    "stale shards": (all_of(stale), None),
    "stale shards beside an index": (all_of(stale_beside_an_index), None),
    "older files beside an index": (all_of(beside_an_index), None),
}


def pipes(folder: Path, variant: str | None) -> tuple[Any, Any]:
    """Stock's pipeline of a folder, and ours."""
    told = {"local_files_only": True, "use_safetensors": True, "variant": variant}
    index = json.loads((folder / "model_index.json").read_text())
    told |= {part: None for part, entry in index.items() if entry == [None, None]}
    return diffusers.DiffusionPipeline.from_pretrained(folder, **told), load_pipeline(folder)


def assert_same(folder: Path, kind: str, variant: str | None) -> None:
    """Weights, conditions and pictures are stock's own."""
    pipe, teacher = pipes(folder, variant)
    net = getattr(pipe, "unet", None) or pipe.transformer
    ours = teacher.denoiser.net.net.state_dict()
    for name, value in net.state_dict().items():
        assert torch.equal(ours[name], value.float()), name
    told = encoded(pipe, kind)
    for name, value in teacher.text(PROMPTS).items():
        assert torch.equal(value, told[name].float()), name
    torch.manual_seed(2)
    z = torch.randn(1, 4, 8, 8)
    assert torch.allclose(teacher.decode(z), decoded(pipe, z), atol=1e-6)


@torch.no_grad()
def decoded(pipe: Any, z: Tensor) -> Tensor:
    """Latents as pictures, by what the stock pipeline does with its VAE's configuration."""
    shift = pipe.vae.config.get("shift_factor") or 0.0
    out: Tensor = pipe.vae.decode(z / pipe.vae.config.scaling_factor + shift, return_dict=False)[0]
    return out


@pytest.mark.parametrize("state", STATES)
@each_kind
def test_files_are_those_of_stock(folders: Folders, tmp_path: Path, kind: str, state: str) -> None:
    """Whatever lies in the folder; the variant is the one that stock has to be told."""
    folder = tmp_path / "pipe"
    shutil.copytree(folders(kind), folder)
    change, variant = STATES[state]
    change(folder)
    assert open_folder(folder).variant == variant
    assert_same(folder, kind, variant)


def test_what_is_not_read_is_known_and_not_digested(folders: Folders, tmp_path: Path) -> None:
    """The digest is that of the clean folder; one of what is read differs."""
    folder = tmp_path / "pipe"
    shutil.copytree(folders("sd"), folder)
    clean = open_folder(folder)
    all_of(stale)(folder)
    (folder / "unet" / "diffusion_pytorch_model.bin").write_bytes(b"")
    found = open_folder(folder)
    bases = {"text_encoder": "model", "unet": BASE, "vae": BASE}
    stale_shards = [
        f"{part}/{base}-0000{number}-of-00002.safetensors"
        for part, base in bases.items()
        for number in (1, 2)
    ]
    assert sorted(found.unread) == sorted([*stale_shards, f"unet/{BASE}.bin"])
    assert (found.text_digest, found.vae_digest) == (clean.text_digest, clean.vae_digest)
    assert clean.unread == []
    path = folder / "text_encoder" / "model.safetensors"
    save_file({name: t + 1 for name, t in load_file(path).items()}, path, {"format": "pt"})
    assert open_folder(folder).text_digest != clean.text_digest


def test_the_last_shard_of_an_encoder_is_in_its_digest(folders: Folders, tmp_path: Path) -> None:
    folder = tmp_path / "pipe"
    shutil.copytree(folders("sd"), folder)
    all_of(shard)(folder)
    found = open_folder(folder)
    before = found.text_digest, found.vae_digest
    for part in ("text_encoder", "vae"):
        path = max((folder / part).glob("*.safetensors"))
        save_file({n: t + 1 for n, t in load_file(path).items()}, path, {"format": "pt"})
    after = open_folder(folder)
    assert after.text_digest != before[0]
    assert after.vae_digest != before[1]


def without_t5(folder: Path) -> None:
    """SD3 as it is often fetched."""
    edit("model_index.json", text_encoder_3=[None, None], tokenizer_3=[None, None])(folder)
    for part in ("text_encoder_3", "tokenizer_3"):
        shutil.rmtree(folder / part)


def test_sd3_without_t5(folders: Folders, tmp_path: Path) -> None:
    """Stock has zeros for its words, as many as it would have; and refuses half of the pair."""
    folder = tmp_path / "pipe"
    shutil.copytree(folders("sd3"), folder)
    edit("model_index.json", text_encoder_3=[None, None])(folder)
    with pytest.raises(ValueError, match="needs text_encoder_3"):
        describe_model(folder)
    without_t5(folder)
    assert_same(folder, "sd3", None)
    assert describe_model(folder) == describe_model(folders("sd3"))
    words = load_pipeline(folder).text(PROMPTS)["prompt"]
    assert words.shape == (2, 8 + 256, 32)
    assert not words[:, 8:].any()
    assert words[:, :8].any()


# configurations


def default_keys(folder: Path, part: str, file: Path) -> Iterator[str]:
    """Keys whose value is the default of the class that reads them, by the class itself."""
    library, name = json.loads((folder / "model_index.json").read_text())[part]
    told = json.loads(file.read_text())
    if library == "diffusers":
        cls = getattr(diffusers, name)
        defaults = dict(cls().config) if part == "scheduler" else signature(cls)
    else:
        defaults = getattr(transformers, name).config_class().to_dict()
    for key, value in told.items():
        plain = json.loads(json.dumps(defaults.get(key, ...), default=str))
        if key in defaults and plain == value and not key.startswith("_"):
            yield key


def signature(cls: Any) -> dict[str, Any]:
    import inspect

    return {n: p.default for n, p in inspect.signature(cls.__init__).parameters.items()}


def configurations(folder: Path) -> Iterator[tuple[str, Path]]:
    for file in sorted(folder.glob("*/*config.json")):
        if file.name in ("config.json", "scheduler_config.json"):
            yield file.parent.name, file


def read(folder: Path, part: str) -> Any:
    found = open_folder(folder)
    return found.text_config(part).to_dict() if part in found.encoders else found.config(part)


@pytest.mark.parametrize("kind", families(tiny_pipelines.KINDS))
def test_missing_keys_have_their_classes_defaults(
    folders: Folders, tmp_path: Path, kind: str
) -> None:
    """Each alone, then all at once: the same configuration, network, schedule and scale."""
    folder, dropped = tmp_path / "pipe", 0
    shutil.copytree(folders(kind), folder)
    whole = open_folder(folder)
    for part, file in configurations(folder):
        text, before = file.read_text(), read(folder, part)
        told = json.loads(text)
        keys = list(default_keys(folder, part, file))
        for key in keys:
            file.write_text(json.dumps({k: v for k, v in told.items() if k != key}))
            assert read(folder, part) == before, (part, key)
        file.write_text(json.dumps({k: v for k, v in told.items() if k not in keys}))
        dropped += len(keys)
    assert dropped > 20
    assert describe_model(folder) == describe_model(folders(kind))
    assert moments(open_folder(folder)) == moments(whole)


@pytest.mark.parametrize("kind", ["sd", "sdxl", "pixart"])
def test_the_scale_of_an_old_vae(folders: Folders, tmp_path: Path, kind: str) -> None:
    """As it was written before the key existed; with the names of that time."""
    folder = tmp_path / "pipe"
    shutil.copytree(folders(kind), folder)
    where = folder / "vae" / "config.json"
    told = json.loads(where.read_text())
    where.write_text(json.dumps({k: v for k, v in told.items() if k != "scaling_factor"}))
    assert moments(open_folder(folder)) == ([0.0], [1 / 0.18215])
    names = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    path = folder / "vae" / "diffusion_pytorch_model.safetensors"
    state = load_file(path)
    for new, old in names.items():
        state = {
            n.replace(f"attentions.0.{new}.", f"attentions.0.{old}."): t for n, t in state.items()
        }
    assert state.keys() != load_file(path).keys()
    save_file(state, path, {"format": "pt"})
    assert_same(folder, kind, None)
    where.write_text(json.dumps({**told, "scaling_factor": 1.0}))
    assert moments(open_folder(folder))[1] == [1.0]


def test_moments_are_those_that_the_pipeline_reads(folders: Folders, tmp_path: Path) -> None:
    """SD passes over a shift, SD3 over means; SDXL takes means and deviations, both or none."""
    means = {"latents_mean": [0.1, 0.2, 0.3, 0.4], "latents_std": [1.0, 2.0, 3.0, 4.0]}
    for kind, more, expected in (
        ("sd", {"shift_factor": 0.5, **means}, ([0.0], [1 / 0.18215])),
        ("sdxl", means, (means["latents_mean"], [s / 0.18215 for s in means["latents_std"]])),
        ("sdxl", {"latents_mean": means["latents_mean"]}, ([0.0], [1 / 0.18215])),
        ("sd3", means, ([0.06], [1 / 1.5])),
    ):
        folder = tmp_path / f"{kind}{len(more)}"
        shutil.copytree(folders(kind), folder)
        edit("vae/config.json", **more)(folder)
        assert moments(open_folder(folder)) == expected, kind
    edit("vae/config.json", shift_factor=None)(folder)
    with pytest.raises(ValueError, match="shift_factor should be a number, got None"):
        describe_model(folder)


@pytest.mark.parametrize("part", ["transformer", "vae", "scheduler"])
def test_null_keys_of_newer_versions_are_passed_over(
    folders: Folders, tmp_path: Path, part: str
) -> None:
    """And those that say something are refused by the name of their file."""
    folder = tmp_path / "pipe"
    shutil.copytree(folders("sd3"), folder)
    name = f"{part}/{'scheduler_' if part == 'scheduler' else ''}config.json"
    edit(name, new_of_2030=None)(folder)
    assert describe_model(folder) == describe_model(folders("sd3"))
    for value in (True, 0, "x", {"a": 1}):
        edit(name, new_of_2030=value)(folder)
        with pytest.raises(
            ValueError, match=f"{name} says 'new_of_2030', which a .*does not know"
        ):
            describe_model(folder)


# what is refused

Damage = Callable[[Path], None]
TORN: dict[str, tuple[Damage, str]] = {
    "pointer": (
        lambda p: (
            p.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
            and None
        ),
        "is a pointer of git-lfs, not the file itself; run 'git lfs pull'",
    ),
    "cut": (
        lambda p: p.write_bytes(p.read_bytes()[:-5]) and None,
        "is not a safetensors file",
    ),
    "cut in the header": (
        lambda p: p.write_bytes(p.read_bytes()[:60]) and None,
        "is not a safetensors file",
    ),
    "longer": (
        lambda p: p.write_bytes(p.read_bytes() + b"\0" * 9) and None,
        "is not a safetensors file",
    ),
    "empty": (lambda p: p.write_bytes(b"") and None, "is not a safetensors file"),
    "junk": (lambda p: p.write_bytes(b"\xff" * 999) and None, "is not a safetensors file"),
    "page": (lambda p: p.write_text("<html>" * 99) and None, "is not a safetensors file"),
    "pickle": (lambda p: p.rename(p.with_suffix(".bin")) and None, r"pickles are never opened"),
    "one tensor less": (
        lambda p: save_file(dict(list(load_file(p).items())[1:]), p),
        "the weights do not fit the configuration in 1 places",
    ),
    "another shape": (
        lambda p: save_file({n: t[..., :1].clone() for n, t in load_file(p).items()}, p),
        "the weights do not fit the configuration in",
    ),
    "quantised": (
        lambda p: save_file({n: t.to(torch.int8) for n, t in load_file(p).items()}, p),
        "holds quantised weights",
    ),
}


def refused(folder: Path, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A sentence from what plan asks, and from loading, and no prompt is encoded."""

    def encode(*_: object) -> None:
        raise AssertionError("a prompt was encoded")

    with monkeypatch.context() as patched:
        patched.setattr(TextAndVAE, "_encoded", encode)
        for ask in (describe_model, load_pipeline):
            with pytest.raises(ValueError, match=message) as caught:
                ask(folder)
            text = str(caught.value)
            assert "\n" not in text
            assert str(folder) in text
            assert len(text.replace(str(folder), "")) < 400


@pytest.mark.parametrize("damage", TORN)
@each_kind
def test_damaged_weights_of_any_part_are_refused(
    folders: Folders, tmp_path: Path, kind: str, damage: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    act, message = TORN[damage]
    for number, file in enumerate(files_of(folders(kind))):
        folder = tmp_path / str(number)
        shutil.copytree(folders(kind), folder)
        act(folder / file.relative_to(folders(kind)))
        refused(folder, message, monkeypatch)


def reindexed(part: str, change: Callable[[dict[str, str], Path], None]) -> Change:
    """Shards whose index is changed."""

    def act(folder: Path) -> None:
        shard(next((folder / part).glob("*.safetensors")))
        path = next((folder / part).glob("*.index.json"))
        told = json.loads(path.read_text())
        change(told["weight_map"], folder / part)
        path.write_text(json.dumps(told))

    return act


def outside(places: dict[str, str], home: Path) -> None:
    name = max(places.values())
    (home / name).rename(home.parent / "elsewhere.safetensors")
    places |= {k: "../elsewhere.safetensors" for k, v in places.items() if v == name}


def absolute(places: dict[str, str], home: Path) -> None:
    places |= {k: str(home / v) for k, v in places.items()}


def lost(places: dict[str, str], home: Path) -> None:
    (home / max(places.values())).unlink()


def moved(places: dict[str, str], home: Path) -> None:
    places[min(places)] = max(places.values())


def pointing(places: dict[str, str], home: Path) -> None:
    (home / max(places.values())).write_text("version https://git-lfs.github.com/spec/v1\n")


INDICES: dict[str, tuple[Callable[[dict[str, str], Path], None], str]] = {
    "outside": (outside, r"names '../elsewhere.safetensors', which is no safetensors file beside"),
    "absolute": (absolute, "which is no safetensors file beside it"),
    "missing": (lost, r"-00002-of-00002.safetensors is missing"),
    "other tensors": (moved, r"does not fit its shards in 1 tensors"),
    "pointer": (pointing, "is a pointer of git-lfs"),
    "empty": (lambda places, home: places.clear(), "names no weights"),
}


@pytest.mark.parametrize("case", INDICES)
@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder"])
def test_an_index_names_whole_files_beside_it(
    folders: Folders, tmp_path: Path, part: str, case: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "pipe"
    shutil.copytree(folders("sd"), folder)
    change, message = INDICES[case]
    reindexed(part, change)(folder)
    refused(folder, message, monkeypatch)


def test_variants_that_complete_nothing(
    folders: Folders, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two that would do, and two of which neither does, are for the person to choose from."""
    folder = tmp_path / "pipe"
    shutil.copytree(folders("sd"), folder)
    all_of(halved, "unet")(folder)
    half = folder / "unet" / "diffusion_pytorch_model.fp16.safetensors"
    shutil.copyfile(half, half.with_name("diffusion_pytorch_model.bf16.safetensors"))
    refused(folder, r"holds unet in several variants \(bf16, fp16\)", monkeypatch)
    half.unlink()
    all_of(halved, "vae")(folder)
    refused(folder, "no plain weights of unet, vae, and no one variant has them", monkeypatch)
    half.with_name("diffusion_pytorch_model.bf16.safetensors").unlink()
    refused(folder, r"unet holds no diffusion_pytorch_model.safetensors; save", monkeypatch)


def tokens_of(part: str, make: Callable[[Path], Any]) -> Change:
    """Another tokenizer in the place of one."""

    def act(folder: Path) -> None:
        shutil.rmtree(folder / part)
        make(folder / "words").save_pretrained(folder / part)
        edit(f"{part}/tokenizer_config.json", model_max_length=8)(folder)
        shutil.rmtree(folder / "words", ignore_errors=True)

    return act


def no_vocabulary(part: str) -> Change:
    """Its configuration alone."""
    return lambda folder: (folder / part / "tokenizer.json").unlink()


def no_merges(folder: Path) -> None:
    """The files of before tokenizer.json, one of them missing."""
    clip_tokenizer(folder / "words")
    (folder / "tokenizer" / "tokenizer.json").unlink()
    shutil.copyfile(folder / "words" / "vocab.json", folder / "tokenizer" / "vocab.json")
    shutil.rmtree(folder / "words")


def half_vocabulary(folder: Path) -> None:
    """The first of the tokens."""
    path = folder / "tokenizer" / "tokenizer.json"
    told = json.loads(path.read_text())
    vocab = told["model"]["vocab"]
    told["model"]["vocab"] = {k: v for k, v in vocab.items() if v < 94 or k.startswith("<|")}
    told["model"]["merges"] = []
    path.write_text(json.dumps(told))


def other_encoder(part: str, make: Callable[[Any], Any], *, words: bool = False) -> Change:
    """A text encoder of other sizes, sound in itself."""

    def act(folder: Path) -> None:
        tokens = t5_tokenizer() if words else clip_tokenizer(folder / "words")
        shutil.rmtree(folder / part)
        make(tokens).save_pretrained(folder / part)
        shutil.rmtree(folder / "words", ignore_errors=True)

    return act


def wide_t5(tokens: Any) -> Any:
    config = transformers.T5Config(
        vocab_size=len(tokens), d_model=48, d_kv=8, d_ff=32, num_layers=1, num_heads=2
    )
    return transformers.T5EncoderModel(config)


def other_vae(channels: int) -> Change:
    return lambda folder: tiny_pipelines.vae(channels, shift_factor=0.1).save_pretrained(
        folder / "vae"
    )


def other_unet(cross: int, **more: Any) -> Change:
    return lambda folder: tiny_pipelines.unet(cross, **more).save_pretrained(folder / "unet")


MISFITS: dict[str, tuple[str, Change, str]] = {
    "no vocabulary": ("sd", no_vocabulary("tokenizer"), "tokenizer has no vocabulary: it needs"),
    "no second one": ("sdxl", no_vocabulary("tokenizer_2"), "tokenizer_2 has no vocabulary"),
    "no T5 vocabulary": ("sd3", no_vocabulary("tokenizer_3"), "tokenizer_3 has no vocabulary"),
    "no PixArt vocabulary": ("pixart", no_vocabulary("tokenizer"), "tokenizer has no vocabulary"),
    "no Gemma vocabulary": ("sana", no_vocabulary("tokenizer"), "tokenizer has no vocabulary"),
    "no merges": ("sd", no_merges, "needs tokenizer.json, or vocab.json and merges.txt"),
    "pointer to a vocabulary": (
        "sd",
        lambda f: (f / "tokenizer" / "tokenizer.json").write_text(
            "version https://git-lfs.github.com/spec/v1\n"
        ),
        "is a pointer of git-lfs",
    ),
    "broken vocabulary": (
        "sd",
        lambda f: (f / "tokenizer" / "tokenizer.json").write_text("{"),
        "holds no usable tokenizer",
    ),
    "half a vocabulary": (
        "sd",
        half_vocabulary,
        "tokenizer has 96 tokens, but text_encoder hears",
    ),
    "longer texts": (
        "sd",
        edit("tokenizer/tokenizer_config.json", model_max_length=9),
        "tokenizer makes 9 tokens of a text, but text_encoder hears 8 at most",
    ),
    "wider CLIP": (
        "sd",
        other_encoder("text_encoder", lambda w: clip(False, w, 32)),
        "text_encoder makes a prompt of width 32, but unet hears 16",
    ),
    "wider second CLIP": (
        "sdxl",
        other_encoder("text_encoder_2", lambda w: clip(True, w, 32)),
        "text_encoder and text_encoder_2 make a prompt of width 48, but unet hears 32",
    ),
    "wider CLIP of SD3": (
        "sd3",
        other_encoder("text_encoder", lambda w: clip(True, w, 32)),
        "make a pooled of width 48, but transformer hears 32",
    ),
    "wider T5 of SD3": (
        "sd3",
        other_encoder("text_encoder_3", wide_t5, words=True),
        "text_encoder_3 makes a prompt of width 48, but transformer hears 32",
    ),
    "wider T5": (
        "pixart",
        other_encoder("text_encoder", wide_t5, words=True),
        "text_encoder makes a prompt of width 48, but transformer hears 32",
    ),
    "wider T5 of FLUX": (
        "flux",
        other_encoder("text_encoder_2", wide_t5, words=True),
        "text_encoder_2 makes a prompt of width 48",
    ),
    "wider CLIP of FLUX": (
        "flux",
        other_encoder("text_encoder", lambda w: clip(False, w, 32)),
        "text_encoder makes a pooled of width 32",
    ),
    "16 channels": ("sd", other_vae(16), "unet takes 4 channels, but the latents of vae have 16"),
    "16 of FLUX": ("flux", other_vae(16), "takes 4 channels, but the latents of vae have 16"),
    "8 of SD3": ("sd3", other_vae(8), "takes 4 channels, but the latents of vae have 8"),
    "inpainting": (
        "sd",
        other_unet(16, in_channels=9),
        "unet takes 9 channels, but the latents of vae have 4; networks that take more",
    ),
    "other answers": ("sd", other_unet(16, out_channels=8), "takes 4 channels and answers with 8"),
    "wider network": (
        "sd",
        other_unet(24),
        "text_encoder makes a prompt of width 16, but unet hears 24",
    ),
    "network of SD": (
        "sdxl",
        other_unet(32),
        "unet hears prompt, but a StableDiffusionXLPipeline",
    ),
    "guidance embedding": (
        "sd",
        other_unet(16, time_cond_proj_dim=8),
        "unet/config.json: time_cond_proj_dim is 8",
    ),
    "class labels": (
        "sd",
        other_unet(16, class_embed_type="timestep"),
        "unet/config.json: class_embed_type is 'timestep'",
    ),
    "guided SANA": (
        "sana",
        edit("transformer/config.json", guidance_embeds=True),
        "transformer/config.json: guidance_embeds is True",
    ),
    "configuration of another class": (
        "sd",
        edit("vae/config.json", _class_name="AutoencoderTiny"),
        "vae/config.json is that of a AutoencoderTiny, not of a AutoencoderKL",
    ),
    "other files": (
        "sd",
        edit("text_encoder/config.json", transformers_weights="../other.safetensors"),
        "has transformers_weights, which fewstep does not load",
    ),
    "no scale": (
        "sd",
        edit("vae/config.json", scaling_factor=None),
        "vae/config.json: scaling_factor should be a number, got None",
    ),
    "scale in words": ("sd", edit("vae/config.json", scaling_factor="1"), "should be a number"),
}


@pytest.mark.parametrize("case", MISFITS)
def test_parts_that_do_not_fit_are_refused(
    folders: Folders, tmp_path: Path, case: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    kind, change, message = MISFITS[case]
    folder = tmp_path / "pipe"
    shutil.copytree(folders(kind), folder)
    change(folder)
    refused(folder, message, monkeypatch)


def test_a_vocabulary_may_be_filled_up(folders: Folders, tmp_path: Path) -> None:
    """T5 hears 32128 tokens, of which its tokenizer has 32100."""
    folder = tmp_path / "pipe"
    shutil.copytree(folders("pixart"), folder)
    path = folder / "text_encoder" / "model.safetensors"
    state = load_file(path)
    (name,) = (n for n in state if n.startswith("shared"))
    state[name] = torch.cat([state[name], torch.zeros(64 - len(state[name]), 32)])
    save_file(state, path, {"format": "pt"})
    edit("text_encoder/config.json", vocab_size=64)(folder)
    assert_same(folder, "pixart", None)
    assert digest(path) != digest(folders("pixart") / "text_encoder" / "model.safetensors")


@pytest.mark.parametrize("kind", ["sd", "sd3"])
@pytest.mark.parametrize("state", ["half precision", "half precision, sharded", "half network"])
def test_what_trains_can_be_exported(
    folders: Folders, tmp_path: Path, kind: str, state: str
) -> None:
    """The folder of such a student loads without a variant, and is the student."""
    teacher = tmp_path / "teacher"
    shutil.copytree(folders(kind), teacher)
    STATES[state][0](teacher)
    all_of(stale, "vae")(teacher)
    sampler = FewStep(1.0, 2) if kind == "sd3" else FewStep(625.0)
    made = student(teacher, tmp_path / "student", sampler)
    assert to_diffusers(made, tmp_path / "out") <= 1e-5
    found = open_folder(tmp_path / "out")
    assert found.variant is None
    assert found.unread == []
    assert (
        TextAndVAE(found).vae.state_dict().keys()
        == TextAndVAE(open_folder(teacher)).vae.state_dict().keys()
    )


def test_a_student_of_sd3_without_t5_is_exported(folders: Folders, tmp_path: Path) -> None:
    """Its card tells stock diffusers which parts there are none of."""
    teacher = tmp_path / "teacher"
    shutil.copytree(folders("sd3"), teacher)
    without_t5(teacher)
    made = student(teacher, tmp_path / "student", FewStep(1.0, 2))
    assert to_diffusers(made, tmp_path / "out") <= 1e-5
    text = (tmp_path / "out" / "README.md").read_text()
    assert 'from_pretrained("out", text_encoder_3=None, tokenizer_3=None)' in text
    assert against(ran(text, tmp_path)["pipe"], load_student(made)) <= 1e-5


def test_another_vae_is_not_a_students_own(folders: Folders, tmp_path: Path) -> None:
    teacher = tmp_path / "teacher"
    shutil.copytree(folders("sd"), teacher)
    made = student(teacher, tmp_path / "student", FewStep(625.0))
    path = teacher / "vae" / f"{BASE}.safetensors"
    save_file({name: t + 1 for name, t in load_file(path).items()}, path, {"format": "pt"})
    with pytest.raises(ValueError, match="has another VAE than this model was trained with"):
        with_text_and_vae(load_student(made))


def test_single_files_are_refused_with_the_way_out(tmp_path: Path) -> None:
    """By a folder that is made of them; a .ckpt is not opened."""
    path, pickled = tmp_path / "model.safetensors", tmp_path / "model.ckpt"
    save_file({"model.diffusion_model.input_blocks.0.0.weight": torch.zeros(1)}, path)
    pickled.write_bytes(b"\x80never opened")
    way = 'diffusers.StableDiffusionPipeline.from_single_file("model.ckpt").save_pretrained'
    for ask in (describe_model, open_generator):
        with pytest.raises(ValueError, match=r"fewstep convert model\.safetensors FOLDER$"):
            ask(path)
        with pytest.raises(ValueError, match="is a pickle, which is not opened") as caught:
            ask(pickled)
        assert way in str(caught.value)


def test_inspect_knows_pipelines(folders: Folders, tmp_path: Path) -> None:
    """Parts, files, what is not read, and what of it would be a teacher or why it would not."""
    folder = tmp_path / "pipe"
    shutil.copytree(folders("sd3"), folder)
    all_of(halved, "vae")(folder)
    all_of(stale, "transformer")(folder)
    without_t5(folder)
    facts = inspect_model(folder)
    assert facts["what"] == "StableDiffusion3Pipeline, a pipeline of diffusers"
    assert facts["left out"] == ["text_encoder_3", "tokenizer_3"]
    assert facts["parts"]["vae"]["variant"] == "fp16"
    file = facts["parts"]["vae"]["files"][f"{BASE}.fp16.safetensors"]
    assert list(file["types"]) == ["float16"]
    assert file["numbers"] == sum(p.numel() for p in tiny_pipelines.vae().parameters())
    assert facts["as a teacher"]["shape"] == [4, 8, 8]
    assert facts["as a teacher"]["predicts"] == "velocity"
    assert facts["not read"] == [
        f"transformer/{BASE}-0000{number}-of-00002.safetensors" for number in (1, 2)
    ]
    assert notes_on(folder) == [
        f"{folder} holds weights that are not read, as stock diffusers does not: "
        + ", ".join(facts["not read"])
    ]
    other_vae(8)(folder)
    shutil.move(
        folder / "vae" / f"{BASE}.safetensors", folder / "vae" / f"{BASE}.fp16.safetensors"
    )
    assert "vae have 8" in inspect_model(folder)["as a teacher"]
    assert notes_on(folders("sd3")) == []
