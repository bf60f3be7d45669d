"""The documentation builds without a warning, from what is here alone, and its comparison names tests that exist.

What the pages' Python does is the matter of test_clients.py. Relies on code_blocks.py and Sphinx.
"""

from __future__ import annotations

import ast
import json
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from code_blocks import DOCS, PAGES, ROOT, blocks

import drsl_kernels
import drsl_kernels.robustness.lm

TESTS = ROOT / "tests"
LANGUAGES = {"python", "console", "diff", "{toctree}", "{eval-rst}", "{include} ../README.md"}


def build(source: Path, target: Path) -> subprocess.CompletedProcess[str]:
    """As `make docs` does, from nothing."""
    command = [sys.executable, "-m", "sphinx", "-E", "-q", "-W", "--keep-going"]
    return subprocess.run([*command, str(source), str(target)], capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The pages of a fresh build, by name."""
    folder = tmp_path_factory.mktemp("site")
    done = build(DOCS, folder)
    assert done.returncode == 0, done.stderr
    assert not done.stderr
    return {path.stem: path.read_text() for path in folder.glob("*.html")}


def test_every_page_is_there(site: dict[str, str]) -> None:
    assert {path.stem for path in DOCS.glob("*.md")} <= site.keys()


def test_every_public_name_is_in_the_reference(site: dict[str, str]) -> None:
    names = [f"drsl_kernels.{name}" for name in drsl_kernels.__all__ if not name.startswith("__")]
    names += [f"drsl_kernels.robustness.{name}" for name in ("pgd", "worst_case", "train")]
    names += [f"drsl_kernels.robustness.lm.{name}" for name in drsl_kernels.robustness.lm.__all__]
    for name in names:
        assert re.search(rf'id="(module-)?{re.escape(name)}"', site["api"]), name


def test_formulas_are_rendered(site: dict[str, str]) -> None:
    """As MathML: nothing of LaTeX is left in the text that a reader sees."""
    sources = "".join(path.read_text() for path in (ROOT / "drsl_kernels").rglob("*.py"))
    assert site["api"].count("<math") == len(re.findall(r"\.\. math::|:math:`", sources)) > 0
    assert site["choosing"].count("<math") == len(re.findall(r"\$[^$]+\$", (DOCS / "choosing.md").read_text())) > 0
    for name, page in site.items():
        if not name.startswith("_"):
            assert not re.search(r"\\(frac|left|right|log|sum|tau|mathrm)\b", page), name


def test_nothing_is_fetched(site: dict[str, str]) -> None:
    """Scripts, styles, fonts and pictures come with the pages."""
    for name, page in site.items():
        assert not re.findall(r'<(?:script|link|img|iframe)\b[^>]*(?:src|href)="(?:https?:)?//[^"]*"', page), name


def test_a_wrong_formula_is_a_warning(tmp_path: Path) -> None:
    (tmp_path / "conf.py").write_text(
        f"import sys; sys.path.insert(0, {str(DOCS)!r}); "
        "extensions = ['mathml', 'myst_parser']; html_math_renderer = 'mathml'; myst_enable_extensions = ['dollarmath']"
    )
    (tmp_path / "index.md").write_text("# Title\n\n$a^2$ and $\\unknowncommand{a}$\n")
    done = build(tmp_path, tmp_path / "out")
    assert done.returncode != 0
    assert "unknowncommand" in done.stderr


def test_fences_name_a_language() -> None:
    """So that no Python hides from the tests that run it."""
    for page in PAGES:
        opening = re.findall(r"^```(.*)$", page.read_text(), re.MULTILINE)[::2]
        assert set(opening) <= LANGUAGES, page.name


def test_python_is_found() -> None:
    assert sum(len(blocks(page, "python")) for page in PAGES) >= 9


# What runs the commands of the pages. {small} is run here, with options that make it short.
SMALL = ["--seeds", "1", "--epochs", "1", "--steps", "1", "--restarts", "1", "--samples", "40", "--fresh"]
COMMANDS = {
    "make demo": "{small}",
    "make test": "the run that this test is part of",
    "pip install --no-build-isolation .": "make install, which each run of the tests begins with",
    "DRSL_KERNELS_BUILD=0 pip install --no-build-isolation .": "`test_build.py::test_pure_python_wheel_on_request`",
    "python benchmarks/gpu_suite.py --out gpu_results": "`test_gpu_suite.py::test_a_dry_run`",
    "python benchmarks/scale.py": "`test_scale.py::test_the_script`",
    "torchrun --standalone --nproc-per-node=2 train.py": "`test_clients.py::test_distributed`",
    "drsl train --loss non_target_logits --out runs/drsl": "`test_lab_resume.py::test_the_command_killed`",
    "drsl train --loss ce --out runs/ce": "`test_lab_resume.py::test_the_command_killed`",
    "drsl attack runs/drsl/best.pt --attacks pgd,pgd:margin,transfer --transfer-from runs/ce/best.pt --eps 0.1 "
    "--out runs/attacked": "`test_lab_attack_command.py::test_files`",
    "drsl train --absum 0.1 --out runs/absum": "`test_lab_fourier_commands.py::test_the_commands_of_the_documentation`",
    "drsl attack runs/absum/best.pt --attacks fourier --eps 0.1 --out runs/waves": "the same",
    "drsl lm": "`test_lm_command.py::test_all_are_there`",
    "drsl lm --text kjv.txt --tokens bpe --vocabulary 2048 --losses ce,drsl,mixture_of_softmax "
    "--steps 3000": "`test_lm_command.py::test_found_again_and_made_anew`",
    "torchrun --nproc-per-node 2 -m drsl_kernels.robustness lm --sharding fsdp "
    "--out fsdp": "`test_lm_training.py::test_two_processes_are_as_one_with_the_joint_batch`",
}
# Commands of these pages need minutes to hours, and some of them images that are not bundled; what runs such options is
EVIDENCE = (
    "`test_lab_compare.py::test_every_loss_every_kind_of_attack_and_label_noise`, "
    "`test_lab_fourier_commands.py::test_the_commands_of_the_documentation` and `test_bottleneck.py::test_the_script`"
)


def commands_of(page: Path) -> list[str]:
    """The lines of its console blocks, without comments; a line may go on after a backslash."""
    text = "".join(block[1] for block in blocks(page, "console")).replace("\\\n", " ")
    return [re.sub(r"\s+#.*", "", line).strip() for line in text.splitlines()]


# One process for all of them, and pictures of the first: most of what so short a command takes is start and pictures.
ONE_AFTER_ANOTHER = """
import json, sys
from drsl_kernels.robustness import compare_command
from drsl_kernels.robustness.commands import drsl
for options in json.load(sys.stdin):
    drsl(options, prog_name="drsl", standalone_mode=False)
    compare_command.draw_pictures = lambda *_: None
"""


def test_every_command_is_run_by_a_test(tmp_path: Path) -> None:
    small = []
    commands = {command for page in PAGES if page.parent.name != "evidence" for command in commands_of(page)}
    assert COMMANDS.keys() <= commands
    for command in sorted(commands):
        if command == "make demo":
            recipe = subprocess.run(["make", "-n", "demo"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
            command = next(line for line in recipe.splitlines() if "drsl compare" in line)
        elif command in COMMANDS:
            continue
        program, *options = shlex.split(command)
        assert Path(program).name == "drsl", f"{command} is run by no test"
        options = [re.sub(r"(=[^,]+),.*", r"\1", option) for option in options]  # of the weights of a loss the first
        small.append([*options, *SMALL, "--out", str(tmp_path / "out")])
    assert small
    command = [sys.executable, "-c", ONE_AFTER_ANOTHER]
    done = subprocess.run(command, input=json.dumps(small), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_tests_of_commands_exist() -> None:
    for file, name in re.findall(r"`([\w/]+\.py)::(\w+)`", "".join([*COMMANDS.values(), EVIDENCE])):
        assert name in functions_of(TESTS / file)


@pytest.mark.parametrize("page", ["README.md", "docs/index.md"])
def test_the_changed_line_runs(page: str) -> None:
    """The line that is taken out and the one that comes in, on the same logits."""
    before, after = re.findall(r"^[-+] (loss = .*)$", blocks(ROOT / page, "diff")[0][1], re.MULTILINE)
    z, y = torch.randn(8, 10, requires_grad=True), torch.randint(10, (8,))
    names: dict[str, Any] = {
        "F": torch.nn.functional,
        "fused_drsl_loss": drsl_kernels.fused_drsl_loss,
        "logits": z,
        "y": y,
    }
    for line in (before, after):
        exec(line, names)
        assert names["loss"].shape == ()
        assert torch.autograd.grad(names["loss"], z)[0].isfinite().all()


def functions_of(file: Path) -> set[str]:
    return {node.name for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, ast.FunctionDef)}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_named_tests_exist(page: Path) -> None:
    for file, name in re.findall(r"`([\w/]+\.py)::(\w+)`", page.read_text()):
        assert name in functions_of(TESTS / file), f"{file}::{name}"


def test_each_cell_of_the_comparison_has_a_test() -> None:
    """In every table, what this library can do, or cannot, names at least one test."""
    rows = [
        [cell.strip() for cell in line.strip("|\n").split("|")]
        for line in (DOCS / "comparison.md").read_text().splitlines()
        if line.startswith("|") and not line.startswith("|---")
    ]
    heads = [row for row in rows if row[-1] == "test"]
    assert len(heads) == 4
    assert len(rows) - len(heads) >= 25
    for row in rows:
        assert len(row) == len(heads[0]), row[0]
        assert all(row[1:-1]), row[0]
        if row not in heads:
            assert re.search(r"`[\w/]+\.py::\w+`", row[-1]), row[0]
