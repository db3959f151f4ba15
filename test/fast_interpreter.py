"""Triton's interpreter without what it does over and over: the same operations in less than half of the time.

Of this version of Triton three things, each a fifth to a third of the time of a kernel:

- every call of a device function patches triton.language anew, which stays patched for the whole launch;
- every sum and product of integers is computed again in int64, and compared with bounds, for an assertion that does
  nothing unless debugging was asked for;
- types and shapes, of which there are few, are made and named anew for every intermediate result.
"""

from __future__ import annotations

import dataclasses

import triton
import triton.language as tl
from triton.runtime import interpreter

VERSION = "3.6."


def make_fast() -> None:
    """Does nothing with another version of Triton: its interpreter may work otherwise."""
    if triton.__version__.startswith(VERSION):
        _patch_once_a_launch()
        _check_no_overflow()
        _remember_types()


def _patch_once_a_launch() -> None:
    patch, modules, done = interpreter._patch_lang, {}, set()

    def modules_of(fn) -> tuple[bool, bool]:
        if fn not in modules:
            seen = list(fn.__globals__.values())
            modules[fn] = any(x is tl for x in seen), any(x is tl.core for x in seen)
        return modules[fn]

    def of_launch(fn):
        done.clear()
        done.add(modules_of(fn))
        return patch(fn)

    def call_device_function(self, *args, **kwargs):
        if modules_of(self.fn) not in done:
            done.add(modules_of(self.fn))
            patch(self.fn)
        try:
            return self.rewrite()(*args, **kwargs)
        except Exception as error:
            raise interpreter.InterpreterError(repr(error)) from error

    interpreter._patch_lang = of_launch
    interpreter.InterpretedFunction.__call__ = call_device_function


def _check_no_overflow() -> None:
    builder = interpreter.interpreter_builder
    builder.options = dataclasses.replace(builder.options, sanitize_overflow=False)


def _remember_types() -> None:
    """A type is known by its name, a block's with its shape; what is made of a type alone is shared."""
    make_block, blocks = tl.block_type.__init__, {}
    make_tensor, tensors = tl.tensor.__init__, {}
    find_numpy, numpy_types = interpreter._get_np_dtype, {}

    def block_init(self, element_ty, shape) -> None:
        key = element_ty.name, *(getattr(size, "value", size) for size in shape)
        if key not in blocks:
            make_block(self, element_ty, shape)
            blocks[key] = dict(self.__dict__)
        self.__dict__.update(blocks[key])

    def tensor_init(self, handle, type) -> None:
        if type.name not in tensors:
            make_tensor(self, handle, type)
            tensors[type.name] = {name: x for name, x in self.__dict__.items() if name not in ("handle", "type")}
        self.__dict__.update(tensors[type.name])
        self.handle, self.type = handle, type

    def numpy_type(of):
        if of.name not in numpy_types:
            numpy_types[of.name] = find_numpy(of)
        return numpy_types[of.name]

    tl.block_type.__init__, tl.tensor.__init__ = block_init, tensor_init
    interpreter._get_np_dtype = numpy_type
