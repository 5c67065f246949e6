"""The folder mapping: our bare folders never shadow somebody's installed package of the same name."""

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = ("suite", "tasks", "models", "kernels")


def test_an_installed_package_of_the_same_name_wins_over_our_folder(tmp_path: Path) -> None:
    package = tmp_path / "kernels"
    package.mkdir()
    (package / "__init__.py").write_text("who = 'installed'")
    code = f"import sys; sys.path.append({str(tmp_path)!r}); import kernels; print(kernels.who)"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "installed"


@pytest.mark.parametrize("folder", FOLDERS)
def test_the_code_folders_are_namespace_packages(folder: str) -> None:
    assert not (ROOT / folder / "__init__.py").exists()
    assert (ROOT / folder / "py.typed").exists()


@pytest.mark.parametrize(
    ("folder", "forbidden"),
    [
        ("tasks", ("suite", "models", "kernels")),
        ("models", ("suite", "tasks")),
        ("kernels", ("suite", "tasks", "models")),
    ],
)
def test_the_arrows_of_dependence_run_one_way(folder: str, forbidden: tuple[str, ...]) -> None:
    for file in (ROOT / folder).rglob("*.py"):
        text = file.read_text(encoding="utf-8")
        for other in forbidden:
            assert f"seqbench.{other}" not in text, f"{file} imports from seqbench.{other}"


def test_a_wheel_carries_every_source_and_data_file(tmp_path: Path) -> None:
    """Built from a copy, so that the build leaves nothing in the checkout."""
    copy = tmp_path / "checkout"
    left_out = shutil.ignore_patterns(".*", "results", "build", "*.egg-info", "__pycache__")
    shutil.copytree(ROOT, copy, ignore=left_out)
    subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "-w", tmp_path, copy],
        check=True,
        capture_output=True,
    )
    (wheel,) = tmp_path.glob("*.whl")
    inside = set(zipfile.ZipFile(wheel).namelist())
    wanted = {
        f"seqbench/{path.relative_to(copy).as_posix()}"
        for folder in FOLDERS
        for path in (copy / folder).rglob("*")
        if path.is_file() and "build" not in path.relative_to(copy).parts
    }
    assert wanted - inside == set()
    top = {name.split("/")[0] for name in inside}
    assert all(name == "seqbench" or name.endswith(".dist-info") for name in top)
