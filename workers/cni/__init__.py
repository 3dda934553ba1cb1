"""The cni worker: kube-bridge, its sysctls, and the pod CIDRs and the MTU in the CNI configuration file."""
