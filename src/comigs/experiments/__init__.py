"""Many runs: sweeps that make them, and comparisons that read them."""
