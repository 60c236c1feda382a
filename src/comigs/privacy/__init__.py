"""This room says how much may be learnt of a text: noise, what it comes to, and what was spent."""
