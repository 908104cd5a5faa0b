"""Random streams that are a pure function of (run seed, step, query, tensor name): no state to keep, nothing to
collide.

The four numbers are packed side by side into the 256-bit counter of one Philox-4x64-10 cipher (Salmon et al. 2011):
for a fixed cipher key a counter-based generator is a *bijection* of its counter, so two different keys never share a
block of random words. A hash into a seed cannot promise that, least of all torch's CPU ``manual_seed``, which keeps
32 bits of what it is given: 5 and 5 + 2^32 are one stream, and with ``seed + i`` for tensor i the directions of seeds
s and s + 1 share their noise.

Normal numbers come from torch's vectorised generator (3.4 ns each, against 7 to 10 ns from numpy), whose Mersenne
state is filled with those words: the first Philox block is part of the state, so the map from keys to states is
injective too. Signs are the words' own bits (0.3 ns each). Tensors are drawn in chunks of ``CHUNK`` elements with a
counter each, so that a part of a tensor can be drawn without the rest, on any rank, in any order.

On CUDA, signs are the same bits as on CPU; normal numbers have the same law but other values (torch draws them with
its own Philox there, and two of our words, 126 bits, become its seed and offset). Draws are float32 whatever the
parameter's dtype, so that a model's directions do not depend on the precision it is held in; for float64 parameters
the same numbers are widened.
"""

from __future__ import annotations

import hashlib
import struct
import threading
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hybridtheory.threads import each

# elements; large enough that filling a generator's state (5 us) vanishes, small enough to stay in cache
CHUNK = 1 << 17
_FOUR = struct.Struct("=4Q")
_WORDS = 624  # 32-bit words of the Mersenne Twister's state
# any constant: the key's bits are all in the counter
_CIPHER = np.array([0x9E3779B97F4A7C15, 0xF39CC0605CEDC834], dtype=np.uint64)


@dataclass(frozen=True, slots=True)
class Key:
    """Names one direction of a run: seed < 2^64, step < 2^40, query < 2^24 (all >= 0)."""

    seed: int
    step: int = 0
    query: int = 0

    def __post_init__(self) -> None:
        if not (0 <= self.seed < 1 << 64 and 0 <= self.step < 1 << 40 and 0 <= self.query < 1 << 24):
            raise ValueError(
                f"a key needs 0 <= seed < 2^64, 0 <= step < 2^40 and 0 <= query < 2^24, got seed = {self.seed}, "
                f"step = {self.step}, query = {self.query}: outside these two keys could share a stream"
            )


@lru_cache(maxsize=1 << 16)
def name_bits(name: str) -> int:
    """64 bits of a tensor's name, the same in every process (Python's ``hash`` is salted). `check_names` rules
    collisions out.
    """
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "little")


def check_names(names: Iterable[str]) -> None:
    """Raise ValueError where two different names of one block would share their stream (chance 1e-13 for a thousand
    tensors).
    """
    seen: dict[int, str] = {}
    for name in names:
        other = seen.setdefault(name_bits(name), name)
        if other != name:
            raise ValueError(
                f"the names {other!r} and {name!r} have the same 64-bit hash, so their directions would be "
                f"equal: rename one"
            )


class _Local(threading.local):
    """One cipher and one Mersenne Twister a thread, refilled at every use: making them anew costs more than a small
    tensor's draw.
    """

    def __init__(self) -> None:
        self.philox = np.random.Philox(key=_CIPHER)
        self.state: Any = self.philox.state
        self.counter = self.state["state"]["counter"].data.cast("B")
        self.state["state"]["key"] = _CIPHER
        self.state["buffer_pos"] = 4  # nothing buffered: the next word is the counter's own
        self.twister = torch.Generator()
        self.twister.manual_seed(0)
        self.template = self.twister.get_state()
        if self.template.numel() != 24 + 8 * _WORDS + 40:
            raise RuntimeError(
                f"torch {torch.__version__} keeps the CPU generator's state in an unknown layout "
                f"({self.template.numel()} bytes)"
            )
        self.mersenne = self.template.numpy().view(np.uint64)[3 : 3 + _WORDS]  # a view: writing it changes the template


_local = _Local()


def _counter(key: Key, name: str, chunk: int) -> tuple[int, int, int, int]:
    return (
        chunk << 32,
        key.seed,
        key.step << 24 | key.query,
        name_bits(name),
    )  # the low 32 bits count the blocks of one stream


def words(key: Key, name: str, n: int, chunk: int = 0) -> np.ndarray:
    """n random 64-bit words, shape (n,) uint64."""
    own = _local
    _FOUR.pack_into(own.counter, 0, *_counter(key, name, chunk))  # a quarter of the time of assigning to the array
    own.philox.state = own.state
    found: np.ndarray = own.philox.random_raw(n)
    return found


