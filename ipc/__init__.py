"""How the worker processes talk: typed messages, one codec, ZeroMQ channels and the replica of the cluster state."""
