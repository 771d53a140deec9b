"""The order in which a corpus is read: a shuffle that is computed, not stored.

A shuffled list of N rows needs N numbers of memory on every rank, and a state to save. A *pseudo-random permutation*
needs neither: it is a formula that sends each index to its own place, chosen by a key. So the row that training
reads at step t under seed s is simply a function of (s, t), a resumed run needs no state, and every rank, in every
layout, agrees without a message.

The formula is a Feistel network, the construction of block ciphers (Luby and Rackoff, 1988: four rounds of a random
function give a pseudo-random permutation). Write the index as two digits (left, right). A round adds to one digit a
hash of the other. However wild the hash, the round can be undone by subtracting it, so the network is a bijection.
The digits live in [0, a) and [0, b) with a·b just above N; an index that leaves [0, N) is sent through again until
it lands inside (*cycle walking*), which keeps the whole a bijection of [0, N): on its cycle, each index of [0, N)
goes to the next such index.
"""

from __future__ import annotations

from math import isqrt

ROUNDS = 6  # of each digit; two would do by Luby and Rackoff, the others pay for a cheap hash and small domains
_MASK = (1 << 64) - 1


def mix(*values: int) -> int:
    """A well-spread 64-bit hash of integers (splitmix64's finaliser, folded over the values)."""
    state = 0
    for value in values:
        state = (state ^ value) + 0x9E3779B97F4A7C15 & _MASK
        state = (state ^ state >> 30) * 0xBF58476D1CE4E5B9 & _MASK
        state = (state ^ state >> 27) * 0x94D049BB133111EB & _MASK
        state ^= state >> 31
    return state


def permute(index: int, size: int, key: int) -> int:
    """Where `index` goes in the pseudo-random permutation of [0, size) that `key` names.

    For a fixed size and key, distinct indices have distinct images. Costs some microseconds and no memory.
    Raises ValueError unless 0 ≤ index < size.
    """
    if not 0 <= index < size:
        raise ValueError(f"index {index} is outside [0, {size}); take it modulo the size, and count the epochs")
    a = isqrt(size - 1) + 1
    b = -(-size // a)
    while True:
        left, right = divmod(index, b)
        for round_ in range(ROUNDS):
            left = (left + mix(key, 2 * round_, right)) % a
            right = (right + mix(key, 2 * round_ + 1, left)) % b
        index = left * b + right
        if index < size:
            return index
