"""The guard against disappearing tests, tried on small generated tests."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.mark.promise("R17")
@pytest.mark.parametrize(
    ("reason", "outcome"), [("no time for this", {"failed": 1}), ("needs a CUDA device", {"skipped": 1})]
)
def test_only_known_reasons_skip(
    reason: str, outcome: dict[str, int], pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[2]))
    monkeypatch.delenv("PYTEST_ADDOPTS", raising=False)
    pytester.makeconftest(Path(__file__).parents[1].joinpath("conftest.py").read_text())
    pytester.makepyfile(
        f"""
        import pytest, torch
        torch.cuda.is_available()

        def test_that_skips():
            pytest.skip({reason!r})
        """
    )
    result = pytester.runpytest_subprocess("-p", "no:cacheprovider")
    result.assert_outcomes(**outcome)
