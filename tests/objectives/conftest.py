import jaxtyping
import pytest


@pytest.fixture
def without_type_hook():
    """Users run without the run-time type checks of the tests; what they see then is ours."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)
