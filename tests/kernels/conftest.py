"""Kernels run in Triton's interpreter where there is no GPU (tests/conftest.py sets TRITON_INTERPRET)."""

from typing import Any

import pytest
import torch


@pytest.fixture(scope="session")
def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(scope="session", autouse=True)
def interpreter_takes_numpy_scalars() -> None:
    """Triton 3.6's interpreter makes loop bounds with int() of arrays of one element, which newer numpy refuses."""
    if torch.cuda.is_available():
        return
    interpreter = pytest.importorskip("triton.runtime.interpreter")
    patch = interpreter._patch_lang_tensor

    def patched(tensor: Any, scope: Any) -> None:
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    interpreter._patch_lang_tensor = patched
