"""Clients on machines of their own, over Flower; the only place that imports flwr.

On the server: apps.server -> server (a run) -> engine (rounds' Engine) -> courier (who is asked,
who is waited for) -> post (Flower's messages). On a device: apps.client -> link (a local socket) ->
trainer (resident: base, text, state).
messages: what the two say to each other.
"""
