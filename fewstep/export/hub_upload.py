"""A finished student as a repository of the Hugging Face hub.

    publication = prepared(Path("runs/fast"), "me/fast", Path("somewhere/fast"))
    upload(publication, private=True)

The student is exported first, by any format of `fewstep.export.formats`, and its model card is
made fit to be read elsewhere: base model and licence are known, and no path of this machine stands
in it. Whoever uses the model has to know its licence, which is that of the teacher: one that
nobody stated is refused, and one that has to be accepted first is asked for by name.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fewstep.export.formats import export, format_called
from fewstep.export.model_card import LICENCE_KEYS, licences, teacher_name
from fewstep.storage.model_folder import load_student
from fewstep.teachers.diffusers.load import pipeline_card

NONE = "none"
"""For --base-model: a teacher that is on no hub."""
NAME = re.compile(r"[A-Za-z0-9](?:[\w.-]{0,94}[A-Za-z0-9])?", re.ASCII)
"""What ORG and NAME consist of."""
GATES = ("extra_gated_prompt", "extra_gated_fields", "extra_gated_heading")
"""Keys of a card by which a repository asks its visitors to accept a licence."""


class Unreachable(Exception):
    """The hub does not answer, or fails; it is no fault of what was asked."""


@dataclass(frozen=True)
class Publication:
    """A folder that is ready to be uploaded."""

    folder: Path
    repository: str
    """ORG/NAME."""
    kind: str
    """"model" or "space"."""
    licence: str
    base_model: str
    """Its name on the hub, or ""."""

    @property
    def files(self) -> list[tuple[str, int]]:
        """Names, relative to the folder, and sizes in bytes."""
        paths = sorted(path for path in self.folder.rglob("*") if path.is_file())
        return [(path.relative_to(self.folder).as_posix(), path.stat().st_size) for path in paths]


def checked_name(repository: str) -> str:
    """A name ORG/NAME that the hub allows; ValueError for any other."""
    org, slash, name = repository.partition("/")
    wrong = not slash or not all(NAME.fullmatch(part) for part in (org, name))
    if wrong or "--" in repository or ".." in repository or name.endswith(".git"):
        raise ValueError(
            f"a repository is named ORG/NAME, each of letters, digits, '-', '_' and '.', such as "
            f"me/fast-4-steps; got {repository!r}"
        )
    return repository


def prepared(
    run: Path,
    repository: str,
    out: Path,
    form: str = "diffusers",
    licence: str = "",
    base_model: str = "",
) -> Publication:
    """Export the student of a run to the new folder `out`, with a card for `repository`.

    Arguments:
        run: a finished run folder, or a folder with model.json.
        repository: ORG/NAME.
        form: a key of `fewstep.export.formats.FORMATS`.
        licence: an identifier such as "openrail++", where the teacher's card states none, or to
            say that a gated one was read.
        base_model: the teacher's ORG/NAME, where it did not come from the hub; "none": it is on
            none.
    Raises ValueError where the name is none of the hub's, the licence or the base model is not
    known, or the export is refused.
    """
    checked_name(repository)
    student = load_student(run)
    stated = licences(student)
    known = agreed_licence(stated, licence, _gated(pipeline_card(student.card)))
    base = _base(teacher_name(student), base_model)
    file = format_called(form).file
    if file:
        out.mkdir()
        export(run, out / file, form)
        (out / f"{file}.md").rename(out / "README.md")
    else:
        export(run, out, form)
    readme = out / "README.md"
    text = readme.read_text(encoding="utf-8")
    folder = pipeline_card(student.card).get("folder")
    text = published(text, repository, file or out.name, known, base, folder)
    readme.write_text(text, encoding="utf-8")
    return Publication(out, repository, "space" if form == "space" else "model", known[0], base)


def agreed_licence(
    stated: Mapping[str, str], said: str, gated: bool
) -> tuple[str, Mapping[str, str]]:
    """The licence in a word, and its lines of a card's front matter; ValueError where unknown.

    stated: what the teacher's card says (`licences`); said: by the user; gated: whether the
    teacher's repository asks to accept it.
    """
    lines = {key: value for key, value in stated.items() if key in LICENCE_KEYS}
    name = lines.get("license_name") or lines.get("license") or stated.get("licence", "")
    if not name and not said:
        raise ValueError(
            "the licence of the teacher is not known (its folder has no README.md that states "
            "one), and a student has its teacher's; read it, and pass --licence, such as "
            "--licence openrail++"
        )
    if name and said and said not in (name, lines.get("license")):
        raise ValueError(
            f"the teacher's card says that its licence is {name}, and --licence says {said}; a "
            "student has its teacher's"
        )
    if gated and not said:
        raise ValueError(
            f"the teacher's licence, {name}, has to be accepted by everybody who downloads it, "
            f"and may forbid this; read it, and pass --licence {name} to say that it allows it"
        )
    if not lines:
        word = said or name
        lines = {"license": word} if re.fullmatch(r"[\w.+-]+", word) else {"license": "other"}
    return name or said, lines


def _gated(card: Mapping[str, Any]) -> bool:
    """Whether the card in a pipeline's folder asks to accept a licence."""
    path = Path(str(card.get("folder", ""))) / "README.md"
    if "folder" not in card or not path.is_file():
        return False
    head = path.read_text(encoding="utf-8", errors="replace").split("\n---", 1)[0]
    return any(re.search(rf"^{key}\s*:", head, re.MULTILINE) for key in GATES)


