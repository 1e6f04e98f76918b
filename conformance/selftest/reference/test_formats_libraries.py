"""Where the casts of torch and ml_dtypes differ from reference/rounding.py, as a table: a new difference fails.

Scope: CPU casts between float64, float32, float16, bfloat16 and every narrow format: all codes, all 65,536 patterns of
the 16-bit types, the midpoints of neighbouring codes and the numbers next to them for the wide ones. Torch is run on
contiguous and on strided tensors, which take different code; float16 and float32 beside ml_dtypes are numpy's own.
Expected is IEEE overflow (E2M1: saturation) and ties to even; for E8M0, for which no specification says how to round,
the nearest power of two, ties up, NaN for what has no power of two near. Of a NaN with other bits the bits are not
compared: they follow the vector width of the CPU. A pass proves nothing about other versions, or about a GPU's casts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import ml_dtypes
import numpy as np
import pytest
import torch

from conformance.selftest.reference.definitions import DEFINITIONS, with_neighbours
from reference.formats import E2M1, E8M0_NAN, FLOAT32, FORMATS, Format, Overflow, Ties
from reference.rounding import decode, decode_e8m0, encode, round_to_format

E8M0 = "float8_e8m0fnu"
#: Between 2**-127 and 2**-126, and so on; what reaches the last one is beyond the largest, 2**127.
E8M0_MIDPOINTS = 1.5 * torch.exp2(torch.arange(-127, 128).double())
OTHER_NAN = "NaN has other bits"  # how many inputs follows the vector width, so it is not counted
SOURCES = ("bfloat16", "float16", "float32", "float64")
NARROW = (*DEFINITIONS, E8M0)
Row = tuple[str, str, str, str, int]
#: Codes int64 of a source tensor in the target, or None if the library cannot.
Cast = Callable[[torch.Tensor, str], torch.Tensor | None]
_UNSIGNED = {1: torch.uint8, 2: torch.uint16, 4: torch.uint32}


def _torch_cast(source: torch.Tensor, target: str) -> torch.Tensor | None:
    dtype = getattr(torch, target, None) or getattr(torch, target + "_x2")
    try:
        cast = source.to(dtype)
    except NotImplementedError:
        return None
    return cast.view(_UNSIGNED[dtype.itemsize]).long()


def _torch_strided(source: torch.Tensor, target: str) -> torch.Tensor | None:
    return _torch_cast(source.repeat_interleave(2)[::2], target)


def _numpy_type(name: str) -> np.dtype[np.generic]:
    dtype: np.dtype[np.generic] = np.dtype(getattr(np, name, None) or getattr(ml_dtypes, name))
    return dtype


def _numpy(tensor: torch.Tensor) -> np.ndarray[tuple[int, ...], np.dtype[np.generic]]:
    if tensor.dtype == torch.bfloat16:
        return tensor.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    return tensor.numpy()


def _ml_dtypes_cast(source: torch.Tensor, target: str) -> torch.Tensor | None:
    dtype = _numpy_type(target)
    with np.errstate(all="ignore"):
        cast = _numpy(source).astype(dtype)
    return torch.from_numpy(cast.view(f"u{dtype.itemsize}").astype(np.int64))


CASTS: dict[str, tuple[Cast, ...]] = {"torch": (_torch_cast, _torch_strided), "ml_dtypes": (_ml_dtypes_cast,)}


def _inputs(source: str, midpoints: torch.Tensor) -> torch.Tensor:
    """Every pattern of a 16-bit source; of a wide one every bfloat16 and the midpoints with their neighbours."""
    patterns = torch.arange(-32768, 32768).to(torch.int16)
    if source in ("bfloat16", "float16"):
        return patterns.view(getattr(torch, source))
    dtype = getattr(torch, source)
    near = with_neighbours(midpoints[midpoints <= torch.finfo(dtype).max].to(dtype))
    return torch.cat([patterns.view(torch.bfloat16).to(dtype), near])


def _ours(value: torch.Tensor, to: Format, *, saturate: bool = False, ties: Ties = Ties.EVEN) -> torch.Tensor:
    """Our codes; E2M1 always saturates, and -1 is no code of its own for the NaN that it lacks."""
    overflow = Overflow.SATURATE if saturate or to is E2M1 else Overflow.IEEE
    encoded = ~value.isnan() if to is E2M1 else torch.ones_like(value, dtype=torch.bool)
    codes = torch.full(value.shape, -1)
    codes[encoded] = encode(value[encoded], to, overflow=overflow, ties=ties)
    return codes


def _our_e8m0(value: torch.Tensor) -> torch.Tensor:
    """Codes by search among the numbers halfway between powers of two."""
    nearest = torch.searchsorted(E8M0_MIDPOINTS, value.abs(), right=True)
    return torch.where(~value.isfinite() | (value < 0), E8M0_NAN, nearest)


def _told_apart(classes: dict[str, torch.Tensor]) -> Iterator[tuple[str, int]]:
    """Sizes of the classes, each input in the first class that holds it, or else in ``other``."""
    left = torch.ones_like(next(iter(classes.values())))
    for what, where in (classes | {"other": left}).items():
        if count := int((left & where).sum()):
            yield what, 0 if what == OTHER_NAN else count
        left = left & ~where


def _differences(value: torch.Tensor, got: torch.Tensor, to: Format) -> Iterator[tuple[str, int]]:
    """What a cast of float64 ``value`` that gave codes ``got`` does differently, with the number of inputs."""
    saturated, read, finite = _ours(value, to, saturate=True), decode(got, to), value.isfinite()
    return _told_apart(
        {
            OTHER_NAN: value.isnan() & read.isnan(),
            "NaN becomes 0 with the other sign": value.isnan() & (read == 0) & (read.signbit() != value.signbit()),
            "rounds to float32 first": finite & (got == _ours(round_to_format(value, FLOAT32), to)),
            "overflow saturates": finite & (_ours(value, to) != saturated) & (got == saturated),
            "infinity saturates": value.isinf() & (got == saturated),
            "ties go away from zero": finite & (got == _ours(value, to, ties=Ties.AWAY)),
            "truncates": finite & (got == _ours(value, to, ties=Ties.TRUNCATE)),
        },
    )


def _e8m0_differences(value: torch.Tensor, got: torch.Tensor) -> Iterator[tuple[str, int]]:
    """The same for E8M0."""
    size = value.abs()
    nearest = torch.searchsorted(E8M0_MIDPOINTS, size, right=True)
    single = torch.searchsorted(E8M0_MIDPOINTS, size.float().double(), right=True)
    negative = (value < 0) & value.isfinite()
    lowest = (size > 2.0**-127) & (size < 1.5 * 2.0**-127)
    return _told_apart(
        {
            "zero becomes NaN": (value == 0) & (got == E8M0_NAN),
            "the sign is dropped": negative & (got == nearest),
            "rounds to float32 first": (value > 0) & (got == single),
            "rounds to float32 first and drops the sign": negative & (got == single),
            "the lowest binade rounds up": (value > 0) & lowest & (got == 1),
            "the lowest binade rounds up and the sign is dropped": negative & lowest & (got == 1),
        },
    )


def _midpoints(target: str) -> torch.Tensor:
    if target == E8M0:
        return E8M0_MIDPOINTS
    if target == "float32":  # some: the 25 bits of a bfloat16 midpoint with a last one added
        return DEFINITIONS["bfloat16"].midpoints * (1 + 2.0**-24)
    return DEFINITIONS[target].midpoints


def _pairs() -> Iterator[tuple[str, str]]:
    """Sources and targets of every cast that is run."""
    yield from ((source, target) for target in NARROW for source in SOURCES if source != target)
    yield "float64", "float32"


def encoding_differences() -> set[Row]:
    """(library, target, what it does, source, number of inputs) wherever a library's cast is not ours."""
    rows: set[Row] = set()
    for source, target in _pairs():
        tensor = _inputs(source, _midpoints(target))
        value = tensor.double()
        want = _our_e8m0(value) if target == E8M0 else _ours(value, FORMATS[target])
        for library, casts in CASTS.items():
            for codes in (cast(tensor, target) for cast in casts):
                if codes is None:
                    rows.add((library, target, "is not implemented", source, 0))
                    continue
                at = codes != want
                some = value[at], codes[at]
                found = _e8m0_differences(*some) if target == E8M0 else _differences(*some, FORMATS[target])
                rows.update((library, target, what, source, count) for what, count in found)
    return rows


