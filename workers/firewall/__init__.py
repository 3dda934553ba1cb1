"""The firewall worker: NetworkPolicy on this node, by iptables and ipset or by nftables."""
