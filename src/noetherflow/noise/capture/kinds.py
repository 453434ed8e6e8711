"""Functions of PyTorch by name, sorted by what their results say of the places of the entries of their arguments."""

# Functions whose results are entries of their arguments, in another order, or a constant.
MOVES = {
    "view", "view_as", "reshape", "reshape_as", "permute", "transpose", "swapaxes", "swapdims", "movedim",
    "moveaxis", "t", "adjoint", "flatten", "ravel", "unflatten", "expand", "expand_as", "broadcast_to",
    "broadcast_tensors", "squeeze", "unsqueeze", "select", "narrow", "split", "split_with_sizes", "chunk",
    "tensor_split", "hsplit", "vsplit", "dsplit", "unbind", "cat", "concat", "concatenate", "stack", "hstack",
    "vstack", "dstack", "column_stack", "roll", "flip", "fliplr", "flipud", "rot90", "repeat", "tile", "diagonal",
    "contiguous", "clone", "detach", "detach_", "__get__", "atleast_1d", "atleast_2d", "atleast_3d", "tril", "triu",
    "pad", "_pad", "unsafe_chunk", "unsafe_split",
}  # fmt: skip
# Functions that make tensors of the shape or the type of others.
FACTORIES = {
    "empty_like", "zeros_like", "ones_like", "full_like", "rand_like", "randn_like", "randint_like", "new_empty",
    "new_zeros", "new_ones", "new_full", "new_tensor", "new_empty_strided",
}  # fmt: skip
# Functions that return where entries are.
INDICES = {"nonzero", "argwhere", "where"}
# Functions that return entries of their first argument; further tensors say which.
PICKS = {
    "__getitem__", "index_select", "gather", "take_along_dim", "masked_select", "take", "repeat_interleave",
    "unfold", "as_strided",
}  # fmt: skip
# Functions that write entries of a tensor into another.
WRITES = {"__setitem__", "copy_", "index_put_", "index_put", "index_copy", "index_copy_", "scatter", "scatter_"}
# Functions that change no place.
CASTS = {
    "to", "float", "double", "half", "bfloat16", "long", "int", "bool", "short", "char", "byte", "type", "type_as",
    "cpu", "cuda", "requires_grad_", "pin_memory", "retain_grad",
}  # fmt: skip
# Functions that are linear in their tensors, if no more than one factor depends on the batch.
LINEAR = {
    "add", "sub", "subtract", "neg", "negative", "mul", "multiply", "div", "divide", "true_divide", "rsub", "sum",
    "mean", "nansum", "__add__", "__radd__", "__sub__", "__rsub__", "__mul__", "__rmul__", "__truediv__", "__neg__",
    "__iadd__", "__isub__", "__imul__", "__itruediv__", "add_", "sub_", "mul_", "div_", "positive", "__pos__",
}  # fmt: skip
# Products and quotients among these.
FACTORS = {
    "mul", "multiply", "div", "divide", "true_divide", "__mul__", "__rmul__", "__truediv__", "__imul__",
    "__itruediv__", "mul_", "div_",
}  # fmt: skip
# Functions that add entries up as they are.
ADDITIONS = {"sum", "nansum", "add", "add_", "__add__", "__radd__", "__iadd__"}
# Functions that sum over entries.
SUMS = {"sum", "mean", "nansum"}
# Functions that add entries to entries of their first argument, and how the entries are read and written.
ADDS = {"index_add": "index", "scatter_add": "scatter"}
