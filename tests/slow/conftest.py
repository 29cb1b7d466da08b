"""Fixtures of tests/integration, for what takes longer."""

from tests.integration.conftest import recipe, server
from tests.integration.test_faults import unbroken

__all__ = ["recipe", "server", "unbroken"]
