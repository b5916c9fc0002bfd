"""Initialises a SoftHSM token with softhsm2-util without a PIN on a command line.

softhsm2-util takes PINs as arguments, which every user of the machine can read, or prompts for them on a terminal.
This script runs it on a pseudo-terminal and answers its four prompts.

usage: init-token.py LABEL --free|--token=LABEL SO-PIN-FILE PIN-FILE
"""

import os
import pty
import select
import sys
import termios
import time
from pathlib import Path

PATIENCE_S = 30


def main() -> int:
    label, which_token, so_pin_file, pin_file = sys.argv[1:]
    so_pin, pin = (Path(name).read_bytes().removesuffix(b"\n") for name in (so_pin_file, pin_file))
    how = [which_token] if which_token == "--free" else ["--token", which_token.split("=", 1)[1], "--force"]
    command = ["softhsm2-util", "--init-token", *how, "--label", label]
    status, screen = answer(command, [so_pin, so_pin, pin, pin])
    if status != 0:
        print(f"softhsm-setup: {' '.join(command)} failed:\n{screen}", file=sys.stderr)
    return status


def answer(command: list[str], answers: list[bytes]) -> tuple[int, str]:
    """Runs the command on a pseudo-terminal and answers each prompt that ends in "PIN: " with the next answer."""
    child, terminal = pty.fork()
    if child == 0:
        os.execvp(command[0], command)
    screen, given, deadline = b"", 0, time.monotonic() + PATIENCE_S
    while time.monotonic() < deadline:
        if select.select([terminal], [], [], 0.02)[0]:
            try:
                screen += os.read(terminal, 4096)
            except OSError:  # EIO: the command has ended
                break
        # The command discards input that arrives before it turns the echo off, so waiting for the prompt is not enough.
        elif given < len(answers) and screen.count(b"PIN: ") > given and not echoes(terminal):
            os.write(terminal, answers[given] + b"\n")
            given += 1
    else:
        os.kill(child, 15)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    return abs(status), screen.decode(errors="replace")


def echoes(terminal: int) -> bool:
    return bool(termios.tcgetattr(terminal)[3] & termios.ECHO)


if __name__ == "__main__":
    sys.exit(main())
