"""A process of a run that does nothing but agree: `member.py <id> <processes> <port> <rounds>`.

With a fifth argument it stops by an error of its own after some rounds.
"""

import sys
import time

from llama3_jax.errors import UserError
from llama3_jax.parallel.processes import Joining, SharedNumber, all_agree, joined, of_first

TIMEOUT = 3


def main(process: int, processes: int, port: str, rounds: int, fails: bool) -> None:
    with joined(Joining("explicit", f"127.0.0.1:{port}", process, processes, TIMEOUT)):
        assert of_first([7, 8] if process == 0 else [7] * process) == [7, 8]
        assert all_agree(True) and not all_agree(process != 1)
        shared = SharedNumber()
        numbers = [shared.exchange(number * (process == 1)) for number in range(1, 5)]
        assert numbers == [0, 1, 2, 3]
        print("begun", flush=True)
        for number in range(rounds):
            if fails and number == 5:
                raise UserError("its disk is full")
            shared.exchange(number)
            time.sleep(0.05)


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], int(sys.argv[4]), len(sys.argv) > 5)
