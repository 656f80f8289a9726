"""One try in one process: forked from a process that has loaded everything, bounded in time and memory, and ended whatever it does."""

from __future__ import annotations

import ctypes
import os
import re
import resource
import select
import signal
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

CPU_SECONDS = 25
"""What a try may compute."""

IDLE_SECONDS = 10
"""How long a try may do nothing at all, as long as one that waits for a pipe does."""

WALL_SECONDS = 240
"""What a try may take on a machine that has much else to do."""

MEMORY = 3 << 30
"""Bytes of address space beyond those of the process that everything is loaded in."""

LARGEST_FILE = 1 << 28
"""Bytes that a try may write into one file."""

PARENT_DEATH_SIGNAL = 1
"""Of prctl(2): nobody is left behind by a run that is stopped."""

BUG = 70
"""Exit code of an exception that nobody caught."""

LONGEST_SENTENCE = 8000
"""Characters of a line; it may quote a path, which may have 4096."""

TRACEBACK = "Traceback (most recent call last)"


@dataclass(frozen=True)
class Outcome:
    """How a try ended.

    Attributes:
        code: Its exit code; None: it was ended by a signal.
        signal: That signal.
        out: What it wrote to stdout.
        err: What it wrote to stderr.
        hung: Whether it was ended because it took too long.
        seconds: How long it took.
    """

    code: int | None
    signal: int | None
    out: str
    err: str
    hung: bool
    seconds: float


class Child:
    """A function that runs in a process of its own.

    Args:
        work: Called there; its end is exit code 0, unless it raises SystemExit.
        folder: Its working directory.
        cpu_seconds: What it may compute.
    """

    def __init__(self, work: Callable[[], object], folder: Path, cpu_seconds: int = CPU_SECONDS):
        self.began = time.monotonic()
        self.out, self.err = os.memfd_create("out"), os.memfd_create("err")
        sys.stdout.flush()
        sys.stderr.flush()
        self.pid = os.fork()
        if self.pid == 0:
            self._work(work, folder, cpu_seconds)
        self.handle = os.pidfd_open(self.pid)

    def _work(self, work: Callable[[], object], folder: Path, cpu_seconds: int) -> None:
        code = BUG
        try:
            os.setsid()
            ctypes.CDLL(None).prctl(PARENT_DEATH_SIGNAL, signal.SIGKILL)
            os.chdir(folder)
            for descriptor, place in ((os.open(os.devnull, os.O_RDONLY), 0), (self.out, 1), (self.err, 2)):
                os.dup2(descriptor, place)
            signal.signal(signal.SIGINT, signal.default_int_handler)
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            _set_limits(cpu_seconds)
            work()
            code = 0
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else 0
        except BaseException:
            traceback.print_exc()
        finally:
            try:
                sys.stdout.flush()
                sys.stderr.flush()
            finally:
                os._exit(code)

    def wait(self) -> Outcome:
        """Its outcome; what takes too long, or does nothing, is killed."""
        hung = not self._ends()
        self.send(signal.SIGKILL)  # also what it has started; an end that it has come to stays what it was
        _, status = os.waitpid(self.pid, 0)
        os.close(self.handle)
        code = os.waitstatus_to_exitcode(status)
        killed_by = -code if code < 0 else None
        out, err = _content(self.out), _content(self.err)
        hung = hung or killed_by == signal.SIGXCPU
        return Outcome(None if code < 0 else code, killed_by, out, err, hung, time.monotonic() - self.began)

    def _ends(self) -> bool:
        spent = 0.0
        while time.monotonic() - self.began < WALL_SECONDS:
            if self.ended_within(IDLE_SECONDS):
                return True
            before, spent = spent, self._computed()
            if spent - before < 0.02:
                return False
        return False

    def _computed(self) -> float:
        """Seconds of a processor."""
        fields = Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def ended_within(self, seconds: float) -> bool:
        """Wait so long for its end."""
        return bool(select.select([self.handle], [], [], max(seconds, 0))[0])

    def send(self, number: signal.Signals) -> None:
        """Send a signal to it and to what it has started."""
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(self.pid, number)


def _set_limits(cpu_seconds: int) -> None:
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, used + MEMORY))
    resource.setrlimit(resource.RLIMIT_CPU, (cpu_seconds, cpu_seconds + 5))
    resource.setrlimit(resource.RLIMIT_FSIZE, (LARGEST_FILE, LARGEST_FILE))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)


def _content(descriptor: int) -> str:
    size = min(os.fstat(descriptor).st_size, 1 << 20)
    content = os.pread(descriptor, size, 0)
    os.close(descriptor)
    return content.decode("utf-8", errors="replace")


def command(*words: object) -> Callable[[], object]:
    """A command of mnemoscope, as a process would run it."""

    def work() -> None:
        from mnemoscope.cli import main as cli

        sys.argv = ["mnemoscope", *map(str, words)]
        cli.main()

    return work


def run(folder: Path, *words: object, cpu_seconds: int = CPU_SECONDS) -> Outcome:
    """The outcome of a command in a folder."""
    return Child(command(*words), folder, cpu_seconds).wait()


def sentences_of(outcome: Outcome) -> list[str]:
    """The lines of stderr that tell an error."""
    return [line for line in outcome.err.splitlines() if line.startswith("mnemoscope: ")]


def fault_of(
    outcome: Outcome, codes: Sequence[int] = (0, 1, 2, 3), verdicts: Sequence[int] = ()
) -> tuple[str, str] | None:
    """What is wrong with how a command ended: the column of the table, and words; None: it ended as documented.

    Args:
        outcome: How it ended.
        codes: The exit codes it may have.
        verdicts: Those of them that are a result, and need no sentence.
    """
    if outcome.hung:
        return "hangs", f"no end after {outcome.seconds:.0f} s"
    if outcome.signal is not None:
        return "tracebacks", f"ended by {signal.Signals(outcome.signal).name}"
    if outcome.code == BUG or TRACEBACK in outcome.err or TRACEBACK in outcome.out:
        return "tracebacks", last_line(outcome.err)
    if outcome.code not in codes:
        return "tracebacks", f"exit code {outcome.code}, which is not documented"
    lines = sentences_of(outcome)
    if outcome.code not in (0, *verdicts) and len(lines) != 1:
        return "tracebacks", f"exit code {outcome.code} with {len(lines)} sentences"
    if any(len(line) > LONGEST_SENTENCE for line in lines):
        return "tracebacks", f"a sentence of {max(map(len, lines)):,} characters"
    return None


def last_line(text: str) -> str:
    """Where a traceback ends: the error, and the last place of ours."""
    lines = text.strip().splitlines() or ["(nothing was said)"]
    errors = [line for line in lines if re.match(r"[\w.]+(Error|Exception|Interrupt|Warning|Fault)\b", line)]
    places = re.findall(r'File "[^"]*/(mnemoscope/[^"]+)", line (\d+)', text)
    place = f" ({places[-1][0]}:{places[-1][1]})" if places else ""
    return (errors or lines)[-1][:200] + place
