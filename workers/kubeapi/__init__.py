"""The way to the Kubernetes API: credentials, connections, answers; for the workers that speak with it."""
