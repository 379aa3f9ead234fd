"""Types that are supported with one value of a key of config.json only."""

import json

import pytest

from quantkit.errors import ModelError
from quantkit.models.headers import read_checkpoint


@pytest.mark.parametrize("said", [{}, {"rescale_every": 6}])
def test_rwkv_that_halves_its_weights_is_refused_with_the_remedy(tmp_path, said):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "rwkv"} | said))
    with pytest.raises(ModelError, match=r"rescale_every: 0 in config\.json"):
        read_checkpoint(tmp_path)


def test_rwkv_that_does_not_is_not(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "rwkv", "rescale_every": 0}))
    with pytest.raises(ModelError, match=r"no model\.safetensors"):
        read_checkpoint(tmp_path)
