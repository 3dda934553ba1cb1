# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True
"""Members of ipsets as packed bytes: read from text, compared, and written as netlink attributes.

Pure: the bytes that go to and come from the kernel, no socket. Format: ``linux/netfilter/ipset/ip_set.h``.

A packed set is one ``bytes``: a record a member, sorted as bytes, each once. So two sets are compared by one merge over
two buffers, and no object a member. A record is, by the kind of member (numbers in network order):

- ``address`` (hash:ip, hash:net): the address (4 or 16 bytes), its prefix length (1);
- ``address,port`` (hash:ip,port): the address, the protocol number (1), the port (2);
- ``port`` (bitmap:port): the port (2), whatever the family.
"""

from collections.abc import Iterable

from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize
from cpython.unicode cimport PyUnicode_AsUTF8AndSize, PyUnicode_FromStringAndSize
from libc.stdint cimport uint8_t, uint16_t
from libc.stdlib cimport free, qsort, realloc
from libc.string cimport memchr, memcmp, memcpy, memset, strlen, strncmp

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
    ATTR_PORT = 4
    ATTR_PROTO = 7
    ATTR_CADT_FLAGS = 8
    FLAG_NOMATCH = 4
    LONGEST_TEXT = 45  # of an IPv6 address (INET6_ADDRSTRLEN - 1)
    # netinet/in.h
    TCP = 6
    UDP = 17
    SCTP = 132
    # kinds of members
    ADDRESS = 0
    ADDRESS_PORT = 1
    PORT = 2


cdef struct Layout:
    int kind
    int family
    int size  # bytes of the address: 4, 16 or none
    int step  # bytes of the record


cdef struct Records:
    uint8_t* data
    size_t count
    size_t room
    size_t size  # bytes of one record


cdef int layout_of(Layout* layout, int family, str kind) except -1:
    if family != 4 and family != 6:
        raise ValueError(f"family must be 4 or 6, not {family}")
    layout.family = family
    layout.size = 4 if family == 4 else 16
    if kind == "address":
        layout.kind, layout.step = ADDRESS, layout.size + 1
    elif kind == "address,port":
        layout.kind, layout.step = ADDRESS_PORT, layout.size + 3
    elif kind == "port":
        layout.kind, layout.size, layout.step = PORT, 0, 2
    else:
        raise ValueError(f"kind must be address, address,port or port, not {kind}")
    return 0


# qsort(3) hands its comparison no context: there is one for each size of a record.
cdef int compare_2(const void* left, const void* right) noexcept nogil:
    return memcmp(left, right, 2)


cdef int compare_5(const void* left, const void* right) noexcept nogil:
    return memcmp(left, right, 5)


cdef int compare_7(const void* left, const void* right) noexcept nogil:
    return memcmp(left, right, 7)


cdef int compare_17(const void* left, const void* right) noexcept nogil:
    return memcmp(left, right, 17)


cdef int compare_19(const void* left, const void* right) noexcept nogil:
    return memcmp(left, right, 19)


cdef void sort_records(uint8_t* data, size_t count, size_t size) noexcept nogil:
    if size == 2:
        qsort(data, count, size, compare_2)
    elif size == 5:
        qsort(data, count, size, compare_5)
    elif size == 7:
        qsort(data, count, size, compare_7)
    elif size == 17:
        qsort(data, count, size, compare_17)
    else:
        qsort(data, count, size, compare_19)


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
    sort_records(records.data, records.count, size)
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


cdef int parse_number(const char* text, Py_ssize_t length, int most) noexcept nogil:
    """A decimal number without sign or leading zero; -1 when ``text`` is none, or more than ``most``."""
    cdef int value = 0
    cdef Py_ssize_t i
    if length < 1 or length > 5 or (length > 1 and text[0] == c"0"):
        return -1
    for i in range(length):
        if text[i] < c"0" or text[i] > c"9":
            return -1
        value = value * 10 + (text[i] - c"0")
    return value if value <= most else -1


cdef int parse_protocol(const char* text, Py_ssize_t length) noexcept nogil:
    """Number of a protocol, given by number or, as ipset prints those with ports, by name; -1 when it is neither."""
    cdef int number
    if length == 3 and strncmp(text, "tcp", 3) == 0:
        return TCP
    if length == 3 and strncmp(text, "udp", 3) == 0:
        return UDP
    if length == 4 and strncmp(text, "sctp", 4) == 0:
        return SCTP
    number = parse_number(text, length, 255)
    return number if number > 0 else -1


