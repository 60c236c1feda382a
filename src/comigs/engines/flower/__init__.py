"""This is the address that invited devices have pinned; the carrier is comigs.federation.flower."""
