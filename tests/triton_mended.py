"""Mends the interpreter of Triton 3.6 when it is imported."""

import triton
from triton.runtime import interpreter

# It takes int() of an array of one element, which numpy 2.4 refuses.
if triton.__version__.startswith("3.6."):
    patch = interpreter._patch_lang_tensor

    def patch_with_index(tensor, scope):
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.squeeze()))

    interpreter._patch_lang_tensor = patch_with_index
