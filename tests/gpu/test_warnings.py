"""Of warnings, which are errors in the tests, one of torch's own is not."""

import warnings

import pytest

# Torch's words, where autograd's thread begins with a product.
CONTEXT = (
    "Attempting to run cuBLAS, but there was no current CUDA context! Attempting to set the "
    "primary context... (Triggered internally at CublasHandlePool.cpp:270.)"
)


def test_torch_may_say_that_it_makes_a_context():
    warnings.warn(CONTEXT, UserWarning, stacklevel=1)


@pytest.mark.parametrize(
    "message",
    [
        "Attempting to run cuBLAS, but the primary context has no memory left",
        "there was no current CUDA context",
        f"Not the first: {CONTEXT}",
    ],
)
def test_nothing_else_that_is_said_of_a_context_is_let_through(message):
    with pytest.raises(UserWarning, match="context"):
        warnings.warn(message, UserWarning, stacklevel=1)
