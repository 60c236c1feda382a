"""Secure aggregation: a server learns the sum of its clients' numbers, and nothing of one client.

Bonawitz et al. 2017 (1611.04482), for parties that are curious but follow the protocol. Every pair
of clients agrees on a mask that one adds and the other takes away, and every client adds a mask of
its own. A client's numbers are hidden by both; in the sum the masks of pairs are gone, and clients
help to take away the rest.

1. Seal. Each client draws two seeds: of the key that it agrees on masks with, and of its own mask.
   Both are cut into shares (Shamir 1979), one for each other client, who alone can read it.
2. Mask. Each client adds its masks to its numbers, modulo 2^32. Whoever has gone since the sealing
   is missing from the sum, but not from the others' masks.
3. Open. Who is still there gives up its own mask, and its shares: of the own mask of those whose
   numbers came, and of the key of those whose numbers did not, never both of one client. From
   `threshold` answers on, the server can take all masks away from the sum.

The pages: `primitives` (Flower's, and what `cryptography` has), `session` (what all know of a sum),
`party` (a client's side), `opening` (the server's), `fixed_point` (whole numbers for the sum) and
`uploads` (from a method's tensors to whole numbers and back). None of them sends anything. They
need Flower to be installed, and importing it takes a second: they are imported where they are used.
"""
