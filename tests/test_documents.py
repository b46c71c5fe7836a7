"""What the documents say is what the product does."""

import importlib
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

# Every command of README.md, AGENTS.md and modal.yml is run by a test, as it stands or with what makes it small.
RUN_BY = {
    r"git clone .*": "what CI begins with",
    r"make smoke": "conftest.py::smoke",
    r"make (setup|lint|test.*)": "what CI runs",
    r"make gpu": "test_benchmarks.py::test_where_there_is_no_gpu_its_benchmark_says_so",
    r"make campaign": "test_campaign.py::test_whatever_happens_a_run_ends_the_same_or_is_refused_in_a_line",
    r"source .*python src/gallery.py|python src/gallery.py.*": "test_gallery.py::"
    "test_on_a_laptop_it_listens_for_this_machine_alone_until_it_is_stopped",
    r"bash data/download.sh": "test_oxford_pets.py::test_the_download_script_prepares_data_cats_beside_itself",
    r"python src/train.py data/cats .*": "test_train.py::test_real_photos_arranged_by_breed_train_for_an_epoch",
    r"python src/train.py (--help|--epochs 1)": "test_train.py::"
    "test_with_no_data_it_trains_on_the_toy_cats_and_says_so",
    r"python src/train.py path/to/images --backbone resnet20": "test_train.py::test_a_run_leaves_what_the_design_says",
    r"python src/train.py path/to/images --image-size .*": "test_train.py::"
    "test_real_photos_arranged_by_breed_train_for_an_epoch",
    r"python src/train.py --resume .*": "test_train.py::"
    "test_killed_at_random_moments_and_resumed_it_ends_bit_identical",
    r"python src/train_dit.py .*": "test_train_dit.py::"
    "test_after_400_steps_a_classifier_recognises_the_coats_of_the_samples",
    r"python src/predict.py .*": "test_predict.py::"
    "test_a_person_reads_each_photos_class_its_probability_and_the_next_two",
    r"python src/sample.py.*": "test_sample.py::"
    "test_every_class_is_sampled_into_numbered_files_and_a_grid_with_a_row_each",
    r"python src/export.py.*": "test_export.py::test_onnx_runtime_samples_the_generators_images",
    r"python src/runs.py.*": "test_list_runs.py::"
    "test_a_line_a_run_says_how_far_it_came_how_good_it_is_and_how_to_go_on",
    r"python benchmarks/sample_quality.py .*": "test_benchmarks.py::"
    "test_a_generators_distance_to_held_out_images_is_measured",
    r"tensorboard --logdir outputs/runs": "test_train.py::test_tensorboard_can_read_the_curves",
    r"torchrun --nproc-per-node 2 .*": "test_processes.py::"
    "test_started_by_itself_a_script_uses_all_gpus_and_ends_as_its_processes_do",
    r"torchrun --nnodes 2 .*": "test_processes.py::test_two_launchers_are_two_machines",
    r"modal setup": "what only Modal can do",
    r"modal token info|modal app (list|logs .*|stop .*)": "test_on_modal.py::"
    "test_a_detached_run_is_watched_and_stopped_by_its_apps_id",
    r"modal run src/train.py( data/cats --epochs 20| -- .*)?": "test_on_modal.py::"
    "test_with_no_arguments_real_cats_are_prepared_once_in_the_volume",
    r"modal run src/train(_dit)?.py .*--gpu (A100:4|A10G)": "test_on_modal.py::"
    "test_what_is_asked_of_modal_and_two_gpus_are_a_process_each",
    r"modal run src/train_dit.py .*--nodes 2": "test_on_modal.py::test_a_run_on_two_nodes",
    r"modal run src/train_dit.py --steps 200000": "test_on_modal.py::"
    "test_the_generator_too_survives_whatever_ends_its_containers",
    r"modal run src/train.py data/toy .*": "test_on_modal.py::test_train_list_fetch_and_predict",
    r"modal run src/train.py path/to/images": "test_on_modal.py::"
    "test_a_local_folder_is_uploaded_and_packed_once_and_its_damage_is_noticed",
    r"modal run src/train.py --resume .*": "test_on_modal.py::test_a_run_cut_short_goes_on_by_name",
    r"modal run --detach src/train(_dit)?.py .*": "test_on_modal.py::"
    "test_detached_it_outlives_its_laptop_even_when_it_is_preempted_then",
    r"modal run src/train(_dit)?.py --help": "test_laptop.py::test_help_under_modal_run_is_the_scripts_own",
    r"modal run src/predict.py .*": "test_models_on_modal.py::test_photos_go_up_and_answers_come_back",
    r"modal run src/sample.py.*": "test_models_on_modal.py::test_images_come_back_from_a_gpu_the_same_as_here",
    r"modal run src/runs.py.*": "test_on_modal.py::test_a_detached_run_is_watched_and_stopped_by_its_apps_id",
    r"modal (run|deploy|serve) src/gallery.py": "test_gallery.py::"
    "test_deployed_it_reads_the_volume_and_its_address_has_the_token",
    r"modal deploy src/(predict|sample).py": "test_models_on_modal.py::"
    "test_both_are_published_as_functions_that_are_called_by_their_names",
    r"modal deploy src/train(_dit)?.py": "test_on_modal.py::test_a_deployed_function_can_be_called_by_name",
    r"modal shell .*": "test_on_modal.py::test_modal_shell_finds_the_function",
    r"modal volume get .*metrics.jsonl .*|modal volume get .* runs/RUN/samples .": "test_on_modal.py::"
    "test_metrics_in_the_volume_can_be_fetched_and_read",
    r"modal volume (ls|get) .*": "test_on_modal.py::test_train_list_fetch_and_predict",
    r"modal volume rm .*": "test_on_modal.py::test_an_uploaded_folder_can_be_forgotten",
    r".venv/bin/python -m tests.modal_cloud .*": "test_modal_cloud.py::test_it_runs_by_hand",
    r".venv/bin/ruff .*": "what CI runs",
}


