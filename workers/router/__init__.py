"""The router worker: BGP through gobgpd, and what its routes need in the kernel."""
