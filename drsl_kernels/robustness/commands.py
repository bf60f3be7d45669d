"""The commands of `drsl`, gathered from their files."""

from __future__ import annotations

import io
import sys

import click

from drsl_kernels import __version__

from .attack_command import attack_command
from .compare_command import compare_command
from .lm.command import lm_command
from .train_command import train_command

__all__ = ["drsl"]


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, prog_name="drsl")
def drsl() -> None:
    """Train image classifiers and language models with robust losses, and attack them.

    To begin, run `drsl compare`: it needs no options and no data of yours.
    """
    # A path may hold bytes that are no text: to show one must not end hours of work.
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")


drsl.add_command(compare_command)
drsl.add_command(train_command)
drsl.add_command(attack_command)
drsl.add_command(lm_command)
