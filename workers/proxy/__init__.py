"""The service proxy: Services and their endpoints in, translation of packets in the kernel out."""
