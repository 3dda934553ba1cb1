# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True
"""Names of tunnel devices, as kube-router gives them.

Pure: text in, text out; nothing is looked up.

SHA-256 (FIPS 180-4) is written out here rather than taken from hashlib for one measured reason: importing hashlib maps
OpenSSL's libcrypto, 2-4 MB in a worker that needs it for nothing else. As a name is one 64-byte block, the call is also
about twice as fast as hashlib's constructor; for long input hashlib would win. The oracle in the tests *is* hashlib.
"""

from libc.stdint cimport uint8_t, uint32_t, uint64_t
from libc.string cimport memcpy, memset

cdef uint32_t[64] ROUND_CONSTANTS = [
    0x428a2f98, 0x71374491, 0xb5c0fbcf, 0xe9b5dba5, 0x3956c25b, 0x59f111f1, 0x923f82a4, 0xab1c5ed5,
    0xd807aa98, 0x12835b01, 0x243185be, 0x550c7dc3, 0x72be5d74, 0x80deb1fe, 0x9bdc06a7, 0xc19bf174,
    0xe49b69c1, 0xefbe4786, 0x0fc19dc6, 0x240ca1cc, 0x2de92c6f, 0x4a7484aa, 0x5cb0a9dc, 0x76f988da,
    0x983e5152, 0xa831c66d, 0xb00327c8, 0xbf597fc7, 0xc6e00bf3, 0xd5a79147, 0x06ca6351, 0x14292967,
    0x27b70a85, 0x2e1b2138, 0x4d2c6dfc, 0x53380d13, 0x650a7354, 0x766a0abb, 0x81c2c92e, 0x92722c85,
    0xa2bfe8a1, 0xa81a664b, 0xc24b8b70, 0xc76c51a3, 0xd192e819, 0xd6990624, 0xf40e3585, 0x106aa070,
    0x19a4c116, 0x1e376c08, 0x2748774c, 0x34b0bcb5, 0x391c0cb3, 0x4ed8aa4a, 0x5b9cca4f, 0x682e6ff3,
    0x748f82ee, 0x78a5636f, 0x84c87814, 0x8cc70208, 0x90befffa, 0xa4506ceb, 0xbef9a3f7, 0xc67178f2,
]
cdef const char* HEX_DIGITS = "0123456789abcdef"


cdef inline uint32_t rotate_right(uint32_t value, int count) noexcept nogil:
    return (value >> count) | (value << (32 - count))


cdef void compress(uint32_t* state, const uint8_t* block) noexcept nogil:
    """Mix one 64-byte block into the eight state words."""
    cdef uint32_t[64] w
    cdef uint32_t a, b, c, d, e, f, g, h, first, second
    cdef int i
    for i in range(16):
        w[i] = (<uint32_t>block[4 * i] << 24) | (<uint32_t>block[4 * i + 1] << 16) \
            | (<uint32_t>block[4 * i + 2] << 8) | <uint32_t>block[4 * i + 3]
    for i in range(16, 64):
        first = rotate_right(w[i - 15], 7) ^ rotate_right(w[i - 15], 18) ^ (w[i - 15] >> 3)
        second = rotate_right(w[i - 2], 17) ^ rotate_right(w[i - 2], 19) ^ (w[i - 2] >> 10)
        w[i] = w[i - 16] + first + w[i - 7] + second
    a, b, c, d = state[0], state[1], state[2], state[3]
    e, f, g, h = state[4], state[5], state[6], state[7]
    for i in range(64):
        first = h + (rotate_right(e, 6) ^ rotate_right(e, 11) ^ rotate_right(e, 25)) \
            + ((e & f) ^ (~e & g)) + ROUND_CONSTANTS[i] + w[i]
        second = (rotate_right(a, 2) ^ rotate_right(a, 13) ^ rotate_right(a, 22)) + ((a & b) ^ (a & c) ^ (b & c))
        h = g
        g = f
        f = e
        e = d + first
        d = c
        c = b
        b = a
        a = first + second
    state[0] += a
    state[1] += b
    state[2] += c
    state[3] += d
    state[4] += e
    state[5] += f
    state[6] += g
    state[7] += h


cdef void sha256_first_words(const uint8_t* data, uint64_t length, uint32_t* state) noexcept nogil:
    """SHA-256 of ``data``; ``state`` receives the digest as eight big-endian words."""
    cdef uint8_t[128] tail
    cdef uint64_t done = 0
    cdef uint64_t bits = length * 8
    cdef uint64_t rest, padded
    cdef int i
    state[0] = 0x6a09e667
    state[1] = 0xbb67ae85
    state[2] = 0x3c6ef372
    state[3] = 0xa54ff53a
    state[4] = 0x510e527f
    state[5] = 0x9b05688c
    state[6] = 0x1f83d9ab
    state[7] = 0x5be0cd19
    while length - done >= 64:
        compress(state, data + done)
        done += 64
    rest = length - done
    memset(tail, 0, 128)
    memcpy(tail, data + done, rest)
    tail[rest] = 0x80
    padded = 64 if rest < 56 else 128
    for i in range(8):
        tail[padded - 1 - i] = <uint8_t>((bits >> (8 * i)) & 0xFF)
    compress(state, tail)
    if padded == 128:
        compress(state, &tail[64])


def tunnel_name(str next_hop not None) -> str:
    cdef bytes text = next_hop.replace(".", "").replace(":", "").encode()
    cdef const char* data = text
    cdef uint32_t[8] state
    cdef char[15] name
    cdef int i
    sha256_first_words(<const uint8_t*>data, <uint64_t>len(text), state)
    memcpy(name, b"tun-", 4)
    for i in range(11):
        name[4 + i] = HEX_DIGITS[(state[i // 8] >> (28 - 4 * (i % 8))) & 0xF]
    return name[:15].decode("ascii")


def legacy_tunnel_name(str next_hop not None) -> str:
    cdef str digits = next_hop.replace(".", "")
    return ("tun-" if len(digits) < 12 else "tun") + digits
