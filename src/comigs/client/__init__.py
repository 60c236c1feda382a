"""One client: receive, train on two levels, send, evaluate."""
