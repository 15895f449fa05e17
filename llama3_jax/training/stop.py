"""SIGTERM (a scheduler wants the machine) and SIGINT (Ctrl-C) end a run after its step."""

import signal

from llama3_jax.exits import EXIT_INTERRUPTED, EXIT_REQUEUE
from llama3_jax.parallel.processes import SharedNumber


class Interrupted(Exception):
    """A signal came while something was measured."""


class StopSignal:
    """Which signal has come; with several processes, one to any of them stops all after one step."""

    EXIT_CODES = {signal.SIGINT: EXIT_INTERRUPTED, signal.SIGTERM: EXIT_REQUEUE}

    def __init__(self) -> None:
        self.agreed, self.name, self.exit_code = False, "", 0
        self._received, self._shared = 0, SharedNumber()

    def listen(self) -> None:
        """Takes signals from now on; before, they end the process."""
        for number in self.EXIT_CODES if not self._received else ():
            signal.signal(number, self._receive)

    def agree(self) -> None:
        """Called once a step by all processes: learns whether to stop, and by which signal."""
        if number := self._shared.exchange(self._received):
            self.agreed, self.name = True, signal.Signals(number).name
            self.exit_code = self.EXIT_CODES[number]

    def check(self) -> None:
        """As `agree`, where the step is over and something is measured.

        Raises:
          Interrupted: the run is to stop.
        """
        self.agree()
        if self.agreed:
            raise Interrupted

    def _receive(self, number: int, _) -> None:
        self._received = number
        signal.signal(number, signal.SIG_DFL)  # a second one ends the process at once
