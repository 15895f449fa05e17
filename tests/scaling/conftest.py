import pytest

from experiments.scaling_laws import published


@pytest.fixture(scope="session")
def public_data():
    """The directory of the published sweeps, or a skip."""
    if not published.DIRECTORY.is_dir():
        pytest.skip(f"published sweeps are not in {published.DIRECTORY}")
    return published.DIRECTORY
