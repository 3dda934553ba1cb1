"""The watcher: the one process that reads the cluster, from an API server or from a directory of manifests."""
