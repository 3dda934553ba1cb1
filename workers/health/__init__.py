"""The health worker: heartbeats in; ``/healthz``, ``/metrics`` and the answer to ``kube-routerctl status`` out."""
