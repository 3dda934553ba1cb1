"""Access to the kernel: the only importers of netlink, pyroute2 and subprocess. Each driver says what is ours."""
