"""This room holds keys and certificates, private files, and the only port that devices reach."""
