"""The signals with which a person, a terminal, a scheduler or a launcher asks a program to end."""

import signal

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)


def ignore_signals() -> None:
    """Of a process that others end, or that is ending by itself."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
