"""Kernels run in Triton's interpreter where there is no GPU (tests/conftest.py sets TRITON_INTERPRET)."""

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch


@pytest.fixture(scope="session")
def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(scope="session", autouse=True)
def quick_interpreter() -> Iterator[None]:
    """Two changes to Triton 3.6's interpreter for the tests of this folder.

    It makes loop bounds with int() of arrays of one element, which newer numpy refuses; and it replaces the functions
    of its language at each call of a jitted function, which takes most of the time: here they are replaced once.
    """
    interpreter = None if torch.cuda.is_available() else pytest.importorskip("triton.runtime.interpreter")
    if interpreter is None:
        yield
        return
    import triton.language as tl

    patch_tensor, patch_language = interpreter._patch_lang_tensor, interpreter._patch_lang

    def patch_tensor_for_new_numpy(tensor: Any, scope: Any) -> None:
        patch_tensor(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    interpreter._patch_lang_tensor = patch_tensor_for_new_numpy
    scope = patch_language(SimpleNamespace(__globals__={"tl": tl, "core": tl.core}))
    interpreter._patch_lang = lambda function: interpreter._LangPatchScope()
    yield
    interpreter._patch_lang, interpreter._patch_lang_tensor = patch_language, patch_tensor
    scope.restore()
