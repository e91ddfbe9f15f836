"""Prompt files of every kind, sound and broken, and the cache of what encoders make of them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from threading import Thread
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

from fewstep.data import picture_set, prompts as module
from fewstep.data.embeddings import Conditioned, Embeddings, key
from fewstep.data.prompts import read_prompts
from fewstep.data.readers import reader_of
from fewstep.diffusion.rng import Draws
from fewstep.domains.prompts import conditioned
from fewstep.storage.folder_lock import locked
from fewstep.training import distributed

WANTED = ["a red cube", "ein Würfel, blau", "a red cube"]
SOUND = {
    "p.txt": "\ufeffa red cube\n\n  ein Würfel, blau\r\na \x1bred\x00 cube\n\t\n",
    "p.jsonl": '"a red cube"\n{"id": 3, "caption": "ein Würfel, blau"}\n\n'
    '{"text": "x", "prompt": "a red\\u0007 cube"}\n',
    "p.csv": 'id,prompt\n1,a red cube\n2,"ein Würfel, blau"\n3,"a red\ncube"\n4,\n',
}


@pytest.mark.parametrize("name", SOUND)
def test_prompts_are_read(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(SOUND[name].encode())
    assert read_prompts(tmp_path / name) == WANTED


def test_parquet(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    parquet.write_table(pyarrow.table({"n": [1, 2, 3], "prompt": WANTED}), tmp_path / "p.parquet")
    assert read_prompts(tmp_path / "p.parquet") == WANTED


BROKEN = {
    "p.docx": (b"a", "prompts are read from .txt, .jsonl, .csv, .parquet files"),
    "p.txt": (b"fine\n\xff\xfe\n", r"p.txt, line 2 is not UTF-8 \(byte 1\); convert it"),
    "long.txt": (
        b"a" * 10_001,
        "line 1: a prompt of 10001 characters",
    ),
    "empty.txt": (b" \n\x00\n", "holds no prompt"),
    "p.jsonl": (b'"a"\n{"prompt": \n', "line 2 is not JSON"),
    "deep.jsonl": (b"[" * 100_000, "line 1 is not JSON"),
    "half.jsonl": (b'"\\ud800"', "line 1 holds half a character; it is not text"),
    "list.jsonl": (b"[1]\n", "line 1: expected a text or an object with 'prompt'"),
    "key.jsonl": (b'{"promt": "a"}', "line 1 has none of prompt, caption, text; it has promt"),
    "number.jsonl": (b'{"prompt": 3}', "line 1 has none of prompt, caption, text; it has prompt"),
    "p.csv": (b"id,words\n1,a\n", "line 2 has none of prompt, caption, text; it has id, words"),
    "quote.csv": (b'prompt\n"a', "is not CSV"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_files_are_refused(tmp_path: Path, name: str) -> None:
    data, message = BROKEN[name]
    (tmp_path / name).write_bytes(data)
    with pytest.raises(ValueError, match=message):
        read_prompts(tmp_path / name)


def test_sizes_are_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "p.txt"
    with pytest.raises(ValueError, match="there is no file"):
        read_prompts(path)
    path.write_text("a\nb\nc\n")
    monkeypatch.setattr(module, "MAX_PROMPTS", 2)
    with pytest.raises(ValueError, match="holds more than 2 prompts; split it"):
        read_prompts(path)
    monkeypatch.setattr(module, "MAX_BYTES", 5)
    with pytest.raises(ValueError, match="has more than 0 GiB; split it"):
        read_prompts(path)


class Encoder:
    """Letters as numbers; remembers what it was asked."""

    def __init__(self) -> None:
        self.asked: list[str] = []

    def __call__(self, texts: Sequence[str]) -> dict[str, Tensor]:
        self.asked += texts
        rows = [[ord(c) / 64 for c in f"{text:8}"[:8]] for text in texts]
        words = torch.tensor(rows).reshape(len(texts), 4, 2)
        return {"prompt": words, "mask": words[..., 0] > 0.6}


NAMES = [f"p{i}" for i in range(600)]


def test_what_is_cached_is_not_encoded_again(tmp_path: Path) -> None:
    encoder = Encoder()
    assert list(Embeddings(tmp_path).fill([*NAMES[:300], "p3"], encoder)) == [256, 300]
    assert encoder.asked == NAMES[:300]
    again = Embeddings(tmp_path)
    assert list(again.fill(NAMES[299:400], encoder)) == [100]
    assert encoder.asked == NAMES[:400]
    assert again.missing(["p399", "new", "new"]) == ["new"]
    chosen = ["p7", "p399", "p256", "p7"]
    found = again.rows([key(p) for p in chosen])
    expected = Encoder()(chosen)
    assert torch.equal(found["prompt"], expected["prompt"])  # multiples of 1/64: exact in half
    assert torch.equal(found["mask"], expected["mask"].float())


def test_a_stopped_cache_goes_on(tmp_path: Path) -> None:
    encoder = Encoder()
    filling = Embeddings(tmp_path).fill(NAMES, encoder)
    next(filling)
    filling.close()
    torn = tmp_path / ".shard-00001.safetensors.partial-99"  # of a process that was killed
    torn.touch()
    assert list(Embeddings(tmp_path).fill(NAMES, encoder)) == [256, 344]
    assert encoder.asked == NAMES
    assert not torn.exists()


def test_a_damaged_shard_is_encoded_again(tmp_path: Path) -> None:
    encoder = Encoder()
    list(Embeddings(tmp_path).fill(NAMES, encoder))
    shard = tmp_path / "shard-00001.safetensors"
    shard.write_bytes(shard.read_bytes()[:-7])
    again = Embeddings(tmp_path)
    assert again.missing(NAMES) == NAMES[256:512]
    list(again.fill(NAMES, encoder))
    assert torch.equal(again.rows([key("p300")])["prompt"], Encoder()(["p300"])["prompt"])
    assert {p.name for p in tmp_path.iterdir()} == {
        *(f"shard-0000{i}.safetensors" for i in (0, 2, 3)),
        "shard-00001.damaged",
    }


def test_overflow_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="'prompt' that is not finite in half precision"):
        list(Embeddings(tmp_path).fill(["a"], lambda texts: {"prompt": torch.full((1, 2), 1e6)}))


def test_batches_are_functions_of_their_draws(tmp_path: Path) -> None:
    """Each epoch has every prompt once; sample n is the same in any batch; z is standard noise."""
    table = Embeddings(tmp_path)
    list(table.fill(NAMES[:10], Encoder()))
    source = Conditioned((3, 2), table, [key(p) for p in NAMES[:10]])
    batch = source(Draws.range(0, 20, seed=5))
    every = Encoder()(NAMES[:10])["prompt"]
    for epoch in (batch.cond["prompt"][:10], batch.cond["prompt"][10:]):
        assert sorted(epoch.flatten(1).tolist()) == sorted(every.flatten(1).tolist())
    assert not torch.equal(batch.cond["prompt"][:10], batch.cond["prompt"][10:])
    part = source(Draws.range(7, 6, seed=5))
    assert torch.equal(part.cond["prompt"], batch.cond["prompt"][7:13])
    assert torch.equal(part.z, batch.z[7:13])
    assert batch.x0 is None
    assert not torch.equal(source(Draws.range(0, 20, seed=6)).cond["prompt"], batch.cond["prompt"])
    turn = source.condition(torch.tensor([1, 11, 9]))["prompt"]
    assert torch.equal(turn, every[[1, 1, 9]])


def test_processes_of_a_run_wait_for_the_cache(tmp_path: Path) -> None:
    """One encodes, the others find it done: none is refused, and nothing is encoded twice."""
    heard: list[str] = []

    def text(prompts: Sequence[str]) -> dict[str, Tensor]:
        heard.extend(prompts)
        return {"prompt": torch.ones(len(prompts), 2)}

    teacher: Any = SimpleNamespace(card={"folder": "pipe", "text": "0" * 64}, text=text)
    found: list[Conditioned] = []

    def rank() -> None:
        found.append(conditioned(["a red cube", "a ball"], tmp_path, teacher, (3,)))

    ranks = [Thread(target=rank) for _ in range(3)]
    with locked(tmp_path / ("0" * 16)):
        for one in ranks:
            one.start()
        ranks[0].join(0.3)
        assert not found  # they wait
    for one in ranks:
        one.join()
    assert len(found) == 3
    assert heard == ["a red cube", "a ball"]
    index = torch.arange(2)
    assert all(torch.equal(each.condition(index)["prompt"], torch.ones(2, 2)) for each in found)


def test_long_preparations_are_not_taken_for_a_hang(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each part of the data, and each look at a folder that another one fills, has START anew."""
    told: list[float] = []
    monkeypatch.setattr(distributed, "_watch", told.append)
    list(Embeddings(tmp_path / "alone").fill(NAMES, Encoder()))
    assert told == []  # a process alone waits for nobody
    monkeypatch.setitem(distributed._limits, "step", 120.0)
    list(Embeddings(tmp_path / "a").fill(NAMES, Encoder(), batch=100))
    assert told == [distributed.START] * 7  # 256, 256 and 88 in hundreds
    told.clear()
    for number in range(3):
        Image.new("L", (8, 8)).save(tmp_path / f"{number}.png")
    monkeypatch.setattr(picture_set, "PART", 2)
    picture_set.load_pictures(reader_of(tmp_path), torch.arange(3), (1, 8, 8))
    assert told == [distributed.START] * 2
    told.clear()

    def rank() -> None:
        with locked(tmp_path, wait=True):
            pass

    waiting = Thread(target=rank)
    with locked(tmp_path):
        waiting.start()
        while len(told) < 2:
            waiting.join(0.01)
    waiting.join()
    assert set(told) == {distributed.START}
