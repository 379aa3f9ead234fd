"""The names that `import quantkit` offers."""

import pytest

import quantkit


@pytest.mark.parametrize("name", quantkit.__all__)
def test_every_public_name_is_there(name):
    assert getattr(quantkit, name)
    assert name in dir(quantkit)