def decoding_differences() -> set[tuple[str, str, str]]:
    """(library, source, target) wherever a library reads a code as another value than we do."""
    rows: set[tuple[str, str, str]] = set()
    for source, target in ((s, t) for s in NARROW for t in ("float32", "float64")):
        codes = torch.arange(256 if source == E8M0 else 2 ** FORMATS[source].bits)
        want = decode_e8m0(codes) if source == E8M0 else decode(codes, FORMATS[source])
        width = torch.uint16 if len(codes) > 256 else torch.uint8
        with np.errstate(all="ignore"):
            read = {"ml_dtypes": torch.from_numpy(_numpy(codes.to(width)).view(_numpy_type(source)).astype(target))}
        if source != E2M1.name:  # torch has a type for pairs of them and converts it to nothing
            read["torch"] = codes.to(width).view(getattr(torch, source)).to(getattr(torch, target))
        for library, value in read.items():
            got = value.double()
            same = (got == want) & (got.signbit() == want.signbit()) | got.isnan() & want.isnan()
            if not bool(same.all()):
                rows.add((library, source, target))
    return rows


def _sources(*counts: int) -> dict[str, int]:
    return dict(zip(SOURCES, counts, strict=True))


#: (library, target): what the cast does, by source the number of inputs it does it to.
DIFFERENCES: dict[tuple[str, str], dict[str, dict[str, int]]] = {
    ("torch", "float32"): {OTHER_NAN: {"float64": 0}},
    ("torch", "bfloat16"): {
        OTHER_NAN: {"float16": 0, "float32": 0, "float64": 0},
        "rounds to float32 first": {"float64": 65280},
    },
    ("torch", "float16"): {
        OTHER_NAN: {"bfloat16": 0, "float32": 0, "float64": 0},
        "rounds to float32 first": {"float64": 63488},
    },
    ("torch", "float8_e4m3fn"): {"rounds to float32 first": {"float64": 254}},
    ("torch", "float8_e4m3fnuz"): {"rounds to float32 first": {"float64": 256}},
    ("torch", "float8_e5m2"): {"rounds to float32 first": {"float64": 248}},
    ("torch", "float8_e5m2fnuz"): {"rounds to float32 first": {"float64": 256}},
    ("torch", "float4_e2m1fn"): {"is not implemented": _sources(0, 0, 0, 0)},
    ("torch", E8M0): {
        "the sign is dropped": _sources(32544, 31743, 33306, 33052),
        "rounds to float32 first": {"float64": 255},
        "rounds to float32 first and drops the sign": {"float64": 254},
        "the lowest binade rounds up": {"bfloat16": 31, "float32": 32, "float64": 31},
        "the lowest binade rounds up and the sign is dropped": {"bfloat16": 31, "float32": 32, "float64": 31},
    },
    ("ml_dtypes", "float32"): {OTHER_NAN: {"float64": 0}},
    ("ml_dtypes", "float16"): {OTHER_NAN: {"float32": 0, "float64": 0}},
    ("ml_dtypes", "bfloat16"): {"rounds to float32 first": {"float64": 65280}},
    ("ml_dtypes", "float8_e4m3fn"): {"rounds to float32 first": {"float64": 254}},
    ("ml_dtypes", "float8_e4m3fnuz"): {"rounds to float32 first": {"float64": 256}},
    ("ml_dtypes", "float8_e5m2"): {
        OTHER_NAN: _sources(0, 0, 0, 0),
        "rounds to float32 first": {"float64": 248},
    },
    ("ml_dtypes", "float8_e5m2fnuz"): {"rounds to float32 first": {"float64": 256}},
    ("ml_dtypes", "float4_e2m1fn"): {
        "NaN becomes 0 with the other sign": _sources(254, 2046, 254, 254),
        "rounds to float32 first": {"float64": 14},
    },
    ("ml_dtypes", E8M0): {
        "zero becomes NaN": _sources(2, 2, 2, 2),
        "rounds to float32 first": {"float64": 255},
        "the lowest binade rounds up": {"bfloat16": 31, "float32": 32, "float64": 31},
    },
}
#: Saturation of torch's E4M3FN came with pytorch/pytorch#178817 (April 2026); before, overflow was NaN as it is here.
SATURATION = {
    ("torch", "float8_e4m3fn"): {
        "overflow saturates": _sources(30510, 14718, 30512, 30510),
        "infinity saturates": _sources(2, 2, 2, 2),
    },
}


def _rows(table: dict[tuple[str, str], dict[str, dict[str, int]]]) -> set[Row]:
    return {
        (library, target, what, source, count)
        for (library, target), entries in table.items()
        for what, counts in entries.items()
        for source, count in counts.items()
    }


def test_casts_differ_exactly_where_recorded() -> None:
    found, recorded, saturation = encoding_differences(), _rows(DIFFERENCES), _rows(SATURATION)
    expected = recorded | saturation if found & saturation else recorded
    new, gone = sorted(found - expected), sorted(expected - found)
    recorded_with = f"torch {torch.__version__} and ml_dtypes {ml_dtypes.__version__}; recorded with 2.13.0 and 0.6.0"
    assert (new, gone) == ([], []), recorded_with


def test_codes_are_read_alike() -> None:
    assert decoding_differences() == set()


@pytest.mark.parametrize("code", [0, 1, 0x7F, 0xFF])
def test_torch_reads_no_e2m1(code: int) -> None:
    pair = torch.tensor([code], dtype=torch.uint8).view(torch.float4_e2m1fn_x2)
    with pytest.raises(NotImplementedError):
        pair.float()
