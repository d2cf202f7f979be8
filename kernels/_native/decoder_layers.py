"""All layers of a decoder over few tokens in one call. See kernels.decoder_layers."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from itertools import chain
from typing import Any, NamedTuple

import torch

from kernels._native.checks import is_like, misfit
from kernels._native.library import POINTER, REAL, SIZE, functions
from kernels._native.limits import MAX_ROWS
from kernels.halved_matrix import HalvedMatrix
from kernels.quantised_matrix import Int8Matrix

_DECODER_LAYERS = functions("decoder_layers", *[POINTER] * 8, returns=SIZE, takes_long=True)


class _Matrix(ctypes.Structure):
    _fields_ = [(name, POINTER) for name in ("weight", "half", "bias", "scales")] + [
        ("columns", SIZE),
        ("inputs", SIZE),
    ]


class _Layer(ctypes.Structure):
    _fields_ = [
        *((name, POINTER) for name in ("input_norm", "qk_norm", "post_norm")),
        *((name, _Matrix) for name in ("qkv", "o", "gate_up", "down")),
        ("window", SIZE),
    ]


class _Sizes(ctypes.Structure):
    _fields_ = [
        *((name, SIZE) for name in ("layers", "hidden", "heads", "kv_heads", "dim", "inner")),
        ("eps", REAL),
        ("scale", REAL),
    ]


class _Step(ctypes.Structure):
    _fields_ = [
        *((name, POINTER) for name in ("cos", "signed_sin", "slots", "page_table", "windows")),
        *((name, SIZE) for name in ("tokens", "sequences", "table_stride", "num_pages", "page_size", "threads")),
    ]


Matrix = torch.Tensor | HalvedMatrix | Int8Matrix


class _Caches(NamedTuple):
    """The keys and values of the layers in turn, and pointers to them."""

    planes: tuple[torch.Tensor, ...]
    pointers: Any
    shape: tuple[int, ...]

    def are(self, caches: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> bool:
        """Whether these are the same tensors; a list may have been given others since."""
        if 2 * len(caches) != len(self.planes):
            return False
        return all(a is b for a, b in zip(self.planes, chain.from_iterable(caches), strict=True))


class Layers:
    """What the C path reads of layers that are all of one size; whoever holds it holds the tensors too."""

    def __init__(self, count: int, *, heads: int, kv_heads: int, dim: int, inner: int, eps: float) -> None:
        self._layers = (_Layer * count)()
        self._count = 0
        self._sizes = _Sizes(layers=count, heads=heads, kv_heads=kv_heads, dim=dim, inner=inner, eps=eps)
        self._sizes.scale = dim**-0.5
        self._held: list[object] = []
        self._caches = _Caches((), (POINTER * 0)(), ())
        self.dtype = torch.float32

    def add(
        self, *, norms: tuple[torch.Tensor, torch.Tensor], qk_norm: torch.Tensor | None, qkv: Matrix,
        qkv_bias: torch.Tensor | None, o: Matrix, o_bias: torch.Tensor | None, gate_up: Matrix, down: Matrix,
        window: int,
    ) -> None:  # fmt: skip
        """The next layer. Raises ValueError where a tensor is not of the sizes, or not of the first layer's dtype."""
        sizes, layer = self._sizes, self._layers[self._count]
        if not self._count:
            self.dtype, sizes.hidden = norms[0].dtype, norms[0].shape[0]
        width, mixed = sizes.hidden, sizes.heads * sizes.dim
        rotated = sizes.heads + sizes.kv_heads
        fits = all(is_like(norm, self.dtype, width) for norm in norms)
        fits &= qk_norm is None or is_like(qk_norm, self.dtype, rotated, sizes.dim)
        if not fits:
            raise misfit("decoder_layers", input_norm=norms[0], post_norm=norms[1], qk_norm=qk_norm)
        layer.input_norm, layer.post_norm = norms[0].data_ptr(), norms[1].data_ptr()
        layer.qk_norm = None if qk_norm is None else qk_norm.data_ptr()
        layer.qkv = self._matrix(qkv, qkv_bias, (rotated + sizes.kv_heads) * sizes.dim, width)
        layer.o = self._matrix(o, o_bias, width, mixed)
        layer.gate_up = self._matrix(gate_up, None, 2 * sizes.inner, width)
        layer.down = self._matrix(down, None, width, sizes.inner)
        layer.window = window
        self._held += [norms, qk_norm]
        self._count += 1

    def _matrix(self, weight: Matrix, bias: torch.Tensor | None, columns: int, inputs: int) -> _Matrix:
        full, half, scales = weight, None, None
        dtype = self.dtype
        if isinstance(weight, HalvedMatrix):
            full, half = weight.full, weight.half
        elif isinstance(weight, Int8Matrix):
            full, scales, dtype = weight.numbers, weight.scales, torch.int8
        assert isinstance(full, torch.Tensor)
        fits = is_like(full, dtype, columns, inputs) and (bias is None or is_like(bias, self.dtype, columns))
        fits &= half is None or (self.dtype == torch.float32 and is_like(half, torch.bfloat16, columns, inputs))
        if not fits or not (scales is None or is_like(scales, torch.float32, columns)):
            raise misfit("decoder_layers", weight=full, half=half, scales=scales, bias=bias)
        self._held += [full, half, scales, bias]
        pointers = (None if tensor is None else tensor.data_ptr() for tensor in (full, half, bias, scales))
        return _Matrix(*pointers, columns, inputs)

    def _checked(self, caches: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> _Caches:
        """Pointers to the planes of all layers. Raises ValueError where they are not of the sizes."""
        planes = tuple(plane for cache in caches for plane in cache)
        shape = tuple(planes[0].shape)
        sizes = (*shape[:2], self._sizes.kv_heads, self._sizes.dim)
        if len(caches) != self._count or not all(is_like(plane, self.dtype, *sizes) for plane in planes):
            raise misfit("decoder_layers", **{f"cache_{i}": plane for i, plane in enumerate(planes)})
        return _Caches(planes, (POINTER * len(planes))(*(plane.data_ptr() for plane in planes)), shape)

    def forward(
        self, hidden: torch.Tensor, final_norm: torch.Tensor, cos: torch.Tensor, signed_sin: torch.Tensor,
        caches: Sequence[tuple[torch.Tensor, torch.Tensor]], slots: torch.Tensor, page_table: torch.Tensor,
        windows: torch.Tensor, threads: int,
    ) -> torch.Tensor:  # fmt: skip
        """hidden [T, H] (used up), T <= MAX_ROWS; final_norm [H]; cos, signed_sin [T, 1, D] float32; slots [T],
        page_table [S, P] and windows [3, S] int64, which cover all T rows. Returns [T, H], normed. Raises ValueError on
        others and where a window or its pages are not there, IndexError for a slot that is not.
        """
        tokens, sizes = hidden.shape[0], self._sizes
        kept = self._caches
        if not kept.are(caches):
            kept = self._caches = self._checked(caches)
        cos, signed_sin, slots = cos.contiguous(), signed_sin.contiguous(), slots.contiguous()
        fits = 0 < tokens <= MAX_ROWS and is_like(hidden, self.dtype, tokens, sizes.hidden)
        fits &= is_like(final_norm, self.dtype, sizes.hidden) and is_like(slots, torch.int64, tokens)
        fits &= all(is_like(table, torch.float32, tokens, 1, sizes.dim) for table in (cos, signed_sin))
        fits &= page_table.dim() == 2 and is_like(page_table, torch.int64, *page_table.shape)
        if not fits or not is_like(windows, torch.int64, 3, len(page_table)):
            raise misfit(
                "decoder_layers", hidden=hidden, final_norm=final_norm, cos=cos, signed_sin=signed_sin, slots=slots,
                page_table=page_table, windows=windows,
            )  # fmt: skip
        step = _Step(
            cos.data_ptr(), signed_sin.data_ptr(), slots.data_ptr(), page_table.data_ptr(), windows.data_ptr(),
            tokens, len(page_table), page_table.shape[1], kept.shape[0], kept.shape[1],
            threads,
        )  # fmt: skip
        heads = 3 * (sizes.heads + sizes.kv_heads)
        scratch = torch.empty(tokens * (2 * sizes.hidden + heads * sizes.dim + 3 * sizes.inner), dtype=self.dtype)
        out = torch.empty_like(hidden)
        refused = _DECODER_LAYERS[self.dtype](
            self._layers, ctypes.byref(sizes), ctypes.byref(step), kept.pointers, final_norm.data_ptr(),
            hidden.data_ptr(), out.data_ptr(), scratch.data_ptr(),
        )  # fmt: skip
        if 0 <= refused < tokens:
            slot, room = int(slots[refused]), kept.shape[0] * kept.shape[1]
            raise IndexError(f"decoder_layers: slot {slot} is none of the cache's {room}")
        if refused >= tokens:
            asked = windows[:, refused - tokens].tolist()
            raise ValueError(
                f"decoder_layers: sequence {refused - tokens} has the windows {asked} (queries, keys, first row) and "
                f"the page_table {page_table[refused - tokens].tolist()}, for {tokens} rows and "
                f"{kept.shape[0]} pages of {kept.shape[1]}"
            )
        return out
