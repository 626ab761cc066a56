"""The guard against disappearing tests, tried on small generated tests."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.mark.promise("R17")
def test_only_known_reasons_skip(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[2]))
    monkeypatch.delenv("PYTEST_ADDOPTS", raising=False)
    pytester.makeconftest(Path(__file__).parents[1].joinpath("conftest.py").read_text())
    pytester.makepyfile(
        """
        import pytest, torch
        torch.cuda.is_available()

        def test_that_skips():
            pytest.skip("no time for this")

        def test_that_may_skip():
            pytest.skip("needs a CUDA device")
        """
    )
    result = pytester.runpytest_subprocess("-p", "no:cacheprovider")
    result.assert_outcomes(failed=1, skipped=1)
    result.stdout.fnmatch_lines(["*::test_that_skips was skipped for a reason that tests/conftest.py doesn't allow*"])
