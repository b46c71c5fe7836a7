"""What the documents say is what the product does."""

import re
import shlex
from pathlib import Path

import pytest
from PIL import Image

import export
import gallery
import predict
import runs
import sample
import train
import train_dit
from conftest import REPOSITORY

PLANS = [f"plans/{path.name}" for path in (REPOSITORY / "plans").glob("*.md")]
SCRIPTS = [train, train_dit, predict, sample, export, runs, gallery]
DOCUMENTS = ["README.md", "AGENTS.md", "modal.yml", *(f"src/{script.PARSER.prog}" for script in SCRIPTS), *PLANS]


def commands_of(script: str) -> list[tuple[str, bool]]:
    """Every command in the documents that starts a script: its arguments, and whether it is for Modal."""
    found = []
    for document in DOCUMENTS:
        text = (REPOSITORY / document).read_text()
        for launcher, rest in re.findall(
            rf"(modal (?:run|serve)(?: --detach)?|python) src/{re.escape(script)}([^\n`#]*)", text
        ):
            if rest.lstrip().startswith("…"):
                continue
            # What follows two spaces is a remark; an ellipsis or a placeholder stands for more.
            arguments = re.split(r"  +|…|\)", rest)[0].strip()
            found.append((arguments, launcher.startswith("modal")))
    return found


@pytest.fixture
def someone(tmp_path, monkeypatch) -> None:
    """The current folder is one in which the documents' commands can be given."""
    monkeypatch.chdir(tmp_path)
    for folder in ("data/cats", "path/to/images", "cat-faces-64", "photos"):
        Path(folder).mkdir(parents=True)
    for run in ("20260225-100000-1f3a", "RUN"):
        checkpoint = Path("outputs/runs", run, "state.pt")
        checkpoint.parent.mkdir(parents=True)
        checkpoint.touch()
    for model in ("cats_model.pt", "tiny_dit.pt"):
        for folder in (".", "outputs", "outputs/runs/RUN"):
            Path(folder, model).touch()
    for photo in ("photo.jpg", "photos/photo.jpg"):
        Image.new("RGB", (40, 40)).save(photo)


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_command_in_the_documents_is_accepted(script, someone):
    commands = commands_of(script.PARSER.prog)
    assert len(commands) > 3
    for arguments, on_modal in commands:
        words = shlex.split(arguments)
        if "--help" in words:
            with pytest.raises(SystemExit) as exit:
                script.PARSER.parse(words, on_modal=on_modal)
            assert exit.value.code == 0
        elif words[1:2] != ["::train_on_modal"]:
            script.PARSER.parse(words, on_modal=on_modal)


def test_every_decision_that_a_document_names_is_there():
    for document in [*DOCUMENTS, "GOAP.md"]:
        for number in re.findall(r"ADR-(\d{3})", (REPOSITORY / document).read_text()):
            assert list((REPOSITORY / "plans").glob(f"ADR-{number}-*.md")), f"{document} names ADR-{number}"


def test_modal_yml_says_that_it_is_never_executed():
    assert (REPOSITORY / "modal.yml").read_text().startswith("# Documentation only")