cdef bint parse_address(const char* text, Py_ssize_t length, const Layout* layout, uint8_t* record) noexcept nogil:
    cdef char[46] address
    if length < 1 or length > LONGEST_TEXT or memchr(text, 0, length) != NULL:
        return False
    memcpy(address, text, length)
    address[length] = 0
    return inet_pton(AF_INET if layout.family == 4 else AF_INET6, address, record) == 1


cdef bint parse_port(const char* text, Py_ssize_t length, uint8_t* at) noexcept nogil:
    cdef int port = parse_number(text, length, 65535)
    if port < 0:
        return False
    at[0] = <uint8_t>(port >> 8)
    at[1] = <uint8_t>(port & 0xFF)
    return True


cdef bint parse_network(const char* text, Py_ssize_t length, const Layout* layout, uint8_t* record) noexcept nogil:
    """``address`` or ``address/prefix``."""
    cdef const char* slash = <const char*>memchr(text, c"/", length)
    cdef Py_ssize_t before = length if slash == NULL else slash - text
    cdef int prefix = layout.size * 8
    if slash != NULL:
        prefix = parse_number(slash + 1, length - before - 1, prefix)
        if prefix < 0:
            return False
    if not parse_address(text, before, layout, record):
        return False
    clear_host_bits(record, layout.size, prefix)
    record[layout.size] = <uint8_t>prefix
    return True


cdef bint parse_endpoint(const char* text, Py_ssize_t length, const Layout* layout, uint8_t* record) noexcept nogil:
    """``address,protocol:port``."""
    cdef const char* comma = <const char*>memchr(text, c",", length)
    cdef const char* colon
    cdef Py_ssize_t left
    cdef int protocol
    if comma == NULL or not parse_address(text, comma - text, layout, record):
        return False
    left = length - (comma - text) - 1
    colon = <const char*>memchr(comma + 1, c":", left)
    if colon == NULL:
        return False
    protocol = parse_protocol(comma + 1, colon - comma - 1)
    if protocol < 0:
        return False
    record[layout.size] = <uint8_t>protocol
    return parse_port(colon + 1, left - (colon - comma), record + layout.size + 1)


cdef bint parse_member(const char* text, Py_ssize_t length, const Layout* layout, uint8_t* record) noexcept nogil:
    """Write the record of a member; False when ``text`` is none."""
    if layout.kind == ADDRESS:
        return parse_network(text, length, layout, record)
    if layout.kind == ADDRESS_PORT:
        return parse_endpoint(text, length, layout, record)
    return parse_port(text, length, record)


cdef str what_fits(const Layout* layout):
    if layout.kind == ADDRESS:
        return f"IPv{layout.family} address or CIDR"
    return "port" if layout.kind == PORT else f"IPv{layout.family} address,protocol:port"


cdef object record_text(const uint8_t* record, const Layout* layout):
    cdef char[46] text
    cdef str address
    cdef const uint8_t* rest = record + layout.size
    if layout.kind == PORT:
        return str(rest[0] << 8 | rest[1])
    inet_ntop(AF_INET if layout.family == 4 else AF_INET6, record, text, 46)
    address = PyUnicode_FromStringAndSize(text, strlen(text))
    if layout.kind == ADDRESS:
        return address if rest[0] == layout.size * 8 else f"{address}/{rest[0]}"
    name = "tcp" if rest[0] == TCP else "udp" if rest[0] == UDP else "sctp" if rest[0] == SCTP else str(rest[0])
    return f"{address},{name}:{rest[1] << 8 | rest[2]}"


cdef Py_ssize_t record_count(bytes packed, const Layout* layout, str name) except -1:
    """Number of records; ValueError unless the length fits, each prefix is possible and the order is strict."""
    cdef const uint8_t* data = <const uint8_t*>PyBytes_AS_STRING(packed)
    cdef Py_ssize_t step = layout.step
    cdef Py_ssize_t count = len(packed) // step
    cdef Py_ssize_t i
    if len(packed) % step != 0:
        raise ValueError(f"{name}: {len(packed)} bytes are no multiple of a record's {step}")
    for i in range(count):
        if layout.kind == ADDRESS and data[i * step + layout.size] > layout.size * 8:
            raise ValueError(f"{name}: record {i} has prefix length {data[i * step + layout.size]}")
        if i and memcmp(data + (i - 1) * step, data + i * step, step) >= 0:
            raise ValueError(f"{name}: record {i} is not above the one before it")
    return count


