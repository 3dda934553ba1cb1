# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True
"""Members of address ipsets as packed bytes: read from text, compared, and written as netlink attributes.

Pure: the bytes that go to and come from the kernel, no socket. Format: ``linux/netfilter/ipset/ip_set.h``.

A packed set is one ``bytes``: a record a member, its address in network order (4 or 16 bytes) and its prefix length
(1 byte), sorted as bytes, each once. So two sets are compared by one merge over two buffers, and no object a member.
"""

from collections.abc import Iterable

from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize
from cpython.unicode cimport PyUnicode_AsUTF8AndSize
from libc.stdint cimport uint8_t, uint16_t
from libc.stdlib cimport free, qsort, realloc
from libc.string cimport memchr, memcmp, memcpy, memset

cdef extern from "<arpa/inet.h>" nogil:
    int AF_INET
    int AF_INET6
    int inet_pton(int family, const char* text, void* address)
    const char* inet_ntop(int family, const void* address, char* text, unsigned int size)

cdef enum:
    # netlink attribute header: u16 length (header included), u16 type, both in host order; attributes start at
    # multiples of four bytes. linux/netlink.h
    HEADER = 4
    NESTED = 0x8000
    NETWORK_ORDER = 0x4000
    TYPE_MASK = 0x3FFF
    LONGEST_ATTRIBUTE = 0xFFFF
    # linux/netfilter/ipset/ip_set.h
    ATTR_DATA = 7
    ATTR_ADT = 8
    ATTR_IP = 1
    ATTR_CIDR = 3
    ATTR_CADT_FLAGS = 8
    FLAG_NOMATCH = 4
    LONGEST_TEXT = 45  # of an IPv6 address (INET6_ADDRSTRLEN - 1)


cdef struct Records:
    uint8_t* data
    size_t count
    size_t room
    size_t size  # bytes of one record: 5 or 17


cdef int address_bytes(int family) except -1:
    if family == 4:
        return 4
    if family == 6:
        return 16
    raise ValueError(f"family must be 4 or 6, not {family}")


cdef int compare_ipv4(const void* left, const void* right) noexcept nogil:
    return memcmp(left, right, 5)


cdef int compare_ipv6(const void* left, const void* right) noexcept nogil:
    return memcmp(left, right, 17)


cdef int append(Records* records, const uint8_t* record) except -1:
    cdef uint8_t* larger
    if records.count == records.room:
        larger = <uint8_t*>realloc(records.data, (records.room * 2 + 64) * records.size)
        if larger == NULL:
            raise MemoryError()
        records.data = larger
        records.room = records.room * 2 + 64
    memcpy(records.data + records.count * records.size, record, records.size)
    records.count += 1
    return 0


cdef bytes sorted_unique(Records* records):
    """The records as packed bytes."""
    cdef size_t i, kept = 0
    cdef size_t size = records.size
    if records.count == 0:
        return b""
    qsort(records.data, records.count, size, compare_ipv4 if size == 5 else compare_ipv6)
    for i in range(records.count):
        if kept and memcmp(records.data + (kept - 1) * size, records.data + i * size, size) == 0:
            continue
        if kept != i:
            memcpy(records.data + kept * size, records.data + i * size, size)
        kept += 1
    return PyBytes_FromStringAndSize(<const char*>records.data, kept * size)


