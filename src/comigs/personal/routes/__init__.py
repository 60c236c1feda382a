"""Where tokens go: the router's weights of a client's own model on a text, and what they are on."""
