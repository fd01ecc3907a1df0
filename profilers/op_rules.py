"""What is known about an op before it runs: its class, whether it moves data, what it reads and what it writes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch

from profilers.flop_formulas import Formula, formula

_CLASSES = {
    "matmul": "linear mm addmm bmm baddbmm mv addmv dot vdot addbmm _int_mm _scaled_mm _grouped_mm _scaled_grouped_mm "
    "grouped_mm_fallback _weight_int8pack_mm _weight_int4pack_mm _weight_int4pack_mm_for_cpu "
    "_weight_int4pack_mm_with_scales_and_zeros linalg_solve_triangular",
    "attention": "scaled_dot_product_attention _scaled_dot_product_flash_attention_for_cpu "
    "_scaled_dot_product_flash_attention _scaled_dot_product_efficient_attention _scaled_dot_product_cudnn_attention "
    "_flash_attention_forward _efficient_attention_forward",
    "convolution": "convolution _convolution cudnn_convolution convolution_overrideable _slow_conv2d_forward",
    "embedding": "embedding",
    "norm": "native_layer_norm native_group_norm native_batch_norm _native_batch_norm_legit_no_training "
    "_fused_rms_norm",
    "softmax": "_softmax _log_softmax _safe_softmax",
    "reduction": "sum mean amax amin max min argmax argmin all any prod var var_mean std norm linalg_vector_norm "
    "logsumexp count_nonzero histc bincount topk sort argsort kthvalue median",
    "scan": "cumsum cumprod cummax cummin logcumsumexp",
    "copy": "clone _to_copy copy copy_ cat stack _unsafe_index index index_select gather take index_put index_put_ "
    "_index_put_impl_ index_copy index_copy_ index_add index_add_ index_fill index_fill_ scatter scatter_ scatter_add "
    "scatter_add_ masked_scatter constant_pad_nd roll flip repeat repeat_interleave tril triu tril_ triu_ fill fill_ "
    "zero_ zeros zeros_like ones ones_like full full_like new_zeros new_ones new_full empty empty_like new_empty "
    "empty_strided new_empty_strided empty_permuted arange linspace eye rand randn randint randperm scalar_tensor "
    "lift_fresh_copy nonzero _local_scalar_dense slice_scatter select_scatter as_strided_scatter masked_select "
    "unfold_copy one_hot equal is_nonzero split_with_sizes_copy _assert_async _assert_tensor_metadata isin",
    "elementwise": "floor_divide pow clamp softplus where masked_fill masked_fill_ threshold glu lerp addcmul addcdiv",
}
_CLASS_OF: dict[str, str] = {name: label for label, names in _CLASSES.items() for name in names.split()}

_NO_BYTES = (
    *("empty", "empty_like", "new_empty", "empty_strided", "new_empty_strided", "empty_permuted", "resize_", "set_"),
    *("_local_scalar_dense", "_assert_async", "_assert_tensor_metadata"),
)
# What these write does not depend on the first argument's values.
_SHAPE_ONLY = (
    *("zeros_like", "ones_like", "full_like", "rand_like", "randn_like"),
    *("new_zeros", "new_ones", "new_full", "fill", "fill_", "zero_"),
)
_VIEWS = ("_unsafe_view", "_reshape_alias", "detach", "detach_", "alias", "lift_fresh")
_GATHERS = ("embedding", "index", "_unsafe_index", "index_select", "gather", "take")
_GROUPED = ("_grouped_mm", "_scaled_grouped_mm", "grouped_mm_fallback")
# In place, only the rows named are touched: op -> position of the new values, and whether the old ones are read too.
_ROW_WRITES = {
    "index_put_": (2, False),
    "_index_put_impl_": (2, False),
    "index_copy_": (3, False),
    "index_add_": (3, True),
    "scatter_": (3, False),
    "scatter_add_": (3, True),
}


class OpRule:
    """How an op is counted, as far as that does not depend on the call.

    Attributes
    ----------
    name : str
        Without namespace and overload.
    op_class : str
        A key of the table in ``docs/profilers/intensity.md``; ``"other"`` for an op it does not know.
    formula : callable or None
        FLOPs from arguments, keyword arguments and output.
    composite : bool
        Taken apart, its parts counted.
    free : bool
        A view, or an op that moves no data worth counting.
    gathers, grouped, reads : bool
        Reads only rows of its first tensor; reads only some experts of its second; reads its arguments at all.
    written : tuple of (int, str)
        Positions and names of the arguments that it changes.
    reads_written : bool
        Whether it reads what it changes: true of ``add_``, not of ``copy_`` or an ``out=`` argument.
    row_write : tuple of (int, bool) or None
        In place, only the rows named are touched: position of the new values, and whether it adds to the old ones.
    """

    __slots__ = (
        *("composite", "formula", "free", "gathers", "grouped", "name", "op_class", "reads", "reads_written"),
        *("row_write", "written"),
    )

    def __init__(self, op: torch._ops.OpOverload) -> None:
        schema = op._schema
        name = schema.name.split("::")[-1]
        self.name = name
        self.op_class = _op_class(op, name)
        self.formula: Formula | None = formula(op)
        self.composite = self.formula is None and _decomposes(op)
        # A view returns an alias of an input that it does not write.
        aliases = any(r.alias_info is not None and not r.alias_info.is_write for r in schema.returns)
        self.free = name in _NO_BYTES or name in _VIEWS or aliases
        self.gathers = name in _GATHERS
        self.grouped = name in _GROUPED
        self.reads = name not in _SHAPE_ONLY
        self.reads_written = self.reads and name.endswith("_") and name != "copy_"
        self.row_write = _ROW_WRITES.get(name)
        self.written = tuple(
            (position, argument.name)
            for position, argument in enumerate(schema.arguments)
            if argument.alias_info is not None and argument.alias_info.is_write
        )


def _decomposes(op: torch._ops.OpOverload) -> bool:
    key = torch._C.DispatchKey.CompositeImplicitAutograd
    return key in op.py_kernels or bool(op.has_kernel_for_dispatch_key(key))


def _op_class(op: torch._ops.OpOverload, name: str) -> str:
    known = _CLASS_OF.get(name) or _CLASS_OF.get(name.rstrip("_"))
    if known is not None:
        return known
    if torch.Tag.pointwise in op.tags:
        return "elementwise"
    return "other"


def footprint(tensor: torch.Tensor) -> int:
    """Return the bytes of memory that the tensor's elements lie in: an expanded dimension counts once."""
    if tensor.is_contiguous():
        return int(tensor.nbytes)
    count = 1
    for size, stride in zip(tensor.shape, tensor.stride(), strict=True):
        if stride != 0:
            count *= size
    if tensor.numel() == 0:
        return 0
    return min(count * tensor.element_size(), int(tensor.untyped_storage().nbytes()))


def selected_bytes(target: torch.Tensor, indices: Iterable[torch.Tensor | None]) -> int:
    """Return the bytes of ``target[indices]`` for integer indices; boolean ones are bounded by the values written."""
    count, shape = 1, torch.Size([])
    given = list(indices)
    for position, size in enumerate(target.shape):
        index = given[position] if position < len(given) else None
        if index is None:
            count *= size
        elif index.dtype == torch.bool:
            return 0
        else:
            shape = torch.broadcast_shapes(shape, index.shape)  # type: ignore[no-untyped-call]
    return int(count * shape.numel() * target.element_size())


def tensors_in(values: Iterable[Any]) -> Iterator[torch.Tensor]:
    """Yield the tensors among ``values``, also those in lists and tuples."""
    for value in values:
        if isinstance(value, torch.Tensor):
            yield value
        elif isinstance(value, (list, tuple)):
            yield from tensors_in(value)
