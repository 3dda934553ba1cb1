"""A dual-stack cluster of network namespaces on one machine: for the demo and the end-to-end tests."""
