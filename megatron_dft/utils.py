"""Shared helpers: name suggestions, import of module:function, argparse, the end of a rank."""

from __future__ import annotations

import argparse
import difflib
import importlib
import os
import sys
from collections.abc import Callable, Iterable
from typing import Any, NoReturn


def nearest(name: str, known: Iterable[str]) -> str:
    """The end of an error message: the known name that is most similar, or nothing."""
    lower = {x.lower(): x for x in known}
    match = difflib.get_close_matches(name.lower(), list(lower), n=1)
    return f"; did you mean {lower[match[0]]!r}?" if match else ""


def load_function(path: str, option: str) -> Callable[..., Any]:
    """Import the function that "module:function" names.

    Args:
        option: the flag or key that the path was given with, for the error message.

    Raises:
        ValueError: if there is no such module or function.
    """
    module_name, _, function = path.rpartition(":")
    try:
        module = importlib.import_module(module_name)
    except (ModuleNotFoundError, ValueError) as error:
        if isinstance(error, ModuleNotFoundError) and not f"{module_name}.".startswith(f"{error.name}."):
            raise  # a dependency of the module
        raise ValueError(
            f"{option}: expected module:function of an installed module, got {path!r} ({error}); check the name, or "
            "install its package"
        ) from None
    if not callable(getattr(module, function, None)):
        known = [key for key, value in vars(module).items() if callable(value) and not key.startswith("_")]
        raise ValueError(f"{option}: {module.__name__} has no function {function!r}{nearest(function, known)}")
    return getattr(module, function)


class Parser(argparse.ArgumentParser):
    """A parser that raises ValueError for invalid arguments. It does not exit and prints no usage."""

    def __init__(self) -> None:
        super().__init__(allow_abbrev=False, add_help=False)

    def error(self, message: str) -> NoReturn:
        raise ValueError(message.removeprefix("argument "))


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Help with defaults, and with a module docstring as the description, as it is laid out."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=40, width=120)

    def _get_help_string(self, action: argparse.Action) -> str | None:
        return action.help if action.default is None else super()._get_help_string(action)


def exit_rank(code: int) -> NoReturn:
    """End this process without running destructors.

    The destructor of a gloo process group can deadlock (torch 2.6): it holds the GIL while it waits for a thread that
    needs the GIL to free the tensor of the last collective.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
