"""torch.compile and CUDA graphs warn of affairs of their own (TF32, empty graphs, `.grad` of what they trace)."""

from pathlib import Path

import pytest


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    here = Path(__file__).parent
    for item in items:
        if here in item.path.parents:
            item.add_marker(pytest.mark.filterwarnings("ignore::UserWarning"))
