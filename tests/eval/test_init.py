"""The package is cheap to import and exports what it says."""

import subprocess
import sys

import pytest
import quantkit_eval


def test_import_loads_neither_torch_nor_transformers():
    code = (
        f"import sys; sys.path[:] = {sys.path!r}; import quantkit_eval; "
        "print(sorted({'torch', 'transformers', 'datasets', 'quantkit'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_every_exported_name_is_there():
    for name in quantkit_eval.__all__:
        assert getattr(quantkit_eval, name).__name__ == name
    assert issubclass(quantkit_eval.EvalError, ValueError)


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = quantkit_eval.nothing
