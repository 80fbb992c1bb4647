"""Has a kernel's functions optimised and made machine code once, as one: the way Numba compiles what calls what.

Numba compiles every jitted function for itself, down to machine code, and links its optimised LLVM code into those that
call it: what is called over five levels is optimised six times, and nobody runs five of the six pieces of machine code.
Kernels are called by their address alone. So here a function's LLVM code waits, as Numba's lowering left it, until
somebody asks for the address of a function in it.
"""

from numba.core.codegen import JITCodeLibrary
from numba.core.compiler import Compiler


class _Library(JITCodeLibrary):
    """One function and those that it calls; ``codegen`` and ``set_env`` are what Numba asks of both."""

    _is_code = False

    def _optimize_final_module(self) -> None:
        pass

    def _finalize_final_module(self) -> None:
        self._finalized = True

    def get_pointer_to_function(self, name: str) -> int:
        """The address of function ``name``, zero where it is not in this library."""
        self._ensure_finalized()
        if not self._is_code:
            if all(function.name != name for function in self.get_defined_functions()):
                return 0
            self._is_code = True
            super()._optimize_final_module()
            super()._finalize_final_module()
        return super().get_pointer_to_function(name)

    @property
    def codegen(self):
        return self

    def set_env(self, name: str, environment) -> None:
        """Numba's own writes the Python objects that a function refers to into its machine code. Kernels have none."""


class KernelCompiler(Compiler):
    """Numba's ``pipeline_class`` for kernels and all functions that they call."""

    def compile_extra(self, function):
        self.state.library = _Library(self.state.targetctx.codegen(), function.__qualname__)
        self.state.library.enable_object_caching()
        return super().compile_extra(function)
