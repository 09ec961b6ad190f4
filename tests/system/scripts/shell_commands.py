"""Run commands in one process as an interactive shell starts it: with a terminal, in a process
group of its own.

`COMMANDS.json` has the words of each; exit code, output and standard error of each are written to
`RESULTS.json`.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import pty
import sys
import traceback
from collections.abc import Callable
from pathlib import Path


def run_in_shell(work: Callable[[], None]) -> int:
    """Run a function in a grandchild of this process; return its exit code."""
    shell, terminal = pty.fork()
    if not shell:
        command = os.fork()
        if not command:
            os.setpgid(0, 0)
            work()
            os._exit(0)
        os._exit(os.waitstatus_to_exitcode(os.waitpid(command, 0)[1]))
    with contextlib.suppress(OSError):  # the terminal is closed
        while text := os.read(terminal, 4096):
            os.write(2, text)
    return os.waitstatus_to_exitcode(os.waitpid(shell, 0)[1])


def run_commands() -> None:
    """Run all commands, and write how they ended."""
    from dtrain.cli import main

    results = []
    for words in json.loads(Path(sys.argv[1]).read_text()):
        out, err = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            try:
                code = main(words)
            except SystemExit as end:
                code = int(end.code or 0)
            except BaseException:
                code = -1
                traceback.print_exc()
        results.append([code, out.getvalue(), err.getvalue()])
    Path(sys.argv[2]).write_text(json.dumps(results))


if __name__ == "__main__":
    sys.exit(run_in_shell(run_commands))
