def tunnel_name(next_hop: str) -> str:
    """Name of the tunnel device to ``next_hop``: ``tun-`` + 11 hex digits, 15 characters, the kernel's limit.

    The digits are the first of SHA-256 over the text of the next hop without ``.`` and ``:`` (kube-router since v2.0).
    The text must be the address's canonical form, which is what ``str(ipaddress.ip_address(…))`` gives. Two next hops
    whose digits are the same share a name (21.3.0.4 and 2.13.0.4): the caller has to check the device's remote address.
    """

def legacy_tunnel_name(next_hop: str) -> str:
    """Name of the same device in kube-router v0.4 to v1.6: the text without ``.``, behind ``tun-`` or ``tun``.

    ``tun-`` if fewer than 12 characters are left, else ``tun``. Only of use to recognise a device of such a version;
    for an IPv6 next hop the result can be longer than a device name may be (15), hence no device then has it. A legacy
    name with 11 digits looks like a current one: compare with both names of the device's remote address.
    """
