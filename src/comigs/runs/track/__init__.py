"""The curves of a run in other programs (docs/track.md): what they are, and who is told."""
