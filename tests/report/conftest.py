import pytest
import report_results

from quantkit.report.page import page
from quantkit.report.read import read_results
from quantkit.report.style import Studio


@pytest.fixture(scope="session")
def everything(tmp_path_factory):
    """make(text) -> one file or folder of each kind of result, with `text` in every name."""
    return lambda name="": report_results.everything(tmp_path_factory.mktemp("results"), name)


@pytest.fixture(scope="session")
def whole(everything):
    """The page about one result of each kind."""
    return page(read_results(everything()), Studio())
