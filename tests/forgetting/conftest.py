from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture(autouse=True)
def few_items(monkeypatch, request, quick_pictures):
    """Fewer items than the built-in ones: what is tested does not depend on their number."""
    if "all_items" in request.keywords:
        return
    from runs import few

    few(monkeypatch.setattr, **getattr(request.module, "FEW", {}))
