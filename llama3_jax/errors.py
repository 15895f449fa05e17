"""The one exception that a person is meant to read."""


class UserError(Exception):
    """Something the user can fix: the message says what, where and what to do, in one line.

    The programs (`python -m llama3_jax.…`) print it without a traceback and exit with code 2.
    """