def commands_in(document: str) -> list[str]:
    """The commands of a document's blocks of them; of modal.yml's lists."""
    text = (REPOSITORY / document).read_text()
    if document.endswith(".yml"):
        lines = re.findall(r"^ +- (.*)$", text, re.MULTILINE)
    else:
        lines = "\n".join(re.findall(r"```bash\n(.*?)```", text, re.DOTALL)).splitlines()
    return [command for line in lines if (command := re.split(r" +# ", line)[0].strip())]


@pytest.mark.parametrize("document", ["README.md", "AGENTS.md", "modal.yml"])
def test_every_command_is_run_by_a_test(document):
    commands = commands_in(document)
    assert len(commands) > 8
    for command in commands:
        tests = [test for pattern, test in RUN_BY.items() if re.fullmatch(pattern, command)]
        assert tests, f"no test runs {command!r}"
        for test in tests:
            module, is_test, name = test.partition("::")
            if is_test:
                assert re.search(rf"^def {name}\(", (REPOSITORY / "tests" / module).read_text(), re.MULTILINE), test


def test_every_name_on_an_images_way_is_there():
    text = (REPOSITORY / "plans" / "FROM-FILE-TO-GRADIENT.md").read_text()
    modules: dict[str, list] = {}
    for path in (REPOSITORY / "src" / "tinycats").rglob("*.py"):
        name = ".".join(path.relative_to(REPOSITORY / "src").with_suffix("").parts)
        modules.setdefault(path.stem, []).append(name)
    named = re.findall(r"`(\w+)\.(\w+)`", text)
    assert len(named) > 30
    for module, name in named:
        if module in modules:
            found = [importlib.import_module(module_name) for module_name in modules[module]]
            assert any(hasattr(module_found, name) for module_found in found), f"{module}.{name}"
    assert [module for module, _ in named if module not in modules] == ["pixels"]  # pixels.bin


def commands_of(script: str) -> list[tuple[str, bool]]:
    """Every command in the documents that starts a script: its arguments, and whether it is for Modal."""
    found = []
    for document in DOCUMENTS:
        text = (REPOSITORY / document).read_text()
        pattern = rf"(modal (?:run|serve)(?: --detach)?|python) src/{re.escape(script)}([^\n`#|]*)"
        for launcher, rest in re.findall(pattern, text):
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


def test_what_it_says_when_it_says_no_is_said_somewhere():
    section = (REPOSITORY / "README.md").read_text().partition("## When it says no")[2].partition("\n## ")[0]
    messages = re.findall(r"^\| `([^`]+)`", section, re.MULTILINE)
    assert len(messages) > 10
    program = " ".join(path.read_text() for path in (REPOSITORY / "src").rglob("*.py"))
    for message in messages:
        for part in message.split("…"):
            assert part.strip(" :").lower().removeprefix("data/cats ") in program.lower() or "no space" in part, message


def test_every_decision_that_a_document_names_is_there():
    for document in [*DOCUMENTS, "GOAP.md"]:
        for number in re.findall(r"ADR-(\d{3})", (REPOSITORY / document).read_text()):
            assert list((REPOSITORY / "plans").glob(f"ADR-{number}-*.md")), f"{document} names ADR-{number}"


def test_every_file_that_a_document_links_to_is_there():
    for document in ["README.md", "AGENTS.md", "GOAP.md", "benchmarks/README.md", *PLANS]:
        for target in re.findall(r"\]\(([^)#:]+)\)", (REPOSITORY / document).read_text()):
            assert (REPOSITORY / document).parent.joinpath(target).exists(), f"{document} links to {target}"


def test_modal_yml_says_that_it_is_never_executed():
    assert (REPOSITORY / "modal.yml").read_text().startswith("# Documentation only")
