"""This room carries rounds to clients on machines of their own, over Flower. Nothing else imports
flwr.

On the server, apps.server starts server (a run), which runs engine (what each client is asked) over
dispatch (who is asked, who is waited for) and grid (Flower's messages). On a device, supernode
fetches messages and asks the resident trainer over a local socket.
"""
