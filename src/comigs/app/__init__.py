"""What a person does: the functions of `comigs`, and the command line that prints what they
return.
"""
