"""The `lora-proxy` command: arguments in, an exit status out.

Owns the words of the help and of a user's mistake: `error: …` lines on stderr and exit
status 2, never a traceback. Refuses to know what a setting means (config) and how a proxy
is put together (app).
"""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from lora_proxy import __version__, config, sources
from lora_proxy.errors import ProxyError
from lora_proxy.settings import Settings

_DESCRIPTION = """\
A reverse proxy that puts LoRA adapter routing in front of vLLM: clients name an
adapter in `model`, the proxy loads it where it is missing and forwards the request.
"""
_EPILOG = """\
examples:
  vLLM must run with --enable-lora and VLLM_ALLOW_RUNTIME_LORA_UPDATING=True.

  one server, one adapter, no file:
    lora-proxy serve --upstream http://127.0.0.1:8000 --adapter sql=/adapters/sql

  then, with any OpenAI client whose base URL is http://127.0.0.1:8080/v1:
    curl http://127.0.0.1:8080/v1/chat/completions -H 'content-type: application/json' \\
      -d '{"model": "sql", "messages": [{"role": "user", "content": "hello"}]}'

  everything else is set in a YAML file or in LORA_PROXY_... variables; try it first:
    lora-proxy check --config lora-proxy.yaml
    lora-proxy serve --config lora-proxy.yaml

lora-proxy COMMAND --help lists a command's flags.
"""


class _Parser(argparse.ArgumentParser):
    """argparse, with this command's form of an error."""

    def error(self, message: str) -> NoReturn:
        """Ends the process with status 2."""
        self.exit(2, f"error: {message}\ntry: {self.prog} --help\n")


def build_parser() -> argparse.ArgumentParser:
    """The whole command line; `tests/test_docs.py` reads it too."""
    parser = _Parser(
        prog="lora-proxy",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"lora-proxy {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name, text in (
        ("serve", "run the proxy until SIGTERM or Ctrl-C"),
        ("check", "judge the configuration and the adapters' files; touches no server"),
    ):
        command = commands.add_parser(
            name,
            help=text,
            description=f"{text[0].upper()}{text[1:]}.",
            epilog="Flags win over LORA_PROXY_... variables, and these over the file.",
            allow_abbrev=False,
        )
        _add_settings(command)
    return parser


def _add_settings(command: argparse.ArgumentParser) -> None:
    """The flags of `config.Flags`, and the file."""
    add = command.add_argument
    add("--config", metavar="FILE", type=Path, help="YAML file (or LORA_PROXY_CONFIG)")
    add("--listen", metavar="HOST:PORT", help="where clients connect; default 0.0.0.0:8080")
    add(
        "--upstream",
        metavar="[NAME=]URL",
        action="append",
        default=[],
        help="a vLLM server, as http://HOST:PORT; repeat for more; replaces the file's list",
    )
    add(
        "--adapter",
        metavar="NAME=PATH",
        action="append",
        default=[],
        help="an adapter, and its absolute path as vLLM sees it; repeat for more; replaces "
        "the file's list",
    )
    add(
        "--default-model",
        metavar="NAME",
        help="answers requests that name no model, or an unknown one",
    )
    add("--log-level", metavar="LEVEL", help="debug, info, warning, error or critical")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command.

    Args:
        argv: The arguments behind the program's name; None takes the process's.

    Returns:
        The exit status: 0, or 2 after a mistake in the configuration.

    Raises:
        SystemExit: From `--help`, `--version`, and for arguments that do not fit.
    """
    args = build_parser().parse_args(argv)
    flags = config.Flags(
        listen=args.listen,
        upstreams=tuple(args.upstream),
        adapters=tuple(args.adapter),
        default_model=args.default_model,
        log_level=args.log_level,
    )
    try:
        settings = config.load(args.config, environ=os.environ, flags=flags)
    except config.ConfigError as error:
        for fault in error.faults:
            _complain(fault)
        return 2
    if args.command == "check":
        return _check(settings)
    from lora_proxy.app import serve  # noqa: PLC0415  # `check` needs no server's libraries

    return serve(settings)


def _check(settings: Settings) -> int:
    """Says of each adapter what can be known without a server."""
    ranks = [upstream.max_lora_rank for upstream in settings.upstreams]
    # An adapter needs one server that takes it: the most generous one decides.
    max_rank = None if None in ranks else max(rank for rank in ranks if rank is not None)
    status = 0
    for adapter in settings.adapters:
        try:
            found = sources.inspect(adapter.path, max_rank)
        except ProxyError as error:
            _complain(f"adapter {adapter.name}: {error.message}")
            status = 2
            continue
        if found.readable:
            _say(f"adapter {adapter.name}: ok, rank {found.rank}, base {found.base_model}")
        else:
            _say(f"adapter {adapter.name}: not readable from here; vLLM judges it at its load")
    if status == 0:
        upstreams, adapters = len(settings.upstreams), len(settings.adapters)
        _say(f"ok: the configuration names {upstreams} upstream(s) and {adapters} adapter(s)")
    return status


def _say(line: str) -> None:
    sys.stdout.write(f"{line}\n")


def _complain(fault: str) -> None:
    sys.stderr.write(f"error: {fault}\n")