def pack_members(members: Iterable[str], int family, str kind="address") -> bytes:
    cdef uint8_t[19] record
    cdef Records records
    cdef Layout layout
    cdef const char* text
    cdef Py_ssize_t length = 0
    cdef object member
    layout_of(&layout, family, kind)
    memset(&records, 0, sizeof(records))
    records.size = layout.step
    if isinstance(members, (str, bytes)):
        raise TypeError("members must be an iterable of str, not one str")
    try:
        for member in members:
            if not isinstance(member, str):
                raise TypeError(f"an ipset member must be str, not {type(member).__name__}")
            text = PyUnicode_AsUTF8AndSize(member, &length)
            if not parse_member(text, length, &layout, record):
                raise ValueError(f"ipset member {member!r} is no {what_fits(&layout)}")
            append(&records, record)
        return sorted_unique(&records)
    finally:
        free(records.data)


def unpack_members(bytes packed not None, int family, str kind="address") -> list[str]:
    cdef Layout layout
    cdef const uint8_t* data = <const uint8_t*>PyBytes_AS_STRING(packed)
    cdef Py_ssize_t i
    layout_of(&layout, family, kind)
    return [record_text(data + i * layout.step, &layout) for i in range(record_count(packed, &layout, "packed"))]


def diff_members(
    bytes actual not None, bytes desired not None, int family, str kind="address"
) -> tuple[bytes, bytes]:
    cdef Layout layout
    layout_of(&layout, family, kind)
    cdef Py_ssize_t step = layout.step
    cdef Py_ssize_t have = record_count(actual, &layout, "actual")
    cdef Py_ssize_t want = record_count(desired, &layout, "desired")
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


cdef inline uint8_t* put_small(uint8_t* at, const uint8_t* value, int length, int kind) noexcept nogil:
    """An attribute of one or two bytes, padded; returns where the next one starts."""
    at = put_header(at, HEADER + length, kind)
    memset(at, 0, 4)
    memcpy(at, value, length)
    return at + 4


cdef inline Py_ssize_t entry_bytes(const Layout* layout, bint with_cidr) noexcept nogil:
    if layout.kind == PORT:
        return HEADER + 8
    return HEADER * 3 + layout.size + (16 if layout.kind == ADDRESS_PORT else 8 if with_cidr else 0)


cdef inline uint8_t* put_entry(
    uint8_t* at, const uint8_t* record, const Layout* layout, Py_ssize_t length, bint with_cidr
) noexcept nogil:
    """One IPSET_ATTR_DATA attribute of ``length`` bytes; returns where the next one starts."""
    cdef int size = layout.size
    cdef const uint8_t* rest = record + size
    at = put_header(at, length, NESTED | ATTR_DATA)
    if layout.kind == PORT:
        return put_small(at, rest, 2, NETWORK_ORDER | ATTR_PORT)
    at = put_header(at, HEADER * 2 + size, NESTED | ATTR_IP)
    at = put_header(at, HEADER + size, NETWORK_ORDER | (1 if size == 4 else 2))  # IPSET_ATTR_IPADDR_IPV4 / _IPV6
    memcpy(at, record, size)
    at += size
    if layout.kind == ADDRESS_PORT:
        at = put_small(at, rest + 1, 2, NETWORK_ORDER | ATTR_PORT)
        return put_small(at, rest, 1, ATTR_PROTO)
    return put_small(at, rest, 1, ATTR_CIDR) if with_cidr else at


cdef int check_storable(const uint8_t* data, Py_ssize_t count, const Layout* layout, bint with_cidr) except -1:
    """Refuse what the set type would refuse, or store as something else."""
    cdef const uint8_t* record = data
    cdef int size = layout.size
    cdef Py_ssize_t i
    if layout.kind != ADDRESS:
        return 0
    for i in range(count):
        if with_cidr and record[size] == 0:
            text = record_text(record, layout)
            raise ValueError(f"ipset member {text}: hash:net has no prefix length 0, use two halves")
        if not with_cidr and record[size] != size * 8:
            text = record_text(record, layout)
            raise ValueError(f"ipset member {text}: a set without prefixes holds single addresses only")
        record += layout.step
    return 0


