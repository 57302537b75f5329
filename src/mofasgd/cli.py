"""The command line `mofasgd COMMAND`: one table; the typed configuration of a command is its flags and their help."""

from __future__ import annotations

import difflib
import importlib
import importlib.metadata
import re
import sys
import typing
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NoReturn

from mofasgd.app.errors import Stopped
from mofasgd.options import did_you_mean

COMMANDS = {
    "pretrain": "mofasgd.app.pretrain:pretrain",
    "export": "mofasgd.app.export:export",
    "compare": "mofasgd.app.compare:compare",
    "finetune": "mofasgd.app.tune.commands:finetune",
    "glue": "mofasgd.app.tune.commands:glue",
    "profile": "mofasgd.app.tune.commands:profile",
    "plan": "mofasgd.app.tune.commands:plan",
}
"""Command -> function of one configuration dataclass; imported when asked for. Its docstring is the command's help."""

Command = Callable[[Any], None]

_UNKNOWN = re.compile(r"(?:unrecognized arguments: |accept option |Option )'?(?:--)?([\w.]+)")
_GROUP = re.compile(r"Group '([\w.]+)'")


def _load(command: str) -> Command:
    module, name = COMMANDS[command].split(":")
    try:
        function: Command = getattr(importlib.import_module(module), name)
        importlib.import_module("jsonargparse")
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("mofasgd"):
            raise
        raise ValueError(f"{error}: install the application with pip install 'mofasgd[train]'") from error
    return function


def _parser(command: str, function: Command, kind: type, prog: str = "") -> Any:
    """Return the command's parser for the dataclass `kind`; its errors are one line with the nearest known key."""
    prog = prog or f"mofasgd {command}"
    import jsonargparse

    jsonargparse.set_parsing_settings(docstring_parse_attribute_docstrings=True)

    add = getattr(sys.modules[function.__module__], "help_epilog", None)

    class Parser(jsonargparse.ArgumentParser):
        def format_help(self, formatter: Any = None) -> str:
            # An epilog of argparse would lose its lines.
            text: str = super().format_help(formatter)
            return text if add is None else f"{text}\n{add()}\n"

        def error(self, message: str, ex: Exception | None = None) -> NoReturn:
            unknown, group = _UNKNOWN.search(message), _GROUP.search(message)
            if unknown:
                word = f"{group[1]}.{unknown[1]}" if group else unknown[1]
                message += _nearest(word, [action.dest for action in self._actions]) or "; --help lists all keys"
            self.exit(2, f"{prog}: error: {' '.join(message.split())}\n")

    parser = Parser(prog=prog, description=function.__doc__)
    parser.add_argument("--config", action="config", help="YAML file with the keys below; flags override it")
    parser.add_class_arguments(kind, None)
    return parser


def _nearest(word: str, keys: Sequence[str]) -> str:
    """Return "; did you mean 'x'?" for the nearest key, or the nearest last part of a key; "" if none is near."""
    last = {key.rsplit(".", 1)[-1]: key for key in reversed(keys)}
    for near, known in ((word, {key: key for key in keys}), (word.rsplit(".", 1)[-1], last)):
        found = difflib.get_close_matches(near, known, n=1)
        if found:
            return f"; did you mean {known[found[0]]!r}?"
    return ""


def _usage() -> str:
    lines = [f"    {command:10s} {(_load(command).__doc__ or '').splitlines()[0]}" for command in COMMANDS]
    return "\n".join(
        ["usage: mofasgd COMMAND [--config FILE.yaml] [--KEY VALUE ...]", "", *lines, "", "mofasgd COMMAND --help"]
    )


def configured(
    command: str, arguments: Sequence[str], *, prog: str = "", defaults: Mapping[str, Any] | None = None
) -> tuple[Command, Any]:
    """Return the function of a command and its configuration; a wrong argument ends the program.

    Args:
        command: one of `COMMANDS`.
        arguments: flags.
        prog: what errors begin with; default "mofasgd COMMAND".
        defaults: dotted key -> value, in place of the configuration's own defaults.
    """
    function = _load(command)
    kind = typing.get_type_hints(function)["config"]
    parser = _parser(command, function, kind, prog)
    parser.set_defaults(dict(defaults or {}))
    values = dict(parser.instantiate(parser.parse_args(arguments)))
    values.pop("config")
    return function, kind(**values)


def _run(command: str, arguments: Sequence[str]) -> None:
    function, config = configured(command, arguments)
    function(config)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; return its exit status: 0 done, 1 failed or stopped, 2 wrong call, 130 Ctrl-C; a line says why."""
    command, *rest = (sys.argv[1:] if arguments is None else arguments) or ["--help"]
    try:
        if command in ("-h", "--help"):
            print(_usage())
        elif command == "--version":
            print(f"mofasgd {importlib.metadata.version('mofasgd')}")
        elif command not in COMMANDS:
            print(f"mofasgd: error: no command {command!r}{did_you_mean(command, tuple(COMMANDS))}", file=sys.stderr)
            return 2
        else:
            _run(command, rest)
    except (ValueError, OSError, Stopped) as error:
        print(f"mofasgd {command}: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"mofasgd {command}: interrupted", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