cdef inline void clear_host_bits(uint8_t* address, int length, int prefix) noexcept nogil:
    cdef int i
    for i in range(prefix // 8, length):
        address[i] &= <uint8_t>((0xFF00 >> (prefix % 8)) & 0xFF) if i == prefix // 8 else 0


cdef bint parse_member(const char* text, Py_ssize_t length, int family, uint8_t* record) noexcept nogil:
    """Write the record of ``address`` or ``address/prefix``; False when ``text`` is neither."""
    cdef char[46] address
    cdef int size = 4 if family == 4 else 16
    cdef int prefix = size * 8
    cdef const char* slash = <const char*>memchr(text, c"/", length)
    cdef Py_ssize_t address_length = length if slash == NULL else slash - text
    cdef Py_ssize_t digits = length - address_length - 1
    cdef Py_ssize_t i
    if address_length == 0 or address_length > LONGEST_TEXT or memchr(text, 0, address_length) != NULL:
        return False
    if slash != NULL:
        if digits < 1 or digits > 3 or (digits > 1 and slash[1] == c"0"):
            return False
        prefix = 0
        for i in range(1, digits + 1):
            if slash[i] < c"0" or slash[i] > c"9":
                return False
            prefix = prefix * 10 + (slash[i] - c"0")
        if prefix > size * 8:
            return False
    memcpy(address, text, address_length)
    address[address_length] = 0
    if inet_pton(AF_INET if family == 4 else AF_INET6, address, record) != 1:
        return False
    clear_host_bits(record, size, prefix)
    record[size] = <uint8_t>prefix
    return True


cdef object record_text(const uint8_t* record, int size):
    cdef char[46] text
    cdef str address
    inet_ntop(AF_INET if size == 4 else AF_INET6, record, text, 46)
    address = (<bytes>text).decode("ascii")
    return address if record[size] == size * 8 else f"{address}/{record[size]}"


cdef Py_ssize_t record_count(bytes packed, int size, str name) except -1:
    """Number of records; ValueError unless the length fits, each prefix is possible and the order is strict."""
    cdef const uint8_t* data = <const uint8_t*>PyBytes_AS_STRING(packed)
    cdef Py_ssize_t step = size + 1
    cdef Py_ssize_t count = len(packed) // step
    cdef Py_ssize_t i
    if len(packed) % step != 0:
        raise ValueError(f"{name}: {len(packed)} bytes are no multiple of a record's {step}")
    for i in range(count):
        if data[i * step + size] > size * 8:
            raise ValueError(f"{name}: record {i} has prefix length {data[i * step + size]}")
        if i and memcmp(data + (i - 1) * step, data + i * step, step) >= 0:
            raise ValueError(f"{name}: record {i} is not above the one before it")
    return count


def pack_members(members: Iterable[str], int family) -> bytes:
    cdef uint8_t[17] record
    cdef Records records
    cdef const char* text
    cdef Py_ssize_t length = 0
    cdef object member
    memset(&records, 0, sizeof(records))
    records.size = address_bytes(family) + 1
    if isinstance(members, (str, bytes)):
        raise TypeError("members must be an iterable of str, not one str")
    try:
        for member in members:
            if not isinstance(member, str):
                raise TypeError(f"an ipset member must be str, not {type(member).__name__}")
            text = PyUnicode_AsUTF8AndSize(member, &length)
            if not parse_member(text, length, family, record):
                raise ValueError(f"ipset member {member!r} is no IPv{family} address or CIDR")
            append(&records, record)
        return sorted_unique(&records)
    finally:
        free(records.data)


def unpack_members(bytes packed not None, int family) -> list[str]:
    cdef int size = address_bytes(family)
    cdef const uint8_t* data = <const uint8_t*>PyBytes_AS_STRING(packed)
    cdef Py_ssize_t i
    return [record_text(data + i * (size + 1), size) for i in range(record_count(packed, size, "packed"))]


def diff_members(bytes actual not None, bytes desired not None, int family) -> tuple[bytes, bytes]:
    cdef int size = address_bytes(family)
    cdef Py_ssize_t step = size + 1
    cdef Py_ssize_t have = record_count(actual, size, "actual")
    cdef Py_ssize_t want = record_count(desired, size, "desired")
    cdef const uint8_t* left = <const uint8_t*>PyBytes_AS_STRING(actual)
    cdef const uint8_t* right = <const uint8_t*>PyBytes_AS_STRING(desired)
    cdef Records to_add, to_delete
    cdef Py_ssize_t i = 0
    cdef Py_ssize_t j = 0
    cdef int order
    if actual == desired:
        return b"", b""
    memset(&to_add, 0, sizeof(Records))
    memset(&to_delete, 0, sizeof(Records))
    to_add.size = to_delete.size = step
    try:
        while i < have or j < want:
            order = 1 if i == have else -1 if j == want else memcmp(left + i * step, right + j * step, step)
            if order < 0:
                append(&to_delete, left + i * step)
            elif order > 0:
                append(&to_add, right + j * step)
            i += order <= 0
            j += order >= 0
        return (
            PyBytes_FromStringAndSize(<const char*>to_add.data, to_add.count * step) if to_add.count else b"",
            PyBytes_FromStringAndSize(<const char*>to_delete.data, to_delete.count * step) if to_delete.count else b"",
        )
    finally:
        free(to_add.data)
        free(to_delete.data)


cdef inline uint8_t* put_header(uint8_t* at, size_t length, int kind) noexcept nogil:
    cdef uint16_t value = <uint16_t>length
    memcpy(at, &value, 2)
    value = <uint16_t>kind
    memcpy(at + 2, &value, 2)
    return at + HEADER


cdef inline uint8_t* put_entry(uint8_t* at, const uint8_t* record, int size, bint with_cidr) noexcept nogil:
    """One IPSET_ATTR_DATA attribute; returns where the next one starts."""
    at = put_header(at, HEADER * 3 + size + (8 if with_cidr else 0), NESTED | ATTR_DATA)
    at = put_header(at, HEADER * 2 + size, NESTED | ATTR_IP)
    at = put_header(at, HEADER + size, NETWORK_ORDER | (1 if size == 4 else 2))  # IPSET_ATTR_IPADDR_IPV4 / _IPV6
    memcpy(at, record, size)
    at += size
    if with_cidr:
        at = put_header(at, HEADER + 1, ATTR_CIDR)
        memset(at, 0, 4)
        at[0] = record[size]
        at += 4
    return at


cdef int check_storable(const uint8_t* data, Py_ssize_t count, int size, bint with_cidr) except -1:
    """Refuse what the set type would refuse, or store as something else."""
    cdef const uint8_t* record = data
    cdef Py_ssize_t i
    for i in range(count):
        if with_cidr and record[size] == 0:
            text = record_text(record, size)
            raise ValueError(f"ipset member {text}: hash:net has no prefix length 0, use two halves")
        if not with_cidr and record[size] != size * 8:
            text = record_text(record, size)
            raise ValueError(f"ipset member {text}: a set without prefixes holds single addresses only")
        record += size + 1
    return 0


def adt_payloads(bytes packed not None, int family, bint with_cidr, Py_ssize_t max_bytes=60000) -> list[bytes]:
    cdef int size = address_bytes(family)
    cdef Py_ssize_t count = record_count(packed, size, "packed")
    cdef const uint8_t* record = <const uint8_t*>PyBytes_AS_STRING(packed)
    cdef Py_ssize_t entry = HEADER * 3 + size + (8 if with_cidr else 0)
    cdef Py_ssize_t most = (max_bytes - HEADER) // entry
    cdef Py_ssize_t part, i
    cdef list payloads = []
    cdef bytes payload
    cdef uint8_t* at
    if max_bytes > LONGEST_ATTRIBUTE or max_bytes < HEADER + entry:
        raise ValueError(f"max_bytes must be {HEADER + entry} to {<int>LONGEST_ATTRIBUTE}, not {max_bytes}")
    check_storable(record, count, size, with_cidr)
    while count > 0:
        part = count if count < most else most
        payload = PyBytes_FromStringAndSize(NULL, HEADER + part * entry)
        at = put_header(<uint8_t*>PyBytes_AS_STRING(payload), HEADER + part * entry, NESTED | ATTR_ADT)
        for i in range(part):
            at = put_entry(at, record, size, with_cidr)
            record += size + 1
        payloads.append(payload)
        count -= part
    return payloads


cdef Py_ssize_t attribute_length(const uint8_t* at, Py_ssize_t left) except -1:
    """Length of the attribute at ``at`` of which ``left`` bytes are there; ValueError if it does not fit."""
    cdef uint16_t length
    if left < HEADER:
        raise ValueError(f"netlink attribute cut off: {left} bytes left")
    memcpy(&length, at, 2)
    if length < HEADER or length > left:
        raise ValueError(f"netlink attribute of {length} bytes where {left} are left")
    return length


cdef inline int attribute_type(const uint8_t* at) noexcept nogil:
    cdef uint16_t kind
    memcpy(&kind, at + 2, 2)
    return kind & TYPE_MASK


cdef inline Py_ssize_t aligned(Py_ssize_t length) noexcept nogil:
    return (length + 3) & ~<Py_ssize_t>3


cdef int read_address(const uint8_t* at, Py_ssize_t length, int size, uint8_t* record) except -1:
    """Read the address out of an IPSET_ATTR_IP attribute."""
    cdef Py_ssize_t inner = attribute_length(at + HEADER, length - HEADER)
    if attribute_type(at + HEADER) != (1 if size == 4 else 2) or inner != HEADER + size:
        raise ValueError(f"ipset entry is not of family IPv{4 if size == 4 else 6}")
    memcpy(record, at + HEADER * 2, size)
    return 0


cdef int read_entry(const uint8_t* at, Py_ssize_t length, int size, Records* records) except -1:
    """Read one IPSET_ATTR_DATA attribute; what is no part of the member (timeout, counters) is passed by."""
    cdef uint8_t[17] record
    cdef const uint8_t* end = at + length
    cdef Py_ssize_t inner
    cdef int kind
    cdef bint found = False
    cdef bint matches = True
    record[size] = <uint8_t>(size * 8)
    at += HEADER
    while at < end:
        inner = attribute_length(at, end - at)
        kind = attribute_type(at)
        if kind == ATTR_IP:
            read_address(at, inner, size, record)
            found = True
        elif kind == ATTR_CIDR:
            if inner != HEADER + 1 or at[HEADER] > size * 8:
                raise ValueError(f"ipset entry with a bad prefix length of {inner - HEADER} bytes")
            record[size] = at[HEADER]
        elif kind == ATTR_CADT_FLAGS and inner == HEADER + 4:
            matches = not at[HEADER + 3] & FLAG_NOMATCH  # big endian
        at += aligned(inner)
    if not found:
        raise ValueError("ipset entry without an address")
    if matches:
        clear_host_bits(record, size, record[size])
        append(records, record)
    return 0


def parse_adt(messages: Iterable[bytes], int family) -> bytes:
    cdef int size = address_bytes(family)
    cdef Records records
    cdef const uint8_t* at
    cdef const uint8_t* end
    cdef Py_ssize_t length
    cdef object message
    memset(&records, 0, sizeof(records))
    records.size = size + 1
    if isinstance(messages, (str, bytes)):
        raise TypeError("messages must be an iterable of bytes, not one bytes")
    try:
        for message in messages:
            if not isinstance(message, bytes):
                raise TypeError(f"a message must be bytes, not {type(message).__name__}")
            at = <const uint8_t*>PyBytes_AS_STRING(message)
            length = attribute_length(at, len(message))
            if attribute_type(at) != ATTR_ADT:
                raise ValueError(f"netlink attribute of type {attribute_type(at)} where IPSET_ATTR_ADT should be")
            end = at + length
            at += HEADER
            while at < end:
                length = attribute_length(at, end - at)
                if attribute_type(at) != ATTR_DATA:
                    raise ValueError(f"netlink attribute of type {attribute_type(at)} where IPSET_ATTR_DATA should be")
                read_entry(at, length, size, &records)
                at += aligned(length)
        return sorted_unique(&records)
    finally:
        free(records.data)