def _base(teacher: str, said: str) -> str:
    """The teacher's name on the hub, or ""; ValueError where it is not known."""
    if said == NONE:
        return ""
    if said:
        return checked_name(said)
    if "/" not in teacher:
        raise ValueError(
            f"the card names the model that this one is made of, and {teacher!r} is no name on "
            "the hub; pass --base-model ORG/NAME, or --base-model none where it is on none"
        )
    return teacher


def published(
    text: str,
    repository: str,
    own: str,
    licence: tuple[str, Mapping[str, str]],
    base: str,
    folder: str | None,
) -> str:
    """A card as it is read on the hub.

    text: as an export writes it; own: what the export is called there; licence: of
    `agreed_licence`; base: the teacher's name, or ""; folder: its place on this machine.
    ValueError where that place would still stand in the card.
    """
    _, front, body = text.split("---\n", 2)
    given = ("base_model", "base_model_relation", *LICENCE_KEYS)
    kept = [line for line in front.splitlines() if line.partition(":")[0] not in given]
    relation = re.search(r"^base_model_relation: (.+)$", front, re.MULTILINE)
    head = dict(licence[1])
    if base:
        head |= {
            "base_model": base,
            "base_model_relation": relation[1] if relation else "finetune",
        }
    lines = [*kept, *(f"{key}: {value}" for key, value in head.items())]
    body = re.sub(r"^\| licence \| .* \|$", f"| licence | {licence[0]} |", body, flags=re.M)
    if own and "." not in own:  # a folder, which is called by the repository's name
        body = body.replace(f'"{own}"', f'"{repository}"')
    if folder and base:
        body = body.replace(folder, base).replace(f"`{Path(folder).name}`", f"`{base}`")
        body = re.sub(rf"^# {re.escape(Path(folder).name)} in", f"# {base} in", body, flags=re.M)
    if folder and folder in body:
        raise ValueError(
            f"the card would name {folder}, which is on this machine alone; pass --base-model "
            "ORG/NAME of the teacher"
        )
    return "---\n" + "\n".join(lines) + "\n---\n" + body


def upload(publication: Publication, private: bool = False, replace: bool = False) -> str:
    """Create the repository and upload the folder in one commit; returns its address.

    private: a repository that is made is not public; replace: one that has files already is
    written over, and its other files stay. ValueError where there is no token, it does not allow
    this, or the repository is not empty; `Unreachable` where the hub does not answer.
    """
    api, kind = _api(), publication.kind
    with answered(publication.repository):
        api.whoami()
        more = {"space_sdk": "gradio"} if kind == "space" else {}
        api.create_repo(
            publication.repository, private=private, exist_ok=True, repo_type=kind, **more
        )
        there = set(api.list_repo_files(publication.repository, repo_type=kind))
        if there - {".gitattributes", "README.md"} and not replace:
            raise ValueError(
                f"{publication.repository} has files already, such as {sorted(there)[-1]}; choose "
                "another name, or write over them with --replace"
            )
        api.upload_folder(
            folder_path=publication.folder,
            repo_id=publication.repository,
            repo_type=kind,
            commit_message="Upload a student distilled by fewstep",
        )
    prefix = "" if kind == "model" else f"{kind}s/"
    return f"{api.endpoint}/{prefix}{publication.repository}"


def require_login() -> None:
    """Raise ValueError where huggingface_hub is missing, or nobody is logged in."""
    if not _api().token and not _hub().get_token():
        raise ValueError(
            "nobody is logged in to the hub; run 'hf auth login' once, or set HF_TOKEN to a token "
            "that may write"
        )


def _hub() -> Any:
    try:
        import huggingface_hub
    except ImportError:
        raise ValueError(
            "pushing needs huggingface_hub, which is not installed: pip install huggingface_hub"
        ) from None
    return huggingface_hub


def _api() -> Any:
    return _hub().HfApi()


@contextmanager
def answered(repository: str) -> Iterator[None]:
    """Within the block errors of the hub become sentences.

    ValueError for what a person can mend, `Unreachable` for a hub that does not answer.
    """
    try:
        yield
    except ValueError as error:  # the hub's own checks of names among them
        raise ValueError(_first(error)) from None
    except Exception as error:  # of the hub, and of whichever library makes the connection
        raise _told(error, repository) from None


def _told(error: Exception, repository: str) -> Exception:
    """An error of the hub as what a person is told."""
    status = getattr(getattr(error, "response", None), "status_code", None)
    if status == 401 or type(error).__name__ == "LocalTokenNotFoundError":
        return ValueError(
            "the hub does not know this token; log in anew with 'hf auth login', or set HF_TOKEN"
        )
    if status == 403:
        return ValueError(
            f"this token may not write to {repository}; use one with the role 'write', of an "
            "account that may"
        )
    what = "does not answer" if status is None else f"failed with {status}"
    return Unreachable(f"the hub {what}: {_first(error)}")


def _first(error: Exception) -> str:
    """The first line of an error of another library."""
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]
