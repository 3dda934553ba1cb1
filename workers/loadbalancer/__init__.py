"""Addresses for Services of type LoadBalancer, given out by one elected agent of the cluster."""
