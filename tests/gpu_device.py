"""A kind of device whose tensors keep their values on the CPU, to walk on as on a GPU.

Whatever mixes devices fails, as on a GPU; what waits for a value or takes a large product in
float64 is noted with where it was asked. Values are true ones, so results can be compared with the
CPU's. A pytest plugin (`-p gpu_device`), since torch must be changed before dynslice is imported.
"""

import sys
from functools import partial

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

torch.inference_mode = torch.no_grad  # the tensors of the former cannot be wrapped
_setup_privateuseone_for_python_backend("gpu")
GPU, CPU = torch.device("gpu", 0), torch.device("cpu")
aten = torch.ops.aten
# A copy between devices, and an index, may name both; all other operations need one.
MAY_MIX = (aten.copy_.default, aten._copy_from.default, aten.index.Tensor, aten.index_put_.default)
# What waits for the GPU to tell a value, or how many there are.
ASKS = ("is_nonzero", "_local_scalar_dense", "equal", "allclose", "nonzero", "masked_select")
PRODUCTS = ("mm", "addmm", "bmm", "baddbmm", "matmul", "linear")


class OnGpu(torch.Tensor):
    """A tensor that is on the GPU by its type, and on the CPU inside."""

    @staticmethod
    def __new__(cls, inside, requires_grad=False):
        inside = inside.inside if isinstance(inside, OnGpu) else inside
        return torch.Tensor._make_wrapper_subclass(
            cls,
            inside.shape,
            strides=inside.stride(),
            storage_offset=inside.storage_offset(),
            dtype=inside.dtype,
            device=GPU,
            dispatch_sizes_strides_policy="sizes",
        )

    def __init__(self, inside, requires_grad=False):
        self.inside = inside.inside if isinstance(inside, OnGpu) else inside

    @classmethod
    def __torch_dispatch__(cls, function, types, arguments=(), options=None):
        return _run(function, arguments, options or {}, Notes())

    def tolist(self):
        return self.cpu().tolist()

    __torch_function__ = torch._C._disabled_torch_function_impl


class Notes:
    """What waited for a value, and products in float64: by the functions that asked for them."""

    def __init__(self):
        self.waits, self.large = [], []


_TENSOR = torch.tensor  # copies to a device in a way that no mode sees


def _tensor(data, device=None, **options):
    if device is None or torch.device(device).type != GPU.type:
        return _TENSOR(data, device=device, **options)
    return _TENSOR(data, **options).to(device)


class Walk(TorchDispatchMode):
    """Runs each operation on the CPU, and notes what a GPU would not like."""

    def __init__(self):
        super().__init__()
        self.notes = Notes()

    def __enter__(self):
        torch.tensor = _tensor
        return super().__enter__()

    def __exit__(self, *reason):
        torch.tensor = _TENSOR
        return super().__exit__(*reason)

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        return _run(function, arguments, options or {}, self.notes)


def _run(function, arguments, options, notes):
    leaves = tree_leaves((arguments, options))
    given = [x for x in leaves if isinstance(x, torch.Tensor)]
    on_gpu = [x for x in given if isinstance(x, OnGpu)]
    asked = [x.type for x in leaves if isinstance(x, torch.device)]
    to_gpu = GPU.type in asked or (on_gpu and not asked)
    if function is aten.copy_.default:
        to_gpu = isinstance(given[0], OnGpu)
    name = function._schema.name.removeprefix("aten::").rstrip("_")
    if on_gpu and (name in ASKS or not (to_gpu or "meta" in asked)):
        notes.waits.append(_asked_for())
    is_strict = on_gpu and not asked and function not in MAY_MIX
    if is_strict and any(not isinstance(x, OnGpu) and x.dim() for x in given):
        raise RuntimeError(f"{function}: all tensors must be on one device, not {GPU} and cpu")
    inside = tree_map_only(OnGpu, lambda x: x.inside, (arguments, options))
    to_cpu = partial(tree_map_only, torch.device, lambda x: CPU if x.type == GPU.type else x)
    arguments, options = to_cpu(inside)
    made, known = function(*arguments, **options), {id(x.inside): x for x in on_gpu}
    if given and bool(on_gpu) != bool(to_gpu):  # a copy from one device to the other
        made = tree_map_only(torch.Tensor, torch.clone, made)
    if not to_gpu:
        return made
    made = tree_map_only(torch.Tensor, lambda x: known[id(x)] if id(x) in known else OnGpu(x), made)
    if name in PRODUCTS and made.dtype == torch.float64:
        notes.large.append((tuple(made.shape), _asked_for()))
    return made


def _asked_for():
    """The functions of dynslice that are running, innermost first, and the library inside them."""
    names, frame, library = [], sys._getframe(2), ""
    while frame is not None:
        file = frame.f_code.co_filename
        if "dynslice" in file:
            names.append(frame.f_code.co_name)
        elif not names and "/transformers/" in file:
            library = "transformers"
        frame = frame.f_back
    return (library, *names)
