"""How other processes reach a running VMM: HTTP over a Unix socket."""