def _refill(own: _Local, twister: torch.Generator, key: Key, name: str, chunk: int) -> torch.Generator:
    if twister.device.type == "cpu":
        # Reversed, because of the Mersenne state's first word only the top bit matters: the block that carries the
        # injection goes last.
        own.mersenne[:] = words(key, name, _WORDS // 2, chunk).view(np.uint32)[::-1]
        twister.set_state(own.template)
    else:
        seed, offset = words(key, name, 2, chunk)
        # torch's device state is (seed, offset) with an offset that is a multiple of 4; the top two bits leave room
        # to count upwards
        state = np.array([seed, (offset >> np.uint64(4)) << np.uint64(2)], dtype=np.uint64)
        twister.set_state(torch.from_numpy(state.view(np.uint8).copy()))
    return twister


def generator(key: Key, name: str, chunk: int = 0, device: torch.device | str = "cpu") -> torch.Generator:
    """A private torch generator at the start of the stream of (key, name, chunk)."""
    return _refill(_local, torch.Generator(device), key, name, chunk)


def normal(key: Key, name: str, shape: Sequence[int], like: Tensor) -> Tensor:
    """N(0, 1) of the given shape on ``like``'s device; float64 for float64 tensors, else float32."""
    out = torch.empty(shape, dtype=torch.float32, device=like.device)
    n = out.numel()
    own = _local
    twister = own.twister if out.device.type == "cpu" else torch.Generator(out.device)
    if n <= CHUNK:
        out.normal_(generator=_refill(own, twister, key, name, 0))
    else:
        flat = out.view(-1)

        def draw(chunk: int) -> None:
            own = _local  # of the thread that draws
            source = own.twister if out.device.type == "cpu" else twister
            flat[chunk * CHUNK : (chunk + 1) * CHUNK].normal_(generator=_refill(own, source, key, name, chunk))

        each(draw, range(-(-n // CHUNK)), n, out.device)
    return out.double() if like.dtype == torch.float64 else out


def normal_chunk(key: Key, name: str, like: Tensor, chunk: int, out: Tensor | None = None) -> Tensor:
    """Elements [CHUNK chunk, CHUNK (chunk + 1)) of ``normal(key, name, like.shape, like)``, flat, without the rest.

    Into ``out``, a contiguous float32 tensor of their number, where it is given.
    """
    own = _local
    if out is None:
        out = torch.empty(chunk_size(like, chunk), dtype=torch.float32, device=like.device)
    twister = own.twister if out.device.type == "cpu" else torch.Generator(out.device)
    out.normal_(generator=_refill(own, twister, key, name, chunk))
    return out.double() if like.dtype == torch.float64 else out


def chunk_size(like: Tensor, chunk: int) -> int:
    """How many of ``like``'s elements its chunk of that number holds."""
    return min(CHUNK, like.numel() - chunk * CHUNK)


def coins_chunk(key: Key, name: str, like: Tensor, chunk: int, p: float) -> Tensor:
    """That chunk of ``coins(key, name, like, p)``, flat."""
    # as few bits an element as carry p; a word's bits are drawn 0.5 ns for each byte of them, and compared in a tenth of that
    bits, kind = next((b for b in _WIDTHS if (p * 2 ** b[0]).is_integer()), _WIDTHS[-1])
    n, limit = chunk_size(like, chunk), max(round(p * 2**bits), 1)
    if limit >= 2**bits:
        return torch.ones(n, dtype=torch.bool, device=like.device)
    drawn = words(key, name, -(-n * bits // 64), chunk).view(kind)[:n]
    return torch.from_numpy(drawn < kind(limit)).to(like.device)


_WIDTHS = ((8, np.uint8), (16, np.uint16), (32, np.uint32))


def coins(key: Key, name: str, like: Tensor, p: float) -> Tensor:
    """True with probability p, independently, in ``like``'s shape: exactly p where it is a multiple of 2^-16, else to 2^-32."""
    chunks = [coins_chunk(key, name, like, i, p) for i in range(-(-like.numel() // CHUNK))]
    return (torch.cat(chunks) if len(chunks) > 1 else chunks[0]).view(like.shape)


_BYTES = np.where(
    np.arange(256)[:, None] >> np.arange(8) & 1, np.float32(-1), np.float32(1)
)  # (256, 8): a byte's bits as signs


def signs(key: Key, name: str, like: Tensor) -> Tensor:
    """Independent fair signs +1.0 / -1.0 in ``like``'s shape: bit i of a chunk's words is the sign of its element i."""
    n = like.numel()
    out = torch.empty(-(-n // 64) * 64, dtype=torch.float32, device="cpu")  # whole words; the tail is cut off below
    rows = out.numpy().reshape(-1, 8)
    for chunk, start in enumerate(range(0, n, CHUNK)):
        part = rows if n <= CHUNK else rows[start // 8 : (start + CHUNK) // 8]
        # a table of bytes is three times as fast as shifting and masking words; "clip" skips a bounds check that cannot fail
        _BYTES.take(words(key, name, len(part) // 8, chunk).view(np.uint8), axis=0, out=part, mode="clip")
    u = out if n == out.numel() else out[:n]
    if like.device.type != "cpu":
        u = u.to(like.device)
    u = u.view(like.shape)
    return u.double() if like.dtype == torch.float64 else u


def integer(key: Key, name: str, below: int) -> int:
    """A uniform integer in [0, below), exact: 64-bit words above the last full multiple of ``below`` are refused."""
    last = (1 << 64) // below * below
    for word in words(key, name, 64):
        if int(word) < last:
            return int(word) % below
    raise RuntimeError("64 words in a row refused: not a random stream")


def numpy_generator(key: Key, name: str) -> np.random.Generator:
    """A numpy generator on the stream of (key, name): for permutations and resampling, not for directions."""
    philox = np.random.Philox(key=_CIPHER, counter=np.array(_counter(key, name, 0), dtype=np.uint64))
    return np.random.Generator(philox)
