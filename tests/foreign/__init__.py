"""A table of ways in which people use Lightning, each trained, killed and resumed, or refused; see ``table``."""

import pytest

pytest.register_assert_rewrite("foreign.harness")
