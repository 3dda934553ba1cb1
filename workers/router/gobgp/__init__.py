"""How the router worker speaks to gobgpd: the only importer of grpc."""
