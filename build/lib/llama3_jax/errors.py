"""The one exception that a person is meant to read."""


class UserError(Exception):
    """Something the user can mend: the message says what, where and what to do, in one line.

    The doors (`python -m llama3_jax.…`) print it without a traceback and exit with code 2.
    """