def adt_payloads(
    bytes packed not None, int family, bint with_cidr, Py_ssize_t max_bytes=60000, str kind="address"
) -> list[bytes]:
    cdef Layout layout
    layout_of(&layout, family, kind)
    cdef Py_ssize_t count = record_count(packed, &layout, "packed")
    cdef const uint8_t* record = <const uint8_t*>PyBytes_AS_STRING(packed)
    cdef Py_ssize_t entry = entry_bytes(&layout, with_cidr)
    cdef Py_ssize_t most = (max_bytes - HEADER) // entry
    cdef Py_ssize_t part, i
    cdef list payloads = []
    cdef bytes payload
    cdef uint8_t* at
    if max_bytes > LONGEST_ATTRIBUTE or max_bytes < HEADER + entry:
        raise ValueError(f"max_bytes must be {HEADER + entry} to {<int>LONGEST_ATTRIBUTE}, not {max_bytes}")
    check_storable(record, count, &layout, with_cidr)
    while count > 0:
        part = count if count < most else most
        payload = PyBytes_FromStringAndSize(NULL, HEADER + part * entry)
        at = put_header(<uint8_t*>PyBytes_AS_STRING(payload), HEADER + part * entry, NESTED | ATTR_ADT)
        for i in range(part):
            at = put_entry(at, record, &layout, entry, with_cidr)
            record += layout.step
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


cdef int read_entry(const uint8_t* at, Py_ssize_t length, const Layout* layout, Records* records) except -1:
    """Read one IPSET_ATTR_DATA attribute; what is no part of the member (timeout, counters) is passed by."""
    cdef uint8_t[19] record
    cdef uint8_t* rest = record + layout.size
    cdef const uint8_t* end = at + length
    cdef Py_ssize_t inner
    cdef int kind
    cdef bint address = layout.kind == PORT  # whether that part has been seen, or is not looked for
    cdef bint port = layout.kind == ADDRESS
    cdef bint protocol = layout.kind != ADDRESS_PORT
    cdef bint matches = True
    if layout.kind == ADDRESS:
        rest[0] = <uint8_t>(layout.size * 8)
    at += HEADER
    while at < end:
        inner = attribute_length(at, end - at)
        kind = attribute_type(at)
        if kind == ATTR_IP and layout.kind != PORT:
            read_address(at, inner, layout.size, record)
            address = True
        elif kind == ATTR_CIDR and layout.kind == ADDRESS:
            if inner != HEADER + 1 or at[HEADER] > layout.size * 8:
                raise ValueError(f"ipset entry with a bad prefix length of {inner - HEADER} bytes")
            rest[0] = at[HEADER]
        elif kind == ATTR_PORT and layout.kind != ADDRESS and inner == HEADER + 2:
            memcpy(record + layout.step - 2, at + HEADER, 2)
            port = True
        elif kind == ATTR_PROTO and layout.kind == ADDRESS_PORT and inner == HEADER + 1:
            rest[0] = at[HEADER]
            protocol = True
        elif kind == ATTR_CADT_FLAGS and inner == HEADER + 4:
            matches = not at[HEADER + 3] & FLAG_NOMATCH  # big endian
        at += aligned(inner)
    if not (address and port and protocol):
        missing = "an address" if not address else "a port" if not port else "a protocol"
        raise ValueError(f"ipset entry without {missing}")
    if matches:
        if layout.kind == ADDRESS:
            clear_host_bits(record, layout.size, rest[0])
        append(records, record)
    return 0


def parse_adt(messages: Iterable[bytes], int family, str kind="address") -> bytes:
    cdef Layout layout
    cdef Records records
    cdef const uint8_t* at
    cdef const uint8_t* end
    cdef Py_ssize_t length
    cdef object message
    layout_of(&layout, family, kind)
    memset(&records, 0, sizeof(records))
    records.size = layout.step
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
                read_entry(at, length, &layout, &records)
                at += aligned(length)
        return sorted_unique(&records)
    finally:
        free(records.data)
