"""A dual-stack cluster of network namespaces on one machine: what the demo shows and what the end-to-end tests run on."""
